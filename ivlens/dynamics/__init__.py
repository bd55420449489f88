"""Before and after fine-tuning: what happened to the instruction vectors, and putting them back."""

from ivlens.dynamics.change import Change
from ivlens.dynamics.checkup import checkup
from ivlens.dynamics.diagnosis import Checkup
from ivlens.dynamics.recovery import Recovery
from ivlens.dynamics.restoring import recover
from ivlens.dynamics.snapshot import Snapshot
from ivlens.dynamics.tracking import compare, track

__all__ = ["Change", "Checkup", "Recovery", "Snapshot", "checkup", "compare", "recover", "track"]

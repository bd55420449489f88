"""`TrainingRun`: a fine-tuning run in its folder, finished or not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ivlens.common.storage import write_text
from ivlens.models.checkpoints import FINAL, SETTINGS, checkpoints_in

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

__all__ = ["LOG", "SAVED", "TrainingRun", "settled", "usable_checkpoint"]

LOG = "log.json"
SAVED = "saved"  # in a checkpoint that was written to its end


@dataclass(frozen=True)
class TrainingRun:
    """A finished training run in its folder.

    Attributes
    ----------
    log
        One entry per logged step: `step`, `loss` (mean over answer tokens, nats), `learning_rate`, …
    cost
        `seconds` of training and of what the method does after it (NaN for a run that was interrupted), `teacher_seconds` of
        them before the first step, `trainable` weights, `kept_mb` on disk for the next stage, `peak_mb` of memory (of the GPU,
        else of the process).
    """

    folder: Path
    settings: Mapping[str, Any]
    log: list[dict[str, float]]
    cost: Mapping[str, float]

    @property
    def final(self) -> Path:
        """The adapter, or with full fine-tuning the model, after the last step: `load_model(base, adapter=run.final)`."""
        return self.folder / FINAL

    @property
    def checkpoints(self) -> list[Path]:
        """What was kept on the way, by steps, and the final one."""
        return [*checkpoints_in(self.folder), self.final]

    @classmethod
    def load(cls, folder: str | Path) -> TrainingRun:
        """A finished run from its folder."""
        folder = Path(folder)
        if not (folder / LOG).is_file():
            raise FileNotFoundError(
                f"{folder} holds no finished training run; call fine_tune with this folder to go on"
            )
        settings, done = (json.loads((folder / name).read_text(encoding="utf-8")) for name in (SETTINGS, LOG))
        return cls(folder, settings, done["log"], done["cost"])

    def to_dataframe(self) -> pd.DataFrame:
        """One row per logged step."""
        import pandas as pd

        return pd.DataFrame(self.log)

    def plot(self) -> go.Figure:
        """Loss over steps."""
        from ivlens.plots import plot_loss

        return plot_loss(self)

    def __repr__(self) -> str:
        s = self.settings
        losses = [f"{self.log[i]['loss']:.3f}" for i in (0, -1)] if self.log else ["?", "?"]
        kept, weights = len(self.checkpoints), "" if s["weights"] == "LoRA" else f" on {s['weights']}"
        return (
            f"TrainingRun({', '.join(s['tasks'])} on {s['base']}, {s['method']}{weights}, {s['steps']} steps of "
            f"{s['batch_size']}, loss {losses[0]} → {losses[1]}, {kept} checkpoint{'s' if kept > 1 else ''} in {self.folder})"
        )


def settled(folder: Path, settings: dict[str, Any]) -> bool:
    """Whether this run is finished already. Notes its settings if it is new."""
    path = folder / SETTINGS
    if path.is_file():
        known = json.loads(path.read_text(encoding="utf-8"))
        differing = [key for key in {**known, **settings} if known.get(key) != settings.get(key)]
        if differing:
            what = ", ".join(f"{key}: {known.get(key)!r} there, {settings.get(key)!r} now" for key in differing)
            raise ValueError(f"{folder} holds another training run ({what}); choose another folder or remove that one")
        return (folder / LOG).is_file()
    write_text(path, json.dumps(settings, indent=1) + "\n")
    return False


def usable_checkpoint(folder: Path) -> Path | None:
    """The last checkpoint that was written to its end; removes those that were not."""
    for path in reversed(checkpoints_in(folder)):
        if (path / SAVED).is_file():
            return path
        shutil.rmtree(path)
    return None

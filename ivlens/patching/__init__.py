"""Activation patching: which heads, and where in the residual stream, an instruction is carried."""

from ivlens.patching.effects import HeadEffects
from ivlens.patching.heads import head_effects, mean_head_outputs
from ivlens.patching.locating import locate_heads
from ivlens.patching.residual import ResidualEffects, residual_effects
from ivlens.running.scores import METRICS

__all__ = [
    "METRICS",
    "HeadEffects",
    "ResidualEffects",
    "head_effects",
    "locate_heads",
    "mean_head_outputs",
    "residual_effects",
]

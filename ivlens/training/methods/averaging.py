"""Averaging a stage's model with the one before it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ivlens.training.methods.method import Method
from ivlens.training.methods.stage import Stage

__all__ = ["Averaging"]


@dataclass(frozen=True)
class Averaging(Method):
    """Model averaging (arXiv 2109.01903): after each stage w ← (1 − share) · w_before + share · w_after.

    With an adapter of its own for every stage, that is its change times `share`, exactly.

    Attributes
    ----------
    share
        Weight of the model after the stage.
    """

    changes: ClassVar[frozenset[str]] = frozenset({"stage", "fresh adapter"})
    share: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"share={self.share} is outside (0, 1]")

    @torch.no_grad()
    def finish(self, stage: Stage) -> None:
        for name, weight in stage.model.named_parameters():
            if ".lora_B." in name:
                weight.mul_(self.share)

"""Orthogonal low-rank adaptation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ivlens.models.adapters import adapter_weights
from ivlens.training.methods.method import Method
from ivlens.training.methods.stage import Stage, trained_weights

__all__ = ["OLoRA"]


@dataclass(frozen=True)
class OLoRA(Method):
    """O-LoRA (arXiv 2310.14152): a fresh adapter per stage whose rows A are kept orthogonal to all earlier ones': λ · Σ (A_old Aᵀ)².

    Attributes
    ----------
    strength
        λ.
    """

    changes: ClassVar[frozenset[str]] = frozenset({"penalty", "fresh adapter"})
    strength: float = 0.5

    def __post_init__(self) -> None:
        if self.strength < 0:
            raise ValueError(f"strength={self.strength} is negative; use 0 or more")

    def penalty(self, stage: Stage) -> Callable[[], Tensor] | None:
        if stage.previous is None:
            return None
        weights = {name: weight for name, weight in trained_weights(stage.model).items() if ".lora_A." in name}
        # Adapters are stacked when a stage is saved, so the last one's rows are all there ever were.
        saved = adapter_weights(stage.previous / "final")
        old = {name: saved[name.replace(".lora_A.default.", ".lora_A.")].to(w.device) for name, w in weights.items()}

        def penalty() -> Tensor:
            parts = [(old[name].to(weight) @ weight.T).square().sum() for name, weight in weights.items()]
            return self.strength * torch.stack(parts).sum()

        return penalty

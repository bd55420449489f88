"""Adapters without any protection: the one that goes on being trained, and a fresh one for every stage."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ivlens.training.methods.method import Method

__all__ = ["FreshLoRA", "SequentialLoRA"]


@dataclass(frozen=True)
class SequentialLoRA(Method):
    """One LoRA adapter, trained on from stage to stage: the baseline (FVG)."""

    changes: ClassVar[frozenset[str]] = frozenset({"same adapter"})


@dataclass(frozen=True)
class FreshLoRA(Method):
    """A fresh LoRA adapter for every stage; the earlier ones stay in the model and no longer change (FVG: IncLoRA)."""

    changes: ClassVar[frozenset[str]] = frozenset({"fresh adapter"})

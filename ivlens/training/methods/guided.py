"""Training guided by instruction vectors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from ivlens.steering.controls import random_vector
from ivlens.training.guidance import Guidance, checked_guidance
from ivlens.training.methods.method import Method
from ivlens.training.methods.rehearsal import TEXT
from ivlens.training.methods.stage import Stage

if TYPE_CHECKING:
    from transformers import Trainer

    from ivlens.vectors.vector import InstructionVector

__all__ = ["Guided"]


@dataclass(frozen=True)
class Guided(Method):
    """Instruction-vector-guided training (IV; preset `fvg-code`: FVG). See `IVTrainer`.

    Attributes
    ----------
    guidance
        A preset's name or a `Guidance`.
    keep_teacher
        See `IVTrainer`.
    random
        Take a random vector of the same norm instead, at the same layer and scale: the control (our choice).
    """

    changes: ClassVar[frozenset[str]] = frozenset({"loss"})
    needs_vectors: ClassVar[bool] = True
    guidance: str | Guidance = "paper"
    keep_teacher: int | str | None = 256
    random: bool = False

    def __post_init__(self) -> None:
        checked_guidance(self.guidance, {}, self.keep_teacher)

    @property
    def teacher_shots(self) -> int:
        return checked_guidance(self.guidance, {}, self.keep_teacher).shots

    def check(self, tasks: Sequence[str], vectors: Mapping[str, InstructionVector] | None) -> None:
        if missing := [task for task in tasks if task not in (vectors or {})]:
            there = f"guided training needs vectors, and there is none for task(s) {', '.join(missing)}"
            raise ValueError(f"{there}; extract one each with ivl.extract_vector")

    def loss(self, stage: Stage) -> tuple[type[Trainer], dict[str, Any]]:
        from ivlens.training.trainer import IVTrainer

        vectors = stage.vectors
        if self.random:
            vectors = {name: random_vector(vector, seed=stage.seed) for name, vector in vectors.items()}
        if TEXT in stage.dataset["task"]:
            some = next(iter(vectors.values()))
            nothing = None if some.shares is None else 0 * some.shares
            vectors = {**vectors, TEXT: replace(some, vector=0 * some.vector, shares=nothing)}
        return IVTrainer, {"vectors": vectors, "guidance": self.guidance, "keep_teacher": self.keep_teacher}

"""Guided training and averaging together, as far as a task's vector is good for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ivlens.training.guidance import Guidance
from ivlens.training.methods.averaging import Averaging
from ivlens.training.methods.guided import Guided
from ivlens.training.methods.method import Method
from ivlens.training.methods.stage import Stage

if TYPE_CHECKING:
    from transformers import Trainer, TrainerCallback

    from ivlens.vectors.vector import InstructionVector

__all__ = ["GuidedAveraging"]


@dataclass(frozen=True)
class GuidedAveraging(Method):
    """Averaging, and more of the new model where the vector does the task: θ then fades in training as in `Guided`, without a KL term.

    Our choice; of the paper is the fading vector (IV §6), averaging of arXiv 2109.01903.

    Attributes
    ----------
    strong, weak
        Share of the model after the stage, where the steered model does the task before training, and where it doesn't.
    least
        From which accuracy on it does: that of `tune_injection`, which its best vector keeps. Of several tasks the lowest counts.
    random
        Take a random vector instead: the control.
    """

    changes: ClassVar[frozenset[str]] = Guided.changes | Averaging.changes
    needs_vectors: ClassVar[bool] = True
    strong: float = 0.85
    weak: float = 0.5
    least: float = 0.75
    random: bool = False

    def __post_init__(self) -> None:
        for share in (self.strong, self.weak):
            Averaging(share)

    def check(self, tasks: Sequence[str], vectors: Mapping[str, InstructionVector] | None) -> None:
        Guided().check(tasks, vectors)
        if unknown := [task for task in tasks if "accuracy" not in vectors[task].metadata]:
            there = f"how much of {', '.join(unknown)} the model does with its vector isn't known"
            raise ValueError(f"{there}; pass the best of ivl.tune_injection, on prompts as they are trained on")

    def strength(self, stage: Stage) -> float:
        """How much of the stage's tasks the steered model does before training, of the one that it does least."""
        return min(stage.vectors[task].metadata["accuracy"] for task in stage.tasks)

    def chosen(self, stage: Stage) -> Method:
        """The method of this stage."""
        if self.strength(stage) < self.least:
            return Averaging(self.weak)
        return Guided(Guidance(kl=()), random=self.random) + Averaging(self.strong)

    def loss(self, stage: Stage) -> tuple[type[Trainer], dict[str, Any]]:
        return self.chosen(stage).loss(stage)

    def callbacks(self, stage: Stage) -> list[TrainerCallback]:
        return self.chosen(stage).callbacks(stage)

    def finish(self, stage: Stage) -> None:
        self.chosen(stage).finish(stage)

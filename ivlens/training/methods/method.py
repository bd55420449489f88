"""What every training method is: how a stage's data, loss and outcome differ from plain fine-tuning; and several at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback

from ivlens.training.batch import Collator
from ivlens.training.methods.stage import Stage
from ivlens.training.sparse import AnswerTrainer

if TYPE_CHECKING:
    import datasets

    from ivlens.vectors.vector import InstructionVector

__all__ = ["Combined", "Method"]


@dataclass(frozen=True)
class Method:
    """Plain fine-tuning: one adapter (or every weight) goes on being trained, stage after stage.

    The other methods override what they do differently; with `+` those that change different things go together.

    Attributes
    ----------
    changes
        What of plain fine-tuning is changed: `rows`, `loss`, `penalty`, `step` (after each), `stage` (after it). `fresh adapter`:
        each stage trains one of its own, on top of the earlier ones, which no longer change; `same adapter`: it can't.
    keeps
        A stage leaves a memory that the next one needs.
    needs_vectors
        It needs the vectors of the tasks.
    """

    changes: ClassVar[frozenset[str]] = frozenset()
    keeps: ClassVar[bool] = False
    needs_vectors: ClassVar[bool] = False

    @property
    def teacher_shots(self) -> int:
        """Demonstrations in the prompts of a teacher; 0 for the student's own prompts."""
        return 0

    @property
    def parts(self) -> tuple[Method, ...]:
        """The methods that this one combines: itself alone."""
        return (self,)

    @property
    def fresh(self) -> bool:
        return "fresh adapter" in self.changes

    def __add__(self, other: Method) -> Method:
        return Combined((self, other))

    def check(self, tasks: Sequence[str], vectors: Mapping[str, InstructionVector] | None) -> None:
        """Raise ValueError where these tasks can't be trained on with these vectors."""

    def data(self, stage: Stage) -> datasets.Dataset:
        """The rows to train on."""
        return stage.dataset

    def loss(self, stage: Stage) -> tuple[type[Trainer], dict[str, Any]]:
        """The Trainer that computes the loss, and arguments of its own."""
        return AnswerTrainer, {"data_collator": Collator(stage.tokenizer)}

    def penalty(self, stage: Stage) -> Callable[[], Tensor] | None:
        """What is added to the loss in every step, a function of the weights alone; None for nothing."""
        return None

    def callbacks(self, stage: Stage) -> list[TrainerCallback]:
        """What happens on the way, such as after a step."""
        return []

    def finish(self, stage: Stage) -> None:
        """After the last step: write the memory, or change the weights once more."""


@dataclass(frozen=True, repr=False)
class Combined(Method):
    """Methods that change different things, together: `Guided() + Averaging(0.7)`.

    Rows go through one part after the other, penalties add up, and each part has its turn after a step and after the stage.

    Raises
    ------
    ValueError
        If parts don't go together: two of a kind, two losses, or one that goes on training an adapter that another one replaces.
    """

    parts: tuple[Method, ...] = ()

    def __post_init__(self) -> None:
        # In one order, so that it is one method however it is written; weights change before memories of them are made.
        parts = sorted((p for part in self.parts for p in part.parts), key=lambda p: (p.keeps, type(p).__name__))
        object.__setattr__(self, "parts", tuple(parts))
        alike = [([part for part in parts if what in part.changes], what) for what in ("loss", "stage")]
        old, new = ([part for part in parts if what in part.changes] for what in ("same adapter", "fresh adapter"))
        if len({type(part) for part in parts}) < len(parts):
            raise ValueError(f"{self!r} has two parts of a kind; choose one of them")
        for both, what in alike:
            if len(both) > 1:
                does = "have a loss of their own" if what == "loss" else "change the weights after a stage"
                raise ValueError(f"{both[0]!r} and {both[1]!r} both {does}; choose one of them")
        if old and new:
            both = f"{old[0]!r} holds on to the adapter of the stage before, and {new[0]!r} trains a fresh one"
            raise ValueError(f"{both}; choose one of them")

    @property
    def changes(self) -> frozenset[str]:
        return frozenset().union(*(part.changes for part in self.parts))

    @property
    def keeps(self) -> bool:
        return any(part.keeps for part in self.parts)

    @property
    def teacher_shots(self) -> int:
        return max(part.teacher_shots for part in self.parts)

    @property
    def needs_vectors(self) -> bool:
        return any(part.needs_vectors for part in self.parts)

    def check(self, tasks: Sequence[str], vectors: Mapping[str, InstructionVector] | None) -> None:
        for part in self.parts:
            part.check(tasks, vectors)

    def data(self, stage: Stage) -> datasets.Dataset:
        for part in self.parts:
            stage = replace(stage, dataset=part.data(stage))
        return stage.dataset

    def loss(self, stage: Stage) -> tuple[type[Trainer], dict[str, Any]]:
        own = [part for part in self.parts if "loss" in part.changes]
        return own[0].loss(stage) if own else super().loss(stage)

    def penalty(self, stage: Stage) -> Callable[[], Tensor] | None:
        penalties = [penalty for part in self.parts if (penalty := part.penalty(stage)) is not None]
        return (lambda: torch.stack([penalty() for penalty in penalties]).sum()) if penalties else None

    def callbacks(self, stage: Stage) -> list[TrainerCallback]:
        return [callback for part in self.parts for callback in part.callbacks(stage)]

    def finish(self, stage: Stage) -> None:
        for part in self.parts:
            part.finish(stage)

    def __repr__(self) -> str:
        return " + ".join(map(repr, self.parts))

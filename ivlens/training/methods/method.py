"""What every training method is: how a stage's data, loss and outcome differ from plain fine-tuning."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from transformers import Trainer

from ivlens.training.batch import Collator

if TYPE_CHECKING:
    import datasets

    from ivlens.vectors.vector import InstructionVector

__all__ = ["Method", "PenaltyTrainer", "Stage"]


@dataclass(frozen=True)
class Stage:
    """One training run of a sequence, as a method sees it.

    Attributes
    ----------
    model
        A PEFT model whose adapter is about to be trained, or a Hugging Face model with every weight.
    dataset
        See `ivlens.training.data.answer_dataset`: as many rows as the run has room for.
    vectors
        Of the tasks in the dataset, for guided methods.
    previous
        Folder of the stage before, None in the first; what a method keeps between stages lies in its `memory`.
    """

    model: Any
    tokenizer: Any
    dataset: datasets.Dataset
    vectors: Mapping[str, InstructionVector] | None
    previous: Path | None
    folder: Path
    seed: int

    def memory(self, name: str) -> Path:
        """Where this stage keeps a file for the next ones."""
        return self.folder / "memory" / name

    def remembered(self, name: str) -> Path | None:
        """The file that the stage before kept, or None in the first stage."""
        return None if self.previous is None else self.previous / "memory" / name


@dataclass(frozen=True)
class Method:
    """Plain fine-tuning: one adapter (or every weight) goes on being trained, stage after stage.

    The other methods override what they do differently.

    Attributes
    ----------
    fresh
        Each stage trains an adapter of its own, on top of the earlier ones, which no longer change.
    keeps
        A stage leaves a memory that the next one needs.
    """

    fresh: ClassVar[bool] = False
    keeps: ClassVar[bool] = False

    def check(self, tasks: Sequence[str], vectors: Mapping[str, InstructionVector] | None) -> None:
        """Raise ValueError where these tasks can't be trained on with these vectors."""

    def data(self, stage: Stage) -> datasets.Dataset:
        """The rows to train on."""
        return stage.dataset

    def trainer(self, stage: Stage, dataset: datasets.Dataset, **common: Any) -> Trainer:
        """The trainer; `common` are the Trainer's own arguments."""
        common = {"train_dataset": dataset, "data_collator": Collator(stage.tokenizer), **common}
        if (penalty := self.penalty(stage)) is None:
            return Trainer(stage.model, **common)
        return PenaltyTrainer(stage.model, penalty=penalty, **common)

    def penalty(self, stage: Stage) -> Callable[[], Tensor] | None:
        """What is added to the loss in every step, a function of the weights alone; None for nothing."""
        return None

    def finish(self, stage: Stage) -> None:
        """After the last step: write the memory, or change the weights once more."""


class PenaltyTrainer(Trainer):
    """A Trainer with a penalty on the weights, logged apart as `penalty`."""

    def __init__(self, *args: Any, penalty: Callable[[], Tensor], **options: Any):
        super().__init__(*args, **options)
        self._penalty = penalty
        self._seen: list[float] = []

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        found = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        penalty = self._penalty()
        self._seen.append(float(penalty.detach()))
        if self.model_accepts_loss_kwargs and num_items_in_batch is not None:
            # Losses are then normalized over the accumulated batch already, and a penalty per part would count as often.
            penalty = penalty / self.current_gradient_accumulation_steps
        return (found[0] + penalty, found[1]) if return_outputs else found + penalty

    def log(self, logs: dict[str, float], *args: Any, **options: Any) -> None:
        """As the Trainer, with the penalty's mean since the last time."""
        if "loss" in logs and self._seen:
            logs = {**logs, "penalty": sum(self._seen) / len(self._seen)}
            self._seen.clear()
        super().log(logs, *args, **options)


def sample_rows(dataset: datasets.Dataset, n: int, seed: int) -> datasets.Dataset:
    """So many rows drawn at random, of every task its part, in their order."""
    rng, by_task = random.Random(seed), {}
    for i, task in enumerate(dataset["task"]):
        by_task.setdefault(task, []).append(i)
    parts = [rng.sample(rows, len(rows)) for rows in by_task.values()]
    # Of a task with k rows, they stand at 1/2k, 3/2k, …: the first n of all tasks together are n shares of the same size.
    ranked = sorted(((j + 0.5) / len(rows), i) for rows in parts for j, i in enumerate(rows))
    return dataset.select(sorted(i for _, i in ranked[:n]))


def trained_weights(model: torch.nn.Module) -> dict[str, Tensor]:
    """The weights in training, by name."""
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}

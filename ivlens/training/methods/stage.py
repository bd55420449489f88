"""One stage of a sequence, as methods see it."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    import datasets

    from ivlens.tasks.task import Task
    from ivlens.vectors.vector import InstructionVector

__all__ = ["Stage", "sample_rows", "trained_weights"]


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
    tasks, look
        What is trained on, and how its prompts look.
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
    tasks: Mapping[str, Task] = field(default_factory=dict)
    look: Mapping[str, Any] = field(default_factory=dict)

    def memory(self, name: str) -> Path:
        """Where this stage keeps a file for the next ones."""
        return self.folder / "memory" / name

    def remembered(self, name: str) -> Path | None:
        """The file that the stage before kept, or None in the first stage."""
        return None if self.previous is None else self.previous / "memory" / name


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

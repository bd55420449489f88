"""What is run: a sequence of tasks × methods × seeds, and where each stage of it is kept."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from ivlens.common.storage import read_json, write_json
from ivlens.continual.general import overlapping
from ivlens.continual.scoring import Scoring
from ivlens.models.adapters import describe_config
from ivlens.models.loading import as_dtype
from ivlens.tasks.suite import TaskSuite
from ivlens.tasks.task import Task
from ivlens.training.methods import Method
from ivlens.training.run import LOG

__all__ = ["Experiment", "Stop"]

KIND, PLAN, SCORES = "continual-learning plan", "plan.json", "scores of a stage"


@dataclass(frozen=True)
class Stop:
    """One stage of one method and seed: training on a task, then scoring all of them.

    Attributes
    ----------
    number
        From 1; the base model before all training is stage 0.
    """

    label: str
    method: Method
    seed: int
    number: int
    task: str
    folder: Path

    @property
    def trained(self) -> bool:
        return (self.folder / LOG).is_file()

    def __str__(self) -> str:
        return f"{self.label}, seed {self.seed}, {self.number} {self.task}"


@dataclass(frozen=True)
class Experiment:
    """A continual-learning experiment, resolved: nothing in it is a name any more but the model.

    Attributes
    ----------
    training
        Options of `fine_tune` that all stages share.
    heads_per_vector, vector_shots
        How the vectors come about: so many heads with the highest effects over all tasks of the sequence, from prompts with so
        many demonstrations (0: with the instruction instead).
    similarity
        Follow the vectors of the sequence's tasks along it.
    """

    model: str
    sequence: TaskSuite
    general: TaskSuite
    methods: Mapping[str, Method]
    seeds: tuple[int, ...]
    folder: Path
    training: dict[str, Any]
    scoring: Scoring = field(default_factory=Scoring)
    heads_per_vector: int = 10
    vector_shots: int = 5
    similarity: bool = True

    def __post_init__(self) -> None:
        if len(self.sequence) < 2:
            raise ValueError(
                f"the sequence has {len(self.sequence)} task; forgetting needs at least two, one after the other"
            )
        if twice := [name for name in self.general if name in self.sequence]:
            raise ValueError(
                f"task(s) {', '.join(twice)} are both trained on and general; leave them out of one of the two"
            )
        if not self.methods or not self.seeds:
            raise ValueError("no methods or no seeds given; pass at least one of each")
        for general in self.general.values():
            for trained in self.sequence.values():
                if shared := overlapping(general, trained):
                    warnings.warn(
                        f"{len(shared)} test input(s) of the general task {general.name!r} stand in the training data of "
                        f"{trained.name!r} (such as {shared[0][:60]!r}): its score after training says little about forgetting",
                        stacklevel=4,
                    )

    def stops(self) -> Iterator[Stop]:
        """All stages, in the order they run."""
        for label, method in self.methods.items():
            for seed in self.seeds:
                for number, task in enumerate(self.sequence, start=1):
                    folder = self.folder / _path(label) / f"seed-{seed}" / f"{number}-{_path(task)}"
                    yield Stop(label, method, seed, number, task, folder)

    def looks(self) -> Iterator[tuple[str, Task, dict[str, Any]]]:
        """What is scored after a stage: kind, task, and how its prompts look. Trained tasks are asked as in training."""
        for task in self.sequence.values():
            yield "trained", task, {key: self.training[key] for key in ("shots", "instruction", "style")}
        for task in self.general.values():
            for shots in self.scoring.general_shots:
                yield "general", task, {"shots": shots, "instruction": True, "style": self.training["style"]}

    @property
    def dtype(self) -> torch.dtype:
        return as_dtype(self.training["dtype"])

    @cached_property
    def key(self) -> str:
        """What must be the same for kept scores to count."""
        return _digest(self.scoring, *_contents(self.general, self.sequence), self.training["style"], self.similarity)

    def scores_in(self, folder: Path) -> Path:
        """The file for what is scored of a stage with these settings; others lie beside it."""
        return folder / f"scores-{self.key}.json"

    def scores(self, folder: Path) -> dict[str, Any] | None:
        """What was scored of a stage with these settings, if it was."""
        path = self.scores_in(folder)
        return read_json(path, SCORES) if path.is_file() else None

    def keep_scores(self, folder: Path, found: dict[str, Any]) -> None:
        write_json(self.scores_in(folder), SCORES, found)

    def settle(self) -> None:
        """Note what this folder's stages are trained with; raise ValueError if they were trained otherwise."""
        mine = {
            "model": self.model,
            "sequence": self.sequence.names,
            "data": _digest(*_contents(self.sequence)),
            "training": json.loads(json.dumps(self.training, default=describe_config)),
            "heads_per_vector": self.heads_per_vector,
            "vector_shots": self.vector_shots,
        }
        path = self.folder / PLAN
        if path.is_file():
            known = read_json(path, KIND)
            if differing := [key for key, value in mine.items() if known.get(key) != value]:
                what = ", ".join(f"{key}: {known.get(key)!r} there, {mine[key]!r} now" for key in differing)
                raise ValueError(
                    f"{self.folder} holds another experiment ({what}); choose another folder or remove that one"
                )
        else:
            write_json(path, KIND, mine)


def _path(name: str) -> str:
    return "".join(c if c.isalnum() or c in "-_." else "_" for c in name)


def _contents(*suites: TaskSuite) -> list[Any]:
    return [(t.name, t.instructions, t.train, t.valid, t.test) for suite in suites for t in suite.values()]


def _digest(*parts: Any) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]

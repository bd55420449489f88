"""What is run: a sequence of tasks × methods × seeds, and where each stage of it is kept."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ivlens.common.keys import differences, files_key, key, recorded
from ivlens.common.storage import read_json, safe_name, write_json
from ivlens.continual.general import overlapping
from ivlens.continual.recipes import load_sequence
from ivlens.continual.scoring import Scoring
from ivlens.models.adapters import describe_config
from ivlens.models.checkpoints import SETTINGS
from ivlens.models.loading import as_dtype
from ivlens.tasks.suite import TaskSuite, as_suite, load_tasks
from ivlens.tasks.task import Task
from ivlens.training.methods import Method, as_method
from ivlens.training.run import LOG

if TYPE_CHECKING:
    from peft import PeftConfig

__all__ = ["Experiment", "Stop", "experiment"]

KIND, PLAN, SCORES = "continual-learning plan", "plan.json", "scores of a stage"
RESERVED = ("base", "vectors")  # what lies in the folder beside the methods


@dataclass(frozen=True)
class Stop:
    """One stage of one method and seed: training on a task, then scoring all of them."""

    label: str
    method: Method
    seed: int
    number: int  # from 1; the base model before all training is stage 0
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
            needed = "forgetting needs at least two, one after the other"
            raise ValueError(f"the sequence has {len(self.sequence)} task; {needed}")
        if twice := [name for name in self.general if name in self.sequence]:
            both = f"task(s) {', '.join(twice)} are both trained on and general"
            raise ValueError(f"{both}; leave them out of one of the two")
        as_suite(self.sequence, answered=["train"])
        if right := [task for task in (*self.sequence.values(), *self.general.values()) if not task.is_checked]:
            as_suite(right, answered=[self.scoring.split])
        if not self.methods or not self.seeds:
            raise ValueError("no methods or no seeds given; pass at least one of each")
        if self.training["lora"] is False:
            why = "lora=False trains every weight, and stages go on from each other's adapter"
            raise ValueError(f"{why}; leave lora out or pass a peft config")
        as_dtype(self.training["dtype"])
        for what, names in (("labels", [*RESERVED, *self.methods]), ("tasks", list(self.sequence))):
            paths = [safe_name(name).lower() for name in names]
            if same := [name for name, path in zip(names, paths) if paths.count(path) > 1]:
                raise ValueError(f"{what} {', '.join(map(repr, same))} would share a folder; give them other names")
        for general in self.general.values():
            for trained in self.sequence.values():
                if shared := overlapping(general, trained):
                    there = (
                        f"{len(shared)} test input(s) of the general task {general.name!r} stand in the training data"
                    )
                    which = f"of {trained.name!r} (such as {shared[0][:60]!r})"
                    what = "its score after training says little about forgetting"
                    warnings.warn(f"{there} {which}: {what}", stacklevel=4)

    def stops(self) -> Iterator[Stop]:
        """All stages, in the order they run."""
        for label, method in self.methods.items():
            for seed in self.seeds:
                for number, task in enumerate(self.sequence, start=1):
                    folder = self.folder / safe_name(label) / f"seed-{seed}" / f"{number}-{safe_name(task)}"
                    yield Stop(label, method, seed, number, task, folder)

    def looks(self) -> Iterator[tuple[str, Task, dict[str, Any]]]:
        """What is scored after a stage: kind, task, and how its prompts look. Trained tasks are asked as in training."""
        for task in self.sequence.values():
            yield "trained", task, {key: self.training[key] for key in ("shots", "instruction", "style")}
        for task in self.general.values():
            if task.is_checked:  # its instruction is all there is to show
                yield "general", task, {"shots": 0, "instruction": True, "style": "chat"}
                continue
            for shots in self.scoring.general_shots:
                yield "general", task, {"shots": shots, "instruction": True, "style": self.training["style"]}

    @property
    def dtype(self) -> torch.dtype:
        return as_dtype(self.training["dtype"])

    @cached_property
    def scores_key(self) -> str:
        """What must be the same for kept scores to count."""
        return key(self.scoring, list(self.looks()), list(self.sequence.values()), self.similarity)

    def scores_in(self, folder: Path) -> Path:
        """The file for what is scored of a stage with these settings; others lie beside it."""
        return folder / f"scores-{self.scores_key}.json"

    def scores(self, folder: Path) -> dict[str, Any] | None:
        """What was scored of a stage with these settings, if it was."""
        path = self.scores_in(folder)
        return read_json(path, SCORES) if path.is_file() else None

    def done(self, stop: Stop) -> bool:
        """Whether it is trained and scored."""
        return stop.trained and self.scores(stop.folder) is not None

    def keep_scores(self, folder: Path, found: dict[str, Any]) -> None:
        write_json(self.scores_in(folder), SCORES, found)

    def settle(self) -> None:
        """Note what this folder's stages are trained with; raise ValueError if they were trained otherwise, or aren't ours."""
        model = [self.model, files_key(self.model) if Path(self.model).is_dir() else None]
        settings = {"model": model, "sequence": list(self.sequence.values()), "training": self.training}
        settings |= {"heads_per_vector": self.heads_per_vector, "vector_shots": self.vector_shots}
        training = {name: describe_config(x) if hasattr(x, "to_dict") else x for name, x in self.training.items()}
        shown = {"model": self.model, "sequence": self.sequence.names}
        shown["training"] = json.loads(json.dumps(training, default=str))
        mine, path = recorded(settings, shown), self.folder / PLAN
        if path.is_file():
            if what := differences(read_json(path, KIND), mine):
                there = f"{self.folder} holds another experiment ({what})"
                raise ValueError(f"{there}; choose another folder or remove that one")
        elif foreign := [name for name in (*RESERVED, *map(safe_name, self.methods)) if (self.folder / name).exists()]:
            there = f"{self.folder} holds {', '.join(foreign)}, but no {PLAN} of ivlens"
            raise ValueError(f"{there}; choose another folder")
        else:
            write_json(path, KIND, mine)
        for stop in self.stops():
            if (stop.folder / SETTINGS).is_file():
                there = json.loads((stop.folder / SETTINGS).read_text(encoding="utf-8"))
                if there.get("keys", {}).get("method") != key(stop.method):
                    both = f"was trained by {there.get('method')}, and {stop.label!r} is {stop.method!r} now"
                    raise ValueError(f"{stop.folder} {both}; choose another label or another folder")


def experiment(
    sequence: str | Iterable[Task] | Mapping[str, Task],
    *,
    folder: str | Path,
    methods: Sequence[str | Method] | Mapping[str, str | Method],
    model: str | Path,
    general: Iterable[str] | Iterable[Task] | Mapping[str, Task],
    seeds: Sequence[int],
    steps: int,
    batch_size: int,
    learning_rate: float,
    lora: bool | PeftConfig,
    shots: int,
    instruction: bool | str | int,
    style: str,
    dtype: str,
    save_every: int | None,
    n_prompts: int,
    split: str,
    metric: str,
    general_shots: Sequence[int],
    general_after: str,
    heads_per_vector: int,
    vector_shots: int,
    similarity: bool,
    **arguments: Any,
) -> Experiment:
    """What `run` would run; see there, also for the defaults."""
    if not isinstance(model, (str, Path)):
        raise ValueError("every stage begins with the base model, so pass its name or folder, not a model object")
    if not isinstance(methods, Mapping):
        methods = {m if isinstance(m, str) else repr(m): m for m in methods}
    training = {"steps": steps, "batch_size": batch_size, "learning_rate": learning_rate, "lora": lora}
    training |= {"shots": shots, "instruction": instruction, "style": style}
    training |= {"dtype": dtype, "save_every": save_every, **arguments}
    watched = list(general.values()) if isinstance(general, Mapping) else list(general)
    return Experiment(
        str(model),
        load_sequence(sequence) if isinstance(sequence, str) else as_suite(sequence),
        TaskSuite([task if isinstance(task, Task) else load_tasks(task)[task] for task in watched]),
        {label: as_method(method) for label, method in methods.items()},
        tuple(seeds),
        Path(folder),
        training,
        Scoring(n_prompts, split, metric, tuple(general_shots), general_after),
        heads_per_vector,
        vector_shots,
        similarity,
    )

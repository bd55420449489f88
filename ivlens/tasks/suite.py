"""The built-in tasks, and collections of tasks."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from importlib.resources import files

import pandas as pd

from ivlens.common.hints import hint
from ivlens.common.tables import table_html
from ivlens.tasks.task import Example, Task

__all__ = ["TaskSuite", "as_suite", "load_tasks"]

DATA = files("ivlens.tasks") / "data"


class TaskSuite(Mapping[str, Task]):
    """Tasks by name. Iterates over names, prints as a table.

    Parameters
    ----------
    tasks
        With names that differ.

    Examples
    --------
    >>> load_tasks(["antonym", "present_past"]).names
    ['antonym', 'present_past']
    """

    def __init__(self, tasks: Iterable[Task]):
        self._tasks: dict[str, Task] = {}
        for task in tasks:
            if (other := self._tasks.setdefault(task.name, task)) != task:
                raise ValueError(f"two tasks are called {task.name!r}: {other!r} and {task!r}; rename one (`name=`)")

    @property
    def names(self) -> list[str]:
        return list(self._tasks)

    def __getitem__(self, name: str) -> Task:
        if name not in self._tasks:
            raise KeyError(_unknown(name, self._tasks))
        return self._tasks[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tasks)

    def __len__(self) -> int:
        return len(self._tasks)

    def subset(self, names: Iterable[str]) -> TaskSuite:
        """The tasks called `names`, in that order."""
        return TaskSuite([self[name] for name in names])

    def to_dataframe(self) -> pd.DataFrame:
        """One row per task: group, sizes, instruction, an example and its check."""
        rows = []
        for task in self._tasks.values():
            first = task.train[0] if task.train else Example("", "")
            about = {"task": task.name, "group": task.group, "examples": len(task), "instruction": task.instructions[0]}
            rows.append({**about, "input": first.input, "output": first.output, "check": first.check})
        frame = pd.DataFrame(rows).set_index("task")
        return frame.drop(columns=[name for name in ("output", "check") if not frame[name].any()])

    def __repr__(self) -> str:
        return f"TaskSuite({len(self)} tasks: {', '.join(self._tasks)})"

    def _repr_html_(self) -> str:
        return table_html(self.to_dataframe())


def _unknown(name: str, known: Iterable[str]) -> str:
    return f"unknown task {name!r}; {hint(name, sorted(known))}"


@cache
def _index() -> dict[str, dict]:
    return json.loads((DATA / "index.json").read_text(encoding="utf-8"))


@cache
def _load(name: str) -> Task:
    about = dict(_index()[name])
    lines = (DATA / f"{about.pop('examples', name)}.jsonl").read_text(encoding="utf-8").splitlines()
    return Task.from_records(map(json.loads, lines), name=name, instruction=about.pop("instructions"), **about)


def load_tasks(names: str | Iterable[str] | None = None, *, group: str | None = None) -> TaskSuite:
    """The built-in tasks: the ones named, those of a group, or by default all that have one right answer.

    Parameters
    ----------
    names
        One or several.
    group
        `formats`: instructions on the form of a free answer, each with a verifier, over the same questions. Others: `morphology`,
        `knowledge`, `text`, `reasoning`, `translation`, `classification`, `choice`, `lists`.

    Raises
    ------
    KeyError
        If a name or group is unknown; the message suggests near ones.
    """
    index = _index()
    if group is not None and group not in (known := {about["group"] for about in index.values()}):
        raise KeyError(f"unknown group {group!r}; {hint(group, sorted(known))}")
    if names is None:
        names = [n for n, about in index.items() if (about["group"] == group if group else about["group"] != "formats")]
    for name in (names := [names] if isinstance(names, str) else list(names)):
        if name not in index:
            raise KeyError(_unknown(name, index))
    return TaskSuite(_load(name) for name in names)


def as_suite(tasks: Task | Iterable[Task] | Mapping[str, Task], *, answered: Sequence[str] = ()) -> TaskSuite:
    """One task, a list of tasks or a mapping of tasks as a suite; an empty one is an error, and so are examples without an output in
    the splits that must be `answered`."""
    suite = TaskSuite([tasks] if isinstance(tasks, Task) else tasks.values() if isinstance(tasks, Mapping) else tasks)
    if not len(suite):
        raise ValueError("no tasks given; pass at least one, such as ivl.load_tasks(['present_past'])")
    for name, split in itertools.product(suite, answered):
        if bare := sum(not x.output for x in suite[name].split(split)):
            said = f"task {name!r} has free answers, and {bare} of its {split} examples no right one to train on or be scored by"
            raise ValueError(f"{said}; give each an output, or the model's own: ivl.with_own_answers")
    return suite

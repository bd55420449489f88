"""How commands load, report, print and fail."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ivlens.common.processes import is_main

if TYPE_CHECKING:
    import pandas as pd

    from ivlens.report import Section
    from ivlens.tasks.suite import TaskSuite

# What input can't cause: let it be seen.
BUGS = (ArithmeticError, AssertionError, AttributeError, LookupError, NameError, NotImplementedError, RecursionError)


@contextmanager
def readable_errors() -> Iterator[None]:
    """Bad input ends with its message, in one line, and exit code 2, not a traceback, whichever library found it bad."""
    try:
        yield
    except (typer.Exit, typer.Abort):
        raise
    except Exception as error:
        if type(error).__module__ == "builtins" and isinstance(error, BUGS) and not isinstance(error, KeyError):
            raise
        if not is_main():  # the main process says it
            raise typer.Exit(2) from error
        text = " ".join(str(error.args[0] if isinstance(error, KeyError) and error.args else error).split())
        ours = isinstance(error, (ValueError, TypeError, OSError, RuntimeError)) or " " in text
        typer.echo(f"error: {text if ours and text else f'{type(error).__name__}: {text}'.rstrip(': ')}", err=True)
        raise typer.Exit(2) from error


def load(name: str, backend: str, adapter: str | None = None, device: str | None = None) -> Any:
    from ivlens.models import load_model

    where = {"device_map": device} if device == "auto" else {"device": device}
    return load_model(name, backend=backend, adapter=adapter, **where)


def read_tasks(
    names: list[str] | None, files: list[Path] | None, instructions: list[str] | None, group: str | None = None
) -> TaskSuite:
    """The built-in tasks named or of a group, and one task per file; all with one right answer where nothing is named."""
    from ivlens.tasks import Task, TaskSuite, load_tasks

    names = list(dict.fromkeys([*(names or ()), *(load_tasks(group=group) if group else ())]))
    if not files:
        return load_tasks(names or None)
    told = instructions or [None] * len(files)
    if len(told) != len(files):
        raise ValueError(f"{len(files)} --file but {len(told)} --instruction; give one per file, in the same order")
    known = {name: f"the built-in task {name!r}" for name in names}
    own = []
    for file, text in zip(files, told):
        own.append(Task.from_file(file, instruction=text))
        if (other := known.setdefault(own[-1].name, str(file))) != str(file):
            raise ValueError(f"{other} and {file} are two tasks of one name; rename one of the files")
    return TaskSuite([*(load_tasks(names).values() if names else ()), *own])


def look(
    suite: TaskSuite, shots: int | None, told: bool | None, style: str | None, default: int, tell: bool | None = None
) -> dict[str, Any]:
    """How prompts look: as given, else with so many demonstrations, and told where there are none (or as `tell` says). Where answers
    are free: told, in the chat template, without demonstrations."""
    kinds = {task.is_checked for task in suite.values()}
    if len(kinds) > 1:
        raise ValueError(
            "some of the tasks have free answers, some one right answer, and are asked otherwise: give them apart"
        )
    free = True in kinds
    shots = (0 if free else default) if shots is None else shots
    told = (free or (shots == 0 if tell is None else tell)) if told is None else told
    return {"shots": shots, "instruction": told, "style": style or ("chat" if free else "qa")}


def with_answers(
    model: Any, suite: TaskSuite, style: str, splits: tuple[str, ...], folder: Path | None = None
) -> TaskSuite:
    """Where answers are free and none is given, the model's own that pass their check, told the instruction."""
    from ivlens.running.answers import with_own_answers
    from ivlens.tasks import TaskSuite

    bare = {name for name, task in suite.items() if not all(x.output for split in splits for x in task.split(split))}
    options: dict[str, Any] = {"style": style, "splits": splits, "folder": folder}
    return TaskSuite(with_own_answers(model, t, **options) if name in bare else t for name, t in suite.items())


def vector_folders(folder: Path, suite: TaskSuite) -> dict[str, Path]:
    """Where each task's vector is kept; a name is never a path."""
    from ivlens.common.storage import safe_name

    folders = {name: folder / safe_name(name) for name in suite}
    if len(set(folders.values())) < len(folders):
        raise ValueError(f"tasks {', '.join(map(repr, folders))} would share folders in {folder}; rename one")
    return folders


def report(out: Path, title: str, sections: list[Section], metadata: dict[str, Any]) -> None:
    """`report.html` in the folder, written by one process of several."""
    if not is_main():
        return
    from ivlens.report import write_report

    about = {key: str(value) for key, value in metadata.items() if value is not None}
    write_report(out / "report.html", title=title, sections=sections, about=about)


def say(text: str) -> None:
    """As it is: a path isn't wrapped, and its brackets are no markup."""
    if is_main():
        typer.echo(text)


def print_table(frame: pd.DataFrame, title: str) -> None:
    """A table in the terminal: numbers on the right, line breaks written out."""
    if not is_main():
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(title))  # a plain string would be read as markup
    for column in frame.columns:
        side = "right" if frame[column].dtype.kind in "fi" else "left"
        table.add_column(Text(str(column)), justify=side, overflow="fold")
    for row in frame.itertuples(index=False):
        shown = [f"{x:.3g}" if isinstance(x, float) else str(x) for x in row]
        table.add_row(*(Text(repr(text)[1:-1] if "\n" in text else text) for text in shown))
    Console().print(table)

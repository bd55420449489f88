"""Options that commands share, and how they load, print and fail."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    import pandas as pd

    from ivlens.tasks.suite import TaskSuite

ModelName = Annotated[str, typer.Option("--model", "-m", help="smollm2, a hub id, a folder or a .gguf file")]
BackendName = Annotated[str, typer.Option("--backend", help="auto, bridge or hooked")]
Adapter = Annotated[str | None, typer.Option("--adapter", help="A PEFT adapter to put on the model")]
Device = Annotated[str | None, typer.Option("--device", help="cpu, cuda, cuda:1, …")]
TaskNames = Annotated[
    list[str] | None, typer.Option("--task", "-t", help="A built-in task; may be given several times")
]
TaskFiles = Annotated[
    list[Path] | None,
    typer.Option(
        "--file", help="Your own task: .jsonl, .json or .csv with input and output; may be given several times"
    ),
]
Told = Annotated[
    list[str] | None,
    typer.Option(
        "--instruction", help="What the task in --file asks for, one per file; default: the file's `instruction`"
    ),
]
Shots = Annotated[int, typer.Option("--shots", help="Demonstrations in each prompt")]
Style = Annotated[str, typer.Option("--style", help="qa, plain or chat")]
Layer = Annotated[int | None, typer.Option("--layer", help="After which layer to inject; default: the vector's own")]
Scale = Annotated[float | None, typer.Option("--scale", help="Strength; negative subtracts")]
Seed = Annotated[int, typer.Option("--seed")]
Out = Annotated[Path, typer.Option("--out", "-o", help="Folder for the results")]


@contextmanager
def readable_errors() -> Iterator[None]:
    """Bad input ends with its message and exit code 2, not a traceback."""
    try:
        yield
    except (ValueError, KeyError, TypeError, OSError) as error:
        typer.echo(f"error: {error.args[0] if isinstance(error, KeyError) else error}", err=True)
        raise typer.Exit(2) from error


def load(name: str, backend: str, adapter: str | None = None, device: str | None = None) -> Any:
    from ivlens.models import load_model

    return load_model(name, backend=backend, adapter=adapter, device=device)


def read_tasks(names: list[str] | None, files: list[Path] | None, instructions: list[str] | None) -> TaskSuite:
    """The built-in tasks named, and one task per file; all built-in ones where nothing is named."""
    from ivlens.tasks import Task, TaskSuite, load_tasks

    if not files:
        return load_tasks(names or None)
    told = instructions or [None] * len(files)
    if len(told) != len(files):
        raise ValueError(
            f"{len(files)} --file but {len(told)} --instruction; give one sentence per file, in the same order"
        )
    known = {name: f"the built-in task {name!r}" for name in names or ()}
    own = []
    for file, text in zip(files, told):
        own.append(Task.from_file(file, instruction=text))
        if (other := known.setdefault(own[-1].name, str(file))) != str(file):
            raise ValueError(f"{other} and {file} are two tasks of one name; rename one of the files")
    return TaskSuite([*(load_tasks(names).values() if names else ()), *own])


def about(metadata: dict[str, Any]) -> dict[str, str]:
    return {key: str(value) for key, value in metadata.items() if value is not None}


def say(text: str) -> None:
    from rich.console import Console

    Console().print(text)


def print_table(frame: pd.DataFrame, title: str) -> None:
    """A table in the terminal: numbers on the right, line breaks written out."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=escape(title))
    for column in frame.columns:
        table.add_column(str(column), justify="right" if frame[column].dtype.kind in "fi" else "left", overflow="fold")
    for row in frame.itertuples(index=False):
        table.add_row(
            *(f"{x:.3g}" if isinstance(x, float) else escape(repr(x)[1:-1] if "\n" in str(x) else str(x)) for x in row)
        )
    Console().print(table)

"""The `ivlens` program, to which each file adds its commands."""

from __future__ import annotations

import sys
from typing import Any

import typer
from typer.core import TyperGroup

from ivlens.common.processes import joined


class Commands(TyperGroup):
    """A sign that the terminal's code page lacks comes out as ?, and doesn't end a run after its work is done. Processes that were
    started together work together."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        if hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(errors="replace")
        with joined():
            return super().main(*args, **kwargs)


app = typer.Typer(
    cls=Commands,
    help="Find, extract, inject and follow the instruction vectors of language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

"""The `ivlens` program, to which each file adds its commands."""

from __future__ import annotations

import typer

app = typer.Typer(
    help="Find, extract, inject and follow the instruction vectors of language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

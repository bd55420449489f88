"""Options that commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from typer import Option

Model = Annotated[str, Option("--model", "-m", help="smollm2, a hub id, a folder or a .gguf file")]
Backend = Annotated[str, Option("--backend", help="auto, bridge or hooked")]
Adapter = Annotated[str | None, Option("--adapter", help="A PEFT adapter to put on the model")]
Device = Annotated[str | None, Option("--device", help="cpu, cuda, cuda:1, … or auto: over all of them")]
Tasks = Annotated[list[str] | None, Option("--task", "-t", help="A built-in task; may be given several times")]
Group = Annotated[str | None, Option("--group", help="All built-in tasks of a group, such as formats")]
_FILE = (
    "Your own task: .jsonl, .json, .csv, .tsv or .parquet with input, and output or check; may be given several times"
)
Files = Annotated[list[Path] | None, Option("--file", help=_FILE)]
_INSTRUCTION = "The text of what the task in --file asks for, one per file; default: the file's `instruction`"
Instructions = Annotated[list[str] | None, Option("--instruction", help=_INSTRUCTION)]


def _shots(default: int) -> Any:
    said = f"Demonstrations in each prompt; default: {default}" + ", but 0 where answers are free" * (default > 0)
    return Annotated[int | None, Option("--shots", help=said)]


def _told(default: str) -> Any:
    return Annotated[
        bool | None, Option("--told/--not-told", help=f"Put the instruction into prompts; default: {default}")
    ]


Shots0, Shots5, Shots10 = _shots(0), _shots(5), _shots(10)
Told, ToldAtZero = _told("told"), _told("told with --shots 0 and where answers are free")
NotTold = _told("not told; where answers are free, both are scored")
Style = Annotated[str | None, Option("--style", help="qa, plain or chat; default: qa, but chat where answers are free")]
Length = Annotated[int, Option("--max-new-tokens", help="How long free answers may be")]
Layer = Annotated[int | None, Option("--layer", help="After which layer to inject; default: the vector's own")]
Scale = Annotated[float | None, Option("--scale", help="Strength; negative subtracts")]
Mode = Annotated[str, Option(help="sum or heads")]
_POSITIONS = "last, generated or all; default: the vector's own, else last"
Positions = Annotated[str | None, Option(help=_POSITIONS)]
Seed = Annotated[int, Option("--seed")]
Out = Annotated[Path, Option("--out", "-o", help="Folder for the results")]

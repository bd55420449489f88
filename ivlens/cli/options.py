"""Options that commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Option

Model = Annotated[str, Option("--model", "-m", help="smollm2, a hub id, a folder or a .gguf file")]
Backend = Annotated[str, Option("--backend", help="auto, bridge or hooked")]
Adapter = Annotated[str | None, Option("--adapter", help="A PEFT adapter to put on the model")]
Device = Annotated[str | None, Option("--device", help="cpu, cuda, cuda:1, …")]
Tasks = Annotated[list[str] | None, Option("--task", "-t", help="A built-in task; may be given several times")]
_FILE = "Your own task: .jsonl, .json, .csv, .tsv or .parquet with input and output; may be given several times"
Files = Annotated[list[Path] | None, Option("--file", help=_FILE)]
_TOLD = "What the task in --file asks for, one per file; default: the file's `instruction`"
Told = Annotated[list[str] | None, Option("--instruction", help=_TOLD)]
Shots = Annotated[int, Option("--shots", help="Demonstrations in each prompt")]
Style = Annotated[str, Option("--style", help="qa, plain or chat")]
Layer = Annotated[int | None, Option("--layer", help="After which layer to inject; default: the vector's own")]
Scale = Annotated[float | None, Option("--scale", help="Strength; negative subtracts")]
Mode = Annotated[str, Option(help="sum or heads")]
Positions = Annotated[str, Option(help="last, generated or all")]
Seed = Annotated[int, Option("--seed")]
Out = Annotated[Path, Option("--out", "-o", help="Folder for the results")]

"""The command line: the same words as the library. Every command writes to a folder and prints a table."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    import pandas as pd

    from ivlens.tasks.suite import TaskSuite

app = typer.Typer(
    help="Find, extract, inject and follow the instruction vectors of language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

ModelName = Annotated[str, typer.Option("--model", "-m", help="smollm2, a hub id, a folder or a .gguf file")]
BackendName = Annotated[str, typer.Option("--backend", help="auto, bridge or hooked")]
Adapter = Annotated[str | None, typer.Option("--adapter", help="A PEFT adapter to put on the model")]
Device = Annotated[str | None, typer.Option("--device", help="cpu, cuda, cuda:1, …")]
TaskNames = Annotated[
    list[str] | None, typer.Option("--task", "-t", help="A built-in task; may be given several times")
]
TaskFile = Annotated[
    Path | None, typer.Option("--file", help="Your own task: .jsonl, .json or .csv with input and output")
]
Told = Annotated[str | None, typer.Option("--instruction", help="What the task in --file asks for")]
Shots = Annotated[int, typer.Option("--shots", help="Demonstrations in each prompt")]
Style = Annotated[str, typer.Option("--style", help="qa, plain or chat")]
Layer = Annotated[int | None, typer.Option("--layer", help="After which layer to inject; default: the vector's own")]
Scale = Annotated[float | None, typer.Option("--scale", help="Strength; negative subtracts")]
Seed = Annotated[int, typer.Option("--seed")]
Out = Annotated[Path, typer.Option("--out", "-o", help="Folder for the results")]


@app.command()
def demo(out: Out = Path("demo"), model: ModelName = "smollm2", backend: BackendName = "auto", seed: Seed = 0) -> None:
    """Everything once on the built-in model: which heads carry instructions, the vectors, and steering with them."""
    from ivlens.demo import run_demo

    with _readable_errors():
        report = run_demo(_load(model, backend), out, seed=seed)
    _say(f"[bold]Open {report} in a browser.[/bold]")


@app.command()
def locate(
    model: ModelName = "smollm2",
    backend: BackendName = "auto",
    adapter: Adapter = None,
    device: Device = None,
    task: TaskNames = None,
    file: TaskFile = None,
    instruction: Told = None,
    shots: Shots = 10,
    style: Style = "qa",
    counterfactual: Annotated[str, typer.Option(help="How the instruction is destroyed")] = "shuffled_labels",
    metric: Annotated[
        str, typer.Option(help="probability, log_probability, logit or logit_difference")
    ] = "probability",
    n_prompts: Annotated[int, typer.Option(help="Prompts per task")] = 25,
    top: Annotated[int, typer.Option(help="Heads to print")] = 10,
    max_rows: Annotated[int | None, typer.Option(help="Bound on the packed sequence")] = None,
    seed: Seed = 0,
    out: Out = Path("heads"),
) -> None:
    """Find the heads that carry an instruction. An interrupted run goes on where it stopped."""
    with _readable_errors():
        from ivlens.patching import locate_heads
        from ivlens.report import Section, write_report

        suite = _tasks(task, file, instruction)
        effects = locate_heads(
            _load(model, backend, adapter, device),
            suite,
            shots=shots,
            style=style,
            counterfactual=counterfactual,
            metric=metric,
            n_prompts=n_prompts,
            max_rows=max_rows,
            seed=seed,
            folder=out / "partial",
        )
        effects.save(out / "effects.safetensors")
        frame = effects.to_dataframe().head(top)
        figures = [effects.plot(), effects.plot("stderr"), *([effects.plot("tasks")] if len(suite) > 1 else [])]
        sections = [Section("Which heads", repr(effects), [*figures, frame])]
        write_report(out / "report.html", title="Instruction heads", sections=sections, about=_about(effects.metadata))
    _table(frame, f"Strongest heads of {len(suite)} task(s)")
    _say(f"Wrote {out / 'effects.safetensors'} and {out / 'report.html'}")


@app.command()
def extract(
    heads: Annotated[Path, typer.Option("--heads", help="effects.safetensors of `ivlens locate`")] = Path(
        "heads/effects.safetensors"
    ),
    model: ModelName = "smollm2",
    backend: BackendName = "auto",
    adapter: Adapter = None,
    device: Device = None,
    task: TaskNames = None,
    file: TaskFile = None,
    instruction: Told = None,
    top: Annotated[int, typer.Option(help="How many heads to sum")] = 10,
    shots: Shots = 10,
    style: Style = "qa",
    n_prompts: Annotated[int, typer.Option(help="Prompts behind the mean")] = 50,
    tune: Annotated[bool, typer.Option(help="Choose layer and scale on the validation split")] = True,
    seed: Seed = 0,
    out: Out = Path("vectors"),
) -> None:
    """Sum the heads' mean outputs to instruction vectors, one folder per task."""
    import pandas as pd

    rows = []
    with _readable_errors():
        from ivlens.extraction import extract_vector
        from ivlens.patching import HeadEffects
        from ivlens.report import Section, write_report
        from ivlens.tuning import tune_injection

        suite, chosen = _tasks(task, file, instruction), HeadEffects.load(heads).top(top)
        hooked, sections = _load(model, backend, adapter, device), []
        for one in suite.values():
            vector = extract_vector(hooked, one, chosen, shots=shots, style=style, n_prompts=n_prompts, seed=seed)
            items: list[Any] = [vector.plot()]
            if tune:
                search = tune_injection(hooked, one, vector, style=style, seed=seed)
                vector = search.best
                items.append(search.plot())
            vector.save(out / one.name)
            rows.append({"task": one.name, "norm": vector.norm(), "layer": vector.layer, "scale": vector.scale})
            sections.append(Section(one.name, repr(vector), items))
        write_report(out / "report.html", title="Instruction vectors", sections=sections, about={"model": model})
    _table(pd.DataFrame(rows), "Vectors")
    _say(f"Wrote {len(rows)} vector(s) and report.html to {out}")


@app.command()
def steer(
    vector: Annotated[Path, typer.Argument(help="Folder of a vector, as `ivlens extract` writes it, or a hub id")],
    prompts: Annotated[list[str], typer.Argument(help="Texts to continue, such as 'Q: walk\\nA:'")],
    model: ModelName = "smollm2",
    backend: BackendName = "auto",
    adapter: Adapter = None,
    device: Device = None,
    layer: Layer = None,
    scale: Scale = None,
    mode: Annotated[str, typer.Option(help="sum or heads")] = "sum",
    positions: Annotated[str, typer.Option(help="last, generated or all")] = "last",
    max_new_tokens: Annotated[int, typer.Option()] = 10,
    out: Out = Path("steered"),
) -> None:
    """Continue prompts without the vector, with it, and with it subtracted."""
    with _readable_errors():
        from ivlens.report import Section, write_report
        from ivlens.steering import generate
        from ivlens.vectors import InstructionVector

        loaded = InstructionVector.from_pretrained(vector)
        texts = [p.replace("\\n", "\n") for p in prompts]
        options: dict[str, Any] = {"layer": layer, "scale": scale, "mode": mode, "positions": positions}
        hooked = _load(model, backend, adapter, device)
        result = generate(hooked, texts, vector=loaded, max_new_tokens=max_new_tokens, **options)
        frame = result.to_dataframe()
        out.mkdir(parents=True, exist_ok=True)
        frame.to_json(out / "generations.json", orient="records", indent=1, force_ascii=False)
        sections = [Section("Side by side", repr(loaded), [result])]
        write_report(out / "report.html", title=f"Steering: {loaded.name}", sections=sections, about={"model": model})
    _table(frame, repr(loaded))
    _say(f"Wrote {out / 'generations.json'} and {out / 'report.html'}")


@app.command()
def evaluate(
    vectors: Annotated[Path | None, typer.Option("--vectors", help="Folder that `ivlens extract` wrote")] = None,
    model: ModelName = "smollm2",
    backend: BackendName = "auto",
    adapter: Adapter = None,
    device: Device = None,
    task: TaskNames = None,
    file: TaskFile = None,
    instruction: Told = None,
    shots: Shots = 0,
    style: Style = "qa",
    reference_shots: Annotated[int | None, typer.Option(help="Also score prompts with this many demonstrations")] = 10,
    layer: Layer = None,
    scale: Scale = None,
    mode: Annotated[str, typer.Option(help="sum or heads")] = "sum",
    positions: Annotated[str, typer.Option(help="last, generated or all")] = "last",
    n_prompts: Annotated[int | None, typer.Option(help="Test prompts per task; default: all")] = None,
    seed: Seed = 0,
    out: Out = Path("evaluation"),
) -> None:
    """Score tasks on the test split, with vectors and their controls."""
    with _readable_errors():
        from ivlens.evaluation import evaluate as score
        from ivlens.report import Section, write_report
        from ivlens.vectors import InstructionVector

        suite = _tasks(task, file, instruction)
        loaded = None if vectors is None else {name: InstructionVector.load(vectors / name) for name in suite}
        options: dict[str, Any] = {"layer": layer, "scale": scale, "mode": mode, "positions": positions}
        result = score(
            _load(model, backend, adapter, device),
            suite,
            vectors=loaded,
            shots=shots,
            style=style,
            reference_shots=reference_shots,
            n_prompts=n_prompts,
            seed=seed,
            **options,
        )
        result.save(out / "evaluation.json")
        items = [result.plot(metric) for metric in result.metrics]
        sections = [Section("Scores", "95 % intervals; test split.", [*items, result.to_dataframe()])]
        if loaded is not None:
            sections.append(Section("Gains over no vector", "", [result.gains("exact_match")]))
        write_report(out / "report.html", title="Evaluation", sections=sections, about=_about(result.metadata))
    _table(result.to_dataframe(), "Scores")
    _say(f"Wrote {out / 'evaluation.json'} and {out / 'report.html'}")


@app.command()
def tasks(name: Annotated[str | None, typer.Argument(help="One task, to see its examples")] = None) -> None:
    """List the built-in tasks, or show one."""
    with _readable_errors():
        from ivlens.tasks import load_tasks

        if name is None:
            frame = load_tasks().to_dataframe().reset_index()
            _table(frame.drop(columns="instruction"), "Built-in tasks")
        else:
            task = load_tasks([name])[name]
            for wording in task.instructions:
                _say(f"· {wording}")
            frame = task.to_dataframe().dropna(axis="columns", how="all")
            _table(frame.groupby("split", sort=False).head(5), f"{name}: {task.description}")


@app.command()
def models() -> None:
    """Say which models can be loaded, and what is installed."""
    from importlib.metadata import version

    from ivlens.models.loading import BUILT_IN
    from ivlens.models.smollm2 import cache_folder

    _say(
        f"Built in, offline: [bold]{', '.join(BUILT_IN)}[/bold] (SmolLM2-135M-Instruct, converted once to {cache_folder()})"
    )
    _say(
        "Any hub id or local folder that transformer-lens hooks, a .gguf file, and from Python any Hugging Face or PEFT model"
    )
    _say(
        f"transformer-lens {version('transformer-lens')}, transformers {version('transformers')}, torch {version('torch')}"
    )


# -- shared ---------------------------------------------------------------------------------------------------------------


@contextmanager
def _readable_errors() -> Iterator[None]:
    """Bad input ends with its message and exit code 2, not a traceback."""
    try:
        yield
    except (ValueError, KeyError, TypeError, OSError) as error:
        typer.echo(f"error: {error.args[0] if isinstance(error, KeyError) else error}", err=True)
        raise typer.Exit(2) from error


def _load(name: str, backend: str, adapter: str | None = None, device: str | None = None) -> Any:
    from ivlens.models import load_model

    return load_model(name, backend=backend, adapter=adapter, device=device)


def _tasks(names: list[str] | None, file: Path | None, instruction: str | None) -> TaskSuite:
    from ivlens.tasks import Task, TaskSuite, load_tasks

    if file is None:
        return load_tasks(names)
    if instruction is None:
        raise ValueError("--file needs --instruction: one sentence that says what the task asks for")
    return TaskSuite([Task.from_file(file, instruction=instruction)])


def _about(metadata: dict[str, Any]) -> dict[str, str]:
    return {key: str(value) for key, value in metadata.items() if value is not None}


def _say(text: str) -> None:
    from rich.console import Console

    Console().print(text)


def _table(frame: pd.DataFrame, title: str) -> None:
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

"""`ivlens evaluate | tasks | models`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

import ivlens.cli.options as opt
from ivlens.cli.app import app
from ivlens.cli.common import load, look, print_table, read_tasks, readable_errors, report, say, vector_folders

if TYPE_CHECKING:
    from ivlens.report import Section
    from ivlens.steering.evaluation import Evaluation


_REFERENCE = "Also score prompts with this many demonstrations; default: 10, but not where answers are free"


@app.command()
def evaluate(
    vectors: Annotated[Path | None, Option("--vectors", help="Folder that `ivlens extract` wrote")] = None,
    model: opt.Model = "smollm2",
    backend: opt.Backend = "auto",
    adapter: opt.Adapter = None,
    device: opt.Device = None,
    task: opt.Tasks = None,
    group: opt.Group = None,
    file: opt.Files = None,
    instruction: opt.Instructions = None,
    shots: opt.Shots0 = None,
    told: opt.NotTold = None,
    style: opt.Style = None,
    reference_shots: Annotated[int | None, Option(help=_REFERENCE)] = None,
    layer: opt.Layer = None,
    scale: opt.Scale = None,
    mode: opt.Mode = "sum",
    positions: opt.Positions = None,
    n_prompts: Annotated[int | None, Option(help="Test prompts per task; default: all")] = None,
    max_new_tokens: opt.Length = 40,
    seed: opt.Seed = 0,
    out: opt.Out = Path("evaluation"),
) -> None:
    """Score tasks on the test split, with vectors and their controls."""
    with readable_errors():
        from ivlens.steering.evaluation import evaluate as score
        from ivlens.vectors.vector import InstructionVector

        suite = read_tasks(task, file, instruction, group)
        folders = {} if vectors is None else vector_folders(vectors, suite)
        loaded = {name: InstructionVector.load(path) for name, path in folders.items()} or None
        options: dict[str, Any] = {"layer": layer, "scale": scale, "mode": mode, "positions": positions}
        free = all(task.is_checked for task in suite.values())
        reference = 10 if reference_shots is None and not free else reference_shots
        options |= {**look(suite, shots, told, style, 0, tell=False), "reference_shots": reference}
        options |= {"n_prompts": n_prompts, "max_new_tokens": max_new_tokens, "seed": seed, "vectors": loaded}
        result = score(load(model, backend, adapter, device), suite, **options)
        result.save(out / "evaluation.json")
        sections = _free(result) if free else _scores(result, loaded is not None)
        report(out, "Evaluation", sections, result.metadata)
    if free:
        table = result.balance()
        table["balance"] = [f"{x.balance:.2f} [{x.low:.2f}, {x.high:.2f}]" for x in table.itertuples()]
        narrow = table.drop(columns=["low", "high", "perplexity"])
        print_table(narrow, "Constraint met, on topic, fluent, and their harmonic mean")
    else:
        print_table(result.to_dataframe(), "Scores")
    say(f"Wrote {out / 'evaluation.json'} and {out / 'report.html'}")


def _scores(result: Evaluation, gained: bool) -> list[Section]:
    from ivlens.report import Section

    items = [result.plot(metric) for metric in result.metrics]
    sections = [Section("Scores", "95 % intervals; test split.", [*items, result.to_dataframe()])]
    return [*sections, Section("Gains over no vector", "", [result.gains("exact_match")])] if gained else sections


def _free(result: Evaluation) -> list[Section]:
    """Of free answers: bars, the balance, and the answers themselves."""
    from ivlens.report import BALANCE, SIDE_BY_SIDE, Section, side_by_side

    return [
        Section("Is the constraint met?", "Decided by a program; 95 % intervals; test split.", [result.plot("met")]),
        Section("Met, on topic, fluent", BALANCE, [result.plot("balance"), result.balance()]),
        *(Section(f"Answers: {name}", SIDE_BY_SIDE, [side_by_side(result, name)]) for name in result.task_names),
        Section("All numbers", "Gains are over no vector.", [result.to_dataframe(), result.gains("met")]),
    ]


@app.command()
def tasks(
    name: Annotated[str | None, Argument(help="One task, to see its examples")] = None, group: opt.Group = None
) -> None:
    """List the built-in tasks, those of a group, or show one."""
    with readable_errors():
        from ivlens.tasks import load_tasks

        if name is None:
            suite = load_tasks(group=group)
            frame = suite.to_dataframe().reset_index()
            if all(task.is_checked for task in suite.values()):
                print_table(frame.drop(columns="input"), "Built-in tasks with free answers, over the same questions")
            else:
                print_table(frame.drop(columns="instruction"), "Built-in tasks (and --group formats: free answers)")
        else:
            task = load_tasks([name])[name]
            for wording in (*task.instructions, *task.held_out):
                say(f"· {wording}" + " (held out: only asked in the test split)" * (wording in task.held_out))
            frame = task.to_dataframe()
            frame = frame.mask(frame.eq("")).dropna(axis="columns", how="all")
            print_table(frame.groupby("split", sort=False).head(5), f"{name}: {task.description}")


@app.command()
def models() -> None:
    """Say which models can be loaded, and what is installed."""
    from importlib.metadata import version

    from ivlens.models.loading import BUILT_IN
    from ivlens.models.smollm2 import cache_folder

    say(f"Built in, offline: {', '.join(BUILT_IN)} (SmolLM2-135M-Instruct, converted once to {cache_folder()})")
    say(
        "Any hub id or folder that transformer-lens hooks, a .gguf file, and from Python any Hugging Face or PEFT model"
    )
    say(", ".join(f"{name} {version(name)}" for name in ("transformer-lens", "transformers", "torch")))

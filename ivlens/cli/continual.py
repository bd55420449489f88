"""`ivlens continual`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Argument, Option

import ivlens.cli.options as opt
from ivlens.cli.app import app
from ivlens.cli.common import look, print_table, readable_errors, report, say

if TYPE_CHECKING:
    import pandas as pd

    from ivlens.continual import ContinualResults


_SEQUENCE = "Instead of a file: a built-in task; give several, in order"


@app.command()
def continual(
    config: Annotated[Path | None, Argument(help="A .yaml file with the options of ivl.continual.run")] = None,
    sequence: Annotated[list[str] | None, Option("--task", "-t", help=_SEQUENCE)] = None,
    recipe: Annotated[str | None, Option(help="Instead: a published benchmark, such as trace or func")] = None,
    general: Annotated[list[str] | None, Option(help="A built-in task to watch; may be given several times")] = None,
    method: Annotated[list[str] | None, Option(help="A method; with a file, only this one of its")] = None,
    seed: Annotated[list[int] | None, Option(help="A seed; with a file, instead of its")] = None,
    model: opt.Model = "smollm2",
    shots: opt.Shots0 = None,
    told: opt.Told = None,
    style: opt.Style = None,
    steps: Annotated[int, Option(help="Steps per stage")] = 100,
    learning_rate: Annotated[float, Option("--lr")] = 1e-4,
    n_prompts: Annotated[int, Option("--n-prompts", help="Test prompts per task")] = 100,
    dry_run: Annotated[bool, Option("--dry-run", help="Only say what is to be done and how long it takes")] = False,
    out: opt.Out = Path("continual"),
) -> None:
    """Train on tasks one after the other, by several methods; what is kept of the earlier ones and in general."""
    with readable_errors():
        from ivlens.continual import load_sequence, read_config, run
        from ivlens.tasks import load_tasks

        if config is not None:
            options = read_config(config)
            if method:
                options["methods"] = _only(options.get("methods"), method)
        else:
            if (recipe is None) == (not sequence):
                raise ValueError("name what to train on: a .yaml file, --recipe, or --task several times")
            tasks = load_sequence(recipe) if recipe else load_tasks(sequence or [])
            options = {"sequence": tasks, "general": general or (), "model": model}
            options |= look(tasks, shots, told, style, 0, tell=True)
            options |= {"steps": steps, "learning_rate": learning_rate, "n_prompts": n_prompts}
            options |= {"methods": method} if method else {}
        options |= {"seeds": seed} if seed else {}
        found = run(**{"folder": out, **options}, dry_run=dry_run)
        folder = Path(options.get("folder", out))
        if dry_run:
            print_table(found.stages, "What is to be done")
            say(repr(found).splitlines()[0])
            return
        found.save(folder / "results.json")
        _report(found, folder)
    print_table(_means(found), "Means over tasks and seeds, in points; intervals are in the report")
    say(f"Wrote {folder / 'results.json'} and {folder / 'report.html'}")


def _only(methods, chosen: list[str]):
    from ivlens.training.methods import as_method

    known = methods if isinstance(methods, dict) else {name: as_method(name) for name in methods or chosen}
    if unknown := [name for name in chosen if name not in known]:
        raise ValueError(f"--method {unknown[0]} is not in the file, which has {', '.join(known)}")
    return {name: known[name] for name in chosen}


def _means(found: ContinualResults) -> pd.DataFrame:
    """Narrow enough for a terminal."""
    table = found.to_dataframe().pivot(index="method", columns="metric", values="mean") * 100
    columns = ["OP", "BWT", "GP", "IP", "plasticity", "forgetting"]
    return table.reindex(index=["base", *found.methods], columns=columns).reset_index()


def _report(found: ContinualResults, folder: Path) -> None:
    from ivlens.report import Section

    sections = [
        Section("What each method keeps and learns", repr(found), [found.plot(), found.table().reset_index()]),
        Section("Accuracy after every stage", "", [found.plot("matrix")]),
        Section("General tasks", "Not trained on by any of them.", [found.plot("general")]),
    ]
    if len(found.similarity):
        sections.append(Section("Instruction vectors along the sequence", "", [found.plot("similarity")]))
    sections.append(Section("All numbers", "", [found.to_dataframe(), found.costs]))
    report(folder, "Continual learning", sections, found.metadata)

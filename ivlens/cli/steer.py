"""`ivlens demo | locate | extract | steer | evaluate | tasks | models`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ivlens.cli.app import app
from ivlens.cli.common import (
    Adapter,
    BackendName,
    Device,
    Layer,
    ModelName,
    Out,
    Scale,
    Seed,
    Shots,
    Style,
    TaskFiles,
    TaskNames,
    Told,
    about,
    load,
    print_table,
    read_tasks,
    readable_errors,
    say,
    vector_folders,
)


@app.command()
def demo(out: Out = Path("demo"), model: ModelName = "smollm2", backend: BackendName = "auto", seed: Seed = 0) -> None:
    """Everything once on the built-in model: which heads carry instructions, the vectors, and steering with them."""
    from ivlens.demo import run_demo

    with readable_errors():
        report = run_demo(load(model, backend), out, seed=seed)
    say(f"Open {report} in a browser.")


@app.command()
def locate(
    model: ModelName = "smollm2",
    backend: BackendName = "auto",
    adapter: Adapter = None,
    device: Device = None,
    task: TaskNames = None,
    file: TaskFiles = None,
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
    with readable_errors():
        from ivlens.patching import locate_heads
        from ivlens.report import Section, write_report

        suite = read_tasks(task, file, instruction)
        effects = locate_heads(
            load(model, backend, adapter, device),
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
        write_report(out / "report.html", title="Instruction heads", sections=sections, about=about(effects.metadata))
    print_table(frame, f"Strongest heads of {len(suite)} task(s)")
    say(f"Wrote {out / 'effects.safetensors'} and {out / 'report.html'}")


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
    file: TaskFiles = None,
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
    with readable_errors():
        from ivlens.patching import HeadEffects
        from ivlens.report import Section, write_report
        from ivlens.steering.tuning import tune_injection
        from ivlens.vectors.extraction import extract_vector

        suite, chosen = read_tasks(task, file, instruction), HeadEffects.load(heads).top(top)
        hooked, sections = load(model, backend, adapter, device), []
        folders = vector_folders(out, suite)
        for one in suite.values():
            vector = extract_vector(hooked, one, chosen, shots=shots, style=style, n_prompts=n_prompts, seed=seed)
            items: list[Any] = [vector.plot()]
            if tune:
                search = tune_injection(hooked, one, vector, style=style, seed=seed)
                vector = search.best
                items.append(search.plot())
            vector.save(folders[one.name])
            rows.append({"task": one.name, "norm": vector.norm(), "layer": vector.layer, "scale": vector.scale})
            sections.append(Section(one.name, repr(vector), items))
        write_report(out / "report.html", title="Instruction vectors", sections=sections, about={"model": model})
    print_table(pd.DataFrame(rows), "Vectors")
    say(f"Wrote {len(rows)} vector(s) and report.html to {out}")


@app.command()
def steer(
    vector: Annotated[str, typer.Argument(help="Folder of a vector, as `ivlens extract` writes it, or a hub id")],
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
    with readable_errors():
        from ivlens.report import Section, write_report
        from ivlens.steering.generate import generate
        from ivlens.vectors.vector import InstructionVector

        loaded = InstructionVector.from_pretrained(vector)
        texts = [p.replace("\\n", "\n") for p in prompts]
        options: dict[str, Any] = {"layer": layer, "scale": scale, "mode": mode, "positions": positions}
        hooked = load(model, backend, adapter, device)
        result = generate(hooked, texts, vector=loaded, max_new_tokens=max_new_tokens, **options)
        frame = result.to_dataframe()
        out.mkdir(parents=True, exist_ok=True)
        frame.to_json(out / "generations.json", orient="records", indent=1, force_ascii=False)
        sections = [Section("Side by side", repr(loaded), [result])]
        write_report(out / "report.html", title=f"Steering: {loaded.name}", sections=sections, about={"model": model})
    print_table(frame, repr(loaded))
    say(f"Wrote {out / 'generations.json'} and {out / 'report.html'}")


@app.command()
def evaluate(
    vectors: Annotated[Path | None, typer.Option("--vectors", help="Folder that `ivlens extract` wrote")] = None,
    model: ModelName = "smollm2",
    backend: BackendName = "auto",
    adapter: Adapter = None,
    device: Device = None,
    task: TaskNames = None,
    file: TaskFiles = None,
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
    with readable_errors():
        from ivlens.report import Section, write_report
        from ivlens.steering.evaluation import evaluate as score
        from ivlens.vectors.vector import InstructionVector

        suite = read_tasks(task, file, instruction)
        folders = {} if vectors is None else vector_folders(vectors, suite)
        loaded = {name: InstructionVector.load(path) for name, path in folders.items()} or None
        options: dict[str, Any] = {"layer": layer, "scale": scale, "mode": mode, "positions": positions}
        result = score(
            load(model, backend, adapter, device),
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
        write_report(out / "report.html", title="Evaluation", sections=sections, about=about(result.metadata))
    print_table(result.to_dataframe(), "Scores")
    say(f"Wrote {out / 'evaluation.json'} and {out / 'report.html'}")


@app.command()
def tasks(name: Annotated[str | None, typer.Argument(help="One task, to see its examples")] = None) -> None:
    """List the built-in tasks, or show one."""
    with readable_errors():
        from ivlens.tasks import load_tasks

        if name is None:
            frame = load_tasks().to_dataframe().reset_index()
            print_table(frame.drop(columns="instruction"), "Built-in tasks")
        else:
            task = load_tasks([name])[name]
            for wording in task.instructions:
                say(f"· {wording}")
            frame = task.to_dataframe().dropna(axis="columns", how="all")
            print_table(frame.groupby("split", sort=False).head(5), f"{name}: {task.description}")


@app.command()
def models() -> None:
    """Say which models can be loaded, and what is installed."""
    from importlib.metadata import version

    from ivlens.models.loading import BUILT_IN
    from ivlens.models.smollm2 import cache_folder

    say(f"Built in, offline: {', '.join(BUILT_IN)} (SmolLM2-135M-Instruct, converted once to {cache_folder()})")
    say(
        "Any hub id or local folder that transformer-lens hooks, a .gguf file, and from Python any Hugging Face or PEFT model"
    )
    say(
        f"transformer-lens {version('transformer-lens')}, transformers {version('transformers')}, torch {version('torch')}"
    )

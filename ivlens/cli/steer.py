"""`ivlens demo | locate | extract | steer | evaluate | tasks | models`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Option

import ivlens.cli.options as opt
from ivlens.cli.app import app
from ivlens.cli.common import load, print_table, read_tasks, readable_errors, report, say, vector_folders

EFFECTS = Path("heads/effects.safetensors")


@app.command()
def demo(
    out: opt.Out = Path("demo"), model: opt.Model = "smollm2", backend: opt.Backend = "auto", seed: opt.Seed = 0
) -> None:
    """Everything once on the built-in model: which heads carry instructions, the vectors, and steering with them."""
    from ivlens.demo import run_demo

    with readable_errors():
        report = run_demo(load(model, backend), out, seed=seed)
    say(f"Open {report} in a browser.")


@app.command()
def locate(
    model: opt.Model = "smollm2",
    backend: opt.Backend = "auto",
    adapter: opt.Adapter = None,
    device: opt.Device = None,
    task: opt.Tasks = None,
    file: opt.Files = None,
    instruction: opt.Told = None,
    shots: opt.Shots = 10,
    style: opt.Style = "qa",
    counterfactual: Annotated[str, Option(help="How the instruction is destroyed")] = "shuffled_labels",
    metric: Annotated[str, Option(help="probability, log_probability, logit or logit_difference")] = "probability",
    n_prompts: Annotated[int, Option(help="Prompts per task")] = 25,
    top: Annotated[int, Option(help="Heads to print")] = 10,
    max_rows: Annotated[int | None, Option(help="Bound on the packed sequence")] = None,
    seed: opt.Seed = 0,
    out: opt.Out = Path("heads"),
) -> None:
    """Find the heads that carry an instruction. An interrupted run goes on where it stopped."""
    with readable_errors():
        from ivlens.patching import locate_heads
        from ivlens.report import Section

        suite = read_tasks(task, file, instruction)
        look = {"shots": shots, "style": style, "counterfactual": counterfactual, "metric": metric, "seed": seed}
        size = {"n_prompts": n_prompts, "max_rows": max_rows}
        hooked = load(model, backend, adapter, device)
        effects = locate_heads(hooked, suite, folder=out / "partial", **look, **size)
        effects.save(out / "effects.safetensors")
        frame = effects.to_dataframe().head(top)
        figures = [effects.plot(), effects.plot("stderr"), *([effects.plot("tasks")] if len(suite) > 1 else [])]
        sections = [Section("Which heads", repr(effects), [*figures, frame])]
        report(out, "Instruction heads", sections, effects.metadata)
    print_table(frame, f"Strongest heads of {len(suite)} task(s)")
    say(f"Wrote {out / 'effects.safetensors'} and {out / 'report.html'}")


@app.command()
def extract(
    heads: Annotated[Path, Option("--heads", help="effects.safetensors of `ivlens locate`")] = EFFECTS,
    model: opt.Model = "smollm2",
    backend: opt.Backend = "auto",
    adapter: opt.Adapter = None,
    device: opt.Device = None,
    task: opt.Tasks = None,
    file: opt.Files = None,
    instruction: opt.Told = None,
    top: Annotated[int, Option(help="How many heads to sum")] = 10,
    shots: opt.Shots = 10,
    style: opt.Style = "qa",
    n_prompts: Annotated[int, Option(help="Prompts behind the mean")] = 50,
    tune: Annotated[bool, Option(help="Choose layer and scale on the validation split")] = True,
    seed: opt.Seed = 0,
    out: opt.Out = Path("vectors"),
) -> None:
    """Sum the heads' mean outputs to instruction vectors, one folder per task."""
    import pandas as pd

    rows = []
    with readable_errors():
        from ivlens.patching import HeadEffects
        from ivlens.report import Section
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
        report(out, "Instruction vectors", sections, {"model": model})
    print_table(pd.DataFrame(rows), "Vectors")
    say(f"Wrote {len(rows)} vector(s) and report.html to {out}")


@app.command()
def steer(
    vector: Annotated[str, Argument(help="Folder of a vector, as `ivlens extract` writes it, or a hub id")],
    prompts: Annotated[list[str], Argument(help="Texts to continue, such as 'Q: walk\\nA:'")],
    model: opt.Model = "smollm2",
    backend: opt.Backend = "auto",
    adapter: opt.Adapter = None,
    device: opt.Device = None,
    layer: opt.Layer = None,
    scale: opt.Scale = None,
    mode: opt.Mode = "sum",
    positions: opt.Positions = "last",
    max_new_tokens: Annotated[int, Option()] = 10,
    out: opt.Out = Path("steered"),
) -> None:
    """Continue prompts without the vector, with it, and with it subtracted."""
    with readable_errors():
        from ivlens.report import Section
        from ivlens.steering.generate import generate
        from ivlens.vectors.vector import InstructionVector

        loaded = InstructionVector.from_pretrained(vector)
        texts = [p.replace("\\n", "\n") for p in prompts]
        options: dict[str, Any] = {"layer": layer, "scale": scale, "mode": mode, "positions": positions}
        options |= {"vector": loaded, "max_new_tokens": max_new_tokens}
        result = generate(load(model, backend, adapter, device), texts, **options)
        frame = result.to_dataframe()
        out.mkdir(parents=True, exist_ok=True)
        frame.to_json(out / "generations.json", orient="records", indent=1, force_ascii=False)
        report(out, f"Steering: {loaded.name}", [Section("Side by side", repr(loaded), [result])], {"model": model})
    print_table(frame, repr(loaded))
    say(f"Wrote {out / 'generations.json'} and {out / 'report.html'}")


@app.command()
def evaluate(
    vectors: Annotated[Path | None, Option("--vectors", help="Folder that `ivlens extract` wrote")] = None,
    model: opt.Model = "smollm2",
    backend: opt.Backend = "auto",
    adapter: opt.Adapter = None,
    device: opt.Device = None,
    task: opt.Tasks = None,
    file: opt.Files = None,
    instruction: opt.Told = None,
    shots: opt.Shots = 0,
    style: opt.Style = "qa",
    reference_shots: Annotated[int | None, Option(help="Also score prompts with this many demonstrations")] = 10,
    layer: opt.Layer = None,
    scale: opt.Scale = None,
    mode: opt.Mode = "sum",
    positions: opt.Positions = "last",
    n_prompts: Annotated[int | None, Option(help="Test prompts per task; default: all")] = None,
    seed: opt.Seed = 0,
    out: opt.Out = Path("evaluation"),
) -> None:
    """Score tasks on the test split, with vectors and their controls."""
    with readable_errors():
        from ivlens.report import Section
        from ivlens.steering.evaluation import evaluate as score
        from ivlens.vectors.vector import InstructionVector

        suite = read_tasks(task, file, instruction)
        folders = {} if vectors is None else vector_folders(vectors, suite)
        loaded = {name: InstructionVector.load(path) for name, path in folders.items()} or None
        options: dict[str, Any] = {"layer": layer, "scale": scale, "mode": mode, "positions": positions}
        options |= {"shots": shots, "style": style, "reference_shots": reference_shots}
        options |= {"n_prompts": n_prompts, "seed": seed, "vectors": loaded}
        result = score(load(model, backend, adapter, device), suite, **options)
        result.save(out / "evaluation.json")
        items = [result.plot(metric) for metric in result.metrics]
        sections = [Section("Scores", "95 % intervals; test split.", [*items, result.to_dataframe()])]
        if loaded is not None:
            sections.append(Section("Gains over no vector", "", [result.gains("exact_match")]))
        report(out, "Evaluation", sections, result.metadata)
    print_table(result.to_dataframe(), "Scores")
    say(f"Wrote {out / 'evaluation.json'} and {out / 'report.html'}")


@app.command()
def tasks(name: Annotated[str | None, Argument(help="One task, to see its examples")] = None) -> None:
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
        "Any hub id or folder that transformer-lens hooks, a .gguf file, and from Python any Hugging Face or PEFT model"
    )
    say(", ".join(f"{name} {version(name)}" for name in ("transformer-lens", "transformers", "torch")))

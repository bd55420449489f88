"""`ivlens demo | locate | extract | steer | export`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

import ivlens.cli.options as opt
from ivlens.cli.app import app
from ivlens.cli.common import load, look, print_table, read_tasks, readable_errors, report, say, vector_folders

if TYPE_CHECKING:
    from ivlens.patching import HeadEffects
    from ivlens.tasks.task import Task
    from ivlens.vectors.vector import InstructionVector

EFFECTS = Path("heads/effects.safetensors")
_COUNTERFACTUAL = "How the instruction is destroyed; default: shuffled_labels, but no_instruction with --shots 0"
_METRIC = (
    "probability, log_probability, logit or logit_difference; default: the first, or second where answers are free"
)
_LAYER = "Where a residual difference is taken; default: chosen from the middle third on"
_TUNED_AT = "Where it is tuned for: last, generated, or all, which most servers steer; default: last, of free answers the better"
_STYLE = "qa, plain or chat around each prompt; default: none, but chat for vectors made in it"
_FORMAT = "llama.cpp, vllm, easysteer, transformers, peft or pt; default: by the ending of --out"
_THERE = "Where the vectors act there: last, generated or all, or for vllm a token's number; default: each one's own"
_ARCHITECTURE = "As llama.cpp calls the model's, which then isn't loaded for a file; default: the model's own"
_TOKENS = "How long answers may be; default: 10, but 40 for vectors of free answers"


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
    group: opt.Group = None,
    file: opt.Files = None,
    instruction: opt.Instructions = None,
    shots: opt.Shots10 = None,
    told: opt.ToldAtZero = None,
    style: opt.Style = None,
    counterfactual: Annotated[str | None, Option(help=_COUNTERFACTUAL)] = None,
    metric: Annotated[str | None, Option(help=_METRIC)] = None,
    n_prompts: Annotated[int, Option(help="Prompts per task")] = 25,
    n_mean: Annotated[int, Option(help="Prompts per task behind the heads' means")] = 50,
    max_new_tokens: opt.Length = 40,
    top: Annotated[int, Option(help="Heads to print")] = 10,
    max_rows: Annotated[int | None, Option(help="Bound on the packed sequence")] = None,
    seed: opt.Seed = 0,
    out: opt.Out = Path("heads"),
) -> None:
    """Find the heads that carry an instruction. An interrupted run goes on where it stopped."""
    with readable_errors():
        from ivlens.patching import locate_heads
        from ivlens.report import Section

        suite = read_tasks(task, file, instruction, group)
        options = {**look(suite, shots, told, style, 10), "counterfactual": counterfactual, "metric": metric}
        options |= {"n_prompts": n_prompts, "n_mean": n_mean, "max_rows": max_rows, "max_new_tokens": max_new_tokens}
        options["seed"] = seed
        effects = locate_heads(load(model, backend, adapter, device), suite, folder=out / "partial", **options)
        effects.save(out / "effects.safetensors")
        frame = effects.to_dataframe().head(top)
        figures = [effects.plot(), effects.plot("stderr"), *([effects.plot("tasks")] if len(suite) > 1 else [])]
        sections = [Section("Which heads", repr(effects), [*figures, frame])]
        report(out, "Instruction heads", sections, effects.metadata)
    print_table(frame, f"Strongest heads of {len(suite)} task(s)")
    say(f"Wrote {out / 'effects.safetensors'} and {out / 'report.html'}")


@app.command()
def extract(
    heads: Annotated[Path | None, Option("--heads", help=f"As `ivlens locate` writes them; default: {EFFECTS}")] = None,
    model: opt.Model = "smollm2",
    backend: opt.Backend = "auto",
    adapter: opt.Adapter = None,
    device: opt.Device = None,
    task: opt.Tasks = None,
    group: opt.Group = None,
    file: opt.Files = None,
    instruction: opt.Instructions = None,
    top: Annotated[int, Option(help="How many heads to sum")] = 10,
    way: Annotated[str, Option(help="heads, difference or residual (which needs no heads)")] = "heads",
    layer: Annotated[int | None, Option(help=_LAYER)] = None,
    shots: opt.Shots10 = None,
    told: opt.ToldAtZero = None,
    style: opt.Style = None,
    n_prompts: Annotated[int, Option(help="Prompts behind the mean")] = 50,
    tune: Annotated[bool, Option(help="Choose layer and scale on the validation split")] = True,
    n_valid: Annotated[int | None, Option(help="Validation prompts that choose; default: all")] = None,
    positions: Annotated[str | None, Option(help=_TUNED_AT)] = None,
    max_new_tokens: opt.Length = 40,
    seed: opt.Seed = 0,
    out: opt.Out = Path("vectors"),
) -> None:
    """Make instruction vectors, one folder per task: by default the heads' mean outputs, summed."""
    import pandas as pd

    rows = []
    with readable_errors():
        from ivlens.patching import HeadEffects
        from ivlens.report import Section
        from ivlens.steering.tuning import tune_injection

        suite = read_tasks(task, file, instruction, group)
        given = None if way == "residual" and heads is None else HeadEffects.load(heads or EFFECTS).top(top)
        options = {**look(suite, shots, told, style, 10), "n_prompts": n_prompts, "seed": seed, "way": way}
        hooked, sections, folders = load(model, backend, adapter, device), [], vector_folders(out, suite)
        for one in suite.values():
            vectors = _vectors(hooked, one, given, layer, tune, options)
            vector, items = vectors[0], []
            if tune:
                again = {"style": options["style"], "n_prompts": n_valid, "max_new_tokens": max_new_tokens}
                again |= {"positions": positions, "seed": seed}
                search = tune_injection(hooked, one, vector if way != "residual" else vectors, **again)
                vector, items = search.best, [search.plot()]
            items = [*([vector.plot()] if vector.heads else []), *items]
            vector.save(folders[one.name])
            rows.append({"task": one.name, "norm": vector.norm(), "layer": vector.layer, "scale": vector.scale})
            sections.append(Section(one.name, repr(vector), items))
        report(out, "Instruction vectors", sections, {"model": model})
    print_table(pd.DataFrame(rows), "Vectors")
    say(f"Wrote {len(rows)} vector(s) and report.html to {out}")


def _vectors(
    model: Any, task: Task, heads: HeadEffects | None, layer: int | None, tune: bool, options: dict[str, Any]
) -> list[InstructionVector]:
    """The vector, or where residual differences are to be chosen from, one for each layer from the middle third on."""
    from ivlens.models.backends import backend_of
    from ivlens.steering.tuning import layers_tried
    from ivlens.vectors.extraction import extract_vector

    choose = options["way"] == "residual" and layer is None and tune
    n = backend_of(model).n_layers
    layers = sorted({*layers_tried(n, "generated"), *layers_tried(n, "last")}) if choose else [layer]
    return [extract_vector(model, task, heads, layer=at, **options) for at in layers]


@app.command()
def steer(
    vector: Annotated[str, Argument(help="Folder of a vector, as `ivlens extract` writes it, or a hub id")],
    prompts: Annotated[
        list[str], Argument(help="Texts to continue, such as 'Q: walk\\nA:', or questions with --style")
    ],
    model: opt.Model = "smollm2",
    backend: opt.Backend = "auto",
    adapter: opt.Adapter = None,
    device: opt.Device = None,
    layer: opt.Layer = None,
    scale: opt.Scale = None,
    mode: opt.Mode = "sum",
    positions: opt.Positions = None,
    style: Annotated[str | None, Option(help=_STYLE)] = None,
    max_new_tokens: Annotated[int | None, Option(help=_TOKENS)] = None,
    out: opt.Out = Path("steered"),
) -> None:
    """Continue prompts without the vector, with it, and with it subtracted."""
    with readable_errors():
        from ivlens.common.storage import write_text
        from ivlens.report import Section
        from ivlens.steering.generate import generate
        from ivlens.tasks.prompts import Prompt
        from ivlens.tasks.task import Example
        from ivlens.vectors.vector import InstructionVector

        loaded = InstructionVector.from_pretrained(vector)
        texts = [p.replace("\\n", "\n") for p in prompts]
        style = style or ("chat" if loaded.metadata.get("style") == "chat" else None)
        asked = [Prompt(Example(text, ""), style=style) for text in texts] if style else texts
        free = "positions" in loaded.metadata  # known to vectors of tasks whose answers are free
        options: dict[str, Any] = {"layer": layer, "scale": scale, "mode": mode, "positions": positions}
        options |= {"max_new_tokens": max_new_tokens or (40 if free else 10), "stop": None if free else "auto"}
        result = generate(load(model, backend, adapter, device), asked, vector=loaded, **options)
        frame = result.to_dataframe()
        write_text(out / "generations.json", frame.to_json(orient="records", indent=1, force_ascii=False))
        report(out, f"Steering: {loaded.name}", [Section("Side by side", repr(loaded), [result])], {"model": model})
    print_table(frame, repr(loaded))
    say(f"Wrote {out / 'generations.json'} and {out / 'report.html'}")


@app.command()
def export(
    vector: Annotated[list[str], Argument(help="Folders of vectors, as `ivlens extract` writes them, or hub ids")],
    out: Annotated[Path, Option("--out", "-o", help="A .gguf, .json or .pt file, else a folder that is new or empty")],
    format: Annotated[str | None, Option(help=_FORMAT)] = None,
    model: opt.Model = "smollm2",
    adapter: opt.Adapter = None,
    device: opt.Device = None,
    positions: Annotated[str | None, Option(help=_THERE)] = None,
    architecture: Annotated[str | None, Option(help=_ARCHITECTURE)] = None,
) -> None:
    """Write vectors for programs that serve models; what a program can't do exactly is refused."""
    with readable_errors():
        from ivlens.vectors.export import export_vector
        from ivlens.vectors.vector import InstructionVector

        loaded = [InstructionVector.from_pretrained(name) for name in vector]
        needed = architecture is None or format in ("transformers", "peft")
        at = int(positions) if positions is not None and positions.isdigit() else positions
        options: dict[str, Any] = {"format": format, "positions": at, "architecture": architecture}
        export_vector(loaded, out, model=load(model, "bridge", adapter, device) if needed else None, **options)
    say(f"Wrote {out}")

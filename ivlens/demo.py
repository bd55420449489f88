"""`ivlens demo`: everything once on a real model, in a few minutes, ending in a report."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from time import perf_counter
from typing import Any

from ivlens.patching import HeadEffects, locate_heads
from ivlens.plots import plot_similarity
from ivlens.report import Section, write_figure, write_report
from ivlens.steering.evaluation import Evaluation, evaluate
from ivlens.steering.generate import Generations, generate
from ivlens.steering.tuning import InjectionSearch, tune_injection
from ivlens.tasks import TaskSuite, load_tasks
from ivlens.tasks.prompts import build_prompts
from ivlens.vectors.extraction import extract_vector
from ivlens.vectors.vector import InstructionVector

__all__ = ["DEMO_TASKS", "run_demo"]

# Chosen by measuring all built-in tasks on the built-in model: those it does with ten demonstrations.
DEMO_TASKS = ("present_past", "singular_plural", "last_of_list", "capitalize", "lowercase")
SCALES = (1.0, 2.0, 3.0)
SHOWN = {"present_past": ("walk", "sing"), "singular_plural": ("house", "child"), "capitalize": ("river", "music")}


def run_demo(model: Any, out: str | Path, *, seed: int = 0) -> Path:
    """Locate heads, build and tune vectors, score them against controls, write `report.html`; returns its path.

    Heads and vectors come from training splits, layer and scale from validation splits, scores from test splits.
    """
    out = Path(out)
    tasks = load_tasks(DEMO_TASKS)
    seconds: dict[str, float] = {}
    with _timed("locate heads", seconds):
        effects = locate_heads(model, tasks, n_prompts=8, n_mean=20, seed=seed)
        effects.save(out / "effects.safetensors")
    heads = effects.top(10)
    with _timed("extract and tune vectors", seconds):
        searches = _vectors(model, tasks, heads, seed)
        vectors = {name: search.best for name, search in searches.items()}
        for name, vector in vectors.items():
            vector.save(out / "vectors" / name)
    with _timed("evaluate", seconds):
        scores = evaluate(model, tasks, vectors=vectors, n_prompts=60, reference_shots=10, seed=seed)
        scores.save(out / "evaluation.json")
    with _timed("generate", seconds):
        prompts = {name: [f"Q: {word}\nA:" for word in words] for name, words in SHOWN.items()}
        steered = {n: generate(model, x, vector=vectors[n], max_new_tokens=6) for n, x in prompts.items()}
        tables = {name: table.to_dataframe().to_dict("records") for name, table in steered.items()}
        (out / "generations.json").write_text(json.dumps(tables, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    (out / "heatmap.png").unlink(missing_ok=True)
    with suppress(RuntimeError):  # where no browser can draw it, the report has it anyway
        write_figure(effects.plot(), out / "heatmap.png")
    (out / "seconds.json").write_text(json.dumps(seconds, indent=1) + "\n", encoding="utf-8")
    return _report(out, effects, searches, vectors, scores, steered)


@contextmanager
def _timed(what: str, seconds: dict[str, float]) -> Iterator[None]:
    start = perf_counter()
    yield
    seconds[what] = round(perf_counter() - start, 1)


def _vectors(model: Any, tasks: TaskSuite, heads: list, seed: int) -> dict[str, InjectionSearch]:
    from tqdm.auto import tqdm

    searches = {}
    for task in tqdm(tasks.values(), desc="vectors"):
        vector = extract_vector(model, task, heads, n_prompts=20, seed=seed)
        layers = range(0, vector.metadata["signature"]["n_layers"], 2)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="the best scale stands at the edge")  # the report says so
            searches[task.name] = tune_injection(model, task, vector, layers=layers, scales=SCALES, n_prompts=20)
    return searches


def _report(
    out: Path,
    effects: HeadEffects,
    searches: dict[str, InjectionSearch],
    vectors: dict[str, InstructionVector],
    scores: Evaluation,
    steered: dict[str, Generations],
) -> Path:
    first = next(iter(searches))
    example = build_prompts(load_tasks([first])[first], n=1, shots=10)[0]
    shown = example.render().replace("\n\nQ", "\nQ")
    heads = (
        "Each cell: how much the right answer's probability rises when that head's output is replaced by its mean over "
        f"prompts that show the task, in prompts whose demonstrations are shuffled. {len(effects.tasks)} prompts of "
        f"{len(effects.task_names)} tasks. Such a prompt, before shuffling, is:\n{shown}"
    )
    summed = "The ten strongest heads' mean outputs, summed per task: one direction in the residual stream each."
    if at_edge := [name for name, search in searches.items() if search.best.scale == max(SCALES)]:
        summed += f"\n\nThe best scale is the largest tried, {max(SCALES):g}, for {', '.join(at_edge)}: "
        summed += "more may work better."
    bare = (
        "Zero-shot prompts with no instruction and no demonstrations. Layer and scale were chosen on validation data."
    )
    split = "Zero-shot accuracy on the test split (60 prompts per task), with each vector's controls"
    maps = [effects.plot(kind) for kind in ("mean", "tasks", "stderr")]
    bars = [scores.plot(metric) for metric in ("exact_match", "first_token")]
    sections = [
        Section("Which heads carry an instruction", heads, [*maps, effects.to_dataframe().head(10)]),
        Section("The vectors", summed, [plot_similarity(vectors), *(search.plot() for search in searches.values())]),
        Section("Steering: nothing asked, the vector in and out", bare, list(steered.values())),
        Section(
            "How well it works",
            f"{split}; bars are 95 % intervals.",
            [*bars, scores.gains("exact_match"), scores.to_dataframe()],
        ),
    ]
    built_in = " in SmolLM2-135M-Instruct" if effects.metadata["model"] == "smollm2" else ""
    about = {key: str(value) for key, value in effects.metadata.items()}
    options = {"title": f"Instruction vectors{built_in}", "summary": _summary(scores), "sections": sections}
    return write_report(out, **options, about=about)


def _summary(scores: Evaluation) -> str:
    gains = scores.gains("exact_match")
    average = gains[gains["task"] == "average"].set_index("condition")
    lines = [f"{name}: {row.gain:+.0%} [{row.low:+.0%}, {row.high:+.0%}]" for name, row in average.iterrows()]
    return f"Exact match against no vector, mean of {len(scores.task_names)} tasks: " + "; ".join(lines) + "."

"""`ivlens demo`: everything once on a real model, in a few minutes, ending in a report."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

from ivlens.common.processes import hidden
from ivlens.common.storage import write_text
from ivlens.models.backends import backend_of
from ivlens.patching import HeadEffects, locate_heads
from ivlens.plots import plot_similarity
from ivlens.report import BALANCE, SIDE_BY_SIDE, Section, side_by_side, write_figure, write_report
from ivlens.steering.evaluation import Evaluation, evaluate
from ivlens.steering.generate import Generations, generate
from ivlens.steering.search import InjectionSearch
from ivlens.steering.tuning import tune_injection
from ivlens.tasks import TaskSuite, load_tasks
from ivlens.tasks.prompts import build_prompts
from ivlens.vectors.extraction import extract_vector
from ivlens.vectors.vector import InstructionVector

__all__ = ["DEMO_TASKS", "run_demo"]

# Chosen by measuring all built-in tasks on the built-in model: those it does with ten demonstrations.
DEMO_TASKS = ("present_past", "singular_plural", "last_of_list", "capitalize", "lowercase")
SCALES = (1.0, 2.0, 3.0)
CONSTRAINT = "title"  # an instruction on the form of answers that the built-in model follows
TOLD = {"style": "chat", "shots": 0, "instruction": True}
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
        write_text(out / "generations.json", json.dumps(tables, ensure_ascii=False, indent=1) + "\n")
    with _timed("an instruction on the form", seconds):
        try:
            constraint = Constraint.study(model, out / CONSTRAINT, seed)
        except ValueError as error:  # another model: without a chat template, or one that doesn't follow it
            constraint = str(error)
    (out / "heatmap.png").unlink(missing_ok=True)
    with suppress(RuntimeError):  # where no browser can draw it, the report has it anyway
        write_figure(effects.plot(), out / "heatmap.png")
    write_text(out / "seconds.json", json.dumps(seconds, indent=1) + "\n")
    return _report(out, effects, searches, vectors, scores, steered, constraint)


@dataclass(frozen=True)
class Constraint:
    """An instruction on the form of answers: its heads, where its vector acts best, and what that does."""

    effects: HeadEffects
    search: InjectionSearch
    scores: Evaluation

    @classmethod
    def study(cls, model: Any, out: Path, seed: int) -> Constraint:
        """Few prompts and short answers: it is a demo."""
        task, n_layers = load_tasks(CONSTRAINT)[CONSTRAINT], backend_of(model).n_layers
        short: dict[str, Any] = {"max_new_tokens": 24, "seed": seed}
        effects = locate_heads(model, task, **TOLD, n_prompts=6, n_mean=12, answer_tokens=4, **short)
        vector = extract_vector(model, task, effects.top(6), way="difference", **TOLD, n_prompts=12, seed=seed)
        # A title is decided when the answer begins, late in the model.
        tries = {"layers": [3 * n_layers // 4], "scales": (2.0, 4.0), "positions": "last", "n_prompts": 6}
        with _edge_is_said():
            search = tune_injection(model, task, vector, style="chat", **tries, **short, progress=False)
        options = {"controls": ("random vector",), "draws": 1, "n_prompts": 8}
        scores = evaluate(model, task, vectors=search.best, style="chat", **options, **short)
        effects.save(out / "effects.safetensors")
        search.best.save(out / "vector")
        scores.save(out / "evaluation.json")
        return cls(effects, search, scores)

    def section(self) -> Section:
        """Of the report: answers side by side, numbers, heads and where the vector was tried."""
        task, own = load_tasks(CONSTRAINT)[CONSTRAINT], self.effects.metadata["own_answers"][CONSTRAINT]
        heads = (
            f"Told “{task.instructions[0]}” in the chat template, no demonstrations. Answers are free, and a program decides "
            f"whether they follow. Heads are located by the model's own answers that do ({own['kept']} of {own['asked']} "
            "questions). The vector is what the six strongest write when told, minus what they write when not. It is "
            f"added at the last prompt token after layer {self.search.best.layer}, at a scale that six validation questions chose; test "
            "questions and the wordings of their instruction are others."
        )
        numbers = self.scores.to_dataframe()
        met = numbers[numbers["metric"] == "met"].drop(columns=["task", "metric"])
        about = "The share of answers that follow, with 95 % intervals: few questions, so wide ones."
        items = [side_by_side(self.scores, CONSTRAINT), about, met, BALANCE, self.scores.plot("balance")]
        figures = [self.scores.balance().drop(columns="task"), self.effects.plot(), self.search.plot()]
        return Section(
            f"The form of an answer: {task.instructions[0]}", f"{heads}\n\n{SIDE_BY_SIDE}", [*items, *figures]
        )

    def summary(self) -> str:
        """A sentence for the report's beginning."""
        frame = self.scores.to_dataframe().query("metric == 'met'").set_index("condition")
        bare = {"no vector": "without", "vector": "with the vector", "random vector": "with a random one"}
        told = {"told": "unsteered", "told − vector": "less the vector", "told − random vector": "less a random one"}
        shares = [
            ", ".join(f"{text} {frame['mean'][name]:.0%}" for name, text in part.items()) for part in (bare, told)
        ]
        asked = f"Answers in the form of “{CONSTRAINT}” to {frame['n']['vector']:.0f} questions"
        return f"{asked}: {shares[0]}; where it is asked for, {shares[1]}."


@contextmanager
def _edge_is_said() -> Iterator[None]:
    """By the report, so that tuning needn't warn of it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="the best scale stands at the edge")
        yield


@contextmanager
def _timed(what: str, seconds: dict[str, float]) -> Iterator[None]:
    start = perf_counter()
    yield
    seconds[what] = round(perf_counter() - start, 1)


def _vectors(model: Any, tasks: TaskSuite, heads: list, seed: int) -> dict[str, InjectionSearch]:
    from tqdm.auto import tqdm

    searches = {}
    for task in tqdm(tasks.values(), desc="vectors", disable=hidden(True)):
        vector = extract_vector(model, task, heads, n_prompts=20, seed=seed)
        layers = range(0, vector.metadata["signature"]["n_layers"], 2)
        with _edge_is_said():
            tries = {"layers": layers, "scales": SCALES, "n_prompts": 20}
            searches[task.name] = tune_injection(model, task, vector, **tries, progress=False)
    return searches


def _report(
    out: Path,
    effects: HeadEffects,
    searches: dict[str, InjectionSearch],
    vectors: dict[str, InstructionVector],
    scores: Evaluation,
    steered: dict[str, Generations],
    constraint: Constraint | str,
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
    summary = _summary(scores)
    if isinstance(constraint, Constraint):
        sections.append(constraint.section())
        summary += f"\n\n{constraint.summary()}"
    else:
        sections.append(Section("The form of an answer", f"Not shown: {constraint}"))
    built_in = " in SmolLM2-135M-Instruct" if effects.metadata["model"] == "smollm2" else ""
    about = {key: str(value) for key, value in effects.metadata.items()}
    options = {"title": f"Instruction vectors{built_in}", "summary": summary, "sections": sections}
    return write_report(out, **options, about=about)


def _summary(scores: Evaluation) -> str:
    gains = scores.gains("exact_match")
    average = gains[gains["task"] == "average"].set_index("condition")
    lines = [f"{name}: {row.gain:+.0%} [{row.low:+.0%}, {row.high:+.0%}]" for name, row in average.iterrows()]
    return f"Exact match against no vector, mean of {len(scores.task_names)} tasks: " + "; ".join(lines) + "."

"""Scores per task with and without vectors, with controls beside every gain and confidence intervals on everything."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from tqdm.auto import tqdm

from ivlens.common.hints import typed
from ivlens.common.processes import hidden
from ivlens.common.statistics import bootstrap_difference, bootstrap_mean, wilson
from ivlens.common.storage import read_json, write_json
from ivlens.common.tables import table_html
from ivlens.models.backends import backend_of
from ivlens.running.injection import Injection
from ivlens.steering.compliance import Unsteered, balance_table, score_free, told_by
from ivlens.steering.controls import CONTROLS, with_controls
from ivlens.steering.generate import Generations
from ivlens.steering.scoring import Condition, score_right
from ivlens.tasks.prompts import build_prompts
from ivlens.tasks.suite import as_suite
from ivlens.tasks.task import Task
from ivlens.vectors.vector import InstructionVector

if TYPE_CHECKING:
    import plotly.graph_objects as go

__all__ = ["CONTROLS", "METRICS", "Evaluation", "evaluate"]

GOLD = ("first_token", "exact_match", "rouge_l", "probability")
FREE = ("met", "met_loose", "topic", "surprise")
METRICS = (*GOLD, *FREE)
BINARY = ("first_token", "exact_match", "met", "met_loose")
BASELINE = "no vector"  # nor, where answers are free, an instruction


@dataclass(frozen=True)
class Evaluation:
    """Scores of every prompt under every condition.

    Attributes
    ----------
    scores
        One row per task, condition, draw and prompt: the metrics, the answer, and the generated text.
    metadata
        Model and settings.
    """

    scores: pd.DataFrame
    metadata: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if "query" not in self.scores:  # as in older files
            query = self.scores["input" if "input" in self.scores else "prompt"]
            object.__setattr__(self, "scores", self.scores.assign(query=query))

    @property
    def task_names(self) -> list[str]:
        return list(dict.fromkeys(self.scores["task"]))

    @property
    def conditions(self) -> list[str]:
        return list(dict.fromkeys(self.scores["condition"]))

    @property
    def metrics(self) -> list[str]:
        return [m for m in METRICS if m in self.scores]

    def __getitem__(self, condition: str) -> pd.DataFrame:
        """The rows of `scores` of a condition, which may be typed in ASCII: `"told - vector"` for `"told − vector"`."""
        return self.scores[self.scores["condition"] == typed(condition, self.conditions, "condition")]

    def to_dataframe(self) -> pd.DataFrame:
        """One row per task, condition and metric: mean, 95 % interval (Wilson for hits, else bootstrap) and n, how many queries."""
        rows = []
        for (task, condition), part in self.scores.groupby(["task", "condition"], sort=False):
            for metric in self.metrics:
                of_prompts = part.groupby(["prompt", "query"], sort=False)[metric].mean()  # over draws
                if of_prompts.isna().all():  # of another kind of task
                    continue
                values, asked = of_prompts.to_numpy(float), of_prompts.index.get_level_values("query").tolist()
                low, high = wilson(values, asked) if metric in BINARY else bootstrap_mean([values], [asked])
                row = {"task": task, "condition": condition, "metric": metric, "mean": values.mean()}
                rows.append({**row, "low": low, "high": high, "n": len(set(asked))})
        return pd.DataFrame(rows)

    def balance(self) -> pd.DataFrame:
        """Of free answers, one row per task and condition: the constraint met, on topic and fluent (shares of what told answers
        reach, at most 1), their harmonic mean, and perplexity; see `compliance`."""
        if "met" not in self.metrics:
            raise ValueError(f"no free answers were scored; there are {', '.join(self.metrics)}")
        return balance_table(self.scores[self.scores["met"].notna()])

    def answers(self, task: str | None = None) -> Generations:
        """What was written, side by side: one row per prompt, one column per condition (of random controls, the first draw).

        `task`: which; default: the first."""
        some = self.scores[(self.scores["task"] == (task or self.task_names[0])) & (self.scores["draw"] == 0)]
        table = some.pivot(index="prompt", columns="condition", values="text")
        asked = some.drop_duplicates("prompt").set_index("prompt")["input"][table.index].tolist()
        return Generations(asked, {name: table[name].tolist() for name in self.conditions if name in table})

    def gains(self, metric: str | None = None) -> pd.DataFrame:
        """Each condition minus no vector, prompt by prompt, per task and on average (95 % paired bootstrap over queries).

        `metric`: one of `metrics`; default: the first."""
        metric = metric or self.metrics[0]
        if metric not in self.metrics:
            raise ValueError(f"metric={metric!r} was not measured; there are {', '.join(self.metrics)}")
        prompts = ["task", "prompt", "query"]
        measured = self.scores[self.scores[metric].notna()]  # of tasks of this kind
        table = measured.pivot_table(index=prompts, columns="condition", values=metric, sort=False)
        rows = []
        for condition in measured["condition"].unique():
            if condition == BASELINE:
                continue
            parts = {}
            for task in measured["task"].unique():
                pair = table.loc[task, [condition, BASELINE]]
                if pair[condition].notna().any():
                    parts[task] = pair[condition] - pair[BASELINE]
                    if parts[task].isna().any():
                        both = f"{condition!r} and {BASELINE!r} were not asked the same prompts of task {task!r}"
                        raise ValueError(f"{both}: gains need pairs; evaluate both in one call")
            for name, tasks in [*((task, [task]) for task in parts), ("average", list(parts))]:
                values = [parts[task].to_numpy(float) for task in tasks]
                asked = [parts[task].index.get_level_values("query").tolist() for task in tasks]
                low, high = (bootstrap_difference if metric in BINARY else bootstrap_mean)(values, asked)
                mean, n = sum(v.mean() for v in values) / len(values), sum(len(set(x)) for x in asked)
                rows.append({"task": name, "condition": condition, "gain": mean, "low": low, "high": high, "n": n})
        return pd.DataFrame(rows)

    def plot(self, metric: str | None = None) -> go.Figure:
        """Bars per task: every condition with its interval; by default of the first `metric`. `balance`: of free answers, its parts."""
        from ivlens.plots import plot_evaluation

        return plot_evaluation(self, metric)

    def save(self, path: str | Path) -> Path:
        """Save to `path`, one JSON file."""
        return write_json(path, "evaluation", {"metadata": self.metadata, "scores": self.scores.to_dict("records")})

    @classmethod
    def load(cls, path: str | Path) -> Evaluation:
        """Load from `path` what `save` wrote."""
        content = read_json(path, "evaluation")
        return cls(pd.DataFrame(content["scores"]), content["metadata"])

    def _table(self) -> pd.DataFrame:
        frame = self.to_dataframe()
        forms = {metric: "{:.2f}" if metric in ("topic", "surprise") else "{:.1%}" for metric in self.metrics}
        shown = [[forms[x.metric].format(y) for y in (x.mean, x.low, x.high)] for x in frame.itertuples()]
        frame["shown"] = [f"{mean} [{low}, {high}]" for mean, low, high in shown]
        rows = ["task", "condition"]
        return frame.pivot_table("shown", rows, "metric", aggfunc="first", sort=False)[self.metrics]

    def __repr__(self) -> str:
        return f"{self._title()}\n{self._table().to_string()}"

    def _repr_html_(self) -> str:
        return table_html(self._table(), title=self._title())

    def _title(self) -> str:
        return f"Evaluation({len(self.task_names)} tasks, {self.metadata.get('split')} split)"


def evaluate(
    model: Any,
    tasks: Task | Iterable[Task] | Mapping[str, Task],
    *,
    vectors: InstructionVector | Mapping[str, InstructionVector] | None = None,
    shots: int = 0,
    instruction: bool | str | int = False,
    style: str = "qa",
    split: str = "test",
    n_prompts: int | None = None,
    layer: int | None = None,
    scale: float | None = None,
    positions: str | None = None,
    mode: str = "sum",
    how: str | None = None,
    template: Mapping[str, Any] | None = None,
    controls: Sequence[str] = CONTROLS,
    draws: int = 2,
    reference_shots: int | None = None,
    metrics: Sequence[str] | None = None,
    max_new_tokens: int = 40,
    reference: Any = None,
    batch_size: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Evaluation:
    """Score tasks without a vector, with one, and with its controls.

    Parameters
    ----------
    model
        A hooked model, such as `load_model` gives.
    tasks
        A task, a list of tasks, or tasks by name, such as `load_tasks` gives.
    vectors
        One vector for all tasks, or one per task; layer and scale are the vector's own unless given (choose them on the
        validation split with `tune_injection`).
    shots, instruction, style, template
        How the prompts look; see `build_prompts`.
    split
        `train`, `valid` or `test`: where the prompts' queries come from.
    n_prompts
        Prompts per task; None for the whole split.
    layer, scale, positions, mode, how
        As in `inject`.
    controls
        Beside the vector: `random vector` (same norm), `random heads` (as many others' shares), `other task` (the next
        task's vector), all at the vector's layer and scale. `()` for none.
    draws
        How often the random controls are drawn, anew for every task; a prompt's score is the mean over draws.
    reference_shots
        Also score prompts with this many demonstrations and no vector.
    metrics
        `first_token` (the answer's first token is ranked first), `exact_match` and `rouge_l` (F1) of the greedily generated
        answer, `probability` of the whole answer. Of free answers always `met` and `met_loose` (the constraint), `topic` and
        `surprise` (nats per token; see `compliance`).
    max_new_tokens
        How long free answers may be, in tokens.
    reference
        Of free answers: the model whose answers are the content, and which is surprised; None for the model itself.
    batch_size
        Prompts per forward pass; None for as many as there is room for. Halved where memory runs out.
    seed
        Of all that is drawn at random; global random states are left alone.
    progress
        Show a progress bar.

    Notes
    -----
    Tasks with a check are asked without and with their instruction, whatever `instruction` says: `no vector` is the bare question,
    `told` with it, `vector` and its controls act on bare questions, `told + vector`, `told − vector` and `told − random vector` on
    told ones.

    Raises
    ------
    ValueError
        If a metric or control is unknown, or a task has no vector.
    """
    suite = as_suite(tasks)
    backend = backend_of(model)
    kinds = {task.is_checked for task in suite.values()}
    measurable = (*(GOLD if False in kinds else ()), *(FREE if True in kinds else ()))
    if False not in kinds and reference_shots is not None:
        raise ValueError("reference_shots is for tasks with one right answer, and these have free ones; leave it out")
    gold = [name for name in metrics or () if name in GOLD] or GOLD
    for what, given, known in (("metric", metrics or (), measurable), ("control", controls, CONTROLS)):
        if unknown := [name for name in given if name not in known]:
            raise ValueError(f"{what} {unknown[0]!r} is unknown; choose from {', '.join(known)}")
    if isinstance(vectors, InstructionVector):
        vectors = dict.fromkeys(suite, vectors)
    if vectors is not None and (missing := [name for name in suite if name not in vectors]):
        raise ValueError(f"no vector for task(s) {', '.join(missing)}; extract one each with ivl.extract_vector")
    look = {"instruction": instruction, "style": style, "split": split, "template": template, "seed": seed}
    options: dict[str, Any] = {"layer": layer, "scale": scale, "positions": positions, "mode": mode, "how": how}
    lengths = {"max_new_tokens": max_new_tokens, "batch_size": batch_size}
    rows: list[dict[str, Any]] = []
    with tqdm(total=len(suite), desc="evaluating", disable=hidden(progress)) as bar:
        for task in suite.values():
            bar.set_postfix_str(task.name)
            conditions: dict[Condition, Injection | None] = {(BASELINE, 0): None}
            if vectors is not None:
                drawn = with_controls(model, task, vectors, controls, mode=mode, draws=draws, seed=seed)
                for name, some in drawn.items():
                    conditions |= {(name, i): Injection.of(backend, v, **options) for i, v in enumerate(some)}
            if task.is_checked:
                again = [{**look, "instruction": x, "shots": shots} for x in (False, told_by(instruction))]
                asked = [build_prompts(task, n=n_prompts, **x) for x in again]
                unsteered = Unsteered(backend_of(reference or model), asked[0], **lengths)
                rows += score_free(backend, task.name, asked, conditions, unsteered, lengths)
                bar.update()
                continue
            asked = [(shots, conditions)]
            if reference_shots is not None:
                asked.append((reference_shots, {(f"{reference_shots} demonstrations", 0): None}))
            for n_shots, some in asked:
                prompts = build_prompts(task, n=n_prompts, shots=n_shots, **look)
                rows += score_right(backend, task, prompts, some, gold, batch_size)
            bar.update()
    about = {"model": backend.name, "shots": shots, **look, **options}
    if True in kinds:
        about |= {"max_new_tokens": max_new_tokens, "reference": backend_of(reference or model).name}
    return Evaluation(pd.DataFrame(rows), about)

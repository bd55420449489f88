"""What patching single heads did: effects per prompt, layer and head, and statistics over them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from ivlens.common.statistics import benjamini_hochberg, bootstrap_mean, resampled_means, sign_flip, standard_error
from ivlens.common.storage import read_tensors, write_tensors
from ivlens.common.tables import table_html
from ivlens.models.head import Head

if TYPE_CHECKING:
    import plotly.graph_objects as go

__all__ = ["HeadEffects"]

KIND = "head effects"


@dataclass(frozen=True)
class HeadEffects:
    """Causal indirect effects of every head.

    Attributes
    ----------
    values
        CIE per prompt, [prompt layer head], in units of `metric`.
    baseline
        The metric on the unpatched counterfactual prompts, [prompt].
    tasks
        Task of each prompt.
    metric
        What effects are measured in; see `locate_heads`.
    metadata
        Model and settings.
    queries
        What each prompt asks: prompts of one query count once in every statistic. Empty: each prompt is its own.
    """

    values: Float[Tensor, "prompt layer head"]
    baseline: Float[Tensor, " prompt"]
    tasks: tuple[str, ...]
    metric: str = "probability"
    metadata: dict[str, Any] = field(default_factory=dict)
    queries: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        n = len(self.values), len(self.baseline), len(self.tasks)
        if len(set(n)) > 1:
            raise ValueError(f"{n[0]} effects, {n[1]} baselines and {n[2]} task names don't match")
        if self.queries and len(self.queries) != n[0]:
            raise ValueError(f"{n[0]} effects and {len(self.queries)} queries don't match")

    @property
    def task_names(self) -> list[str]:
        return list(dict.fromkeys(self.tasks))

    def of(self, task: str) -> HeadEffects:
        """The effects of the prompts of one `task`."""
        if task not in self.tasks:
            raise KeyError(f"no effects of task {task!r}; there are {', '.join(self.task_names)}")
        rows = [i for i, name in enumerate(self.tasks) if name == task]
        queries = tuple(self.queries[i] for i in rows) if self.queries else ()
        some = {"values": self.values[rows], "baseline": self.baseline[rows], "queries": queries}
        return replace(self, tasks=(task,) * len(rows), **some)

    # -- statistics -------------------------------------------------------------------------------------------------
    def mean(self, task: str | None = None) -> Float[Tensor, "layer head"]:
        """Average indirect effect (AIE, IV §3): over prompts, then over tasks with equal weight, or of one `task`."""
        if task is not None:
            return self.of(task).values.mean(0)
        return torch.stack([self.of(name).values.mean(0) for name in self.task_names]).mean(0)

    def n_queries(self, task: str | None = None) -> int:
        """Different queries behind the effects, or those of one `task`: what the statistics below are over."""
        return sum(len(set(queries)) for queries in self._groups(task)[1])

    def stderr(self, task: str | None = None) -> Float[Tensor, "layer head"]:
        """Standard error of the mean over queries, of all tasks (taken as fixed) or one `task`. NaN, with a warning, where one has
        one query only."""
        return torch.from_numpy(standard_error(*self._groups(task))).float()

    def interval(
        self, task: str | None = None, *, level: float = 0.95, n_bootstrap: int = 1000, seed: int = 0
    ) -> tuple[Float[Tensor, "layer head"], Float[Tensor, "layer head"]]:
        """Percentile bootstrap interval of the mean, resampling queries within each task.

        Parameters
        ----------
        task
            One task; None for all.
        level
            Share of the resampled means inside, 0 to 1.
        n_bootstrap
            Resamples.
        seed
            Of all that is drawn at random; global random states are left alone.
        """
        ends = bootstrap_mean(*self._groups(task), level=level, n_bootstrap=n_bootstrap, seed=seed)
        return tuple(torch.from_numpy(end).float() for end in ends)

    def pvalue(
        self, task: str | None = None, *, corrected: bool = False, n_flips: int = 10_000, seed: int = 0
    ) -> Float[Tensor, "layer head"]:
        """Two-sided p-value of the mean against zero: effects' signs flipped query by query, all flips where there are few.

        Parameters
        ----------
        task
            One task; None for all.
        corrected
            For the number of heads, by Benjamini and Hochberg: of the heads with p ≤ α, a share α is expected to have no effect.
        n_flips
            Random flips of all signs, where there are more than that.
        seed
            Of all that is drawn at random; global random states are left alone.
        """
        p = sign_flip(*self._groups(task), n_flips=n_flips, seed=seed)
        return torch.from_numpy(benjamini_hochberg(p) if corrected else p).float()

    def stability(
        self, k: int = 10, task: str | None = None, *, n_bootstrap: int = 1000, seed: int = 0
    ) -> Float[Tensor, "layer head"]:
        """How often each head is among the k strongest when queries are resampled, 0 to 1; its mean over `top(k)` is the share of
        the top k that resampling keeps. NaN where a task has one query only.

        Parameters
        ----------
        k
            How many heads count as strong.
        task
            One task; None for all.
        n_bootstrap
            Resamples.
        seed
            Of all that is drawn at random; global random states are left alone.
        """
        means = torch.from_numpy(resampled_means(*self._groups(task), n_bootstrap=n_bootstrap, seed=seed))
        if means.isnan().any():
            return torch.full(means.shape[1:], torch.nan)
        chosen = means.flatten(1).argsort(dim=1, descending=True, stable=True)[:, :k]
        return (chosen.flatten().bincount(minlength=means[0].numel()) / n_bootstrap).view(means.shape[1:])

    def _groups(self, task: str | None) -> tuple[list[np.ndarray], list[tuple[str, ...] | range]]:
        """Effects and queries, task by task."""
        parts = [self.of(name) for name in (self.task_names if task is None else [task])]
        return [x.values.double().numpy() for x in parts], [x.queries or range(len(x.values)) for x in parts]

    def top(self, k: int = 10, task: str | None = None) -> list[Head]:
        """The `k` heads with the highest average indirect effect: the instruction heads S, strongest first.

        Universal (over all tasks) by default, or of one `task`.
        """
        mean = self.mean(task)
        if not 1 <= k <= mean.numel():
            raise ValueError(f"k={k} is out of range: there are {mean.numel()} heads")
        order = mean.flatten().argsort(descending=True, stable=True)[:k].tolist()
        return [Head(i // mean.shape[1], i % mean.shape[1]) for i in order]

    # -- looking at it, keeping it ----------------------------------------------------------------------------------
    def to_dataframe(self, task: str | None = None) -> pd.DataFrame:
        """One row per head, strongest first, over all tasks or of one `task`: mean, standard error, 95 % interval, p-value, the same
        corrected for the number of heads (Benjamini and Hochberg), and `stability` among the ten strongest."""
        low, high = self.interval(task)
        columns = {
            "aie": self.mean(task),
            "stderr": self.stderr(task),
            "low": low,
            "high": high,
            "p": self.pvalue(task),
            "p_corrected": self.pvalue(task, corrected=True),
            "stability": self.stability(task=task),
        }
        frame = pd.DataFrame(product(*map(range, self.values.shape[1:])), columns=["layer", "head"])
        frame = frame.assign(**{name: x.flatten().tolist() for name, x in columns.items()})
        return frame.sort_values("aie", ascending=False, ignore_index=True)

    def plot(self, kind: str = "mean", *, task: str | None = None) -> go.Figure:
        """Heatmap, layer × head, by `kind`: `mean`, `stderr` (both over all tasks, or of one `task`), or `tasks` for one map per task."""
        from ivlens.plots import plot_effects

        return plot_effects(self, kind, task=task)

    def save(self, path: str | Path) -> Path:
        """Save to `path`, one `.safetensors` file."""
        names = {"tasks": list(self.tasks), "queries": list(self.queries)}
        about = {"kind": KIND, **names, "metric": self.metric, "metadata": self.metadata}
        return write_tensors(path, {"values": self.values, "baseline": self.baseline}, about)

    @classmethod
    def load(cls, path: str | Path) -> HeadEffects:
        """Load from `path` what `save` wrote."""
        tensors, about = read_tensors(path, kind=KIND)
        names = {"tasks": tuple(about["tasks"]), "queries": tuple(about.get("queries", ()))}  # older files have none
        return cls(tensors["values"], tensors["baseline"], metric=about["metric"], metadata=about["metadata"], **names)

    def __repr__(self) -> str:
        (n, layers, heads), mean, tasks = self.values.shape, self.mean(), self.task_names
        what = tasks[0] if len(tasks) == 1 else f"{len(tasks)} tasks"
        n = f"{n} prompts" if self.n_queries() == n else f"{n} prompts of {self.n_queries()} queries"
        few, stable = self.top(min(10, mean.numel())), self.stability()
        best = ", ".join(f"{head} {mean[head]:+.3f}" for head in few[:5])
        kept = sum(stable[head].item() for head in few) / len(few)
        best += f"; resampled, {kept:.0%} of the top {len(few)} stay" if kept == kept else ""
        return f"HeadEffects({what}, {n}, {layers} layers × {heads} heads, {self.metric}; strongest: {best})"

    def _repr_html_(self) -> str:
        return table_html(self.to_dataframe().round(4), title=repr(self))

"""What patching single heads did: effects per prompt, layer and head, and statistics over them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from ivlens.common.storage import read_tensors, write_tensors
from ivlens.models.head import Head

if TYPE_CHECKING:
    import pandas as pd
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
    """

    values: Float[Tensor, "prompt layer head"]
    baseline: Float[Tensor, " prompt"]
    tasks: tuple[str, ...]
    metric: str = "probability"
    metadata: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not len(self.values) == len(self.baseline) == len(self.tasks):
            raise ValueError(
                f"{len(self.values)} effects, {len(self.baseline)} baselines and {len(self.tasks)} task names don't match"
            )

    @property
    def task_names(self) -> list[str]:
        return list(dict.fromkeys(self.tasks))

    def of(self, task: str) -> HeadEffects:
        """The effects of one task's prompts."""
        if task not in self.tasks:
            raise KeyError(f"no effects of task {task!r}; there are {', '.join(self.task_names)}")
        rows = [i for i, name in enumerate(self.tasks) if name == task]
        return HeadEffects(self.values[rows], self.baseline[rows], (task,) * len(rows), self.metric, self.metadata)

    # -- statistics -------------------------------------------------------------------------------------------------
    def mean(self, task: str | None = None) -> Float[Tensor, "layer head"]:
        """Average indirect effect (AIE, IV §3): over prompts, then over tasks with equal weight."""
        if task is not None:
            return self.of(task).values.mean(0)
        return torch.stack([self.of(name).values.mean(0) for name in self.task_names]).mean(0)

    def stderr(self, task: str | None = None) -> Float[Tensor, "layer head"]:
        """Standard error of the mean over prompts (tasks taken as fixed)."""
        if task is not None:
            values = self.of(task).values
            return values.std(0) / len(values) ** 0.5
        each = torch.stack([self.stderr(name) for name in self.task_names])
        return each.square().sum(0).sqrt() / len(each)

    def interval(
        self, task: str | None = None, *, level: float = 0.95, n_bootstrap: int = 1000, seed: int = 0
    ) -> tuple[Float[Tensor, "layer head"], Float[Tensor, "layer head"]]:
        """Percentile bootstrap interval of the mean, resampling prompts within each task."""
        generator = torch.Generator().manual_seed(seed)
        names = self.task_names if task is None else [task]
        means = torch.zeros(n_bootstrap, *self.values.shape[1:])
        for name in names:
            values = self.of(name).values
            n = len(values)
            draws = torch.randint(n, (n_bootstrap, n), generator=generator)
            counts = torch.zeros(n_bootstrap, n).scatter_add_(1, draws, torch.ones(n_bootstrap, n))
            means += (counts @ values.float().flatten(1) / n).unflatten(1, values.shape[1:]) / len(names)
        tail = (1 - level) / 2
        low, high = torch.quantile(means, torch.tensor([tail, 1 - tail]), dim=0)
        return low, high

    def pvalue(self, task: str | None = None, *, n_flips: int = 2000, seed: int = 0) -> Float[Tensor, "layer head"]:
        """Two-sided p-value of the mean against zero: effects' signs flipped at random, prompt by prompt.

        Not corrected for the number of heads; the smallest value it can give is 1 / (n_flips + 1).
        """
        generator = torch.Generator().manual_seed(seed)
        names = self.task_names if task is None else [task]
        flipped = torch.zeros(n_flips, *self.values.shape[1:])
        for name in names:
            values = self.of(name).values
            signs = torch.randint(2, (n_flips, len(values)), generator=generator).float() * 2 - 1
            flipped += (signs @ values.float().flatten(1) / len(values)).unflatten(1, values.shape[1:]) / len(names)
        extreme = flipped.abs() >= self.mean(task).float().abs() - 1e-12
        return (extreme.sum(0) + 1) / (n_flips + 1)

    def top(self, k: int = 10, task: str | None = None) -> list[Head]:
        """The k heads with the highest average indirect effect: the instruction heads S, strongest first.

        Universal (over all tasks) by default, or of one task.
        """
        mean = self.mean(task)
        if not 1 <= k <= mean.numel():
            raise ValueError(f"k={k} is out of range: there are {mean.numel()} heads")
        order = mean.flatten().argsort(descending=True, stable=True)[:k].tolist()
        return [Head(i // mean.shape[1], i % mean.shape[1]) for i in order]

    # -- looking at it, keeping it ----------------------------------------------------------------------------------
    def to_dataframe(self, task: str | None = None) -> pd.DataFrame:
        """One row per head, strongest first: mean, standard error, 95 % interval, p-value."""
        import pandas as pd

        low, high = self.interval(task)
        columns = {
            "aie": self.mean(task),
            "stderr": self.stderr(task),
            "low": low,
            "high": high,
            "p": self.pvalue(task),
        }
        n_heads = self.values.shape[2]
        frame = pd.DataFrame({name: x.flatten().tolist() for name, x in columns.items()})
        frame.insert(0, "layer", [i // n_heads for i in range(len(frame))])
        frame.insert(1, "head", [i % n_heads for i in range(len(frame))])
        return frame.sort_values("aie", ascending=False, ignore_index=True)

    def plot(self, kind: str = "mean", *, task: str | None = None) -> go.Figure:
        """Heatmap, layer × head: `mean`, `stderr`, or `tasks` for one map per task."""
        from ivlens.plots import plot_effects

        return plot_effects(self, kind, task=task)

    def save(self, path: str | Path) -> Path:
        """Save to one `.safetensors` file."""
        about = {"kind": KIND, "tasks": list(self.tasks), "metric": self.metric, "metadata": self.metadata}
        return write_tensors(path, {"values": self.values, "baseline": self.baseline}, about)

    @classmethod
    def load(cls, path: str | Path) -> HeadEffects:
        """Load what `save` wrote."""
        tensors, about = read_tensors(path, kind=KIND)
        return cls(tensors["values"], tensors["baseline"], tuple(about["tasks"]), about["metric"], about["metadata"])

    def __repr__(self) -> str:
        n, layers, heads = self.values.shape
        mean = self.mean()
        best = ", ".join(f"{h} {mean[h]:+.3f}" for h in self.top(min(5, mean.numel())))
        tasks = self.task_names
        what = tasks[0] if len(tasks) == 1 else f"{len(tasks)} tasks"
        return f"HeadEffects({what}, {n} prompts, {layers} layers × {heads} heads, {self.metric}; strongest: {best})"

    def _repr_html_(self) -> str:
        import html

        return f"<p>{html.escape(repr(self))}</p>" + self.to_dataframe().head(10).round(4).to_html()

"""What putting the old vector back returns of what fine-tuning lost, beside its controls and its upper bound."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from ivlens.common.hints import typed
from ivlens.common.statistics import bootstrap_share, wilson
from ivlens.common.storage import read_json, write_json
from ivlens.common.tables import table_html

if TYPE_CHECKING:
    import numpy as np
    import plotly.graph_objects as go

__all__ = ["Recovery"]

BEFORE, BEFORE_STEERED, AFTER = "before", "before + vector", "after"
OLD, HEADS, MINUS, STATE = "old vector", "old vector, by heads", "old − new vector", "original state"
RANDOM, OTHER = "random vector", "other task"
_ENDS = (BEFORE, BEFORE_STEERED, AFTER)


@dataclass(frozen=True)
class Recovery:
    """Accuracy (whole answer, teacher-forced) of every test prompt under every condition.

    Attributes
    ----------
    scores
        One row per checkpoint, task, condition and prompt: `hit`, and `query`, what the prompt asks.
    choices
        One row per checkpoint, task and condition that had something to choose: `layer` and `scale`, from the validation
        split, and the accuracy there; and of the conditions `before` and `after`, with nothing injected.
    metadata
        Model and settings.
    """

    scores: pd.DataFrame
    choices: pd.DataFrame
    metadata: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if "query" not in self.scores:  # as in older files: each prompt is its own
            object.__setattr__(self, "scores", self.scores.assign(query=self.scores["prompt"]))

    @property
    def conditions(self) -> list[str]:
        return list(dict.fromkeys(self.scores["condition"]))

    def __getitem__(self, condition: str) -> pd.DataFrame:
        """The rows of `scores` of a condition, which may be typed in ASCII: `"old - new vector"` for `"old − new vector"`."""
        return self.scores[self.scores["condition"] == typed(condition, self.conditions, "condition")]

    def lost(self, least: float = 0.05) -> list[tuple[str, str]]:
        """(checkpoint, task) where accuracy on the validation split fell by `least` (a share of 1) or more: where there is something to
        recover, told without looking at the test split."""
        chosen = self.choices.pivot_table(index=["checkpoint", "task"], columns="condition", values="accuracy")
        return [key for key, row in chosen.iterrows() if row[BEFORE] - row[AFTER] >= least - 1e-9]

    def to_dataframe(self) -> pd.DataFrame:
        """One row per checkpoint, task and condition: accuracy with its 95 % Wilson interval, the share of the loss that
        returned, and whether there was a loss on the validation split."""
        lost, rows = set(self.lost()), []
        for (checkpoint, task), part in self.scores.groupby(["checkpoint", "task"], sort=False):
            means = part.groupby("condition")["hit"].mean()
            loss = means[BEFORE] - means[AFTER]
            for condition, rows_of in part.groupby("condition", sort=False):
                low, high = wilson(rows_of["hit"].tolist(), rows_of["query"].tolist())
                share = (means[condition] - means[AFTER]) / loss if loss > 0 and condition not in _ENDS else None
                row = {"checkpoint": checkpoint, "task": task, "condition": condition, "accuracy": means[condition]}
                row |= {"low": low, "high": high, "n": rows_of["query"].nunique(), "share": share}
                rows.append({**row, "lost": (checkpoint, task) in lost})
        return pd.DataFrame(rows)

    def shares(self, *, seed: int = 0) -> pd.DataFrame:
        """Share of the lost accuracy that each condition returns, over all (checkpoint, task) where it was lost on the
        validation split: summed gains over summed losses. 95 % bootstrap intervals over each task's prompts, which all
        checkpoints share, drawn by `seed`; tasks and checkpoints are taken as they are."""
        lost, pairs, rows = set(self.lost()), self._hits(), []
        pairs = pairs[[key[:2] in lost for key in pairs.index]]
        for condition in self.conditions if len(pairs) else ():
            if condition not in _ENDS:
                share, (before, after, restored), amounts = _share(pairs[[BEFORE, AFTER, condition]].dropna(), seed)
                row = {"condition": condition, **dict(zip(("share", "low", "high"), share)), "gain": restored - after}
                rows.append({**row, "loss": before - after, **amounts})
        columns = ["condition", "share", "low", "high", "gain", "loss", "pairs", "n"]
        return pd.DataFrame(rows, columns=columns)

    def kept(self, *, seed: int = 0) -> pd.DataFrame:
        """Whether the skill is still there: accuracy of the fine-tuned models with the old vector (and with its controls), over
        the base model's with it. One row per condition, 95 % bootstrap intervals, by `seed`, as in `shares`."""
        rows = []
        for condition in self.conditions:
            if condition not in _ENDS:
                known = self._hits()[[BEFORE_STEERED, condition]].dropna()
                known.insert(1, "nothing", 0.0)  # a share of the way from nothing to the base model with the vector
                share, (before, _, after), amounts = _share(known, seed)
                row = {"condition": condition, **dict(zip(("ratio", "low", "high"), share))}
                rows.append({**row, "base": before, "fine-tuned": after, **amounts})
        return pd.DataFrame(rows)

    def _hits(self) -> pd.DataFrame:
        """Conditions as columns, one row per checkpoint, task and prompt."""
        return self.scores.pivot(index=["checkpoint", "task", "prompt", "query"], columns="condition", values="hit")

    def plot(self, checkpoint: str | None = None) -> go.Figure:
        """Bars per task, every condition with its interval; mean over checkpoints unless `checkpoint` names one."""
        from ivlens.plots import plot_recovery

        return plot_recovery(self, checkpoint)

    def save(self, path: str | Path) -> Path:
        """Save to `path`, one JSON file."""
        frames = {name: getattr(self, name).to_dict("records") for name in ("scores", "choices")}
        return write_json(path, "recovery", {"metadata": self.metadata, **frames})

    @classmethod
    def load(cls, path: str | Path) -> Recovery:
        """Load from `path` what `save` wrote."""
        content = read_json(path, "recovery")
        return cls(pd.DataFrame(content["scores"]), pd.DataFrame(content["choices"]), content["metadata"])

    def __repr__(self) -> str:
        shares = self.shares()
        if shares.empty:
            return "Recovery(nothing was lost on the validation split)"
        told = ", ".join(f"{r.condition} {r.share:.0%} [{r.low:.0%}, {r.high:.0%}]" for r in shares.itertuples())
        pairs = shares["pairs"].max()
        return f"Recovery(share of the lost accuracy returned, {pairs} checkpoint-task pairs that lost some: {told})"

    def _repr_html_(self) -> str:
        return table_html(self.to_dataframe().round(3), title=repr(self), index=False)


def _share(hits: pd.DataFrame, seed: int) -> tuple[tuple[float, float, float], np.ndarray, dict[str, int]]:
    """`bootstrap_share` of three columns, their means, and how much is behind them. Hits are summed over checkpoints, which are
    answers to the same prompt."""
    parts = [part.groupby(level=["prompt", "query"]).sum() for _, part in hits.groupby(level="task")]
    groups = [part.to_numpy(float) for part in parts]
    asked = [part.index.get_level_values("query").tolist() for part in parts]
    pairs = hits.groupby(level=[0, 1]).ngroups
    amounts = {"pairs": pairs, "n": sum(len(set(x)) for x in asked)}
    return bootstrap_share(groups, asked, seed=seed), sum(group.mean(axis=0) for group in groups) / pairs, amounts

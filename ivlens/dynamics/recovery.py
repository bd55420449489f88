"""What putting the old vector back returns of what fine-tuning lost, beside its controls and its upper bound."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ivlens.statistics import bootstrap_share, wilson

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

__all__ = ["Recovery"]

BEFORE, BEFORE_STEERED, AFTER = "before", "before + vector", "after"
OLD, RANDOM, OTHER, HEADS, MINUS, STATE = (
    "old vector",
    "random vector",
    "other task",
    "old vector, by heads",
    "old − new vector",
    "original state",
)
_ENDS = (BEFORE, BEFORE_STEERED, AFTER)


@dataclass(frozen=True)
class Recovery:
    """Accuracy (whole answer, teacher-forced) of every test prompt under every condition.

    Attributes
    ----------
    scores
        One row per checkpoint, task, condition and prompt: `hit`.
    choices
        One row per checkpoint, task and condition that had something to choose: `layer` and `scale`, from the validation
        split, and the accuracy there; and of the conditions `before` and `after`, with nothing injected.
    """

    scores: pd.DataFrame
    choices: pd.DataFrame
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def conditions(self) -> list[str]:
        return list(dict.fromkeys(self.scores["condition"]))

    def lost(self, least: float = 0.05) -> list[tuple[str, str]]:
        """(checkpoint, task) where accuracy on the validation split fell by `least` or more: where there is something to
        recover, told without looking at the test split."""
        chosen = self.choices.pivot_table(index=["checkpoint", "task"], columns="condition", values="accuracy")
        return [key for key, row in chosen.iterrows() if row[BEFORE] - row[AFTER] >= least - 1e-9]

    def to_dataframe(self) -> pd.DataFrame:
        """One row per checkpoint, task and condition: accuracy with its 95 % Wilson interval, the share of the loss that
        returned, and whether there was a loss on the validation split."""
        import pandas as pd

        lost, rows = set(self.lost()), []
        for (checkpoint, task), part in self.scores.groupby(["checkpoint", "task"], sort=False):
            means = part.groupby("condition")["hit"].mean()
            for condition, hits in part.groupby("condition", sort=False)["hit"]:
                low, high = wilson(hits.tolist())
                row = {"checkpoint": checkpoint, "task": task, "condition": condition, "accuracy": hits.mean()}
                loss = means[BEFORE] - means[AFTER]
                share = (means[condition] - means[AFTER]) / loss if loss > 0 and condition not in _ENDS else None
                rows.append(
                    {
                        **row,
                        "low": low,
                        "high": high,
                        "n": len(hits),
                        "share": share,
                        "lost": (checkpoint, task) in lost,
                    }
                )
        return pd.DataFrame(rows)

    def shares(self, *, seed: int = 0) -> pd.DataFrame:
        """Share of the lost accuracy that each condition returns, over all (checkpoint, task) where it was lost on the
        validation split: summed gains over summed losses, 95 % bootstrap intervals over prompts (paired)."""
        import pandas as pd

        table = self.scores.pivot(index=["checkpoint", "task", "prompt"], columns="condition", values="hit")
        parts = {key: part for key, part in table.groupby(level=[0, 1]) if key in set(self.lost())}
        rows = []
        for condition in self.conditions:
            if condition in _ENDS or not parts:
                continue
            groups = [part[[BEFORE, AFTER, condition]].dropna().to_numpy(float) for part in parts.values()]
            groups = [g for g in groups if len(g)]
            share, low, high = bootstrap_share(groups, seed=seed)
            gain = sum(g[:, 2].mean() - g[:, 1].mean() for g in groups) / len(groups)
            loss = sum(g[:, 0].mean() - g[:, 1].mean() for g in groups) / len(groups)
            row = {"condition": condition, "share": share, "low": low, "high": high, "gain": gain, "loss": loss}
            rows.append({**row, "pairs": len(groups), "n": sum(map(len, groups))})
        columns = ["condition", "share", "low", "high", "gain", "loss", "pairs", "n"]
        return pd.DataFrame(rows, columns=columns)

    def kept(self, *, seed: int = 0) -> dict[str, float]:
        """Whether the skill is still there: accuracy of the fine-tuned model with the old vector, over the base model's
        with it; summed over all checkpoints and tasks, 95 % bootstrap interval over prompts."""
        table = self.scores.pivot(index=["checkpoint", "task", "prompt"], columns="condition", values="hit")
        groups = [p[[BEFORE_STEERED, OLD]].to_numpy(float) for _, p in table.groupby(level=[0, 1])]
        # As a share of the way from nothing to the base model's accuracy with the vector.
        ratio, low, high = bootstrap_share([_with_zero(g) for g in groups], seed=seed)
        before, after = (sum(g[:, i].mean() for g in groups) / len(groups) for i in (0, 1))
        return {"ratio": ratio, "low": low, "high": high, "before": before, "after": after, "n": sum(map(len, groups))}

    def plot(self, checkpoint: str | None = None) -> go.Figure:
        """Bars per task, every condition with its interval; mean over checkpoints unless one is named."""
        from ivlens.plots import plot_recovery

        return plot_recovery(self, checkpoint)

    def save(self, path: str | Path) -> Path:
        """Save to one JSON file."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        content: dict[str, Any] = {"kind": "recovery", "metadata": self.metadata}
        content |= {name: getattr(self, name).to_dict("records") for name in ("scores", "choices")}
        path.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        return path

    @classmethod
    def load(cls, path: str | Path) -> Recovery:
        """Load what `save` wrote."""
        import pandas as pd

        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is truncated or not JSON ({error})") from error
        if not isinstance(content, dict) or content.get("kind") != "recovery":
            raise ValueError(f"{path} holds no recovery that ivlens saved")
        return cls(pd.DataFrame(content["scores"]), pd.DataFrame(content["choices"]), content["metadata"])

    def __repr__(self) -> str:
        shares = self.shares()
        if shares.empty:
            return "Recovery(nothing was lost on the validation split)"
        told = ", ".join(f"{r.condition} {r.share:.0%} [{r.low:.0%}, {r.high:.0%}]" for r in shares.itertuples())
        pairs = shares["pairs"].max()
        return f"Recovery(share of the lost accuracy returned, {pairs} checkpoint-task pairs that lost some: {told})"

    def _repr_html_(self) -> str:
        import html

        return f"<p>{html.escape(repr(self))}</p>" + self.to_dataframe().round(3).to_html(index=False)


def _with_zero(pairs: Any) -> Any:
    import numpy as np

    return np.stack([pairs[:, 0], np.zeros(len(pairs)), pairs[:, 1]], axis=1)

"""What training did to instruction vectors: similarities, overlap and accuracy at every checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from ivlens.common.statistics import correlation, wilson
from ivlens.common.storage import read_json, write_json
from ivlens.common.tables import table_html
from ivlens.dynamics.snapshot import Snapshot

if TYPE_CHECKING:
    import plotly.graph_objects as go

__all__ = ["Change"]

FILE = "change.json"
PREDICTORS = ("iv_similarity", "hidden_similarity", "head_overlap", "effects_spearman", "weight_distance")


@dataclass(frozen=True)
class Change:
    """What training did, checkpoint by checkpoint; the first snapshot is the base's.

    Attributes
    ----------
    snapshots
        One per checkpoint.
    skipped
        Checkpoints that couldn't be opened, and why.
    metadata
        Model and settings, and what each answered prompt asks (`queries`, by task).
    """

    snapshots: tuple[Snapshot, ...]
    skipped: dict[str, str] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for s in self.snapshots:
            for task in self.task_names:
                if (n := len(s.accuracy[task])) != (n_base := len(self.asked(task))):
                    amounts = f"{s.label!r} answered {n} prompts of task {task!r}, {self.base.label!r} {n_base}"
                    raise ValueError(f"{amounts}; track them on the same prompts")

    @property
    def base(self) -> Snapshot:
        return self.snapshots[0]

    @property
    def task_names(self) -> list[str]:
        return self.base.task_names

    def asked(self, task: str) -> Sequence[Any]:
        """What each answered prompt of a `task` asks, the same at every checkpoint."""
        return self.metadata.get("queries", {}).get(task, range(len(self.base.accuracy[task])))

    def similarity(self) -> pd.DataFrame:
        """cos(θ⁰, θʲ) of every task (columns) at every checkpoint (rows), over the same heads (IV §5)."""
        rows = [[self.base.vectors[t].cosine(s.vectors[t]) for t in self.task_names] for s in self.snapshots]
        return pd.DataFrame(rows, index=[s.label for s in self.snapshots], columns=self.task_names)

    def head_similarity(self) -> pd.DataFrame:
        """The same per head: cos(z̄⁰ W_O⁰, z̄ʲ W_Oʲ), one row per checkpoint, task and head."""
        import torch

        rows = []
        for s in self.snapshots[1:]:
            for task in self.task_names:
                old, new = self.base.vectors[task], s.vectors[task]
                cosines = torch.nn.functional.cosine_similarity(old.shares, new.shares, dim=-1)
                about = {"checkpoint": s.label, "task": task}
                rows += [{**about, "head": str(h), "similarity": x} for h, x in zip(old.heads, cosines.tolist())]
        return pd.DataFrame(rows)

    def hidden_similarity(self) -> pd.DataFrame:
        """Cosine of the residual stream with θ⁰, one row per checkpoint, task and layer."""
        rows = []
        for s in self.snapshots:
            for task in self.task_names:
                about = {"checkpoint": s.label, "task": task}
                rows += [{**about, "layer": i, "similarity": x} for i, x in enumerate(s.hidden[task].tolist())]
        return pd.DataFrame(rows)

    def overlap(self, k: int = 10) -> pd.DataFrame:
        """Of the head sets: Jaccard index of the `k` strongest and Spearman's ρ of all effects, per checkpoint and task.

        The row of "all tasks" takes the universal heads. Empty where heads weren't located.
        """
        rows = []
        before = self.base.effects
        for s in self.snapshots[1:]:
            if before is None or s.effects is None:
                continue
            for task in [*self.task_names, None]:
                one, two = set(before.top(k, task)), set(s.effects.top(k, task))
                maps = [x.mean(task).flatten().tolist() for x in (before, s.effects)]
                rho = correlation(*maps, n_bootstrap=0)["spearman"]
                row = {"checkpoint": s.label, "task": task or "all tasks", "jaccard": len(one & two) / len(one | two)}
                rows.append({**row, "spearman": rho})
        return pd.DataFrame(rows, columns=["checkpoint", "task", "jaccard", "spearman"])

    def to_dataframe(self) -> pd.DataFrame:
        """One row per checkpoint and task: accuracy with its 95 % Wilson interval, and every similarity to the base."""
        similarity, overlap = self.similarity(), self.overlap().set_index(["checkpoint", "task"])
        rows = []
        for s in self.snapshots:
            for task in self.task_names:
                hits = s.accuracy[task].tolist()
                low, high = wilson(hits, self.asked(task))
                row = {"checkpoint": s.label, "step": s.step, "task": task, "accuracy": sum(hits) / len(hits)}
                row |= {"low": low, "high": high, "n": len(set(self.asked(task)))}
                row["log_probability"] = s.log_probability[task].mean().item()
                row["iv_similarity"] = similarity.loc[s.label, task]
                row["hidden_similarity"] = s.hidden[task].mean().item()
                here = overlap.loc[(s.label, task)] if (s.label, task) in overlap.index else {}
                row |= {"head_overlap": here.get("jaccard"), "effects_spearman": here.get("spearman")}
                rows.append({**row, "weight_distance": s.distance})
        return pd.DataFrame(rows)

    def correlations(self) -> pd.DataFrame:
        """How well each similarity tells how accuracy changed, over all (task, checkpoint) after the base (IV §5).

        R² of a straight line and Spearman's ρ with 95 % bootstrap intervals over tasks (over points where there are fewer
        than five); `weight_distance`, which knows nothing of tasks, is the baseline.
        Hidden similarity counts as its change from the base's, mean over layers.
        """
        points = self.points()
        told = [name for name in PREDICTORS if points[name].notna().any()]
        found = [correlation(points[name], points["accuracy_change"], groups=points["task"]) for name in told]
        return pd.DataFrame([{"predictor": name, **row} for name, row in zip(told, found)])

    def points(self) -> pd.DataFrame:
        """What `correlations` is over: `to_dataframe` after the base, with changes from the base."""
        frame = self.to_dataframe()
        start = frame[frame["checkpoint"] == self.base.label].set_index("task")
        frame = frame[frame["checkpoint"] != self.base.label].copy()
        frame["accuracy_change"] = frame["accuracy"] - frame["task"].map(start["accuracy"])
        frame["hidden_similarity"] -= frame["task"].map(start["hidden_similarity"])
        return frame.reset_index(drop=True)

    def plot(self, kind: str = "tasks") -> go.Figure:
        """By `kind`, `tasks`: similarity and accuracy per task; `matrix`: task × task cosines, before against after; `trajectory`: both
        over steps; `scatter`: similarity against accuracy; `hidden`: per layer; `effects`: maps before, after and apart."""
        from ivlens.plots import plot_change

        return plot_change(self, kind)

    def save(self, folder: str | Path) -> Path:
        """Save to `folder`: a file per snapshot, and `change.json`."""
        folder = Path(folder)
        names = [s.save(folder / f"snapshot-{i}.safetensors").name for i, s in enumerate(self.snapshots)]
        write_json(folder / FILE, "change", {"snapshots": names, "skipped": self.skipped, "metadata": self.metadata})
        return folder

    @classmethod
    def load(cls, folder: str | Path) -> Change:
        """Load from `folder` what `save` wrote."""
        content = read_json(Path(folder) / FILE, "change")
        snapshots = tuple(Snapshot.load(Path(folder) / name) for name in content["snapshots"])
        return cls(snapshots, content["skipped"], content["metadata"])

    def __repr__(self) -> str:
        frame, last = self.to_dataframe(), self.snapshots[-1]
        before, after = (frame[frame["checkpoint"] == s.label]["accuracy"].mean() for s in (self.base, last))
        cosine = self.similarity().loc[last.label].mean()
        skipped = f", {len(self.skipped)} left out" if self.skipped else ""
        amounts = f"{len(self.task_names)} tasks, base and {len(self.snapshots) - 1} checkpoint(s){skipped}"
        falls = f"accuracy {before:.1%} → {after:.1%}, mean cosine of the vectors {cosine:.3f}"
        return f"Change({amounts}; at {last.label}: {falls})"

    def _repr_html_(self) -> str:
        return table_html(self.to_dataframe().round(3), title=repr(self), index=False)

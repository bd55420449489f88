"""`ContinualResults`: what a continual-learning run gave."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from ivlens.common.storage import read_json, write_json
from ivlens.common.tables import table_html
from ivlens.continual.metrics import MEASURES, cut_in_forgetting, interval, resampled

if TYPE_CHECKING:
    import numpy as np
    import plotly.graph_objects as go

__all__ = ["ContinualResults"]

FRAMES = ("scores", "similarity", "costs")
REFERENCE = "lora"
CUT = "cut in forgetting"
SUMMARY = ("mean", "low", "high", "sd", "n_seeds")
IN_TABLE = ("OP", "BWT", "GP", "IP", "plasticity", "forgetting")


@dataclass(frozen=True)
class ContinualResults:
    """Scores of every prompt after every stage, by method and seed. Methods that aren't finished have NaN for what is missing.

    Attributes
    ----------
    scores
        One row per prompt: `method`, `seed`, `stage`, `task`, `kind` (`trained` or `general`), `shots`, `prompt`, `query`, `score`
        (0 to 1). The base model's rows have method `base`, seed 0 and stage 0. Prompts are the same in all of them.
    similarity
        One row per method, seed, stage and task: cosine of the task's instruction vector with the base model's. May be empty.
    costs
        One row per method, seed and stage: `seconds` of training, `teacher_seconds` of them, `trainable` weights, `kept_mb` on
        disk between stages, `peak_mb` of memory.
    metadata
        Model, `sequence` (the trained tasks in order) and settings.
    """

    scores: pd.DataFrame
    similarity: pd.DataFrame
    costs: pd.DataFrame
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def sequence(self) -> list[str]:
        return list(self.metadata["sequence"])

    @property
    def methods(self) -> list[str]:
        """All but the base model."""
        return [method for method in dict.fromkeys(self.scores["method"]) if method != "base"]

    def matrix(self, method: str) -> pd.DataFrame:
        """Mean score over prompts and seeds of one `method` after each stage (rows; 0 is the base) on each trained and general
        task."""
        frame = self.scores[self.scores["method"].isin(["base", self._known(method, "method")])]
        of_seeds = frame.groupby(["kind", "task", "shots", "stage", "seed"], sort=False)["score"].mean()
        table = of_seeds.groupby(level=["kind", "task", "shots", "stage"], sort=False).mean().unstack("stage")
        trained = [cell for task in self.sequence for cell in table.index if cell[:2] == ("trained", task)]
        cells = trained + [cell for cell in table.index if cell[0] == "general"]
        table = table.loc[cells].T.sort_index()
        table.columns = [t if kind == "trained" else f"{t}, {shots}-shot" for kind, t, shots in cells]
        return table

    def to_dataframe(self) -> pd.DataFrame:
        """One row per method and metric: mean over seeds, 95 % interval over prompts, standard deviation over seeds.

        The metrics are those of `ivlens.continual.metrics`, as shares of 1; OP is also what FVG calls FP. Intervals are a
        paired percentile bootstrap: 2000 resamples of the prompts, the same for all methods, seeds and stages.
        """
        rows = []
        for method, found in self._resampled.items():
            told = {metric: interval(values) for metric, values in found.items()}
            rows += [{"method": method, "metric": m, **x, "n_prompts": self._n_prompts(m)} for m, x in told.items()]
        return pd.DataFrame(rows)

    def by_seed(self) -> pd.DataFrame:
        """One row per finished method and seed: every metric."""
        seeds = sorted(set(self.scores.loc[self.scores["method"] != "base", "seed"]))
        rows = [
            {"method": method, "seed": seed, **{m: float(x[0, i]) for m, x in self._resampled[method].items()}}
            for method in self.methods
            for i, seed in enumerate(seeds)
        ]
        return pd.DataFrame(rows, columns=["method", "seed", *MEASURES]).dropna(subset=["OP"]).reset_index(drop=True)

    def versus(self, reference: str = REFERENCE) -> pd.DataFrame:
        """Each method minus `reference`, prompt by prompt, over the seeds that both have; columns as in `to_dataframe`.

        The last metric of each method is the cut in forgetting: 1 − its forgetting / the reference's, NaN where that is not
        above zero.
        """
        theirs = self._resampled[self._known(reference, "reference")]
        rows = []
        for method in self.methods:
            if method == reference:
                continue
            mine = self._resampled[method]
            found = {metric: interval(mine[metric] - theirs[metric]) for metric in MEASURES}
            found[CUT] = cut_in_forgetting(mine["forgetting"], theirs["forgetting"])
            about = {"method": method, "reference": reference}
            rows += [{**about, "metric": m, **x, "n_prompts": self._n_prompts(m)} for m, x in found.items()]
        return pd.DataFrame(rows, columns=["method", "reference", "metric", *SUMMARY, "n_prompts"])

    def pareto(self) -> list[str]:
        """The finished methods that none exceeds in both stability and plasticity (or equals in one and exceeds in the other)."""
        means = self.to_dataframe().pivot(index="method", columns="metric", values="mean").reindex(self.methods)
        points = means.reindex(columns=["stability", "plasticity"]).dropna()
        exceeded = [((points >= p).all(axis=1) & (points > p).any(axis=1)).any() for _, p in points.iterrows()]
        return [method for method, worse in zip(points.index, exceeded) if not worse]

    def table(self) -> pd.DataFrame:
        """One row per method, in points with 95 % intervals; the cut in forgetting is against plain LoRA, where it was run."""
        found = self.to_dataframe()
        found["shown"] = [_points(row) for row in found.to_dict("records")]
        table = found.pivot(index="method", columns="metric", values="shown")
        table = table.reindex(index=["base", *self.methods], columns=list(IN_TABLE))
        if REFERENCE in self.methods:
            rows = self.versus(REFERENCE).to_dict("records")
            shown = {row["method"]: _points(row, "%") for row in rows if row["metric"] == CUT}
            table[f"cut vs {REFERENCE}"] = [shown.get(method) for method in table.index]
        table.columns.name = None
        return table.fillna("–")

    def plot(self, kind: str = "scatter") -> go.Figure:
        """By `kind`, `scatter`: stability against plasticity; `matrix`: scores after every stage; `similarity`: instruction vectors along
        the sequence; `general`: tasks not trained on."""
        from ivlens.plots import plot_continual

        return plot_continual(self, kind)

    def save(self, path: str | Path) -> Path:
        """Save to `path`, one JSON file."""
        frames = {name: getattr(self, name).to_dict("list") for name in FRAMES}
        return write_json(path, "continual", {"metadata": self.metadata, **frames})

    @classmethod
    def load(cls, path: str | Path) -> ContinualResults:
        """Load from `path` what `save` wrote."""
        content = read_json(path, "continual")
        return cls(*(pd.DataFrame(content[name]) for name in FRAMES), content["metadata"])

    @cached_property
    def _resampled(self) -> dict[str, dict[str, np.ndarray]]:
        return resampled(self.scores, self.sequence)

    def _known(self, method: str, what: str) -> str:
        if method not in self.methods:
            raise ValueError(f"{what}={method!r} is unknown; there are {', '.join(self.methods)}")
        return method

    def _n_prompts(self, metric: str) -> int:
        base = self.scores[self.scores["method"] == "base"]
        base = base.drop_duplicates(["kind", "task", "shots", "query" if "query" in base else "prompt"])
        trained, shown = base["kind"] == "trained", base["shots"] > 0
        looked_at = {"GP": ~trained & ~shown, "IP": ~trained & shown}
        looked_at |= dict.fromkeys(("OP", "BWT", "plasticity"), trained)
        return int(looked_at.get(metric.removesuffix(" change"), trained | ~trained).sum())

    def __repr__(self) -> str:
        return f"{self._title()}\n{self.table().to_string()}"

    def _repr_html_(self) -> str:
        return table_html(self.table(), title=self._title())

    def _title(self) -> str:
        n_seeds = len(set(self.scores.loc[self.scores["method"] != "base", "seed"]))
        methods = f"{len(self.methods)} method(s) on {self.metadata.get('model')}"
        return f"ContinualResults({methods}, {n_seeds} seed(s), {' → '.join(self.sequence)})"


def _points(row: Mapping[str, Any], unit: str = "") -> str:
    mean, low, high = (f"{100 * row[key]:.1f}{unit}" for key in ("mean", "low", "high"))
    if row["mean"] != row["mean"]:
        return "–"
    return mean if row["low"] != row["low"] else f"{mean} [{low}, {high}]"

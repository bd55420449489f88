"""What a fine-tune cost: which skills fell, and whether they are overlaid or gone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from ivlens.common.statistics import bootstrap_difference, bootstrap_share, wilson
from ivlens.common.storage import read_json, write_json
from ivlens.common.tables import table_html
from ivlens.dynamics.advice import advice
from ivlens.dynamics.recovery import AFTER, BEFORE, OLD, RANDOM

if TYPE_CHECKING:
    import plotly.graph_objects as go

__all__ = ["Checkup"]

# The rules (our choice).
LEAST = 0.1  # a skill counts where the base does it more often than that, and than by chance; likewise a vector
HALF = 0.5  # of what the vector brings out in the base is enough to call a skill overlaid; of a head's share, that it still writes it
FILE = "checkup"


@dataclass(frozen=True)
class Checkup:
    """What a fine-tune cost, skill by skill.

    A skill *counts* where the lower end of the base model's 95 % interval lies above 10 %, and above chance where there are options.
    It *fell* where its accuracy went down by more than the tolerance, with the interval of the change clear of 0; those intervals
    hold for all skills that count together (Bonferroni). What fell is

    - `overlaid` where the old vector, on prompts that ask for nothing, still brings out at least half of what it brings out in the base
      model, clear of a random vector of its norm;
    - `gone` where that is less than half, with the whole interval, and the vector put back beside the request returns less than half of
      what fell;
    - `unclear` otherwise, above all where the vector brings out nothing in the base model either.

    What a vector brings out is its accuracy minus the random one's. (All rules are our choice.)

    Attributes
    ----------
    scores
        One row per answer: `skill`, `model` (`before`, `after`), `asked` (or nothing asked), `added` (nothing, `old vector`, `random
        vector`), `prompt`, `query`, `hit` and `text`.
    heads
        One row per skill that fell and head behind its vector: `written`, the share of its old output that it still writes, along that:
        1 as before, 0 nothing.
    metadata
        Models, tolerance, settings, and for every skill its `chance`, and why it wasn't looked at, if so.
    """

    scores: pd.DataFrame
    heads: pd.DataFrame
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def skills(self) -> list[str]:
        return list(dict.fromkeys(self.scores["skill"]))

    @property
    def counting(self) -> list[str]:
        """Skills that the base model can do."""
        return [skill for skill in self.skills if self._counts(skill)]

    @property
    def tolerance(self) -> float:
        return self.metadata["tolerance"]

    @property
    def fell(self) -> list[str]:
        """Skills that fell by more than the tolerance, with their interval clear of 0."""
        return self._table.loc[self._table["fell"], "skill"].tolist()

    @property
    def exit_status(self) -> int:
        """2 where a skill fell, else 0: for `sys.exit`."""
        return 2 if self.fell else 0

    def to_dataframe(self) -> pd.DataFrame:
        """One row per skill, all numbers shares from 0 to 1.

        `before`, `after`, their `change` with `low` and `high`, `fell` and `verdict`. Of skills that fell, on prompts that ask for
        nothing: `vector_before`, `random_before`, `vector_after`, `random_after`, and `left` with its interval, the share of what the
        vector brings out that is left. On prompts that ask: `put_back`, the fine-tuned model's accuracy with the old vector added, and
        `put_back_random`. `stopped`: heads that write less than half of what they wrote.
        """
        return self._table.copy()

    def turned(self, skill: str, n: int = 3) -> pd.DataFrame:
        """The first `n` answers to a `skill` that were right before and are wrong now: `query`, `before`, `after`."""
        asked = self.scores[(self.scores["skill"] == skill) & self.scores["asked"] & (self.scores["added"] == "")]
        both = asked.pivot(index=["prompt", "query"], columns="model", values=["hit", "text"])
        some = both[both["hit"][BEFORE].gt(both["hit"][AFTER])].head(n)["text"].reset_index("query")
        return some.reset_index(drop=True)[["query", BEFORE, AFTER]].rename_axis(columns=None)

    def advice(self) -> list[str]:
        """What to do about what fell: a paragraph each."""
        return advice(self)

    def plot(self) -> go.Figure:
        """Bars per skill: before, after, and with the old vector put back, with 95 % intervals."""
        from ivlens.plots import plot_checkup

        return plot_checkup(self)

    def save(self, path: str | Path) -> Path:
        """Save to `path`, one JSON file, which begins with what machines ask: `exit_status`, `fell`, `skills` (the rows of `to_dataframe`)
        and `advice`."""
        told = {"exit_status": self.exit_status, "fell": self.fell, "skills": _records(self._table)}
        told |= {"advice": self.advice(), "metadata": self.metadata}
        return write_json(path, FILE, {**told, "heads": _records(self.heads), "scores": _records(self.scores)})

    @classmethod
    def load(cls, path: str | Path) -> Checkup:
        """Load what `save` wrote to `path`."""
        content = read_json(path, FILE)
        heads = pd.DataFrame(content["heads"], columns=["skill", "head", "written"])
        return cls(pd.DataFrame(content["scores"]), heads, content["metadata"])

    def __repr__(self) -> str:
        return f"Checkup({self.summary})\n{self.table().to_string(index=False)}"

    @property
    def summary(self) -> str:
        """How many fell of the skills that count, in words."""
        left_out = len(self.skills) - len(self.counting)
        beside = f" ({left_out} not counted: the base model doesn't do them)" * bool(left_out)
        fell = f"{len(self.fell) or 'none'} of {len(self.counting)} skills fell{beside}"
        return f"{fell}: {', '.join(self.fell)}" if self.fell else fell

    def _repr_html_(self) -> str:
        return table_html(self.table(), title=repr(self).splitlines()[0], index=False)

    def table(self) -> pd.DataFrame:
        """`to_dataframe` to read: per cent, and what fell beside its control."""
        rows = []
        for row in self._table.itertuples():
            shown = {"skill": row.skill, "before": _percent(row.before), "after": _percent(row.after)}
            shown["change (points)"] = f"{_points(row.change)} [{_points(row.low)}, {_points(row.high)}]"
            shown["verdict"] = row.verdict
            if self.fell:
                pair = f"{_percent(row.vector_before)} → {_percent(row.vector_after)}"
                seen = not math.isnan(row.vector_after)
                shown["old vector, not asked"] = f"{pair} (random {_percent(row.random_after)})" if seen else ""
                shown["put back"] = _percent(row.put_back) if seen else ""
            rows.append(shown)
        return pd.DataFrame(rows)

    # -- the arithmetic ---------------------------------------------------------------------------------------------
    @cached_property
    def _table(self) -> pd.DataFrame:
        counting = self.counting
        return pd.DataFrame([self._row(skill, max(len(counting), 1), skill in counting) for skill in self.skills])

    def hits(self, skill: str, model: str, asked: bool, added: str = "") -> tuple[np.ndarray, list[Any]]:
        """Right answers as 1, else 0, [prompt], and what each prompt asks; empty where that wasn't measured.

        Parameters
        ----------
        skill, model, asked, added
            Which of `scores`.
        """
        some = self.scores
        some = some[(some["skill"] == skill) & (some["model"] == model)]
        some = some[(some["asked"] == asked) & (some["added"] == added)].sort_values("prompt")
        return some["hit"].to_numpy(float), some["query"].tolist()

    def _counts(self, skill: str) -> bool:
        hits, queries = self.hits(skill, BEFORE, True)
        chance = self.metadata["skills"][skill]["chance"]
        return wilson(hits, queries)[0] > max(LEAST, chance)

    def _row(self, skill: str, n_skills: int, counts: bool) -> dict[str, Any]:
        before, queries = self.hits(skill, BEFORE, True)
        after, _ = self.hits(skill, AFTER, True)
        change = after - before
        low, high = bootstrap_difference([change], [queries], level=1 - 0.05 / n_skills, n_bootstrap=10_000)
        row = {"skill": skill, "n": len(set(queries)), "before": before.mean(), "after": after.mean()}
        row |= {"change": change.mean(), "low": low, "high": high}
        fell = bool(counts and change.mean() < -self.tolerance - 1e-9 and high < 0)
        found = self._second_look(skill)
        verdict = found.pop("verdict")
        if verdict == "gone" and found["put_back"] - after.mean() >= HALF * -change.mean():
            verdict = "unclear"  # not gone while the vector beside the request returns half of what fell
        verdict = verdict if fell else "kept" if counts else "not counted"
        return {**row, "fell": fell, "verdict": verdict, **found, "stopped": self._stopped(skill)}

    def _second_look(self, skill: str) -> dict[str, Any]:
        """What the vector brings out in both models, and whether that is still enough."""
        untold = {m: {x: self.hits(skill, m, False, x) for x in (OLD, RANDOM)} for m in (BEFORE, AFTER)}
        told = {x: self.hits(skill, AFTER, True, x)[0] for x in (OLD, RANDOM)}
        means = {f"{x.split()[0]}_{m}": _mean(untold[m][x][0]) for m in (BEFORE, AFTER) for x in (OLD, RANDOM)}
        found = {name.replace("old_", "vector_"): value for name, value in means.items()}
        found |= {"put_back": _mean(told[OLD]), "put_back_random": _mean(told[RANDOM])}
        nothing = {"left": math.nan, "left_low": math.nan, "left_high": math.nan, "verdict": "unclear"}
        if not all(len(untold[m][x][0]) for m in untold for x in (OLD, RANDOM)):
            return {**found, **nothing}
        queries = untold[BEFORE][OLD][1]
        out = {m: untold[m][OLD][0] - untold[m][RANDOM][0] for m in untold}
        if out[BEFORE].mean() < LEAST or bootstrap_difference([out[BEFORE]], [queries])[0] <= 0:
            return {**found, **nothing}
        columns = np.stack([out[BEFORE], np.zeros(len(queries)), out[AFTER]], axis=1)
        left, low, high = bootstrap_share([columns], [queries])
        clear = bootstrap_difference([out[AFTER]], [queries])[0] > 0
        verdict = "overlaid" if left >= HALF and clear else "gone" if high < HALF else "unclear"
        return {**found, "left": left, "left_low": low, "left_high": high, "verdict": verdict}

    def _stopped(self, skill: str) -> str:
        some = self.heads[self.heads["skill"] == skill]
        return ", ".join(f"{x.head} ({x.written:.0%})" for x in some.itertuples() if x.written < HALF)


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if len(values) else math.nan


def _percent(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.0%}"


def _points(value: float) -> str:
    return f"{100 * value:+.0f}".replace("-", "−")


def _records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows without NaN, which isn't JSON."""
    return [
        {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in row.items()}
        for row in frame.to_dict("records")
    ]

"""The figure of a checkup."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd
import plotly.graph_objects as go

from ivlens.plots.style import finish
from ivlens.plots.traces import rate, task_bars
from ivlens.plots.words import escaped, span

if TYPE_CHECKING:
    from ivlens.dynamics import Checkup

__all__ = ["plot_checkup"]

BARS = {
    "before": ("before", ""),
    "after": ("after", ""),
    "old vector": ("after", "old vector"),
}  # model, and what is added


def plot_checkup(found: Checkup) -> go.Figure:
    """Bars per skill: accuracy before, after, and with the old vector put back where it fell, with 95 % intervals."""
    rows = []
    for skill in found.skills:
        for name, (model, added) in BARS.items():
            hits, queries = found.hits(skill, model, True, added)
            if len(hits):
                rows.append({"task": skill, "condition": name, **rate(hits.tolist(), queries)})
    frame = pd.DataFrame(rows)
    conditions = [name for name in BARS if name in set(frame["condition"])]
    figure, size = task_bars(frame, found.skills, conditions, "answered as asked")
    fell = f"fell: {escaped(', '.join(found.fell))}" if found.fell else "nothing fell"
    notes = [f"mean and 95% interval · {span(frame['n'])} prompts per bar", fell]
    return finish(figure, "Skills before and after fine-tuning", notes, **size)

"""The figure of similarities against changes in accuracy."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import plotly.graph_objects as go

from ivlens.plots.colours import FAINT, TASK_COLOURS
from ivlens.plots.style import ZERO, finish, panels
from ivlens.plots.words import escaped

if TYPE_CHECKING:
    import pandas as pd

    from ivlens.dynamics import Change

__all__ = ["plot_scatter"]

PREDICTORS = {
    "iv_similarity": "cosine with the base's vector",
    "hidden_similarity": "change in hidden similarity",
    "head_overlap": "overlap of the strongest heads",
    "effects_spearman": "rank correlation of heads' effects",
    "weight_distance": "distance of the weights",
}
SYMBOLS = ("circle", "diamond", "square", "triangle-up", "x", "star")


def plot_scatter(change: Change) -> go.Figure:
    """A panel per measured similarity: a point per task and checkpoint, and a straight line."""
    points, found = change.points(), change.correlations().to_dict("records")
    columns = min(3, len(found))
    rows = math.ceil(len(found) / columns)
    figure, size = panels(rows, columns, (250, 220), (36, 84), [_r2(row) for row in found])
    for i, name in enumerate(row["predictor"] for row in found):
        where = {"row": i // columns + 1, "col": i % columns + 1}
        for j, task in enumerate(change.task_names):
            figure.add_trace(_dots(points[points["task"] == task], name, task, j).update(showlegend=i == 0), **where)
        if (line := _straight(points[name], points["accuracy_change"])) is not None:
            figure.add_trace(line, **where)
        figure.update_xaxes(title_text=PREDICTORS[name], nticks=5, **where)
        figure.update_yaxes(matches="y", showticklabels=where["col"] == 1, **where)
        figure.update_yaxes(title_text="change in accuracy" if where["col"] == 1 else None, **where)
    figure.update_xaxes(zeroline=False)
    figure.update_yaxes(**ZERO, tickformat="+.1~%")
    figure.update_layout(legend={"x": 1 + 16 / size["width"], "y": 1, "font": {"size": 12}, "tracegroupgap": 0})
    amount = f"a point per task and checkpoint, {len(points)} in all, coloured by task"
    notes = [f"{amount} · R² of a straight line with its 95% interval"]
    right = int(7 * max(map(len, change.task_names))) + 68
    title = "Similarity to the base against the change in accuracy"
    return finish(figure, title, notes, **size, left=14, right=right, extra_top=24)


def _r2(found: Mapping[str, float]) -> str:
    if math.isnan(found["r2"]):
        return "R²: too few points"
    return f"R² {found['r2']:.2f} [{found['r2_low']:.2f}, {found['r2_high']:.2f}]"


def _dots(part: pd.DataFrame, name: str, task: str, number: int) -> go.Scatter:
    values = f"{PREDICTORS[name]}: %{{x:.3f}}<br>accuracy %{{y:+.1%}}"
    symbol = SYMBOLS[number // len(TASK_COLOURS) % len(SYMBOLS)]
    return go.Scatter(
        x=part[name].tolist(),
        y=part["accuracy_change"].tolist(),
        mode="markers",
        marker={"color": TASK_COLOURS[number % len(TASK_COLOURS)], "symbol": symbol, "size": 8, "opacity": 0.85},
        name=escaped(task),
        legendgroup=escaped(task),
        customdata=[escaped(label) for label in part["checkpoint"]],
        hovertemplate=f"%{{fullData.name}}, %{{customdata}}<br>{values}<extra></extra>",
    )


def _straight(x: pd.Series, y: pd.Series) -> go.Scatter | None:
    """The least-squares line through the points, from the first to the last."""
    known = x.notna() & y.notna()
    x, y = x[known].to_numpy(float), y[known].to_numpy(float)
    if len(x) < 3 or np.ptp(x) == 0:
        return None
    slope, start = np.polyfit(x, y, 1)
    ends = [float(x.min()), float(x.max())]
    line = go.Scatter(x=ends, y=[start + slope * end for end in ends], mode="lines", hoverinfo="skip", showlegend=False)
    return line.update(line={"color": FAINT, "width": 1.6, "dash": "dash"})

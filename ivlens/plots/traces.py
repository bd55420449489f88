"""What several figures are made of: bars and rows per task, points before and after, a line per task and their mean."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from ivlens.common.statistics import wilson
from ivlens.plots.colours import BEFORE_AFTER, GRID, INK, condition_colours
from ivlens.plots.style import BARE, LEGEND_ABOVE, label_width, legend_lines, panels, task_labels, ticks
from ivlens.plots.words import escaped

__all__ = ["before_after", "error_bars", "rate", "task_bars", "task_lines", "task_rows"]


def rate(hits: Sequence[float], asked: Sequence[Any]) -> dict[str, float]:
    """Mean of hits with its 95 % Wilson interval, and the number of different queries."""
    low, high = wilson(hits, asked)
    return {"mean": sum(hits) / len(hits), "low": low, "high": high, "n": len(set(asked))}


def error_bars(mean: Sequence[float], low: Sequence[float], high: Sequence[float], colour: str) -> dict[str, Any]:
    up, down = (np.clip(np.subtract(a, b), 0, None).tolist() for a, b in ((high, mean), (mean, low)))
    return {"array": up, "arrayminus": down, "symmetric": False, "color": colour, "thickness": 1.2, "width": 2}


def task_bars(
    frame: pd.DataFrame, tasks: Sequence[str], conditions: Sequence[str], name: str, *, share: bool = True
) -> tuple[go.Figure, dict[str, int]]:
    """Bars per task, one colour per condition, with intervals, in several rows if need be; and what `finish` must know.

    `frame` has a row per task and condition: `mean`, `low`, `high`, `n`. A `share` of 1 is shown in percent.
    """
    group = max(56, 13 * len(conditions) + 20, label_width(tasks))
    n_rows = math.ceil(len(tasks) / max(1, 1000 // group))
    n_columns = math.ceil(len(tasks) / n_rows)
    width = max(520, n_columns * group)
    labels, angle, room = task_labels(tasks, width // n_columns)
    figure, size = panels(n_rows, 1, (width, 300 if n_rows == 1 else 180), (0, 48 + room))
    named = set()  # a condition stands in the legend once, whichever row it comes up in first
    for row in range(n_rows):
        here = tasks[row * n_columns : (row + 1) * n_columns]
        for condition, colour in condition_colours(conditions).items():
            part = frame[(frame["condition"] == condition) & frame["task"].isin(here)]
            if len(part):
                bars = _bars(part, condition, colour, ".1%" if share else ".3f")
                figure.add_trace(bars.update(showlegend=condition not in named), row + 1, 1)
                named.add(condition)
        shown = {"tickvals": [escaped(task) for task in here], "ticktext": [labels[task] for task in here]}
        # Every row has room for as many tasks, so that bars have one width throughout.
        figure.update_xaxes(categoryarray=shown["tickvals"], range=[-0.5, n_columns - 0.5], **shown, row=row + 1, col=1)
    figure.update_xaxes(type="category", categoryorder="array", tickangle=angle)
    figure.update_yaxes(title_text=name, tickformat=".0%" if share else None, range=[0, 1.03])
    figure.update_layout(barmode="group", bargap=0.22, bargroupgap=0.06, legend=LEGEND_ABOVE)
    margins = {"right": 24, "extra_top": 14 + 20 * legend_lines(conditions, width), "extra_bottom": room - 20}
    return figure, {**size, **margins}


def _bars(part: pd.DataFrame, condition: str, colour: str, digits: str) -> go.Bar:
    mean, low, high = (f"%{{{name}:{digits}}}" for name in ("y", "customdata[0]", "customdata[1]"))
    return go.Bar(
        x=[escaped(task) for task in part["task"]],
        y=part["mean"].tolist(),
        name=escaped(condition),
        legendgroup=condition,
        marker_color=colour,
        error_y=error_bars(part["mean"], part["low"], part["high"], INK),
        customdata=part[["low", "high", "n"]].to_numpy().tolist(),
        hovertemplate=f"%{{x}}<br>%{{fullData.name}}: {mean} [{low}, {high}]<br>n = %{{customdata[2]}}<extra></extra>",
    )


def task_rows(tasks: Sequence[str], titles: Sequence[str], *, panel: int = 320) -> tuple[go.Figure, dict[str, int]]:
    """Panels side by side with a row per task, the first at the top; and what `finish` must know."""
    height = max(110, (34 if len(tasks) <= 12 else 26) * len(tasks))
    figure, size = panels(1, len(titles), (panel, height), (44, 0), titles)
    figure.update_yaxes(range=[len(tasks) - 0.5, -0.5], showticklabels=False, **BARE)
    figure.update_yaxes(**ticks([escaped(task) for task in tasks]), showticklabels=True, ticklabelstandoff=4, col=1)
    for edge in range(1, len(tasks)):
        figure.add_hline(edge - 0.5, line={"color": GRID, "width": 1}, layer="below", exclude_empty_subplots=False)
    figure.update_xaxes(zeroline=False)
    figure.update_layout(legend=LEGEND_ABOVE | {"y": 1 + 24 / height})
    left = max(0, int(7.5 * max(map(len, tasks))) - 50)
    return figure, {**size, "left": left, "right": 28, "extra_top": 46}


def before_after(
    figure: go.Figure,
    column: int,
    frames: dict[str, pd.DataFrame],
    tasks: Sequence[str],
    *,
    named: bool = True,
    digits: str = ".1%",
    least: float = -math.inf,
) -> None:
    """Points with intervals in a panel of `task_rows`: before above after, each with a row per task (`mean`, `low`, `high`, `n`).

    `named` points stand in the legend; `least` is where points and intervals below it are drawn, on a log axis.
    """
    for (when, frame), lift in zip(frames.items(), (-0.16, 0.16), strict=True):
        part, colour = frame.set_index("task").loc[list(tasks)], BEFORE_AFTER[when]
        mean, low, high = (f"%{{customdata[{i}]:{digits}}}" for i in (1, 2, 3))
        drawn = part[["mean", "low", "high"]].clip(lower=least)
        about = part[["mean", "low", "high", "n"]].to_numpy().tolist()
        points = go.Scatter(
            x=drawn["mean"].tolist(),
            y=[i + lift for i in range(len(tasks))],
            mode="markers",
            marker={"color": colour, "size": 9, "symbol": "circle-open" if when == "before" else "circle"},
            error_x=error_bars(drawn["mean"], drawn["low"], drawn["high"], colour),
            name=when,
            legendgroup=when,
            showlegend=named,
            customdata=[[escaped(task), *row] for task, row in zip(tasks, about, strict=True)],
            hovertemplate=f"%{{customdata[0]}}, {when}: {mean} [{low}, {high}]<br>n = %{{customdata[4]}}<extra></extra>",
        )
        figure.add_trace(points, 1, column)


def task_lines(
    figure: go.Figure,
    x: Sequence[int],
    values: Mapping[str, Sequence[float]],
    name: str,
    colour: str,
    places: Sequence[str],
) -> None:
    """A faint line per task, and their mean as a bold one, which stands in the legend."""
    name, hover = escaped(name), "%{customdata}<br>%{meta}: %{y:.3f}<extra></extra>"
    common = {"x": list(x), "customdata": [escaped(place) for place in places], "hovertemplate": hover}
    common |= {"legendgroup": name, "line_color": colour}
    for task, y in values.items():
        faint = go.Scatter(y=list(y), mode="lines", opacity=0.28, line_width=1.2, showlegend=False, **common)
        figure.add_trace(faint.update(meta=f"{name}, {escaped(task)}"))
    mean = pd.DataFrame(values).mean(axis=1).tolist()  # over the tasks that have a value there
    bold = go.Scatter(y=mean, mode="lines+markers", line_width=3, marker_size=6, name=name, **common)
    figure.add_trace(bold.update(meta=f"{name}, mean"))

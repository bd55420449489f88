"""What several figures are made of: bars per task, points before and after, maps of cosines."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from ivlens.plots.style import (
    BEFORE_AFTER,
    DIVERGING,
    GRID,
    INK,
    bare,
    colorbar,
    condition_colours,
    escaped,
    heatmap,
    label_width,
    legend_above,
    legend_lines,
    signed,
    task_labels,
    ticks,
)

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["before_after", "cosine_map", "task_bars", "task_rows"]


# -- bars --------------------------------------------------------------------------------------------------------------
def task_bars(
    frame: pd.DataFrame, tasks: Sequence[str], conditions: Sequence[str], name: str, *, share: bool = True
) -> tuple[go.Figure, dict[str, int]]:
    """Bars per task, one colour per condition, with intervals, in several rows if need be; and what `finish` must know.

    Parameters
    ----------
    frame
        A row per task and condition: `mean`, `low`, `high`, `n`.
    share
        Whether values are shares of 1, shown in percent.
    """
    group = max(56, 13 * len(conditions) + 20, label_width(tasks))
    n_rows = math.ceil(len(tasks) / max(1, 1000 // group))
    n_columns = math.ceil(len(tasks) / n_rows)
    width = max(520, n_columns * group)
    labels, angle, room = task_labels(tasks, width // n_columns)
    height, gap = (300 if n_rows == 1 else 180) * n_rows + (48 + room) * (n_rows - 1), 48 + room
    figure = make_subplots(n_rows, 1, vertical_spacing=gap / height if n_rows > 1 else 0)
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
    figure.update_yaxes(title_text=name, tickformat=".0%" if share else None, range=[0, 1.03], gridcolor=GRID)
    figure.update_layout(barmode="group", bargap=0.22, bargroupgap=0.06, legend=legend_above())
    size = {"extra_top": 14 + 20 * legend_lines(conditions, width), "extra_bottom": room - 20}
    return figure, {"width": width, "height": height, "right": 24, **size}


def _bars(part: pd.DataFrame, condition: str, colour: str, digits: str) -> go.Bar:
    mean, low, high = (f"%{{{name}:{digits}}}" for name in ("y", "customdata[0]", "customdata[1]"))
    hover = f"%{{x}}<br>%{{fullData.name}}: {mean} [{low}, {high}]<br>n = %{{customdata[2]}}"
    return go.Bar(
        x=[escaped(task) for task in part["task"]],
        y=part["mean"].tolist(),
        name=escaped(condition),
        legendgroup=condition,
        marker_color=colour,
        error_y=_errors(part["mean"], part["low"], part["high"], INK),
        customdata=part[["low", "high", "n"]].to_numpy().tolist(),
        hovertemplate=hover + "<extra></extra>",
    )


def _errors(mean: pd.Series, low: pd.Series, high: pd.Series, colour: str) -> dict[str, Any]:
    return {
        "array": (high - mean).clip(lower=0).tolist(),
        "arrayminus": (mean - low).clip(lower=0).tolist(),
        "symmetric": False,
        "color": colour,
        "thickness": 1.2,
        "width": 2,
    }


# -- a row per task ----------------------------------------------------------------------------------------------------
def task_rows(tasks: Sequence[str], titles: Sequence[str], *, panel: int = 320) -> tuple[go.Figure, dict[str, int]]:
    """Panels side by side with a row per task, the first at the top; and what `finish` must know."""
    gap, row = 44, 34 if len(tasks) <= 12 else 26
    width, height = len(titles) * (panel + gap) - gap, max(110, row * len(tasks))
    figure = make_subplots(1, len(titles), subplot_titles=titles, horizontal_spacing=gap / width)
    figure.update_yaxes(range=[len(tasks) - 0.5, -0.5], showticklabels=False, **bare())
    figure.update_yaxes(**ticks([escaped(task) for task in tasks]), showticklabels=True, ticklabelstandoff=4, col=1)
    for edge in range(1, len(tasks)):
        figure.add_hline(edge - 0.5, line={"color": GRID, "width": 1}, layer="below", exclude_empty_subplots=False)
    figure.update_xaxes(gridcolor=GRID, zeroline=False)
    figure.update_annotations(font_size=13, yshift=2)
    figure.update_layout(legend=legend_above() | {"y": 1 + 24 / height})
    left = max(0, int(7.5 * max(map(len, tasks))) - 50)
    return figure, {"width": width, "height": height, "left": left, "right": 28, "extra_top": 46}


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

    Parameters
    ----------
    named
        Whether this panel's points stand in the legend.
    least
        Where points and intervals below are drawn, on a log axis.
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
            error_x=_errors(drawn["mean"], drawn["low"], drawn["high"], colour),
            name=when,
            legendgroup=when,
            showlegend=named,
            customdata=[[escaped(task), *row] for task, row in zip(tasks, about, strict=True)],
            hovertemplate=f"%{{customdata[0]}}, {when}: {mean} [{low}, {high}]<br>n = %{{customdata[4]}}<extra></extra>",
        )
        figure.add_trace(points, 1, column)


# -- cosines -----------------------------------------------------------------------------------------------------------
def cosine_map(
    cosines: np.ndarray, names: Sequence[str], rows: str = "", columns: str = ""
) -> tuple[go.Figure, dict[str, int]]:
    """A square map of cosines with their numbers, where there is room for them; and what `finish` must know.

    Parameters
    ----------
    rows, columns
        What the axes are called, where the two differ.
    """
    shown = [escaped(name) for name in names]
    one, two = (f" {x}" if x else "" for x in (rows, columns))
    hover = [
        [f"{a}{one} · {b}{two}  {signed(x)}" for b, x in zip(shown, row, strict=True)]
        for a, row in zip(shown, cosines, strict=True)
    ]
    cell = max(14, min(54, 560 // len(names)))
    side = max(280, cell * len(names))
    figure = go.Figure(heatmap(cosines, hover, (side, side), colorscale=DIVERGING, zmin=-1, zmax=1, zmid=0))
    if len(names) <= 12:
        figure.update_traces(texttemplate="%{z:.2f}", textfont_size=12)
    figure.update_xaxes(tickangle=-45, title_text=columns, **ticks(shown), **bare())
    figure.update_yaxes(autorange="reversed", title_text=rows, **ticks(shown), **bare())
    colorbar(figure, "cosine")
    room, named = 7 * max(map(len, names)), 24 if rows or columns else 0
    margins = {"left": room - 50 + named, "right": 96, "extra_bottom": int(room * 0.75) - 30 + named}
    return figure, {"width": side, "height": side, **margins}

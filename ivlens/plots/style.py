"""What all figures share: panels, axes, legends, labels, title and margins."""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from ivlens.plots.colours import FAINT, GRID, INK
from ivlens.plots.words import escaped

__all__ = ["BARE", "LEGEND_ABOVE", "ZERO", "finish", "label_width", "legend_lines", "panels", "task_labels", "ticks"]

FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
ZERO = {"zerolinecolor": FAINT, "zerolinewidth": 1}
BARE = {"showgrid": False, "zeroline": False}
LEGEND_ABOVE = {"orientation": "h", "x": 0, "xanchor": "left", "y": 1, "yanchor": "bottom", "font": {"size": 13}}
# Buttons that would lie on the title; dragging zooms and a double click goes back.
BUTTONS = ["zoom", "pan", "select", "lasso", "zoomIn", "zoomOut", "autoScale", "resetScale", "sendChartToCloud"]


def panels(
    down: int, across: int, panel: tuple[int, int], gap: tuple[int, int], titles: Sequence[str] | None = None
) -> tuple[go.Figure, dict[str, int]]:
    """Panels of one size in pixels with gaps between them, and the width and height that `finish` must know."""
    width, height = across * (panel[0] + gap[0]) - gap[0], down * (panel[1] + gap[1]) - gap[1]
    spacing = {"horizontal_spacing": gap[0] / width if across > 1 else 0}
    spacing["vertical_spacing"] = gap[1] / height if down > 1 else 0
    figure = make_subplots(down, across, subplot_titles=titles, **spacing)
    figure.update_annotations(font_size=13, yshift=2)
    return figure, {"width": width, "height": height}


def finish(
    figure: go.Figure,
    title: str,
    notes: Sequence[str],
    *,
    width: int,
    height: int,
    left: int = 0,
    right: int = 0,
    extra_top: int = 0,
    extra_bottom: int = 0,
) -> go.Figure:
    """Title, a line or two below it, and margins around a plot of width × height."""
    left, whole = left + 68, left + 68 + width + right
    big = textwrap.wrap(title, int((whole - 30) / 10.5), break_long_words=False)
    small = [line for note in notes for line in textwrap.wrap(note, int((whole - 30) / 7.2), break_long_words=False)]
    text = "<br>".join(big + [f'<span style="font-size:13px;color:{FAINT}">{line}</span>' for line in small])
    top, bottom = 30 + 24 * len(big) + 20 * len(small) + extra_top, 58 + extra_bottom
    whole_height = top + height + bottom
    # A title of several lines has its first line's baseline at y.
    place = {"x": 20 / whole, "xref": "container", "y": 1 - 32 / whole_height, "yref": "container"}
    figure.update_layout(
        template="plotly_white",
        font={"family": FONT, "size": 13, "color": INK},
        title={"text": text, "font_size": 18, "xanchor": "left", "yanchor": "top", **place},
        width=whole,
        height=whole_height,
        margin={"l": left, "r": right, "t": top, "b": bottom},
        hoverlabel={"font_size": 13},
        modebar={"remove": BUTTONS},
    )
    figure.update_xaxes(title_font_size=13, gridcolor=GRID)
    figure.update_yaxes(title_font_size=13, gridcolor=GRID)
    return figure


def tick_step(n: int, most: int) -> int:
    """The distance between ticks that leaves at most `most` of n."""
    return next((s for s in (1, 2, 4, 5, 8, 10, 16, 20, 32) if n <= s * most), max(1, n // max(1, most)))


def ticks(labels: Sequence[Any], most: int | None = None) -> dict[str, Any]:
    """Labels for the cells 0, 1, … of an axis; all, or evenly spaced ones that make at most `most`."""
    step = 1 if most is None else tick_step(len(labels), most)
    return {"tickvals": list(range(0, len(labels), step)), "ticktext": list(labels[::step])}


def legend_lines(names: Sequence[str], width: int) -> int:
    """How many lines a legend above the plot takes; plotly puts it into columns once one line is too short."""
    widths = [8 * len(name) + 38 for name in names]
    return 1 if sum(widths) <= width else math.ceil(len(widths) / max(1, width // max(widths)))


def task_labels(tasks: Sequence[str], width: int) -> tuple[dict[str, str], int, int]:
    """Labels that fit below a group of bars `width` pixels wide, their angle, and the height they need beyond a line.

    Long names break after underscores and spaces, and are slanted where that isn't enough.
    """
    most = width // 8
    lines = {task: _broken(task, most) for task in tasks}
    if all(len(line) <= most for parts in lines.values() for line in parts):
        labels = {task: "<br>".join(map(escaped, parts)) for task, parts in lines.items()}
        return labels, 0, 18 * max(len(parts) - 1 for parts in lines.values())
    return {task: escaped(task) for task in tasks}, -30, 4 * max(map(len, tasks))


def label_width(tasks: Sequence[str]) -> int:
    """Width that `task_labels` needs to break names instead of slanting them, within reason."""
    return min(130, 8 * max(len(piece) for task in tasks for piece in _broken(task, 1)))


def _broken(name: str, most: int) -> list[str]:
    lines = [""]
    for piece in re.findall(r"[^_\s]*[_\s]*", name):
        if lines[-1] and len(lines[-1] + piece.rstrip()) > most:
            lines.append("")
        lines[-1] += piece
    return lines

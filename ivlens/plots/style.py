"""What figures look like: colours, cell sizes, axes, titles, and how numbers and names are written."""

from __future__ import annotations

import html
import math
import re
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import plotly.graph_objects as go

from ivlens.models.head import Head

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "BEFORE_AFTER",
    "DIVERGING",
    "FAINT",
    "GRID",
    "INK",
    "MARK",
    "RDBU",
    "SEQUENTIAL",
    "TASK_COLOURS",
    "ZERO",
    "bare",
    "colorbar",
    "condition_colours",
    "counted",
    "diverging",
    "escaped",
    "finish",
    "grid_axes",
    "heatmap",
    "hover_heads",
    "label_width",
    "legend_above",
    "legend_lines",
    "map_size",
    "numbers",
    "outline",
    "percent",
    "plain",
    "sequential",
    "signed",
    "span",
    "task_labels",
    "tick_step",
    "ticks",
    "unit",
    "which_tasks",
    "with_minus",
]

FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
INK, FAINT, GRID, MARK = "#1f2328", "#59636e", "#e6e8eb", "#d55e00"
ZERO = {"zerolinecolor": FAINT, "zerolinewidth": 1}

# RdBu as ColorBrewer's seven classes: without plotly's almost black ends, on which an outline would not show.
RDBU = ["#b2182b", "#ef8a62", "#fddbc7", "#f7f7f7", "#d1e5f0", "#67a9cf", "#2166ac"]
DIVERGING = [[i / 6, colour] for i, colour in enumerate(RDBU)]
SEQUENTIAL = "Blues"

# Okabe and Ito's colours, which people with any kind of colour vision tell apart.
COLOURS = {
    "no vector": "#999999",
    "vector": "#0072b2",
    "random vector": "#e69f00",
    "random heads": "#d55e00",
    "other task": "#cc79a7",
    "demonstrations": "#009e73",
    # of models before and after training
    "before": "#999999",
    "before + vector": "#4d545c",
    "after": "#d5d9de",
    "old vector": "#0072b2",
    "old vector, by heads": "#56b4e9",
    "old − new vector": "#d55e00",
    "original state": "#009e73",
}
BEFORE_AFTER = {"before": "#7d8590", "after": "#d55e00"}
TASK_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#7b4fa3", "#000000")
MORE_COLOURS = ("#56b4e9", "#f0e442", "#000000", "#7b4fa3", "#8c6d31")

# Buttons that would lie on the title; dragging zooms and a double click goes back.
BUTTONS = ["zoom", "pan", "select", "lasso", "zoomIn", "zoomOut", "autoScale", "resetScale", "sendChartToCloud"]

UNITS = {
    "probability": "answer probability",
    "log_probability": "answer log-probability (nats)",
    "logit": "answer logit",
    "logit_difference": "logit difference",
    "accuracy": "first-token accuracy",
    "first_token": "first-token accuracy",
    "exact_match": "exact match",
    "rouge_l": "ROUGE-L (F1)",
}


def heatmap(z: np.ndarray, hover: list[list[str]], size: tuple[int, int], **options: Any) -> go.Heatmap:
    gap = 1 if min(size[0] / z.shape[1], size[1] / z.shape[0]) >= 10 else 0
    return go.Heatmap(z=z, hovertext=hover, hoverinfo="text", xgap=gap, ygap=gap, **options)


def map_size(
    n_rows: int,
    n_columns: int,
    *,
    room: int = 600,
    largest: int = 48,
    smallest: tuple[int, int] = (260, 140),
    stretch: float = 1.5,
) -> tuple[int, int]:
    """Width and height in pixels of a heatmap, its cells square or, where there are few columns, wider."""
    tall = min(room / n_rows, largest)
    wide = min(room / n_columns, max(stretch * tall, 1))
    return max(smallest[0], round(wide * n_columns)), max(smallest[1], round(tall * n_rows))


def diverging(maps: Sequence[np.ndarray]) -> dict[str, Any]:
    """Colours from red over white, at zero, to blue, wide enough for all maps."""
    bound = _largest(maps)
    return {"colorscale": DIVERGING, "zmin": -bound, "zmax": bound, "zmid": 0}


def sequential(values: np.ndarray) -> dict[str, Any]:
    """Colours from white, at zero, to dark blue."""
    return {"colorscale": SEQUENTIAL, "zmin": 0, "zmax": _largest([values])}


def _largest(maps: Sequence[np.ndarray]) -> float:
    return max((float(np.nanmax(np.abs(m))) for m in maps if not np.isnan(m).all()), default=0.0) or 1.0


def outline(figure: go.Figure, x: int, y: int, colour: str, **where: int) -> None:
    edges = {"x0": x - 0.47, "x1": x + 0.47, "y0": y - 0.47, "y1": y + 0.47}
    figure.add_shape(type="rect", **edges, line={"color": colour, "width": 2}, **where)


def colorbar(figure: go.Figure, title: str, **options: Any) -> None:
    bar = {"title": {"text": title, "side": "top", "font": {"size": 13}}, "thickness": 14, "outlinewidth": 0}
    figure.update_traces(colorbar={**bar, "exponentformat": "none", **options}, selector={"type": "heatmap"})


def bare() -> dict[str, Any]:
    return {"showgrid": False, "zeroline": False}


def grid_axes(figure: go.Figure, shape: tuple[int, ...], size: tuple[int, int], **where: int) -> None:
    """Axes of a map: heads along x, layers upwards from 0."""
    x, y = tick_step(shape[1], size[0] // 24), tick_step(shape[0], size[1] // 18)
    figure.update_xaxes(title_text="head", tick0=0, dtick=x, range=[-0.5, shape[1] - 0.5], **bare(), **where)
    figure.update_yaxes(title_text="layer", tick0=0, dtick=y, range=[-0.5, shape[0] - 0.5], **bare(), **where)


def tick_step(n: int, most: int) -> int:
    """The distance between ticks that leaves at most `most` of n."""
    return next((s for s in (1, 2, 4, 5, 8, 10, 16, 20, 32) if n <= s * most), max(1, n // max(1, most)))


def ticks(labels: Sequence[Any], most: int | None = None) -> dict[str, Any]:
    """Labels for the cells 0, 1, … of an axis; all, or evenly spaced ones that make at most `most`."""
    step = 1 if most is None else tick_step(len(labels), most)
    return {"tickvals": list(range(0, len(labels), step)), "ticktext": list(labels[::step])}


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
    figure.update_layout(
        template="plotly_white",
        font={"family": FONT, "size": 13, "color": INK},
        title={"text": text, "font_size": 18, "xanchor": "left", "yanchor": "top"},
        width=whole,
        height=whole_height,
        margin={"l": left, "r": right, "t": top, "b": bottom},
        hoverlabel={"font_size": 13},
        modebar={"remove": BUTTONS},
    )
    # A title of several lines has its first line's baseline at y.
    figure.update_layout(title={"x": 20 / whole, "xref": "container", "y": 1 - 32 / whole_height, "yref": "container"})
    figure.update_xaxes(title_font_size=13)
    figure.update_yaxes(title_font_size=13)
    return figure


def condition_colours(conditions: Sequence[str]) -> dict[str, str]:
    """A colour per condition: the known ones always have theirs."""
    kinds = {c: "demonstrations" if c.endswith("demonstrations") else c for c in conditions}
    taken = {COLOURS.get(kind) for kind in kinds.values()}
    more = iter([colour for colour in MORE_COLOURS if colour not in taken] * len(conditions))
    return {c: COLOURS[kind] if kind in COLOURS else next(more) for c, kind in kinds.items()}


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


def legend_above() -> dict[str, Any]:
    return {"orientation": "h", "x": 0, "xanchor": "left", "y": 1, "yanchor": "bottom", "font": {"size": 13}}


def legend_lines(names: Sequence[str], width: int) -> int:
    """How many lines a legend above the plot takes; plotly puts it into columns once one line is too short."""
    widths = [8 * len(name) + 38 for name in names]
    return 1 if sum(widths) <= width else math.ceil(len(widths) / max(1, width // max(widths)))


def hover_heads(mean: np.ndarray, error: np.ndarray) -> list[list[str]]:
    n_layers, n_heads = mean.shape
    return [[f"{Head(i, j)}  {signed(mean[i, j], error[i, j])}" for j in range(n_heads)] for i in range(n_layers)]


def numbers(x: Tensor) -> np.ndarray:
    return x.detach().float().cpu().numpy()


def escaped(name: str) -> str:
    """A name as plotly shall show it: without its tags taking effect."""
    return html.escape(str(name), quote=False)


def with_minus(text: str) -> str:
    return text.replace("-", "−")


def signed(mean: float, error: float = math.nan) -> str:
    return with_minus(f"{mean:+.3f}") + ("" if math.isnan(error) else f" ± {error:.3f}")


def percent(part: float, digits: int = 1) -> str:
    return with_minus(f"{part:.{digits}%}")


def plain(scale: float) -> str:
    return with_minus(f"{scale:g}")


def counted(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def span(amounts: Sequence[int]) -> str:
    """The one amount, or from the least to the most."""
    least, most = min(amounts), max(amounts)
    return str(least) if least == most else f"{least} to {most}"


def which_tasks(names: Sequence[str]) -> str:
    return escaped(names[0]) if len(names) == 1 else counted(len(names), "task")


def unit(metric: str) -> str:
    return UNITS.get(metric, metric.replace("_", " "))

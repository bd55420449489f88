"""Heatmaps: their colours, sizes and axes; maps of heads and of cosines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import plotly.graph_objects as go

from ivlens.models.head import Head
from ivlens.plots.style import BARE, tick_step, ticks
from ivlens.plots.words import escaped, signed

if TYPE_CHECKING:
    from torch import Tensor

# RdBu as ColorBrewer's seven classes: without plotly's almost black ends, on which an outline would not show.
RDBU = ["#b2182b", "#ef8a62", "#fddbc7", "#f7f7f7", "#d1e5f0", "#67a9cf", "#2166ac"]
DIVERGING = [[i / 6, colour] for i, colour in enumerate(RDBU)]
SEQUENTIAL = "Blues"


def numbers(x: Tensor) -> np.ndarray:
    return x.detach().float().cpu().numpy()


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


def hover_heads(mean: np.ndarray, error: np.ndarray) -> list[list[str]]:
    n_layers, n_heads = mean.shape
    return [[f"{Head(i, j)}  {signed(mean[i, j], error[i, j])}" for j in range(n_heads)] for i in range(n_layers)]


def grid_axes(figure: go.Figure, shape: tuple[int, ...], size: tuple[int, int], **where: int) -> None:
    """Axes of a map: heads along x, layers upwards from 0."""
    x, y = tick_step(shape[1], size[0] // 24), tick_step(shape[0], size[1] // 18)
    figure.update_xaxes(title_text="head", tick0=0, dtick=x, range=[-0.5, shape[1] - 0.5], **BARE, **where)
    figure.update_yaxes(title_text="layer", tick0=0, dtick=y, range=[-0.5, shape[0] - 0.5], **BARE, **where)


def cosine_map(
    cosines: np.ndarray, names: Sequence[str], rows: str = "", columns: str = ""
) -> tuple[go.Figure, dict[str, int]]:
    """A square map of cosines, with their numbers where there is room; rows and columns are named where they differ."""
    shown = [escaped(name) for name in names]
    one, two = (f" {x}" if x else "" for x in (rows, columns))
    hover = [[f"{a}{one} · {b}{two}  {signed(x)}" for b, x in zip(shown, row)] for a, row in zip(shown, cosines)]
    cell = max(14, min(54, 560 // len(names)))
    side = max(280, cell * len(names))
    figure = go.Figure(heatmap(cosines, hover, (side, side), colorscale=DIVERGING, zmin=-1, zmax=1, zmid=0))
    if len(names) <= 12:
        figure.update_traces(texttemplate="%{z:.2f}", textfont_size=12)
    figure.update_xaxes(tickangle=-45, title_text=columns, **ticks(shown), **BARE)
    figure.update_yaxes(autorange="reversed", title_text=rows, **ticks(shown), **BARE)
    colorbar(figure, "cosine")
    room, named = 7 * max(map(len, names)), 24 if rows or columns else 0
    margins = {"left": room - 50 + named, "right": 96, "extra_bottom": int(room * 0.75) - 30 + named}
    return figure, {"width": side, "height": side, **margins}

"""Names of points in a plane, put where they don't cover each other."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from ivlens.plots.words import escaped

__all__ = ["labels_beside"]


def labels_beside(
    x: pd.DataFrame,
    y: pd.DataFrame,
    ranges: Sequence[Sequence[float]],
    size: tuple[int, int],
    colours: Mapping[str, str],
) -> list[dict[str, Any]]:
    """A name beside every point, tied to it by a thin line, where it covers the least of points, names and intervals.

    `x` and `y` have a row per point (`mean`, `low`, `high`), named by the index; `ranges` and `size` of the axes are in their
    units and in pixels.
    """

    def pixel(value: float, axis: int) -> float:
        return (value - ranges[axis][0]) / (ranges[axis][1] - ranges[axis][0]) * size[axis]

    places = {m: (pixel(x["mean"][m], 0), pixel(y["mean"][m], 1)) for m in x.index}
    taken = [(px - 8, py - 8, px + 8, py + 8, 10.0) for px, py in places.values()]
    for m, (px, py) in places.items():
        taken.append((pixel(x["low"][m], 0), py - 2, pixel(x["high"][m], 0), py + 2, 1.0))
        taken.append((px - 2, pixel(y["low"][m], 1), px + 2, pixel(y["high"][m], 1), 1.0))
    labels = []
    for m, (px, py) in places.items():
        wide, tried = 3.8 * len(m) + 4, []  # half of its width
        for far, turn in itertools.product((12, 24, 38, 54), range(1, 17, 2)):
            dx, dy = math.cos(turn * math.pi / 8) * (far + wide), math.sin(turn * math.pi / 8) * (far + 8)
            box = (px + dx - wide, py + dy - 8, px + dx + wide, py + dy + 8)
            cost = far / 40 + sum(weight for *other, weight in taken if _overlap(box, other))
            cost += 20 * (box[0] < 0 or box[1] < 0 or box[2] > size[0] or box[3] > size[1])
            tried.append((cost, dx, dy, box))
        _, dx, dy, box = min(tried, key=lambda place: place[0])
        taken.append((*box, 10.0))
        label = {"x": x["mean"][m], "y": y["mean"][m], "text": escaped(m), "ax": dx, "ay": -dy, "standoff": 6}
        line = {"showarrow": True, "arrowhead": 0, "arrowwidth": 1, "arrowcolor": colours[m]}
        labels.append({**label, **line, "font": {"color": colours[m], "size": 13}, "bgcolor": "rgba(255,255,255,0.7)"})
    return labels


def _overlap(a: Sequence[float], b: Sequence[float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]

"""Figures of accuracy: where and how strongly to inject a vector, and what that gives."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from ivlens.plots.style import (
    MARK,
    SEQUENTIAL,
    bare,
    colorbar,
    counted,
    escaped,
    finish,
    heatmap,
    map_size,
    numbers,
    outline,
    plain,
    span,
    ticks,
    unit,
)
from ivlens.plots.traces import task_bars

if TYPE_CHECKING:
    from ivlens.steering.evaluation import Evaluation
    from ivlens.steering.tuning import InjectionSearch

__all__ = ["plot_evaluation", "plot_search"]


def plot_search(search: InjectionSearch) -> go.Figure:
    """Heatmaps of first-token accuracy, scale × layer, of the vector and of a random one; the choice is outlined."""
    columns = sorted(range(len(search.layers)), key=lambda i: search.layers[i])
    rows = sorted(range(len(search.scales)), key=lambda i: search.scales[i])
    layers, scales = [search.layers[i] for i in columns], [search.scales[i] for i in rows]
    panels = [numbers(x).T[np.ix_(rows, columns)] for x in (search.accuracy, search.control)]
    best, gap = search.best, 36
    x, y = layers.index(best.layer), scales.index(best.scale)
    size = width, height = map_size(len(scales), len(layers), room=480, largest=40, smallest=(300, 180))
    names = "the vector", "a random vector of the same length"
    figure = make_subplots(1, 2, subplot_titles=names, horizontal_spacing=gap / (2 * width + gap))
    for column, (panel, name) in enumerate(zip(panels, ("vector", "random vector"), strict=True), start=1):
        hover = [
            [f"{name}, layer {layer}, scale {plain(scale)}: {panel[i, j]:.1%}" for j, layer in enumerate(layers)]
            for i, scale in enumerate(scales)
        ]
        options = {"colorscale": SEQUENTIAL, "zmin": 0, "zmax": 1, "showscale": column == 1}
        figure.add_trace(heatmap(panel, hover, size, **options), 1, column)
        outline(figure, x, y, MARK, row=1, col=column)
    figure.update_xaxes(title_text="layer", **ticks(layers, width // 26), **bare())
    figure.update_yaxes(**ticks([plain(s) for s in scales], height // 18), **bare())
    figure.update_yaxes(title_text="scale", col=1)
    figure.update_yaxes(showticklabels=False, col=2)
    figure.update_annotations(font_size=13, yshift=2)
    colorbar(figure, "accuracy", tickformat=".0%")
    goal = "inducing" if search.goal == "induce" else "suppressing"
    chosen, beside = panels[0][y, x], panels[1][y, x]
    notes = [
        f"{goal} the task, {counted(search.n, 'prompt')} · nothing injected: {search.baseline:.1%}",
        f"outlined: layer {best.layer}, scale {plain(best.scale)}: {chosen:.1%} (random vector there: {beside:.1%})",
    ]
    title = f"Where and how strongly to inject “{escaped(search.vector.name)}”"
    return finish(figure, title, notes, width=2 * width + gap, height=height, right=96, extra_top=20)


def plot_evaluation(evaluation: Evaluation, metric: str = "first_token") -> go.Figure:
    """Bars per task, one colour per condition, with 95 % intervals; many tasks go into several rows."""
    if metric not in evaluation.metrics:
        raise ValueError(f"metric={metric!r} was not measured; there are {', '.join(evaluation.metrics)}")
    frame = evaluation.to_dataframe()
    frame = frame[frame["metric"] == metric]
    share = metric in ("first_token", "exact_match")
    figure, size = task_bars(frame, evaluation.task_names, evaluation.conditions, unit(metric), share=share)
    notes = [f"mean and 95% interval · {span(frame['n'])} prompts per bar"]
    if (shots := evaluation.metadata.get("shots")) is not None:
        notes[0] += f" · {counted(shots, 'demonstration') if shots else 'zero-shot'}"
    title = f"{unit(metric)[0].upper()}{unit(metric)[1:]} with and without the vector"
    return finish(figure, title, notes, **size)

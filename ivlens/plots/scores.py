"""Figures of accuracy: where and how strongly to inject a vector, and what that gives."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import plotly.graph_objects as go

from ivlens.plots import maps
from ivlens.plots.colours import MARK
from ivlens.plots.style import BARE, finish, panels, ticks
from ivlens.plots.traces import task_bars
from ivlens.plots.words import counted, escaped, plain, span, unit

if TYPE_CHECKING:
    from ivlens.steering.evaluation import Evaluation
    from ivlens.steering.tuning import InjectionSearch

__all__ = ["plot_evaluation", "plot_search"]


def plot_search(search: InjectionSearch) -> go.Figure:
    """Heatmaps of accuracy (of free answers, balance), scale × layer, of the vector and of a random one; the choice is outlined."""
    columns = sorted(range(len(search.layers)), key=lambda i: search.layers[i])
    rows = sorted(range(len(search.scales)), key=lambda i: search.scales[i])
    layers, scales = [search.layers[i] for i in columns], [search.scales[i] for i in rows]
    shown = [maps.numbers(x).T[np.ix_(rows, columns)] for x in (search.accuracy, search.control)]
    best = search.best
    x, y = layers.index(best.layer), scales.index(best.scale)
    panel = maps.map_size(len(scales), len(layers), room=480, largest=40, smallest=(300, 180))
    figure, size = panels(1, 2, panel, (36, 0), ("the vector", "a random vector of the same length"))
    for column, (values, name) in enumerate(zip(shown, ("vector", "random vector"), strict=True), start=1):
        hover = [
            [f"{name}, layer {layer}, scale {plain(scale)}: {_share(values[i, j])}" for j, layer in enumerate(layers)]
            for i, scale in enumerate(scales)
        ]
        options = {"colorscale": maps.SEQUENTIAL, "zmin": 0, "zmax": 1, "showscale": column == 1}
        figure.add_trace(maps.heatmap(values, hover, panel, **options), 1, column)
        maps.outline(figure, x, y, MARK, row=1, col=column)
    figure.update_xaxes(title_text="layer", **ticks(layers, panel[0] // 26), **BARE)
    figure.update_yaxes(**ticks([plain(s) for s in scales], panel[1] // 18), **BARE)
    figure.update_yaxes(title_text="scale", col=1)
    figure.update_yaxes(showticklabels=False, col=2)
    maps.colorbar(figure, search.measure, tickformat=".0%")
    goal = "inducing" if search.goal == "induce" else "suppressing"
    chosen, beside = shown[0][y, x], shown[1][y, x]
    notes = [
        f"{goal} the task, {counted(search.n, 'prompt')} · nothing injected: {search.baseline:.1%}",
        f"outlined: layer {best.layer}, scale {plain(best.scale)}: {chosen:.1%} (random vector there: {beside:.1%})",
    ]
    title = f"Where and how strongly to inject “{escaped(search.vector.name)}”"
    return finish(figure, title, notes, **size, right=96, extra_top=20)


def plot_evaluation(evaluation: Evaluation, metric: str | None = None) -> go.Figure:
    """Bars per task, one colour per condition, with 95 % intervals; many tasks go into several rows."""
    metric = metric or evaluation.metrics[0]
    if metric not in evaluation.metrics:
        raise ValueError(f"metric={metric!r} was not measured; there are {', '.join(evaluation.metrics)}")
    frame = evaluation.to_dataframe()
    frame = frame[frame["metric"] == metric]
    share = metric in ("first_token", "exact_match", "met", "met_loose")
    figure, size = task_bars(frame, evaluation.task_names, evaluation.conditions, unit(metric), share=share)
    if metric in ("topic", "surprise"):
        figure.update_yaxes(range=None)
    notes = [f"mean and 95% interval · {span(frame['n'])} prompts per bar"]
    if (shots := evaluation.metadata.get("shots")) is not None:
        notes[0] += f" · {counted(shots, 'demonstration') if shots else 'zero-shot'}"
    title = f"{unit(metric)[0].upper()}{unit(metric)[1:]} with and without the vector"
    return finish(figure, title, notes, **size)


def _share(value: float) -> str:
    return "not tried" if np.isnan(value) else f"{value:.1%}"

"""Figures of accuracy: where and how strongly to inject a vector, and what that gives."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import plotly.graph_objects as go

from ivlens.plots import maps
from ivlens.plots.colours import INK, MARK, PARTS
from ivlens.plots.style import BARE, LEGEND_ABOVE, ZERO, finish, panels, task_labels, ticks
from ivlens.plots.traces import error_bars, task_bars
from ivlens.plots.words import counted, escaped, plain, span, unit

if TYPE_CHECKING:
    from ivlens.steering.evaluation import Evaluation
    from ivlens.steering.search import InjectionSearch

__all__ = ["plot_balance", "plot_evaluation", "plot_search"]


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
    if search.measure == "balance":
        beside = [f"{x.positions} at best {x.accuracy.max():.1%}" for x in search.others]
        notes.append(" · ".join([f"positions: {search.positions}", *beside]))
    title = f"Where and how strongly to inject “{escaped(search.vector.name)}”"
    return finish(figure, title, notes, **size, right=96, extra_top=20)


def plot_evaluation(evaluation: Evaluation, metric: str | None = None) -> go.Figure:
    """Bars per task, one colour per condition, with 95 % intervals; many tasks go into several rows. `balance`: see `plot_balance`."""
    if metric == "balance":
        return plot_balance(evaluation)
    metric = metric or evaluation.metrics[0]
    if metric not in evaluation.metrics:
        raise ValueError(f"metric={metric!r} was not measured; there are {', '.join(evaluation.metrics)}")
    frame = evaluation.to_dataframe()
    frame = frame[frame["metric"] == metric]
    tasks, conditions = (frame[name].unique().tolist() for name in ("task", "condition"))
    share = metric in ("first_token", "exact_match", "met", "met_loose")
    figure, size = task_bars(frame, tasks, conditions, unit(metric), share=share)
    if metric in ("topic", "surprise"):  # nats have no bounds
        figure.update_yaxes(range=None, matches="y", **ZERO)
    title = f"{unit(metric)[0].upper()}{unit(metric)[1:]} with and without the vector"
    notes = [f"mean and 95% interval · {span(frame['n'])} prompts per bar{_told_shots(evaluation)}"]
    return finish(figure, title, notes, **size)


def plot_balance(evaluation: Evaluation) -> go.Figure:
    """Of free answers, a panel per task and a group per condition: met, on topic and fluent as bars, their harmonic mean as a mark."""
    table = evaluation.balance()
    tasks, conditions = (table[name].unique().tolist() for name in ("task", "condition"))
    width = max(520, 66 * len(conditions))
    figure, size = panels(len(tasks), 1, (width, 130), (0, 44), [escaped(task) for task in tasks])
    labels, angle, room = task_labels(conditions, width // len(conditions))
    for row, task in enumerate(tasks, start=1):
        part = table[table["task"] == task]
        x = [conditions.index(name) for name in part["condition"]]
        common = {"x": x, "customdata": [escaped(name) for name in part["condition"]], "showlegend": row == 1}
        common["hovertemplate"] = "%{customdata}<br>%{fullData.name}: %{y:.1%}<extra></extra>"
        for name, colour in PARTS.items():
            bars = go.Bar(
                y=part[name].tolist(), name=name.replace("_", " "), legendgroup=name, marker_color=colour, **common
            )
            figure.add_trace(bars, row, 1)
        mark = {"symbol": "diamond", "size": 9, "color": INK, "line": {"color": "white", "width": 1}}
        mean = part["balance"]
        common["error_y"] = error_bars(mean, part["low"], part["high"], INK)
        points = go.Scatter(y=mean.tolist(), mode="markers", marker=mark, name="balance", **common)
        figure.add_trace(points.update(legendgroup="balance", cliponaxis=False), row, 1)
    figure.update_yaxes(range=[0, 1.05], tickformat=".0%", tickvals=[0, 0.5, 1])
    figure.update_xaxes(range=[-0.5, len(conditions) - 0.5], showticklabels=False, **BARE)
    shown = {"tickvals": list(range(len(conditions))), "ticktext": list(labels.values()), "tickangle": angle}
    figure.update_xaxes(showticklabels=True, **shown, row=len(tasks))
    legend = LEGEND_ABOVE | {"y": 1 + 24 / size["height"]}
    figure.update_layout(barmode="group", bargap=0.25, bargroupgap=0.06, legend=legend)
    asked = evaluation.scores[evaluation.scores["task"].isin(tasks)].groupby("task")["query"].nunique()
    notes = [
        f"shares; on topic and fluent beside told answers; {span(asked)} prompts per bar{_told_shots(evaluation)}",
        "diamond: balance, the harmonic mean of the three, and its 95% interval",
    ]
    return finish(
        figure,
        "Free answers: constraint met, on topic, fluent",
        notes,
        **size,
        right=24,
        extra_top=54,
        extra_bottom=room,
    )


def _told_shots(evaluation: Evaluation) -> str:
    shots = evaluation.metadata.get("shots")
    return "" if shots is None else f" · {counted(shots, 'demonstration') if shots else 'zero-shot'}"


def _share(value: float) -> str:
    return "not tried" if np.isnan(value) else f"{value:.1%}"

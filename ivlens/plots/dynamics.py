"""Figures of what training did to instruction vectors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from ivlens.plots import maps
from ivlens.plots.colours import BEFORE_AFTER, COLOURS, FAINT, MARK, TASK_COLOURS
from ivlens.plots.style import LEGEND_ABOVE, ZERO, finish, panels, tick_step
from ivlens.plots.traces import before_after, rate, task_lines, task_rows
from ivlens.plots.words import counted, escaped, span, unit, which_tasks, with_minus

if TYPE_CHECKING:
    from ivlens.dynamics import Change, Snapshot

__all__ = ["plot_change"]

PREDICTORS = {
    "iv_similarity": "cosine with the base's vector",
    "hidden_similarity": "change in hidden similarity",
    "head_overlap": "overlap of the strongest heads",
    "effects_spearman": "rank correlation of heads' effects",
    "weight_distance": "distance of the weights",
}
SYMBOLS = ("circle", "diamond", "square", "triangle-up", "x", "star")


def plot_change(change: Change, kind: str = "tasks") -> go.Figure:
    """What training did to instruction vectors.

    Parameters
    ----------
    kind
        `tasks`: cosine of the vector with the base's, beside accuracy before and after, per task; `matrix`: cosines between
        every task's vector before and every task's after; `trajectory`: cosine and accuracy over steps; `scatter`: each
        similarity against the change in accuracy; `hidden`: cosine of the residual stream with the base's vector, per
        layer; `effects`: maps of heads' effects before, after, and their difference.
    """
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r} is unknown; choose one of {', '.join(KINDS)}")
    if len(change.snapshots) < 2:
        raise ValueError("there is no checkpoint after the base to show")
    return KINDS[kind](change)


def _plot_tasks(change: Change) -> go.Figure:
    tasks, later = change.task_names, change.snapshots[1:]
    if _steps(change) is not None:
        later = later[-1:]
    cosines = change.similarity().loc[[s.label for s in later]].mean()
    figure, size = task_rows(tasks, ("cosine with the base's vector", "accuracy, whole answer"), panel=300)
    names = [escaped(task) for task in tasks]
    bars = go.Bar(x=cosines.tolist(), y=list(range(len(tasks))), orientation="h", width=0.56, showlegend=False)
    bars.update(text=[with_minus(f"{x:.2f}") for x in cosines], textposition="outside", cliponaxis=False)
    hover = "%{customdata}: %{x:.3f}<extra></extra>"
    bars.update(marker_color=COLOURS["vector"], customdata=names, hovertemplate=hover)
    figure.add_trace(bars, 1, 1)
    frames = {"before": _accuracies(change, [change.base]), "after": _accuracies(change, later)}
    before_after(figure, 2, frames, tasks)
    figure.update_xaxes(range=[min(0.0, 1.25 * cosines.min()), 1.16], tickvals=[-1, -0.5, 0, 0.5, 1], col=1)
    figure.update_xaxes(range=[-0.02, 1.02], tickformat=".0%", col=2)
    several = f"mean over {len(later)} checkpoints, answers pooled as if independent"
    where = escaped(later[0].label) if len(later) == 1 else several
    amounts = " and ".join(dict.fromkeys(span(frame["n"]) for frame in frames.values()))
    notes = [f"after: {where} · accuracy with 95% interval, {amounts} prompts per point"]
    return finish(figure, "Vectors and accuracy of each task before and after training", notes, **size)


def _accuracies(change: Change, snapshots: Sequence[Snapshot]) -> pd.DataFrame:
    """Per task, over the prompts of all snapshots."""
    rows = []
    for task in change.task_names:
        hits = [hit for s in snapshots for hit in s.accuracy[task].tolist()]
        asked = [(s.label, query) for s in snapshots for query in change.asked(task)]
        rows.append({"task": task, **rate(hits, asked)})
    return pd.DataFrame(rows)


def _plot_matrix(change: Change) -> go.Figure:
    tasks, last = change.task_names, change.snapshots[-1]
    cosines = np.array([[change.base.vectors[a].cosine(last.vectors[b]) for b in tasks] for a in tasks])
    figure, size = maps.cosine_map(cosines, tasks, "before", "after")
    others = cosines[~np.eye(len(tasks), dtype=bool)]
    means = f"mean {cosines.diagonal().mean():.2f} on the diagonal"
    means += f", {others.mean():.2f} off it" if len(others) else ""
    notes = [f"after: {escaped(last.label)} · cosine similarity, {with_minus(means)}"]
    return finish(figure, "Each task's vector before training against each after", notes, **size)


def _plot_trajectory(change: Change) -> go.Figure:
    steps, labels = _steps(change), [s.label for s in change.snapshots]
    x = list(range(len(labels))) if steps is None else steps
    accuracy = {t: [s.accuracy[t].mean().item() for s in change.snapshots] for t in change.task_names}
    cosines = {t: change.similarity()[t].tolist() for t in change.task_names}
    figure = go.Figure()
    task_lines(figure, x, accuracy, "accuracy", COLOURS["vector"], labels)
    task_lines(figure, x, cosines, "cosine with the base's vector", MARK, labels)
    lowest = min(map(min, cosines.values()))
    figure.update_yaxes(range=[min(-0.03, lowest - 0.05), 1.04], **ZERO)
    figure.update_xaxes(title_text="step", zeroline=False)
    room = 0
    if steps is None:
        slanted = max(map(len, labels)) > 10 or len(labels) > 8
        figure.update_xaxes(title_text=None, tickvals=x, ticktext=[escaped(label) for label in labels])
        figure.update_xaxes(tickangle=-45 if slanted else 0)
        room = int(5.2 * max(map(len, labels))) - 20 if slanted else -20
    figure.update_layout(legend=LEGEND_ABOVE)
    n = span([len(hits) for s in change.snapshots for hits in s.accuracy.values()])
    notes = [f"bold: mean over {counted(len(change.task_names), 'task')}, faint: single tasks · {n} prompts each"]
    extra = {"right": 28, "extra_top": 34, "extra_bottom": room}
    return finish(figure, "Accuracy and vectors along training", notes, width=620, height=340, **extra)


def _plot_hidden(change: Change) -> go.Figure:
    base, last = change.base, change.snapshots[-1]
    figure, layers = go.Figure(), list(range(len(base.hidden[change.task_names[0]])))
    for when, snapshot in (("before", base), ("after", last)):
        values = {task: snapshot.hidden[task].tolist() for task in change.task_names}
        task_lines(figure, layers, values, when, BEFORE_AFTER[when], [f"layer {layer}" for layer in layers])
    figure.update_xaxes(title_text="layer", dtick=tick_step(len(layers), 20), zeroline=False)
    figure.update_xaxes(range=[-0.5, len(layers) - 0.5])
    figure.update_yaxes(title_text="cosine with the base's vector", **ZERO)
    figure.update_layout(legend=LEGEND_ABOVE)
    amount = f"bold: mean over {counted(len(change.task_names), 'task')}, faint: single tasks"
    n = span([len(hits) for hits in base.accuracy.values()])
    where = f"residual stream after each layer, at the last prompt token, {n} prompts per task"
    notes = [f"after: {escaped(last.label)} · {amount} · {where}"]
    title = "How near the residual stream lies to the base's vector"
    return finish(figure, title, notes, width=620, height=320, right=28, extra_top=34)


def _steps(change: Change) -> list[int] | None:
    """Steps behind each snapshot, 0 behind the base; None where they don't tell an order, as over several runs."""
    steps = [change.base.step or 0, *(s.step for s in change.snapshots[1:])]
    return None if None in steps or sorted(set(steps)) != steps else steps


def _plot_effects(change: Change) -> go.Figure:
    base, last = change.base, change.snapshots[-1]
    for snapshot in (base, last):
        if snapshot.effects is None:
            raise ValueError(
                f"no heads were located at {snapshot.label}; give n_effects to compare or track, such as 8"
            )
    before, after = (maps.numbers(s.effects.mean()) for s in (base, last))
    nothing = np.full(before.shape, np.nan)
    shown = {"before": before, "after": after, "after − before": after - before}
    panel = maps.map_size(*before.shape, room=440, largest=30, smallest=(220, 140))
    figure, size = panels(1, 3, panel, (34, 0), list(shown))
    colours = maps.diverging(list(shown.values()))
    for column, values in enumerate(shown.values(), start=1):
        hover = maps.hover_heads(values, nothing)
        figure.add_trace(maps.heatmap(values, hover, panel, showscale=column == 1, **colours), 1, column)
        maps.grid_axes(figure, before.shape, panel, row=1, col=column)
        if column > 1:
            figure.update_yaxes(title_text=None, showticklabels=False, row=1, col=column)
    maps.colorbar(figure, "effect")
    n = span([len(s.effects.values) for s in (base, last)])
    what = f"average indirect effect on {unit(base.effects.metric)} · {which_tasks(base.effects.task_names)}"
    notes = [f"after: {escaped(last.label)} · {what}, {n} prompts · one colour scale for all"]
    title = "Effects of heads before and after training"
    return finish(figure, title, notes, **size, right=96, extra_top=20)


def _plot_scatter(change: Change) -> go.Figure:
    """A panel per measured similarity: a point per task and checkpoint, and a straight line."""
    points, found = change.points(), change.correlations().to_dict("records")
    columns = min(3, len(found))
    rows = math.ceil(len(found) / columns)
    titles = [f"R² {x['r2']:.2f} [{x['r2_low']:.2f}, {x['r2_high']:.2f}]" for x in found]
    titles = ["R²: too few points" if math.isnan(x["r2"]) else title for x, title in zip(found, titles)]
    figure, size = panels(rows, columns, (250, 220), (36, 84), titles)
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


KINDS = {
    "tasks": _plot_tasks,
    "matrix": _plot_matrix,
    "trajectory": _plot_trajectory,
    "scatter": _plot_scatter,
    "hidden": _plot_hidden,
    "effects": _plot_effects,
}

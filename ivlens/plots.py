"""Figures of results. Each function returns a `go.Figure` and leaves plotly's global templates alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from ivlens.style import (
    DIVERGING,
    FAINT,
    GRID,
    INK,
    MARK,
    RDBU,
    SEQUENTIAL,
    bare,
    colorbar,
    condition_colours,
    counted,
    diverging,
    escaped,
    finish,
    grid_axes,
    heatmap,
    hover_heads,
    label_width,
    legend_above,
    legend_lines,
    map_size,
    numbers,
    outline,
    percent,
    plain,
    sequential,
    signed,
    task_labels,
    ticks,
    unit,
    which_tasks,
    with_minus,
)

if TYPE_CHECKING:
    import pandas as pd

    from ivlens.evaluation import Evaluation
    from ivlens.patching.effects import HeadEffects
    from ivlens.patching.residual import ResidualEffects
    from ivlens.tuning import InjectionSearch
    from ivlens.vectors import InstructionVector

__all__ = ["plot_effects", "plot_evaluation", "plot_residual", "plot_search", "plot_shares", "plot_similarity"]

KINDS = ("mean", "stderr", "tasks")


# -- heads and residual stream ----------------------------------------------------------------------------------------
def plot_effects(effects: HeadEffects, kind: str = "mean", *, task: str | None = None) -> go.Figure:
    """Heatmap of heads' effects, layer × head.

    Parameters
    ----------
    kind
        `mean` with the ten strongest heads outlined, `stderr`, or `tasks` for one small map per task.
    task
        Only this task's prompts (not with `kind="tasks"`).
    """
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r} is unknown; choose one of {', '.join(KINDS)}")
    if kind == "tasks":
        if task is not None:
            raise ValueError(f"kind='tasks' shows every task; for {task!r} alone leave kind at 'mean'")
        return _plot_tasks(effects)
    mean, error = numbers(effects.mean(task)), numbers(effects.stderr(task))
    part = effects if task is None else effects.of(task)
    amount = f"{which_tasks(part.task_names)}, {counted(len(part.values), 'prompt')}"
    notes = [f"effect on {unit(effects.metric)} · {amount}"]
    size = width, height = map_size(*mean.shape)
    colours = diverging([mean]) if kind == "mean" else sequential(error)
    figure = go.Figure(heatmap(mean if kind == "mean" else error, hover_heads(mean, error), size, **colours))
    if kind == "mean":
        top = effects.top(min(10, mean.size), task)
        for head in top:
            outline(figure, head.head, head.layer, INK)
        notes.append(f"outlined: the {len(top)} strongest, led by {escaped(', '.join(map(str, top[:3])))}")
    colorbar(figure, "effect" if kind == "mean" else "standard error")
    grid_axes(figure, mean.shape, size)
    title = "Average indirect effect of each head" if kind == "mean" else "Standard error of each head's effect"
    return finish(figure, title, notes, width=width, height=height, right=96)


def _plot_tasks(effects: HeadEffects) -> go.Figure:
    names, gap_x, gap_y = effects.task_names, 46, 66
    means = [numbers(effects.mean(name)) for name in names]
    errors = [numbers(effects.stderr(name)) for name in names]
    width, height = map_size(*means[0].shape, room=220, largest=18, smallest=(120, 100))
    rows = math.ceil(len(names) / max(1, min(len(names), 1040 // (width + gap_x))))
    columns = math.ceil(len(names) / rows)
    whole = columns * (width + gap_x) - gap_x, rows * (height + gap_y) - gap_y
    figure = make_subplots(
        rows,
        columns,
        subplot_titles=[escaped(name) for name in names],
        horizontal_spacing=gap_x / whole[0] if columns > 1 else 0,
        vertical_spacing=gap_y / whole[1] if rows > 1 else 0,
    )
    colours = diverging(means)
    for i, (mean, error) in enumerate(zip(means, errors, strict=True)):
        row, column = i // columns + 1, i % columns + 1
        hover = hover_heads(mean, error)
        figure.add_trace(heatmap(mean, hover, (width, height), showscale=i == 0, **colours), row, column)
        grid_axes(figure, mean.shape, (width, height), row=row, col=column)
        figure.update_xaxes(title_text="head" if i + columns >= len(names) else None, row=row, col=column)
        figure.update_yaxes(title_text="layer" if column == 1 else None, row=row, col=column)
    size = (width + gap_x) / (0.58 * max(map(len, names)))
    figure.update_annotations(font_size=max(8, min(13, size)), yshift=2)
    colorbar(figure, "effect")
    amount = counted(len(effects.values), "prompt")
    notes = [f"effect on {unit(effects.metric)} · {amount} · one colour scale for all"]
    title = "Average indirect effect of each head, by task"
    return finish(figure, title, notes, width=whole[0], height=whole[1], right=96, extra_top=20)


def plot_residual(effects: ResidualEffects) -> go.Figure:
    """Heatmap of the residual stream's effects, layer × position."""
    mean, error = numbers(effects.mean()), numbers(effects.stderr())
    size = width, height = map_size(*mean.shape, stretch=3)
    places = [with_minus(str(p)) for p in effects.positions]
    hover = [
        [f"layer {i}, position {place}  {signed(mean[i, j], error[i, j])}" for j, place in enumerate(places)]
        for i in range(len(mean))
    ]
    figure = go.Figure(heatmap(mean, hover, size, **diverging([mean])))
    if width / mean.shape[1] >= 42 and height / mean.shape[0] >= 16:
        figure.update_traces(text=[[with_minus(f"{x:+.2f}") for x in row] for row in mean])
        figure.update_traces(texttemplate="%{text}", textfont_size=11)
    colorbar(figure, "effect")
    grid_axes(figure, mean.shape, size)
    figure.update_xaxes(title_text="position, counted from the end", **ticks(places, width // 38))
    notes = [f"effect on {unit(effects.metric)} · {counted(len(effects.values), 'prompt')}"]
    return finish(figure, "Patching the residual stream", notes, width=width, height=height, right=96)


# -- injection ---------------------------------------------------------------------------------------------------------
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
    tasks, conditions = evaluation.task_names, evaluation.conditions
    group = max(56, 13 * len(conditions) + 20, label_width(tasks))
    n_rows = math.ceil(len(tasks) / max(1, 1000 // group))
    n_columns = math.ceil(len(tasks) / n_rows)
    width = max(520, n_columns * group)
    labels, angle, room = task_labels(tasks, width // n_columns)
    height, gap = (300 if n_rows == 1 else 180) * n_rows + (48 + room) * (n_rows - 1), 48 + room
    figure = make_subplots(n_rows, 1, vertical_spacing=gap / height if n_rows > 1 else 0)
    percent = metric in ("first_token", "exact_match")
    named = set()  # a condition stands in the legend once, whichever row it comes up in first
    for row in range(n_rows):
        here = tasks[row * n_columns : (row + 1) * n_columns]
        for condition, colour in condition_colours(conditions).items():
            part = frame[(frame["condition"] == condition) & frame["task"].isin(here)]
            if len(part):
                bars = _bars(part, condition, colour, ".1%" if percent else ".3f")
                figure.add_trace(bars.update(showlegend=condition not in named), row + 1, 1)
                named.add(condition)
        shown = {"tickvals": [escaped(task) for task in here], "ticktext": [labels[task] for task in here]}
        # Every row has room for as many tasks, so that bars have one width throughout.
        figure.update_xaxes(categoryarray=shown["tickvals"], range=[-0.5, n_columns - 0.5], **shown, row=row + 1, col=1)
    figure.update_xaxes(type="category", categoryorder="array", tickangle=angle)
    figure.update_yaxes(title_text=unit(metric), tickformat=".0%" if percent else None, range=[0, 1.03], gridcolor=GRID)
    figure.update_layout(barmode="group", bargap=0.22, bargroupgap=0.06, legend=legend_above())
    least, most = frame["n"].min(), frame["n"].max()
    notes = [f"mean and 95% interval · {least if least == most else f'{least} to {most}'} prompts per bar"]
    if (shots := evaluation.metadata.get("shots")) is not None:
        notes[0] += f" · {counted(shots, 'demonstration') if shots else 'zero-shot'}"
    title = f"{unit(metric)[0].upper()}{unit(metric)[1:]} with and without the vector"
    extra = {"extra_top": 14 + 20 * legend_lines(conditions, width), "extra_bottom": room - 20}
    return finish(figure, title, notes, width=width, height=height, right=24, **extra)


def _bars(part: pd.DataFrame, condition: str, colour: str, digits: str) -> go.Bar:
    mean, low, high = (f"%{{{name}:{digits}}}" for name in ("y", "customdata[0]", "customdata[1]"))
    hover = f"%{{x}}<br>%{{fullData.name}}: {mean} [{low}, {high}]<br>n = %{{customdata[2]}}"
    return go.Bar(
        x=[escaped(task) for task in part["task"]],
        y=part["mean"].tolist(),
        name=escaped(condition),
        legendgroup=condition,
        marker_color=colour,
        error_y={
            "array": (part["high"] - part["mean"]).clip(lower=0).tolist(),
            "arrayminus": (part["mean"] - part["low"]).clip(lower=0).tolist(),
            "symmetric": False,
            "color": INK,
            "thickness": 1.2,
            "width": 2,
        },
        customdata=part[["low", "high", "n"]].to_numpy().tolist(),
        hovertemplate=hover + "<extra></extra>",
    )


# -- vectors -----------------------------------------------------------------------------------------------------------
def plot_shares(vector: InstructionVector) -> go.Figure:
    """Bars: the part of the vector's length that each head contributes; the parts add up to one."""
    if vector.shares is None or not vector.heads:
        raise ValueError(f"vector {vector.name!r} has no heads to show; those that ivl.extract_vector makes have some")
    shares, direction = numbers(vector.shares), numbers(vector.vector)
    parts = shares @ direction / max(float(direction @ direction), 1e-12)
    order = np.argsort(-parts, kind="stable")
    names, lengths = [str(vector.heads[i]) for i in order], np.linalg.norm(shares, axis=1)
    hover = [
        f"{name}  {percent(parts[i])} (its own length {lengths[i]:.2f})" for name, i in zip(names, order, strict=True)
    ]
    bars = go.Bar(x=names, y=parts[order], hovertext=hover, hoverinfo="text")
    bars.update(marker_color=[RDBU[-1] if parts[i] >= 0 else RDBU[0] for i in order])
    if len(names) <= 20:
        bars.update(text=[percent(parts[i]) for i in order], textposition="outside", cliponaxis=False, textangle=0)
    figure = go.Figure(bars)
    figure.update_xaxes(title_text="head", type="category", tickangle=0 if len(names) <= 12 else -60)
    figure.update_yaxes(
        title_text="part of the vector's length", tickformat=".2~%", gridcolor=GRID, zerolinecolor=FAINT
    )
    width = max(460, min(1100, 52 * len(names)))
    notes = [f"each head's share projected on the vector · length {vector.norm():.2f}, {counted(len(names), 'head')}"]
    title = f"Heads behind the vector “{escaped(vector.name)}”"
    return finish(figure, title, notes, width=width, height=320, right=24, extra_bottom=24)


def plot_similarity(vectors: Mapping[str, InstructionVector]) -> go.Figure:
    """Heatmap of cosines between vectors."""
    if not vectors:
        raise ValueError("no vectors given; pass a mapping from a name to each, such as {'antonym': iv}")
    names = list(vectors)
    cosines = np.array([[vectors[a].cosine(vectors[b]) for b in names] for a in names])
    shown = [escaped(name) for name in names]
    hover = [
        [f"{a} · {b}  {signed(x)}" for b, x in zip(shown, row, strict=True)]
        for a, row in zip(shown, cosines, strict=True)
    ]
    cell = max(14, min(54, 560 // len(names)))
    size = (max(280, cell * len(names)),) * 2
    figure = go.Figure(heatmap(cosines, hover, size, colorscale=DIVERGING, zmin=-1, zmax=1, zmid=0))
    if len(names) <= 12:
        figure.update_traces(texttemplate="%{z:.2f}", textfont_size=12)
    figure.update_xaxes(tickangle=-45, **ticks(shown), **bare())
    figure.update_yaxes(autorange="reversed", **ticks(shown), **bare())
    colorbar(figure, "cosine")
    side = 7 * max(map(len, names))
    notes = [f"cosine similarity of {counted(len(names), 'vector')}; 1: the same direction, 0: unrelated"]
    margins = {"left": side - 50, "right": 96, "extra_bottom": int(side * 0.75) - 30}
    return finish(figure, "How alike the tasks' vectors are", notes, width=size[0], height=size[1], **margins)

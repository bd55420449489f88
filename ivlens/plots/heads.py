"""Figures of heads' effects, of the residual stream, and of vectors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import plotly.graph_objects as go

from ivlens.plots import maps
from ivlens.plots.colours import FAINT, INK
from ivlens.plots.style import finish, panels, ticks
from ivlens.plots.words import counted, escaped, signed, unit, which_tasks, with_minus

if TYPE_CHECKING:
    from ivlens.patching.effects import HeadEffects
    from ivlens.patching.residual import ResidualEffects
    from ivlens.vectors.vector import InstructionVector

__all__ = ["plot_effects", "plot_residual", "plot_shares", "plot_similarity"]

KINDS = ("mean", "stderr", "tasks")


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
    mean, error = maps.numbers(effects.mean(task)), maps.numbers(effects.stderr(task))
    part = effects if task is None else effects.of(task)
    amount = f"{which_tasks(part.task_names)}, {counted(len(part.values), 'prompt')}"
    notes = [f"effect on {unit(effects.metric)} · {amount}"]
    size = width, height = maps.map_size(*mean.shape)
    shown, colours = (mean, maps.diverging([mean])) if kind == "mean" else (error, maps.sequential(error))
    figure = go.Figure(maps.heatmap(shown, maps.hover_heads(mean, error), size, **colours))
    if kind == "mean":
        top = effects.top(min(10, mean.size), task)
        for head in top:
            maps.outline(figure, head.head, head.layer, INK)
        notes.append(f"outlined: the {len(top)} strongest, led by {escaped(', '.join(map(str, top[:3])))}")
    maps.colorbar(figure, "effect" if kind == "mean" else "standard error")
    maps.grid_axes(figure, mean.shape, size)
    title = "Average indirect effect of each head" if kind == "mean" else "Standard error of each head's effect"
    return finish(figure, title, notes, width=width, height=height, right=96)


def _plot_tasks(effects: HeadEffects) -> go.Figure:
    names, gap_x, gap_y = effects.task_names, 46, 66
    means = [maps.numbers(effects.mean(name)) for name in names]
    errors = [maps.numbers(effects.stderr(name)) for name in names]
    panel = maps.map_size(*means[0].shape, room=220, largest=18, smallest=(120, 100))
    rows = math.ceil(len(names) / max(1, min(len(names), 1040 // (panel[0] + gap_x))))
    columns = math.ceil(len(names) / rows)
    figure, size = panels(rows, columns, panel, (gap_x, gap_y), [escaped(name) for name in names])
    colours = maps.diverging(means)
    for i, (mean, error) in enumerate(zip(means, errors, strict=True)):
        where = {"row": i // columns + 1, "col": i % columns + 1}
        hover = maps.hover_heads(mean, error)
        figure.add_trace(maps.heatmap(mean, hover, panel, showscale=i == 0, **colours), **where)
        maps.grid_axes(figure, mean.shape, panel, **where)
        figure.update_xaxes(title_text="head" if i + columns >= len(names) else None, **where)
        figure.update_yaxes(title_text="layer" if where["col"] == 1 else None, **where)
    fitting = (panel[0] + gap_x) / (0.58 * max(map(len, names)))
    figure.update_annotations(font_size=max(8, min(13, fitting)))
    maps.colorbar(figure, "effect")
    amount = counted(len(effects.values), "prompt")
    notes = [f"effect on {unit(effects.metric)} · {amount} · one colour scale for all"]
    title = "Average indirect effect of each head, by task"
    return finish(figure, title, notes, **size, right=96, extra_top=20)


def plot_residual(effects: ResidualEffects) -> go.Figure:
    """Heatmap of the residual stream's effects, layer × position."""
    mean, error = maps.numbers(effects.mean()), maps.numbers(effects.stderr())
    size = width, height = maps.map_size(*mean.shape, stretch=3)
    places = [with_minus(str(p)) for p in effects.positions]
    hover = [
        [f"layer {i}, position {place}  {signed(mean[i, j], error[i, j])}" for j, place in enumerate(places)]
        for i in range(len(mean))
    ]
    figure = go.Figure(maps.heatmap(mean, hover, size, **maps.diverging([mean])))
    if width / mean.shape[1] >= 42 and height / mean.shape[0] >= 16:
        figure.update_traces(text=[[with_minus(f"{x:+.2f}") for x in row] for row in mean])
        figure.update_traces(texttemplate="%{text}", textfont_size=11)
    maps.colorbar(figure, "effect")
    maps.grid_axes(figure, mean.shape, size)
    figure.update_xaxes(title_text="position, counted from the end", **ticks(places, width // 38))
    notes = [f"effect on {unit(effects.metric)} · {counted(len(effects.values), 'prompt')}"]
    return finish(figure, "Patching the residual stream", notes, width=width, height=height, right=96)


def plot_shares(vector: InstructionVector) -> go.Figure:
    """Bars: the part of the vector's length that each head contributes; the parts add up to one."""
    if vector.shares is None or not vector.heads:
        raise ValueError(f"vector {vector.name!r} has no heads to show; those that ivl.extract_vector makes have some")
    shares, direction = maps.numbers(vector.shares), maps.numbers(vector.vector)
    parts = shares @ direction / max(float(direction @ direction), 1e-12)
    order = np.argsort(-parts, kind="stable")
    names, lengths = [str(vector.heads[i]) for i in order], np.linalg.norm(shares, axis=1)
    shown = [with_minus(f"{parts[i]:.1%}") for i in order]
    hover = [f"{name}  {x} (its own length {lengths[i]:.2f})" for name, x, i in zip(names, shown, order, strict=True)]
    bars = go.Bar(x=names, y=parts[order], hovertext=hover, hoverinfo="text")
    bars.update(marker_color=[maps.RDBU[-1] if parts[i] >= 0 else maps.RDBU[0] for i in order])
    if len(names) <= 20:
        bars.update(text=shown, textposition="outside", cliponaxis=False, textangle=0)
    figure = go.Figure(bars)
    figure.update_xaxes(title_text="head", type="category", tickangle=0 if len(names) <= 12 else -60)
    figure.update_yaxes(title_text="part of the vector's length", tickformat=".2~%", zerolinecolor=FAINT)
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
    figure, size = maps.cosine_map(cosines, names)
    notes = [f"cosine similarity of {counted(len(names), 'vector')}; 1: the same direction, 0: unrelated"]
    return finish(figure, "How alike the tasks' vectors are", notes, **size)

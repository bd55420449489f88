"""Figures of a continual-learning run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from ivlens.plots import maps
from ivlens.plots.colours import FAINT, INK, MARK, method_colours
from ivlens.plots.labels import labels_beside
from ivlens.plots.style import BARE, ZERO, finish, panels, task_labels, ticks
from ivlens.plots.traces import error_bars, task_lines, task_rows
from ivlens.plots.words import counted, escaped, span, with_minus

if TYPE_CHECKING:
    from ivlens.continual import ContinualResults

__all__ = ["plot_continual"]

LIGHT = [[0, "#ffffff"], [1, "#5fa8d3"]]  # numbers can be read on all of it
AXES = ("plasticity", "stability")


def plot_continual(results: ContinualResults, kind: str = "scatter") -> go.Figure:
    """What methods learn and forget along a sequence of tasks.

    Parameters
    ----------
    kind
        `scatter`: stability against plasticity, a point per method with 95 % intervals, and the front of those that none exceeds
        in both; `matrix`: a map per method, stage × task, of mean scores; `similarity`: cosine of the instruction vectors with
        the base's, along the sequence; `general`: mean scores on tasks not trained on, beside the base's.
    """
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r} is unknown; choose one of {', '.join(KINDS)}")
    if not results.methods:
        raise ValueError("there is no method beside the base to show")
    return KINDS[kind](results)


def _plot_scatter(results: ContinualResults) -> go.Figure:
    found = _in_points(results.to_dataframe()).dropna(subset=["mean"])
    x, y = (found[found["metric"] == m].set_index("method") for m in AXES)
    seeds, size = results.by_seed(), (640, 460)
    if y.empty:
        raise ValueError("no method has finished the sequence; wait until one has, or plot kind='matrix'")
    figure, colours = go.Figure(), method_colours(results.methods)
    front = sorted(results.pareto(), key=lambda m: x["mean"][m])
    line = {"color": FAINT, "width": 1.5, "dash": "dot"}
    path = go.Scatter(x=x["mean"][front].tolist(), y=y["mean"][front].tolist(), mode="lines", line=line)
    figure.add_trace(path.update(name="Pareto front", hoverinfo="skip", showlegend=len(front) > 1))
    for method in x.index:
        own = seeds[seeds["method"] == method]
        dots = go.Scatter(x=(100 * own[AXES[0]]).tolist(), y=(100 * own[AXES[1]]).tolist(), mode="markers")
        dots.update(marker={"color": colours[method], "size": 5, "opacity": 0.4}, showlegend=False)
        hover = f"{escaped(method)}, seed %{{customdata}}<br>plasticity %{{x:.1f}}, stability %{{y:.1f}}<extra></extra>"
        figure.add_trace(dots.update(customdata=own["seed"].tolist(), hovertemplate=hover, name=escaped(method)))
    for method in x.index:
        figure.add_trace(_cross(method, x.loc[method], y.loc[method], colours[method]))
    ranges = [_range([*a["low"], *a["high"], *(100 * seeds[name])]) for a, name in zip((x, y), AXES)]
    figure.update_xaxes(title_text="plasticity: score right after training on a task (points)", range=ranges[0])
    figure.update_yaxes(title_text="stability: −forgetting (points)", range=ranges[1])
    figure.update_xaxes(zeroline=False)
    figure.update_yaxes(**ZERO)
    figure.update_layout(annotations=labels_beside(x, y, ranges, size, colours))
    figure.update_layout(legend={"x": 0, "y": 1.01, "yanchor": "bottom", "orientation": "h", "font": {"size": 12}})
    dots = "; small dots: single seeds" if seeds["seed"].nunique() > 1 else ""
    both = (results.scores["kind"] == "general").any()
    lost = "average of what was lost on earlier and on general tasks" if both else "on earlier tasks"
    notes = [f"up and right is better · {_seeds(results)}, 95% interval over prompts{dots}", f"forgetting: {lost}"]
    title = "What methods keep against what they learn"
    return finish(figure, title, notes, width=size[0], height=size[1], right=28, extra_top=26)


def _cross(method: str, x: pd.Series, y: pd.Series, colour: str) -> go.Scatter:
    values = [with_minus(f"{a['mean']:.1f} [{a['low']:.1f}, {a['high']:.1f}]") for a in (x, y)]
    hover = f"{escaped(method)}<br>plasticity {values[0]}<br>stability {values[1]}<extra></extra>"
    along, up = (error_bars([a["mean"]], [a["low"]], [a["high"]], colour) for a in (x, y))
    errors = {"error_x": along, "error_y": up}
    point = go.Scatter(x=[x["mean"]], y=[y["mean"]], mode="markers", marker={"color": colour, "size": 11}, **errors)
    return point.update(name=escaped(method), hovertemplate=hover, showlegend=False)


def _range(values: Sequence[float]) -> list[float]:
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    room = 0.08 * (high - low) or 1.0
    return [low - room, high + room]


def _plot_matrix(results: ContinualResults) -> go.Figure:
    tables = {method: 100 * results.matrix(method) for method in results.methods}
    n_trained, stages = len(results.sequence), range(len(results.sequence) + 1)
    columns = list(next(iter(tables.values())).columns)
    cell, gap = (max(24, min(44, 520 // len(columns))), 23), (30, 42)
    panel = cell[0] * len(columns), cell[1] * len(stages)
    across = max(1, min(4, len(tables), 1100 // (panel[0] + gap[0])))
    down = math.ceil(len(tables) / across)
    # Above an empty place, slanted labels would run into the neighbour below.
    angle = -90 if down > 1 and len(tables) % across else -45
    figure, size = panels(down, across, panel, gap, [f"<b>{escaped(m)}</b>" for m in tables])
    after = ["base", *(f"after {escaped(task)}" for task in results.sequence)]
    for i, (method, table) in enumerate(tables.items()):
        where, z = {"row": i // across + 1, "col": i % across + 1}, table.reindex(stages).to_numpy(float)
        names = [[f"{escaped(method)}, {a}<br>{escaped(c)}" for c in columns] for a in after]
        hover = [[f"{name}: {v:.1f}" for name, v in zip(*pair)] for pair in zip(names, z)]
        options = {"colorscale": LIGHT, "zmin": 0, "zmax": 100, "showscale": i == 0}
        text = [["" if math.isnan(v) else with_minus(f"{v:.0f}") for v in row] for row in z]
        numbers = {"text": text, "texttemplate": "%{text}"}
        numbers["textfont"] = {"size": 11, "color": INK}
        figure.add_trace(maps.heatmap(z, hover, panel, **options, **numbers), **where)
        for task in range(n_trained):
            maps.outline(figure, task, task + 1, MARK, **where)
        if len(columns) > n_trained:
            edge = {"x0": n_trained - 0.5, "x1": n_trained - 0.5, "y0": -0.5, "y1": n_trained + 0.5}
            figure.add_shape(type="line", line={"color": INK, "width": 1.5}, **edge, **where)
        below = i + across >= len(tables)
        figure.update_xaxes(**ticks([escaped(c) for c in columns]), showticklabels=below, tickangle=angle, **where)
        figure.update_yaxes(**ticks(after), showticklabels=where["col"] == 1, **where)
    figure.update_xaxes(**BARE)
    figure.update_yaxes(**BARE, autorange="reversed", ticklabelstandoff=4)
    bar = {"len": min(260, size["height"]), "lenmode": "pixels", "y": 1, "yanchor": "top"}
    maps.colorbar(figure, "points", **bar, x=1 + 14 / size["width"], xanchor="left")
    base = results.scores[results.scores["method"] == "base"]
    amounts = f"{span(base.groupby(['kind', 'task', 'shots']).size())} prompts each, {_seeds(results)}"
    notes = [f"mean score, {amounts} · outlined: the task just trained on"]
    notes[0] += " · right of the line: general tasks, not trained on" if len(columns) > n_trained else ""
    room = int((1 if angle == -90 else 0.75) * 7 * max(map(len, columns))) - 30
    size |= {"left": max(0, 7 * max(map(len, after)) - 50), "right": 92, "extra_top": 24, "extra_bottom": room}
    return finish(figure, "Scores on every task after every stage", notes, **size)


def _plot_similarity(results: ContinualResults) -> go.Figure:
    if not len(results.similarity):
        raise ValueError("the vectors were not followed along the sequence; run with similarity=True")
    single = results.similarity.groupby(["method", "task", "stage"])["similarity"].mean()
    figure, stages = go.Figure(), list(range(len(results.sequence) + 1))
    names = [f"after {task}" for task in results.sequence]
    for method, colour in method_colours(results.methods).items():
        if method not in single.index:
            continue
        lines = single[method].unstack("stage")
        lines[0] = 1.0  # the base's vectors themselves
        task_lines(figure, stages, lines.reindex(columns=stages).T.to_dict("list"), method, colour, ["base", *names])
    width = max(520, min(110 * len(stages), 1000))
    labels, angle, room = task_labels(names, width // len(stages))
    figure.update_xaxes(tickvals=stages, ticktext=["base", *(labels[name] for name in names)], tickangle=angle)
    figure.update_xaxes(zeroline=False, range=[-0.15, len(stages) - 0.85])
    figure.update_yaxes(title_text="cosine with the base's vector", **ZERO)
    figure.update_layout(legend={"x": 1 + 12 / width, "y": 1, "font": {"size": 13}, "tracegroupgap": 2})
    n_tasks = results.similarity["task"].nunique()
    notes = [f"bold: mean over {counted(n_tasks, 'task')}, thin: single tasks · {_seeds(results)}"]
    right = 76 + int(7.5 * max(map(len, results.methods)))
    title = "How far training turns the tasks' instruction vectors"
    return finish(figure, title, notes, width=width, height=380, right=right, extra_bottom=room - 20)


def _plot_general(results: ContinualResults) -> go.Figure:
    found = _in_points(results.to_dataframe()).dropna(subset=["mean"]).set_index(["metric", "method"])
    titles = {m: t for m, t in (("GP", "zero-shot (GP)"), ("IP", "with demonstrations (IP)")) if m in found.index}
    if not titles:
        raise ValueError("no general tasks were scored; run with general=('present_past', ...)")
    methods = results.methods
    figure, size = task_rows(methods, list(titles.values()))
    for column, metric in enumerate(titles, start=1):
        part, start = found.loc[metric], found["mean"][metric, "base"]
        part = part.reindex([m for m in methods if m in part.index])
        rows = [methods.index(m) for m in part.index]
        colours = [method_colours(methods)[m] for m in part.index]
        from_base = [with_minus(f"{mean - start:+.1f}") for mean in part["mean"]]
        about = list(zip(map(escaped, part.index), from_base, part["low"], part["high"], part["n_prompts"]))
        interval = "%{x:.1f} [%{customdata[2]:.1f}, %{customdata[3]:.1f}]"
        hover = f"%{{customdata[0]}}: {interval}, %{{customdata[1]}} from the base<br>n = %{{customdata[4]}}"
        bars = go.Bar(x=part["mean"].tolist(), y=rows, orientation="h", width=0.6, showlegend=False)
        bars.update(
            marker={"color": colours, "opacity": 0.8}, customdata=about, hovertemplate=f"{hover}<extra></extra>"
        )
        bars.update(error_x=error_bars(part["mean"], part["low"], part["high"], INK))
        figure.add_trace(bars, 1, column)
        beside = [max(high, start) for high in part["high"].fillna(part["mean"])]
        text = [f" {mean:.1f} ({change})" for mean, change in zip(part["mean"], from_base)]
        shown = go.Scatter(x=beside, y=rows, mode="text", text=text, textposition="middle right")
        figure.add_trace(shown.update(textfont_size=12, hoverinfo="skip", showlegend=False), 1, column)
        figure.add_vline(start, line={"color": FAINT, "width": 1.5, "dash": "dash"}, row=1, col=column)
        figure.update_xaxes(range=[0, 1.45 * max([start, *beside])], title_text="mean score (points)", col=column)
        titles[metric] += f", base {start:.1f}"
    for note, text in zip(figure.layout.annotations, titles.values(), strict=True):
        note.update(text=text)
    n_tasks = results.scores.loc[results.scores["kind"] == "general", "task"].nunique()
    n = span([int(found["n_prompts"][metric, "base"]) for metric in titles])
    notes = ["after the last stage · dashed: the base model, in brackets: the difference from it"]
    notes += [
        f"mean over {counted(n_tasks, 'task')}, {n} prompts per bar, {_seeds(results)} · 95% interval over prompts"
    ]
    return finish(figure, "Tasks that were not trained on", notes, **{**size, "extra_top": 24})


def _in_points(frame: pd.DataFrame) -> pd.DataFrame:
    return frame.assign(**{name: 100 * frame[name] for name in ("mean", "low", "high", "sd")})


def _seeds(results: ContinualResults) -> str:
    n = results.scores.loc[results.scores["method"] != "base"].groupby("method")["seed"].nunique()
    return f"{span(n)} seed{'' if n.max() == 1 else 's'}"


KINDS = {"scatter": _plot_scatter, "matrix": _plot_matrix, "similarity": _plot_similarity, "general": _plot_general}

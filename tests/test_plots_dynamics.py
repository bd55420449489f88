"""Figures of what training did."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import plotly.io as pio
import pytest
import torch

from ivlens.common.statistics import wilson
from ivlens.dynamics import Change, Recovery, Snapshot
from ivlens.dynamics.probabilities import AnswerProbabilities
from ivlens.models.head import Head
from ivlens.patching.effects import HeadEffects
from ivlens.plots import plot_change, plot_loss, plot_probabilities, plot_recovery
from ivlens.plots.colours import condition_colours
from ivlens.training import TrainingRun
from ivlens.vectors.vector import InstructionVector
from tests.test_plots import UGLY, check

TASKS = ("antonym", "present_past")
KINDS = ("tasks", "matrix", "trajectory", "scatter", "hidden", "effects")
LAYERS, HEADS = 6, 4
RATES = {
    "before": 0.9,
    "before + vector": 1.0,
    "after": 0.2,
    "old vector": 0.6,
    "my heads": 0.5,
    "old vector, by heads": 0.4,
    "random vector": 0.1,
    "other task": 0.0,
    "original state": 0.8,
}


def snapshot(label: str, step: int | None, k: int, tasks=TASKS) -> Snapshot:
    g = torch.Generator().manual_seed(k)
    vectors, hidden, accuracy, chances = {}, {}, {}, {}
    for i, task in enumerate(tasks):
        shares = torch.randn(2, 8, generator=torch.Generator().manual_seed(100 + i))
        shares = shares + 0.3 * k * torch.randn(2, 8, generator=g)
        vectors[task] = InstructionVector(shares.sum(0), (Head(1, 2), Head(3, 0)), shares, metadata={"task": task})
        hidden[task] = torch.rand(LAYERS, generator=g)
        accuracy[task] = (torch.arange(10) < 9 - 2 * k - i).float()
        chances[task] = -torch.rand(10, generator=g)
    effects = HeadEffects(
        torch.randn(4 * len(tasks), LAYERS, HEADS, generator=g),
        torch.zeros(4 * len(tasks)),
        tuple(task for task in tasks for _ in range(4)),
    )
    return Snapshot(label, step, vectors, hidden, accuracy, chances, 0.5 * k, effects)


def along(n: int = 3, tasks=TASKS) -> Change:
    """One run's checkpoints."""
    later = [snapshot(f"checkpoint-{20 * k}", 20 * k, k, tasks) for k in range(1, n + 1)]
    return Change((snapshot("base", None, 0, tasks), *later))


def over_runs(n: int = 3) -> Change:
    later = [snapshot(f"english_french-{k}/final", 100, k) for k in range(1, n + 1)]
    return Change((snapshot("base", None, 0), *later))


def recovery(checkpoints=("a/final", "b/final"), tasks=TASKS, n: int = 10) -> Recovery:
    rows, choices = [], []
    for i, checkpoint in enumerate(checkpoints):
        for task in tasks:
            for condition, rate in RATES.items():
                if condition == "my heads" and task == tasks[-1]:
                    continue  # not given for this task
                rate = rate if condition.startswith("before") else max(rate - 0.1 * i, 0)
                row = {"checkpoint": checkpoint, "task": task, "condition": condition}
                rows += [{**row, "prompt": j, "hit": float(j < round(rate * n))} for j in range(n)]
                choices.append({**row, "layer": 1, "scale": 1.0, "accuracy": rate})
    return Recovery(pd.DataFrame(rows), pd.DataFrame(choices))


def probabilities(shift: float = 0.0, tasks=TASKS, n: int = 12) -> AnswerProbabilities:
    g = torch.Generator().manual_seed(0)
    knowledge = {task: -7 - torch.rand(n, generator=g) for task in tasks}
    instruction = {task: -1 - shift - torch.rand(n, generator=g) for task in tasks}
    return AnswerProbabilities(knowledge, instruction, {task: torch.ones(n, 2) for task in tasks})


def run(n: int = 5, tasks=("english_french",)) -> TrainingRun:
    log = [{"step": 10.0 * (i + 1), "loss": 3 / (i + 1), "learning_rate": 1e-4} for i in range(n)]
    settings = {"tasks": list(tasks), "base": "tiny", "method": "lora", "weights": "LoRA", "steps": 50, "batch_size": 8}
    return TrainingRun(Path("run"), {**settings, "learning_rate": 1e-4}, log, {"seconds": 1.0})


# -- loss --------------------------------------------------------------------------------------------------------------
def test_loss_over_steps():
    figure = run().plot()
    check(figure)
    assert figure == plot_loss(run())
    (line,) = figure.data
    assert list(line.x) == [10, 20, 30, 40, 50]
    assert list(line.y) == [entry["loss"] for entry in run().log]
    assert "english_french" in figure.layout.title.text and "3.000 at first, 0.600 at last" in figure.layout.title.text
    assert "nats" in figure.layout.yaxis.title.text


def test_loss_needs_a_log():
    with pytest.raises(ValueError, match="logging_steps"):
        plot_loss(run(0))
    # The Trainer's last entry has times and no loss.
    last = replace(run(2), log=[*run(2).log, {"step": 20, "train_runtime": 1.0}])
    assert len(plot_loss(last).data[0].y) == 2


# -- answers -----------------------------------------------------------------------------------------------------------
def test_probabilities_on_a_log_axis():
    before, after = probabilities(), probabilities(2.0)
    figure = plot_probabilities(before, after)
    check(figure)
    assert {(t.name, t.xaxis) for t in figure.data} == {(w, x) for w in ("before", "after") for x in ("x", "x2")}
    frames = {"before": before.to_dataframe(), "after": after.to_dataframe()}
    for trace in figure.data:
        frame = frames[trace.name]
        part = frame[frame["kind"] == ("knowledge" if trace.xaxis == "x" else "instruction")]
        assert list(trace.x) == part["probability"].tolist()
        assert np.allclose(trace.error_x.array, part["high"] - part["probability"])
        assert np.allclose(trace.error_x.arrayminus, part["probability"] - part["low"])
        assert [row[1:] for row in trace.customdata] == part[["probability", "low", "high", "n"]].values.tolist()
    for axis in (figure.layout.xaxis, figure.layout.xaxis2):
        assert axis.type == "log"
        assert axis.range[0] < np.log10(min(frames["before"]["low"])) and axis.range[1] > 0
    assert [trace.showlegend for trace in figure.data].count(True) == 2
    assert list(figure.layout.yaxis.ticktext) == list(TASKS)
    assert "12 prompts" in figure.layout.title.text


def test_probabilities_of_zero_stand_at_the_edge():
    after = probabilities()
    after.instruction["antonym"][:] = -200.0  # exp underflows
    figure = plot_probabilities(probabilities(), after)
    check(figure)
    assert "left edge" in figure.layout.title.text
    trace = next(t for t in figure.data if t.name == "after" and t.xaxis == "x2")
    assert np.log10(trace.x[0]) == pytest.approx(figure.layout.xaxis2.range[0])
    assert trace.customdata[0][1] == 0


def test_probabilities_need_the_same_tasks():
    with pytest.raises(ValueError, match="different tasks"):
        plot_probabilities(probabilities(), probabilities(tasks=("antonym",)))


# -- change: per task --------------------------------------------------------------------------------------------------
def test_tasks_at_the_last_checkpoint():
    change = along()
    figure = change.plot()
    check(figure)
    assert figure == plot_change(change, "tasks")
    bars, before, after = figure.data
    last = change.similarity().loc["checkpoint-60"]
    assert list(bars.x) == last.tolist()
    assert list(bars.text) == [f"{x:.2f}".replace("-", "−") for x in last]
    frame = change.to_dataframe()
    for trace, label in ((before, "base"), (after, "checkpoint-60")):
        part = frame[frame["checkpoint"] == label]
        assert trace.x == pytest.approx(part["accuracy"].tolist())
        assert np.allclose(trace.error_x.array, part["high"] - part["accuracy"])
        assert np.allclose(trace.error_x.arrayminus, part["accuracy"] - part["low"])
    assert (before.name, after.name) == ("before", "after")
    assert list(figure.layout.yaxis.ticktext) == list(TASKS)
    assert figure.layout.yaxis.range[0] > figure.layout.yaxis.range[1]  # the first task at the top
    assert "after: checkpoint-60" in figure.layout.title.text and "10 prompts" in figure.layout.title.text


def test_tasks_over_runs_are_means():
    change = over_runs()
    bars, before, after = plot_change(change, "tasks").data
    assert bars.x == pytest.approx(change.similarity().iloc[1:].mean().tolist())
    hits = [hit for s in change.snapshots[1:] for hit in s.accuracy["antonym"].tolist()]
    assert after.x[0] == pytest.approx(sum(hits) / 30)
    assert after.error_x.array[0] == pytest.approx(wilson(hits)[1] - after.x[0])
    assert (before.customdata[0][-1], after.customdata[0][-1]) == (10, 30)
    assert "mean over 3 checkpoints" in plot_change(change, "tasks").layout.title.text


def test_matrix_of_before_against_after():
    change = along()
    figure = plot_change(change, "matrix")
    check(figure)
    (trace,) = figure.data
    last = change.snapshots[-1]
    for i, a in enumerate(TASKS):
        for j, b in enumerate(TASKS):
            assert trace.z[i][j] == pytest.approx(change.base.vectors[a].cosine(last.vectors[b]))
    assert trace.texttemplate and (trace.zmin, trace.zmid, trace.zmax) == (-1, 0, 1)
    assert trace.hovertext[0][1].startswith("antonym before · present_past after  ")
    assert (figure.layout.yaxis.title.text, figure.layout.xaxis.title.text) == ("before", "after")
    assert "checkpoint-60" in figure.layout.title.text


# -- change: lines -----------------------------------------------------------------------------------------------------
def test_trajectory_over_steps():
    change = along()
    figure = plot_change(change, "trajectory")
    check(figure)
    bold = {trace.name: trace for trace in figure.data if trace.showlegend is not False}
    assert list(bold) == ["accuracy", "cosine with the base's vector"]
    for trace in figure.data:
        assert list(trace.x) == [0, 20, 40, 60]
    cosines = bold["cosine with the base's vector"]
    assert cosines.y == pytest.approx(change.similarity().mean(axis=1).tolist())
    accuracy = change.to_dataframe().groupby("checkpoint", sort=False)["accuracy"].mean()
    assert bold["accuracy"].y == pytest.approx(accuracy.tolist())
    faint = [trace for trace in figure.data if trace.meta == "accuracy, present_past"]
    assert len(faint) == 1 and faint[0].line.width < bold["accuracy"].line.width
    assert faint[0].y == pytest.approx([s.accuracy["present_past"].mean().item() for s in change.snapshots])
    assert figure.layout.xaxis.title.text == "step"


def test_trajectory_without_an_order_of_steps():
    figure = plot_change(over_runs(), "trajectory")
    check(figure)
    assert list(figure.data[0].x) == [0, 1, 2, 3]
    assert list(figure.layout.xaxis.ticktext) == ["base", *(f"english_french-{k}/final" for k in (1, 2, 3))]
    unknown = replace(along(), snapshots=tuple(replace(s, step=None) for s in along().snapshots))
    assert list(plot_change(unknown, "trajectory").data[0].x) == [0, 1, 2, 3]


def test_hidden_similarity_per_layer():
    change = along()
    figure = plot_change(change, "hidden")
    check(figure)
    bold = {trace.name: trace for trace in figure.data if trace.showlegend is not False}
    for when, s in (("before", change.base), ("after", change.snapshots[-1])):
        assert list(bold[when].x) == list(range(LAYERS))
        assert bold[when].y == pytest.approx(torch.stack(list(s.hidden.values())).mean(0).tolist())
    assert len(figure.data) == 2 * (len(TASKS) + 1)


# -- change: predictors and heads --------------------------------------------------------------------------------------
@pytest.mark.slow
def test_scatter_has_a_panel_per_predictor():
    change = along()
    figure = plot_change(change, "scatter")
    check(figure)
    points, found = change.points(), change.correlations()
    assert len(found) == 5
    assert [note.text for note in figure.layout.annotations] == [
        f"R² {r.r2:.2f} [{r.r2_low:.2f}, {r.r2_high:.2f}]" for r in found.itertuples()
    ]
    for i, name in enumerate(found["predictor"]):
        axis = "x" if i == 0 else f"x{i + 1}"
        dots = [t for t in figure.data if t.xaxis == axis and t.mode == "markers"]
        assert [t.name for t in dots] == list(TASKS)
        for trace in dots:
            part = points[points["task"] == trace.name]
            assert list(trace.x) == part[name].tolist() and list(trace.y) == part["accuracy_change"].tolist()
            assert list(trace.customdata) == part["checkpoint"].tolist()
        (line,) = (t for t in figure.data if t.xaxis == axis and t.mode == "lines")
        slope, start = np.polyfit(points[name], points["accuracy_change"], 1)
        assert line.y == pytest.approx([start + slope * x for x in line.x])
    assert [t.name for t in figure.data if t.mode == "markers" and t.showlegend] == list(TASKS)
    assert len({t.marker.color for t in figure.data if t.mode == "markers"}) == len(TASKS)


def test_scatter_without_effects_and_with_too_few_points():
    change = along(1)
    change = replace(change, snapshots=tuple(replace(s, effects=None) for s in change.snapshots))
    figure = plot_change(change, "scatter")
    check(figure)
    assert [note.text for note in figure.layout.annotations] == ["R²: too few points"] * 3
    assert all(trace.mode == "markers" for trace in figure.data)


@pytest.mark.slow
def test_many_tasks_differ_by_colour_or_symbol():
    figure = plot_change(along(2, tasks=tuple(f"task_{i}" for i in range(20))), "scatter")
    looks = {(t.marker.color, t.marker.symbol) for t in figure.data if t.mode == "markers"}
    assert len(looks) == 20


def test_effects_before_after_and_difference():
    change = along()
    figure = plot_change(change, "effects")
    check(figure)
    before, after, difference = figure.data
    one, two = change.base.effects.mean(), change.snapshots[-1].effects.mean()
    assert np.allclose(before.z, one) and np.allclose(after.z, two) and np.allclose(difference.z, two - one)
    assert len({(t.zmin, t.zmid, t.zmax) for t in figure.data}) == 1
    assert (before.zmid, before.zmin) == (0, -before.zmax)
    assert before.hovertext[1][2] == f"L1H2  {one[1, 2]:+.3f}".replace("-", "−")
    assert [t.showscale for t in figure.data] == [True, False, False]


def test_effects_must_have_been_located():
    change = along()
    without = replace(change, snapshots=(change.base, replace(change.snapshots[-1], effects=None)))
    with pytest.raises(ValueError, match="checkpoint-60; give n_effects to compare or track"):
        plot_change(without, "effects")


def test_kinds_are_checked():
    with pytest.raises(ValueError, match=", ".join(KINDS)):
        plot_change(along(), "nosuch")
    with pytest.raises(ValueError, match="no checkpoint"):
        plot_change(Change((snapshot("base", None, 0),)))


# -- recovery ----------------------------------------------------------------------------------------------------------
def test_recovery_at_one_checkpoint():
    found = recovery()
    figure = found.plot("b/final")
    check(figure)
    assert figure == plot_recovery(found, "b/final")
    bars = {trace.name: trace for trace in figure.data}
    assert list(bars) == found.conditions
    frame = found.to_dataframe()
    for name, trace in bars.items():
        part = frame[(frame["checkpoint"] == "b/final") & (frame["condition"] == name)]
        assert list(trace.x) == part["task"].tolist() and list(trace.y) == part["accuracy"].tolist()
        assert np.allclose(trace.error_y.array, part["high"] - part["accuracy"])
        assert np.allclose(trace.error_y.arrayminus, part["accuracy"] - part["low"])
    assert list(bars["my heads"].x) == ["antonym"]
    assert "b/final" in figure.layout.title.text and "10 prompts" in figure.layout.title.text


def test_recovery_pools_checkpoints_but_the_base_answers_once():
    bars = {trace.name: trace for trace in plot_recovery(recovery()).data}
    assert bars["old vector"].y[0] == pytest.approx(0.55)
    low, high = wilson([1.0] * 11 + [0.0] * 9)
    assert bars["old vector"].customdata[0] == pytest.approx([low, high, 20])
    assert bars["before"].y[0] == pytest.approx(0.9)
    assert bars["before"].customdata[0] == pytest.approx([*wilson([1.0] * 9 + [0.0]), 10])
    title = plot_recovery(recovery()).layout.title.text
    assert "2 checkpoints" in title and "20 answers per bar; before training 10" in title


def test_recovery_names_the_checkpoints_there_are():
    with pytest.raises(ValueError, match="a/final, b/final"):
        plot_recovery(recovery(), "c/final")


def test_known_conditions_keep_their_colours():
    colours = condition_colours(list(RATES))
    assert len(set(colours.values())) == len(RATES)
    assert colours["old vector"] == condition_colours(["vector"])["vector"]
    assert {c: condition_colours([c])[c] for c in RATES if c != "my heads"}.items() <= colours.items()


# -- all of them -------------------------------------------------------------------------------------------------------
def every_figure(change: Change, tasks=TASKS, checkpoint: str = "a/final") -> list[go.Figure]:
    figures = [plot_change(change, kind) for kind in KINDS]
    figures += [plot_recovery(recovery((checkpoint,), tasks)), plot_loss(run(tasks=tasks[:1]))]
    return [*figures, plot_probabilities(probabilities(tasks=tasks), probabilities(1.0, tasks=tasks))]


@pytest.mark.slow
def test_markup_in_names_is_shown_not_obeyed():
    change = along(tasks=(UGLY, "b"))
    for figure in every_figure(change, (UGLY, "b")):
        text = json.loads(check(figure).replace("\\u003c", "<").replace("\\u003e", ">"))
        assert "<b>" not in str(text) and "<a href" not in str(text)


@pytest.mark.slow
def test_markup_in_labels_is_shown_not_obeyed():
    change = along()
    last = replace(change.snapshots[-1], label=UGLY, step=None)
    for figure in every_figure(replace(change, snapshots=(*change.snapshots[:-1], last)), checkpoint=UGLY):
        text = json.loads(check(figure).replace("\\u003c", "<").replace("\\u003e", ">"))
        assert "<b>" not in str(text) and "<a href" not in str(text)


@pytest.mark.slow
def test_global_templates_stay_as_they_were():
    before = pio.templates.default, pio.templates["plotly_white"].to_plotly_json()
    for figure in every_figure(along()):
        figure.layout.template.layout.font.size = 99
    assert (pio.templates.default, pio.templates["plotly_white"].to_plotly_json()) == before


@pytest.mark.slow
@pytest.mark.parametrize("tasks", [TASKS[:1], tuple(f"a_rather_long_task_{i}" for i in range(24))])
def test_sizes_suit_a_slide(tasks):
    for figure in every_figure(along(1, tasks), tasks):
        assert 250 < figure.layout.width < 1350 and 200 < figure.layout.height < 1300

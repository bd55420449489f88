"""Figures of free answers: bars with intervals, axes in nats, and the balance with its parts."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest

from ivlens.plots import plot_balance
from ivlens.steering.evaluation import Evaluation
from tests.test_plots import UGLY, check
from tests.test_plots import evaluation as gold

CONDITIONS = [
    "no vector", "vector", "random vector", "random heads", "other task", "told", "told + vector", "told − vector",
    "told − random vector",
]  # fmt: skip
TASKS = [f"task_{i}" for i in range(7)]


def evaluation(tasks=TASKS) -> Evaluation:
    rng = np.random.default_rng(0)
    rows = [
        {"task": task, "condition": condition, "draw": 0, "prompt": i, "query": str(i), "met": float(rng.random() < 0.1 * (k + 1)),
         "met_loose": 1.0, "topic": rng.normal(1 - 0.4 * k * (k < 5), 0.5), "surprise": rng.normal(3, 0.5)}
        for task in tasks for k, condition in enumerate(CONDITIONS) for i in range(12)
    ]  # fmt: skip
    return Evaluation(pd.DataFrame(rows), {"shots": 0})


@pytest.mark.parametrize(
    ("metric", "name"),
    [("met", "constraint met"), ("topic", "on topic (nats per token)"), ("surprise", "surprise (nats per token)")],
)
def test_bars_of_free_answers(metric, name):
    found = evaluation()
    figure = found.plot(metric)
    check(figure)
    frame = found.to_dataframe().query("metric == @metric").set_index(["task", "condition"])
    assert [trace.name for trace in figure.data] == CONDITIONS
    assert len({trace.marker.color for trace in figure.data}) == len(CONDITIONS)
    for trace in figure.data:
        rows = frame.loc[[(task, trace.name) for task in TASKS]]
        assert list(trace.x) == TASKS and trace.y == pytest.approx(rows["mean"].tolist())
        assert trace.error_y.array == pytest.approx((rows["high"] - rows["mean"]).tolist())
        assert trace.error_y.arrayminus == pytest.approx((rows["mean"] - rows["low"]).tolist())
    axis = figure.layout.yaxis
    assert axis.title.text == name and axis.tickformat == (".0%" if metric == "met" else None)
    low, high = axis.range or (-math.inf, math.inf)
    assert all(low <= y <= high for trace in figure.data for y in trace.y), "nothing is cut off"
    assert figure.layout.width < 1200


def test_rows_of_many_tasks_share_an_axis_in_nats():
    figure = evaluation([f"task_{i}" for i in range(20)]).plot("topic")
    assert len({trace.yaxis for trace in figure.data}) > 1
    assert figure.layout.yaxis.range is None and figure.layout.yaxis2.matches == "y"


def test_balance_and_its_parts():
    found = evaluation()
    figure = found.plot("balance")
    check(figure)
    assert figure.to_json() == plot_balance(found).to_json()
    table = found.balance().set_index(["task", "condition"])
    assert len(figure.data) == 4 * len(TASKS)
    for i, trace in enumerate(figure.data):
        part = table.loc[TASKS[i // 4]]
        assert list(trace.customdata) == CONDITIONS and list(trace.x) == list(range(len(CONDITIONS)))
        assert trace.y == pytest.approx(part[trace.name.replace(" ", "_")].tolist(), nan_ok=True)
    assert [trace.name for trace in figure.data if trace.showlegend] == ["met", "on topic", "fluent", "balance"]
    shown = figure.layout[f"xaxis{len(TASKS)}"]
    assert [text.replace("<br>", "") for text in shown.ticktext] == CONDITIONS and shown.showticklabels
    assert figure.layout.xaxis.showticklabels is False and "12 prompts" in figure.layout.title.text
    assert [note.text for note in figure.layout.annotations] == TASKS


def test_of_both_kinds_each_figure_shows_its_own_tasks():
    both = Evaluation(pd.concat([gold().scores.assign(draw=0), evaluation(["free"]).scores]), {"shots": 0})
    assert {x for trace in both.plot("first_token").data for x in trace.x} == {"antonym", "present_past"}
    assert {x for trace in both.plot("met").data for x in trace.x} == {"free"}
    assert [note.text for note in both.plot("balance").layout.annotations] == ["free"]
    with pytest.raises(ValueError, match="no free answers were scored"):
        gold().plot("balance")


def test_names_are_shown_as_they_are():
    text = check(evaluation([UGLY]).plot("balance")).replace("\\u003c", "<")
    assert "<b>" not in text and "&lt;b&gt;" in text

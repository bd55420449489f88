from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import plotly.io as pio
import pytest
import torch

from ivlens.common.statistics import wilson
from ivlens.models.head import Head
from ivlens.patching.effects import HeadEffects
from ivlens.patching.residual import ResidualEffects
from ivlens.plots import plot_effects, plot_evaluation, plot_residual, plot_search, plot_shares, plot_similarity
from ivlens.steering.evaluation import Evaluation
from ivlens.steering.search import InjectionSearch
from ivlens.vectors.vector import InstructionVector

LAYERS, HEADS = 6, 4
UGLY = "<b>bold</b> & <a href='x'>link</a>"


@pytest.fixture
def effects() -> HeadEffects:
    values = torch.randn(8, LAYERS, HEADS, generator=torch.Generator().manual_seed(0)) * 0.01
    values[:, 4, 1] += 0.5
    values[:, 2, 3] -= 0.7
    return HeadEffects(values, torch.zeros(8), ("antonym",) * 5 + ("present_past",) * 3)


@pytest.fixture
def search() -> InjectionSearch:
    accuracy = torch.tensor([[0.1, 0.2], [0.3, 0.9], [0.4, 0.5]])
    return InjectionSearch(vector(), accuracy, torch.full((3, 2), 0.05), 0.025, (4, 0, 2), (1.0, 0.5), 40)


def vector(name: str = "antonym", seed: int = 0) -> InstructionVector:
    shares = torch.randn(3, 8, generator=torch.Generator().manual_seed(seed)) + 0.5
    return InstructionVector(shares.sum(0), (Head(1, 2), Head(3, 0), Head(4, 1)), shares, metadata={"task": name})


def evaluation(tasks=("antonym", "present_past"), n: int = 10) -> Evaluation:
    rates = {"no vector": 0.0, "vector": 0.8, "random vector": 0.1, "other task": 0.2, "10 demonstrations": 1.0}
    rows = [
        {"task": task, "condition": condition, "prompt": i, "first_token": float(i < rate * n), "probability": rate / 2}
        for task in tasks
        for condition, rate in rates.items()
        for i in range(n)
        if not (condition == "other task" and task == tasks[-1])
    ]
    return Evaluation(pd.DataFrame(rows), {"shots": 0})


def check(figure: go.Figure) -> str:
    """Serialisable, titled, on white, with a size; returns its JSON."""
    text = figure.to_json()
    json.loads(text)
    assert figure.layout.title.text
    assert figure.layout.template.layout.plot_bgcolor == "white"
    assert figure.layout.width > 200 and figure.layout.height > 150
    return text


# -- effects -----------------------------------------------------------------------------------------------------------
def test_heatmap_of_means(effects):
    figure = effects.plot()
    check(figure)
    (trace,) = figure.data
    assert np.allclose(trace.z, effects.mean())
    assert (trace.zmid, trace.zmin) == (0, -trace.zmax)
    assert trace.zmax == pytest.approx(effects.mean().abs().max().item())
    x, y = figure.layout.xaxis, figure.layout.yaxis
    assert (x.title.text, y.title.text) == ("head", "layer")
    assert y.range[0] < y.range[1]  # layer 0 at the bottom
    assert "answer probability" in figure.layout.title.text


def test_hover_names_head_effect_and_error(effects):
    (trace,) = plot_effects(effects).data
    mean, error = effects.mean(), effects.stderr()
    assert trace.hoverinfo == "text"
    assert trace.hovertext[4][1] == f"L4H1  +{mean[4, 1]:.3f} ± {error[4, 1]:.3f}"
    assert trace.hovertext[2][3].startswith(f"L2H3  −{-mean[2, 3]:.3f}")


def test_strongest_heads_are_outlined(effects):
    figure = plot_effects(effects)
    outlined = {(round((s.y0 + s.y1) / 2), round((s.x0 + s.x1) / 2)) for s in figure.layout.shapes}
    assert outlined == {tuple(head) for head in effects.top(10)}
    assert "L4H1" in figure.layout.title.text
    assert not plot_effects(effects, "stderr").layout.shapes


def test_one_task(effects):
    (trace,) = plot_effects(effects, task="antonym").data
    assert np.allclose(trace.z, effects.mean("antonym"))
    with pytest.raises(KeyError, match="nosuch"):
        plot_effects(effects, task="nosuch")


def test_standard_errors(effects):
    figure = plot_effects(effects, "stderr")
    check(figure)
    (trace,) = figure.data
    assert np.allclose(trace.z, effects.stderr())
    assert trace.zmin == 0


def test_map_per_task_on_one_scale(effects):
    figure = plot_effects(effects, "tasks")
    check(figure)
    assert [note.text for note in figure.layout.annotations] == ["antonym", "present_past"]
    for trace, name in zip(figure.data, effects.task_names, strict=True):
        assert np.allclose(trace.z, effects.mean(name))
    assert len({(trace.zmin, trace.zmax) for trace in figure.data}) == 1
    assert [trace.showscale for trace in figure.data] == [True, False]


def test_kinds_are_checked(effects):
    with pytest.raises(ValueError, match="mean, stderr, tasks"):
        plot_effects(effects, "median")
    with pytest.raises(ValueError, match="every task"):
        plot_effects(effects, "tasks", task="antonym")


@pytest.mark.parametrize("shape", [(1, 1), (30, 9), (80, 64)])
@pytest.mark.parametrize("kind", ["mean", "tasks"])
def test_sizes_suit_a_slide(shape, kind):
    effects = HeadEffects(torch.randn(4, *shape), torch.zeros(4), ("a", "a", "b", "b"), "log_probability")
    layout = plot_effects(effects, kind).layout
    assert 250 < layout.width < 1200 and 200 < layout.height < 900


def test_effects_of_zero_and_of_a_single_prompt():
    zero = HeadEffects(torch.zeros(3, 2, 2), torch.zeros(3), ("a",) * 3)
    assert plot_effects(zero).data[0].zmax == 1
    with pytest.warns(UserWarning, match="one query has no standard error"):
        figure = plot_effects(HeadEffects(torch.ones(1, 2, 2), torch.zeros(1), ("a",)))
    check(figure)
    assert figure.data[0].hovertext[0][0] == "L0H0  +1.000"


def test_half_precision_works(effects):
    check(plot_effects(replace(effects, values=effects.values.bfloat16())))


def test_residual_map():
    values = torch.randn(5, LAYERS, 3, generator=torch.Generator().manual_seed(0))
    effects = ResidualEffects(values, (-5, -2, -1))
    figure = effects.plot()
    check(figure)
    assert figure == plot_residual(effects)
    (trace,) = figure.data
    assert np.allclose(trace.z, values.mean(0), atol=1e-6)
    assert trace.zmid == 0
    assert list(figure.layout.xaxis.ticktext) == ["−5", "−2", "−1"]
    assert trace.hovertext[2][1].startswith("layer 2, position −2  ")
    assert "position" in figure.layout.xaxis.title.text


# -- injection ---------------------------------------------------------------------------------------------------------
def test_search_shows_vector_beside_control(search):
    figure = search.plot()
    check(figure)
    assert figure == plot_search(search)
    with_vector, control = figure.data
    # Layers and scales were given in another order; the axes are sorted.
    assert list(figure.layout.xaxis.ticktext) == [0, 2, 4]
    assert list(figure.layout.yaxis.ticktext) == ["0.5", "1"]
    assert np.allclose(with_vector.z, [[0.9, 0.5, 0.2], [0.3, 0.4, 0.1]])
    assert np.allclose(control.z, 0.05)
    assert with_vector.colorscale == control.colorscale
    assert (with_vector.zmin, with_vector.zmax) == (control.zmin, control.zmax) == (0, 1)
    assert with_vector.hovertext[0][0] == "vector, layer 0, scale 0.5: 90.0%"


def test_search_marks_the_choice_and_says_the_baseline(search):
    figure = plot_search(search)
    assert (search.best.layer, search.best.scale) == (0, 0.5)
    for shape in figure.layout.shapes:
        assert (round((shape.x0 + shape.x1) / 2), round((shape.y0 + shape.y1) / 2)) == (0, 0)
    assert {shape.xref for shape in figure.layout.shapes} == {"x", "x2"}
    title = figure.layout.title.text
    assert "nothing injected: 2.5%" in title and "layer 0, scale 0.5: 90.0%" in title and "antonym" in title


def test_search_on_free_answers_says_balance_and_what_was_not_tried(search):
    control = torch.full((3, 2), torch.nan)
    control[1, 1] = 0.05
    along, last = (replace(vector(), metadata={"positions": at}) for at in ("generated", "last"))
    other = replace(search, vector=last, accuracy=search.accuracy / 2, measure="balance")
    figure = plot_search(replace(search, vector=along, control=control, measure="balance", others=(other,)))
    check(figure)
    assert f"positions: generated · last at best {search.accuracy.max() / 2:.1%}" in figure.layout.title.text
    assert figure.data[0].colorbar.title.text == "balance"
    assert figure.data[1].hovertext[0][0] == "random vector, layer 0, scale 0.5: 5.0%"
    assert figure.data[1].hovertext[0][1].endswith("not tried")


def test_search_for_suppression(search):
    search = replace(search, goal="suppress", scales=(-1.0, -0.5))
    figure = plot_search(search)
    assert "suppressing" in figure.layout.title.text
    assert list(figure.layout.yaxis.ticktext) == ["−1", "−0.5"]


# -- evaluation --------------------------------------------------------------------------------------------------------
def test_bars_with_intervals():
    scores = evaluation()
    figure = scores.plot()
    check(figure)
    bars = {trace.name: trace for trace in figure.data}
    assert list(bars) == scores.conditions
    assert len({trace.marker.color for trace in figure.data}) == len(scores.conditions)
    low, high = wilson([1.0] * 8 + [0.0] * 2)
    vector_bars = bars["vector"]
    assert list(vector_bars.y) == [0.8, 0.8]
    assert vector_bars.error_y.array[0] == pytest.approx(high - 0.8)
    assert vector_bars.error_y.arrayminus[0] == pytest.approx(0.8 - low)
    assert vector_bars.customdata[0][2] == 10 and "n = %{customdata[2]}" in vector_bars.hovertemplate
    assert list(bars["other task"].x) == ["antonym"]  # not measured for the last task
    assert figure.layout.yaxis.tickformat == ".0%"
    assert figure.layout.barmode == "group"
    assert "10 prompts" in figure.layout.title.text


def test_a_condition_keeps_its_colour():
    many = {trace.name: trace.marker.color for trace in plot_evaluation(evaluation()).data}
    scores = evaluation()
    few = replace(scores, scores=scores.scores[scores.scores["condition"].isin(["vector", "other task"])])
    for trace in plot_evaluation(few).data:
        assert trace.marker.color == many[trace.name]


def test_other_metrics():
    figure = plot_evaluation(evaluation(), "probability")
    assert figure.layout.yaxis.tickformat is None
    assert "robability" in figure.layout.title.text
    with pytest.raises(ValueError, match="first_token, probability"):
        plot_evaluation(evaluation(), "rouge_l")


def test_many_tasks_go_into_rows_with_one_legend():
    tasks = tuple(f"task_{i}" for i in range(23))
    figure = plot_evaluation(evaluation(tasks, n=4))
    check(figure)
    shown = [trace.name for trace in figure.data if trace.showlegend]
    assert sorted(shown) == sorted(evaluation().conditions)
    assert {x for trace in figure.data for x in trace.x} == set(tasks)
    assert len({trace.xaxis for trace in figure.data}) > 1
    assert figure.layout.width < 1200


# -- vectors -----------------------------------------------------------------------------------------------------------
def test_shares_add_up_to_the_vector():
    iv = vector()
    figure = iv.plot()
    check(figure)
    (bars,) = figure.data
    assert sum(bars.y) == pytest.approx(1, abs=1e-5)
    assert list(bars.y) == sorted(bars.y, reverse=True)
    assert set(bars.x) == {"L1H2", "L3H0", "L4H1"}
    expected = (iv.shares @ iv.vector / iv.norm() ** 2).tolist()
    assert dict(zip(bars.x, bars.y, strict=True)) == pytest.approx(dict(zip(map(str, iv.heads), expected, strict=True)))


def test_shares_need_heads():
    with pytest.raises(ValueError, match="no heads"):
        plot_shares(InstructionVector(torch.ones(3)))


def test_similarity():
    vectors = {"a": vector(seed=0), "b": vector(seed=1), "c": -vector(seed=0)}
    figure = plot_similarity(vectors)
    check(figure)
    (trace,) = figure.data
    assert (trace.zmin, trace.zmid, trace.zmax) == (-1, 0, 1)
    assert trace.z[0][2] == pytest.approx(-1, abs=1e-5)
    assert trace.z[0][1] == pytest.approx(vectors["a"].cosine(vectors["b"]))
    assert trace.texttemplate
    assert list(figure.layout.xaxis.ticktext) == ["a", "b", "c"]
    assert plot_similarity({str(i): vector(seed=i) for i in range(13)}).data[0].texttemplate is None
    with pytest.raises(ValueError, match="no vectors"):
        plot_similarity({})


# -- all of them -------------------------------------------------------------------------------------------------------
def test_markup_in_names_is_shown_not_obeyed(effects, search):
    renamed = replace(effects, tasks=(UGLY,) * 8)
    figures = [plot_effects(renamed), plot_effects(renamed, "tasks"), plot_search(replace(search, vector=vector(UGLY)))]
    figures += [plot_evaluation(evaluation((UGLY, "b"))), plot_shares(vector(UGLY)), plot_similarity({UGLY: vector()})]
    for figure in figures:
        text = json.loads(check(figure).replace("\\u003c", "<"))
        assert "<b>" not in str(text) and "<a href" not in str(text)
        assert "&lt;b&gt;" in str(text)


def test_global_templates_stay_as_they_were(effects, search):
    before = pio.templates.default, pio.templates["plotly_white"].to_plotly_json()
    for figure in (plot_effects(effects), plot_search(search), plot_evaluation(evaluation()), plot_shares(vector())):
        figure.layout.template.layout.font.size = 99
    assert (pio.templates.default, pio.templates["plotly_white"].to_plotly_json()) == before

"""Figures of continual-learning runs."""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd
import pytest

from ivlens.continual.results import ContinualResults
from ivlens.plots import plot_continual
from ivlens.plots.colours import METHOD_COLOURS, method_colours
from ivlens.plots.labels import labels_beside
from tests.test_continual_results import HITS, SEQUENCE, frame, results
from tests.test_plots import UGLY, check


@pytest.fixture(scope="module")
def found() -> ContinualResults:
    return results()


def points(found: ContinualResults) -> pd.DataFrame:
    return found.to_dataframe().set_index(["metric", "method"])[["mean", "low", "high"]] * 100


# -- scatter -----------------------------------------------------------------------------------------------------------
def test_scatter_of_stability_against_plasticity(found):
    figure = found.plot()
    check(figure)
    assert figure == plot_continual(found, "scatter")
    numbers, seeds = points(found), found.by_seed()
    front, *rest = figure.data
    order = sorted(found.pareto(), key=lambda m: numbers["mean"]["plasticity", m])
    assert order == ["iv", "lora"]
    assert list(front.x) == [numbers["mean"]["plasticity", m] for m in order]
    assert list(front.y) == [numbers["mean"]["stability", m] for m in order]
    large = {trace.name: trace for trace in rest if trace.error_x.array is not None}
    small = {trace.name: trace for trace in rest if trace.error_x.array is None}
    assert list(large) == list(small) == ["lora", "iv"]
    for method, trace in large.items():
        for name, value, error in (("plasticity", trace.x, trace.error_x), ("stability", trace.y, trace.error_y)):
            row = numbers.loc[(name, method)]
            assert list(value) == [row["mean"]]
            assert error.array[0] == pytest.approx(row["high"] - row["mean"])
            assert error.arrayminus[0] == pytest.approx(row["mean"] - row["low"])
            own = seeds.loc[seeds["method"] == method, name]
            assert np.allclose(small[method]["xy"["ps".index(name[0])]], 100 * own)
    assert [label.text for label in figure.layout.annotations] == ["lora", "iv"]
    for label in figure.layout.annotations:
        assert (label.x, label.y) == (large[label.text].x[0], large[label.text].y[0])
    x, y = figure.layout.xaxis, figure.layout.yaxis
    assert "points" in x.title.text and "points" in y.title.text
    assert x.range[0] < numbers["low"]["plasticity"].min() and x.range[1] > numbers["high"]["plasticity"].max()
    assert "2 seeds" in figure.layout.title.text and "general" in figure.layout.title.text


def test_scatter_leaves_out_what_is_not_finished(found):
    scores = found.scores
    part = results(scores[~((scores["method"] == "iv") & (scores["stage"] == 3))])
    figure = part.plot()
    check(figure)
    assert [label.text for label in figure.layout.annotations] == ["lora"]
    assert figure.data[0].showlegend is False  # one point is no front
    with pytest.raises(ValueError, match="no method has finished"):
        results(scores[scores["stage"] < 3]).plot()
    with pytest.raises(ValueError, match="no method beside the base"):
        results(scores[scores["method"] == "base"]).plot()


def test_names_of_points_lie_apart():
    rng = np.random.default_rng(0)
    names, size = [f"method {i}" for i in range(10)], (640, 460)
    x, y = (pd.DataFrame({"mean": rng.uniform(0.3, 0.7, 10)}, index=names) for _ in range(2))
    x, y = (t.assign(low=t["mean"] - 0.05, high=t["mean"] + 0.05) for t in (x, y))
    labels = labels_beside(x, y, [(0, 1), (0, 1)], size, dict.fromkeys(names, "#000000"))
    boxes = []
    for label in labels:
        middle = label["x"] * size[0] + label["ax"], label["y"] * size[1] - label["ay"]
        boxes.append((middle, 3.5 * len(label["text"])))
    for ((ax, ay), a), ((bx, by), b) in itertools.combinations(boxes, 2):
        assert abs(ax - bx) >= a + b or abs(ay - by) >= 13
    for (lx, ly), wide in boxes:
        for name in names:
            px, py = x["mean"][name] * size[0], y["mean"][name] * size[1]
            assert abs(lx - px) >= wide + 5 or abs(ly - py) >= 11


# -- maps --------------------------------------------------------------------------------------------------------------
def test_matrix_has_a_map_per_method(found):
    figure = found.plot("matrix")
    check(figure)
    assert [note.text for note in figure.layout.annotations] == ["<b>lora</b>", "<b>iv</b>"]
    for method, trace in zip(HITS, figure.data, strict=True):
        table = 100 * found.matrix(method)
        assert np.allclose(trace.z, table)
        assert [list(row) for row in trace.text] == [[f"{v:.0f}" for v in row] for row in table.to_numpy()]
        assert (trace.zmin, trace.zmax) == (0, 100)
        assert trace.hovertext[2][3] == f"{method}, after two<br>far, 0-shot: {table.iloc[2, 3]:.1f}"
    assert list(figure.layout.yaxis.ticktext) == ["base", "after one", "after two", "after three"]
    assert list(figure.layout.xaxis.ticktext) == list(found.matrix("lora").columns)
    outlined = [(s.x0 + 0.47, s.y0 + 0.47) for s in figure.layout.shapes if s.type == "rect" and s.xref == "x2"]
    assert np.allclose(outlined, [(0, 1), (1, 2), (2, 3)])  # task j after stage j
    (line,) = (s for s in figure.layout.shapes if s.type == "line" and s.xref == "x")
    assert line.x0 == line.x1 == len(SEQUENCE) - 0.5


def test_matrix_of_what_is_not_finished_has_gaps(found):
    scores = found.scores[found.scores["kind"] == "trained"]
    figure = results(scores[~((scores["method"] == "iv") & (scores["stage"] > 1))]).plot("matrix")
    check(figure)
    z = np.array(figure.data[1].z, float)
    assert z.shape == (4, 3) and np.isnan(z[2:]).all() and not np.isnan(z[:2]).any()
    assert list(figure.data[1].text[3]) == [""] * 3
    assert not [s for s in figure.layout.shapes if s.type == "line"]  # nothing general to divide from


def test_many_methods_make_rows_of_maps():
    many = {f"method {i}": HITS["iv"] for i in range(7)}
    figure = results(frame(many, seeds=(0,)), methods=many, seeds=(0,)).plot("matrix")
    check(figure)
    assert len(figure.data) == 7
    axes = [figure.layout[f"xaxis{i or ''}"] for i in ("", *range(2, 8))]
    shown = [axis.showticklabels for axis in axes]
    per_row = shown[::-1].index(False)  # names of tasks stand below the last map of every column
    assert shown == [False] * (7 - per_row) + [True] * per_row
    assert len({axis.domain[0] for axis in axes}) == per_row
    assert per_row > 1 and {axis.tickangle for axis in axes} == {-90}  # slanted, they would run into the map below
    full = dict(list(many.items())[:per_row])
    assert results(frame(full, seeds=(0,)), methods=full, seeds=(0,)).plot("matrix").layout.xaxis.tickangle == -45


# -- along the sequence ------------------------------------------------------------------------------------------------
def test_similarity_along_the_sequence(found):
    figure = found.plot("similarity")
    check(figure)
    bold = {trace.name: trace for trace in figure.data if trace.showlegend is not False}
    assert list(bold) == ["lora", "iv"]
    for method, trace in bold.items():
        own = found.similarity[found.similarity["method"] == method]
        assert list(trace.x) == [0, 1, 2, 3]
        assert trace.y == pytest.approx([1.0, *own.groupby("stage")["similarity"].mean()])
        for task in SEQUENCE:
            (thin,) = (t for t in figure.data if t.meta == f"{method}, {task}")
            of_task = own[own["task"] == task].groupby("stage")["similarity"].mean()
            assert thin.y == pytest.approx([1.0, *of_task])
            assert thin.line.width < trace.line.width and thin.line.color == trace.line.color
    assert figure.layout.xaxis.ticktext[0] == "base"
    without = ContinualResults(found.scores, pd.DataFrame(), pd.DataFrame(), found.metadata)
    with pytest.raises(ValueError, match="similarity=True"):
        without.plot("similarity")


# -- general tasks -----------------------------------------------------------------------------------------------------
def test_general_tasks_beside_the_base(found):
    figure = found.plot("general")
    check(figure)
    numbers = points(found)
    bars = [trace for trace in figure.data if trace.type == "bar"]
    texts = [trace for trace in figure.data if trace.type == "scatter"]
    lines = [shape for shape in figure.layout.shapes if shape.x0 == shape.x1 and shape.line.dash == "dash"]
    for metric, trace, text, line in zip(("GP", "IP"), bars, texts, lines, strict=True):
        part, start = numbers.loc[metric].loc[["lora", "iv"]], numbers["mean"][metric, "base"]
        assert list(trace.x) == part["mean"].tolist() and list(trace.y) == [0, 1]
        assert np.allclose(trace.error_x.array, part["high"] - part["mean"])
        assert np.allclose(trace.error_x.arrayminus, part["mean"] - part["low"])
        assert line.x0 == pytest.approx(start)
        expected = [f"{m:.1f} ({m - start:+.1f})".replace("-", "−") for m in part["mean"]]
        assert [t.strip() for t in text.text] == expected
        assert min(text.x) >= start
        colours = method_colours(found.methods)
        assert list(trace.marker.color) == [colours["lora"], colours["iv"]]
    assert list(figure.layout.yaxis.ticktext) == ["lora", "iv"]
    assert [note.text for note in figure.layout.annotations] == [
        f"{title}, base {numbers['mean'][m, 'base']:.1f}"
        for m, title in (("GP", "zero-shot (GP)"), ("IP", "with demonstrations (IP)"))
    ]
    assert "2 tasks" in figure.layout.title.text and "14 prompts" in figure.layout.title.text


def test_general_tasks_of_one_kind_and_of_none(found):
    zero = results(found.scores[found.scores["shots"] == 0])
    assert [trace.type for trace in zero.plot("general").data] == ["bar", "scatter"]
    with pytest.raises(ValueError, match="no general tasks were scored"):
        results(found.scores[found.scores["kind"] == "trained"]).plot("general")


# -- all of them -------------------------------------------------------------------------------------------------------
def test_a_method_has_one_colour_everywhere(found):
    expected = METHOD_COLOURS["iv"]
    scatter = next(t for t in found.plot().data if t.name == "iv" and t.error_x.array is not None)
    line = next(t for t in found.plot("similarity").data if t.name == "iv")
    assert scatter.marker.color == line.line.color == expected == found.plot("general").data[0].marker.color[1]
    names = [*METHOD_COLOURS, "mine", "yours"]
    assert len(set(method_colours(names).values())) == len(names)
    assert len(set(method_colours([f"variant {i}" for i in range(12)]).values())) == 12
    assert method_colours(["mine", "iv"])["iv"] == expected


@pytest.mark.parametrize("kind", ["scatter", "matrix", "similarity", "general"])
def test_names_do_not_become_tags(found, kind):
    scores = found.scores.replace({"method": {"iv": UGLY}, "task": {"two": UGLY + "2", "far": UGLY + "3"}})
    similarity = found.similarity.replace({"method": {"iv": UGLY}, "task": {"two": UGLY + "2"}})
    metadata = {**found.metadata, "sequence": ["one", UGLY + "2", "three"]}
    figure = ContinualResults(scores, similarity, found.costs, metadata).plot(kind)
    text = check(figure)
    assert "<a href" not in text.replace("\\u003c", "<") and "link&lt;" in text.replace("\\u0026", "&")

"""Metrics of continual learning against plain arithmetic, their intervals against a loop, and the result object."""

from __future__ import annotations

import itertools
import warnings

import numpy as np
import pandas as pd
import pytest

from ivlens.continual.metrics import MEASURES, cut_in_forgetting, interval, resampled
from ivlens.continual.results import ContinualResults

SEQUENCE = ["one", "two", "three"]
GENERAL = [("far", 0), ("far", 5), ("near", 0), ("near", 5)]
CELLS = [*(("trained", task, 0) for task in SEQUENCE), *(("general", *cell) for cell in GENERAL)]
# Prompts per cell; a bootstrap that mixes cells up would be found out.
N = dict(zip(CELLS, (10, 12, 14, 8, 8, 6, 6), strict=True))
# Hits per cell after each stage, from the base on; trained tasks first.
HITS = {
    "lora": [[1, 2, 3, 6, 7, 4, 5], [9, 2, 3, 5, 6, 3, 4], [6, 11, 4, 4, 5, 3, 4], [3, 7, 13, 2, 4, 2, 3]],
    "iv": [[1, 2, 3, 6, 7, 4, 5], [8, 3, 3, 6, 7, 4, 5], [8, 10, 4, 6, 6, 4, 5], [7, 9, 12, 5, 7, 4, 4]],
}


def frame(hits=HITS, seeds=(0, 1)) -> pd.DataFrame:
    """Which prompts are hit differs between seeds and stages; under seed 1 one more is, where there is room."""
    rows = []
    runs = [("base", 0, 0), *itertools.product(hits, seeds, range(1, 4))]
    for method, seed, stage in runs:
        for k, cell in enumerate(CELLS):
            n = N[cell]
            count = min(n, HITS["lora"][0][k] if method == "base" else hits[method][stage][k] + seed)
            order = np.random.default_rng([stage, seed, k]).permutation(n)
            about = {"method": method, "seed": seed, "stage": stage, "task": cell[1], "kind": cell[0], "shots": cell[2]}
            rows += [{**about, "prompt": i, "score": float(order[i] < count)} for i in range(n)]
    return pd.DataFrame(rows)


def results(scores: pd.DataFrame | None = None, methods=("lora", "iv"), seeds=(0, 1)) -> ContinualResults:
    places = list(itertools.product(methods, seeds, (1, 2, 3)))
    similarity = [
        {"method": m, "seed": s, "stage": i, "task": t, "similarity": 0.9**i - 0.1 * s - 0.05 * k + 0.01 * len(m)}
        for m, s, i in places
        for k, t in enumerate(SEQUENCE)
    ]
    costs = [{"method": m, "seed": s, "stage": i, "seconds": 1.5, "teacher_seconds": np.nan} for m, s, i in places]
    frames = (frame() if scores is None else scores, pd.DataFrame(similarity), pd.DataFrame(costs))
    return ContinualResults(*frames, {"model": "tiny", "sequence": SEQUENCE, "steps": 3})


@pytest.fixture(scope="module")
def found():
    return results()


def by_hand(scores: dict) -> dict[str, float]:
    """From {(stage, cell): mean score}, with every sum written out."""
    one, two, three = (("trained", task, 0) for task in SEQUENCE)
    out = {"OP": (scores[3, one] + scores[3, two] + scores[3, three]) / 3}
    out["OP change"] = out["OP"] - (scores[0, one] + scores[0, two] + scores[0, three]) / 3
    out["BWT"] = ((scores[3, one] - scores[1, one]) + (scores[3, two] - scores[2, two])) / 2
    for name, shots in (("GP", 0), ("IP", 5)):
        far, near = ("general", "far", shots), ("general", "near", shots)
        out[name] = (scores[3, far] + scores[3, near]) / 2
        out[f"{name} change"] = out[name] - (scores[0, far] + scores[0, near]) / 2
    out["plasticity"] = (scores[1, one] + scores[2, two] + scores[3, three]) / 3
    general = [scores[0, cell] - scores[3, cell] for cell in CELLS[3:]]
    out["forgetting"] = (-out["BWT"] + sum(general) / 4) / 2
    out["stability"] = -out["forgetting"]
    return out


def means(scores: pd.DataFrame, method: str, seed: int, drawn: dict | None = None) -> dict:
    """{(stage, cell): mean score}, over the drawn prompts of each cell."""
    mine = scores[((scores["method"] == method) & (scores["seed"] == seed)) | (scores["method"] == "base")]
    out = {}
    for (stage, *cell), part in mine.groupby(["stage", "kind", "task", "shots"]):
        values = part.sort_values("prompt")["score"].to_numpy()
        out[stage, tuple(cell)] = values[slice(None) if drawn is None else drawn[tuple(cell)]].mean()
    return out


def draws(n: int, seed: int = 0) -> list[dict]:
    rng = np.random.default_rng(seed)
    drawn = {cell: rng.integers(N[cell], size=(n, N[cell])) for cell in CELLS}
    return [{cell: rows[i] for cell, rows in drawn.items()} for i in range(n)]


# -- metrics -----------------------------------------------------------------------------------------------------------
def test_metrics_are_those_written_out_by_hand(found):
    table = found.to_dataframe().set_index(["method", "metric"])
    for method in HITS:
        seeds = [by_hand(means(found.scores, method, seed)) for seed in (0, 1)]
        for metric in MEASURES:
            values = [seed[metric] for seed in seeds]
            assert table["mean"][method, metric] == pytest.approx(np.mean(values)), metric
            assert table["sd"][method, metric] == pytest.approx(np.std(values, ddof=1)), metric
    assert table["mean"]["iv", "OP"] == pytest.approx((7.5 / 10 + 9.5 / 12 + 12.5 / 14) / 3)
    assert table["mean"]["lora", "BWT"] == pytest.approx((-6 / 10 - 4 / 12) / 2)
    assert set(table.loc[["lora", "iv"], "n_seeds"]) == {2}
    numbers = {"OP": 36, "OP change": 36, "BWT": 36, "plasticity": 36, "GP": 14, "IP": 14, "forgetting": 64}
    assert {metric: table["n_prompts"]["iv", metric] for metric in numbers} == numbers


def test_the_base_has_scores_but_neither_learns_nor_forgets(found):
    base = found.to_dataframe().query("method == 'base'").set_index("metric")
    assert list(base.index) == ["OP", "GP", "IP"]
    assert base["mean"]["OP"] == pytest.approx((1 / 10 + 2 / 12 + 3 / 14) / 3)
    assert base["mean"]["IP"] == pytest.approx((7 / 8 + 5 / 6) / 2)


@pytest.mark.slow
def test_intervals_are_those_of_a_loop_over_the_same_draws(found):
    n = 60
    mine = resampled(found.scores, SEQUENCE, n_bootstrap=n, seed=3)
    each = {
        (m, s): [by_hand(means(found.scores, m, s, drawn)) for drawn in draws(n, seed=3)] for m in HITS for s in (0, 1)
    }
    for metric in MEASURES:
        over = {m: [(each[m, 0][i][metric] + each[m, 1][i][metric]) / 2 for i in range(n)] for m in HITS}
        low, high = np.quantile(over["iv"], [0.025, 0.975])
        assert interval(mine["iv"][metric])["low"] == pytest.approx(low)
        assert interval(mine["iv"][metric])["high"] == pytest.approx(high)
        apart = np.subtract(over["iv"], over["lora"])
        paired = interval(mine["iv"][metric] - mine["lora"][metric])
        assert (paired["low"], paired["high"]) == pytest.approx(tuple(np.quantile(apart, [0.025, 0.975])))
    lost = {m: [(each[m, 0][i]["forgetting"] + each[m, 1][i]["forgetting"]) / 2 for i in range(n)] for m in HITS}
    cuts = 1 - np.divide(lost["iv"], lost["lora"])
    cut = cut_in_forgetting(mine["iv"]["forgetting"], mine["lora"]["forgetting"])
    assert min(lost["lora"]) > 0
    assert (cut["low"], cut["high"]) == pytest.approx(tuple(np.quantile(cuts, [0.025, 0.975])))


def test_prompts_of_one_query_are_resampled_together_and_count_once(found):
    scores = found.scores.assign(query=found.scores["prompt"].astype(str))
    twice = pd.concat([scores, scores.assign(prompt=scores["prompt"] + 100)], ignore_index=True)
    one, two = (results(x).to_dataframe() for x in (scores, twice))
    pd.testing.assert_frame_equal(one, two)
    other = scores.copy()
    other.loc[(other["method"] == "iv") & (other["prompt"] == 0), "query"] = "of other data"
    with pytest.raises(ValueError, match="different queries under one number"):
        results(other).to_dataframe()


def test_the_order_of_rows_does_not_matter(found):
    shuffled = found.scores.sample(frac=1.0, random_state=0).reset_index(drop=True)
    order = found.scores.drop_duplicates(
        ["kind", "task", "shots"]
    ).index  # which cells are seen first decides the draws
    shuffled = pd.concat([found.scores.loc[order], shuffled]).drop_duplicates()
    one, two = (resampled(scores, SEQUENCE, n_bootstrap=20) for scores in (found.scores, shuffled))
    for metric in MEASURES:
        assert np.allclose(one["iv"][metric], two["iv"][metric])


def test_without_general_tasks_forgetting_is_of_the_trained_ones(found):
    scores = found.scores[found.scores["kind"] == "trained"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        table = results(scores).to_dataframe().set_index(["method", "metric"])["mean"]
    assert table["lora", "forgetting"] == pytest.approx(-table["lora", "BWT"])
    assert np.isnan(table["lora", "GP"]) and np.isnan(table["base", "IP"])


def test_what_the_base_cannot_do_cannot_be_forgotten(found):
    scores = found.scores.copy()
    cannot = (scores["task"] == "far") & (scores["shots"] == 0) & (scores["method"] == "base")
    scores.loc[cannot, "score"] = 0.0
    cell = {(k, t, s): part for (k, t, s), part in scores.groupby(["kind", "task", "shots"])}
    expected = []
    for seed in (0, 1):

        def at(kind, task, shots, stage, seed=seed):
            part = cell[kind, task, shots]
            rows = part[(part["method"] == ("lora" if stage else "base")) & (part["stage"] == stage)]
            return rows[rows["seed"] == (seed if stage else 0)]["score"].mean()

        earlier = [at("trained", t, 0, i, seed) - at("trained", t, 0, 3, seed) for i, t in enumerate(SEQUENCE[:2], 1)]
        able = [("near", 0), ("near", 5), ("far", 5)]
        general = [at("general", t, s, 0) - at("general", t, s, 3, seed) for t, s in able]
        expected.append((np.mean(earlier) + np.mean(general)) / 2)
    table = results(scores).to_dataframe().set_index(["method", "metric"])["mean"]
    assert table["lora", "forgetting"] == pytest.approx(np.mean(expected))
    assert table["lora", "GP"] == pytest.approx(
        found.to_dataframe().set_index(["method", "metric"])["mean"]["lora", "GP"]
    )


def test_what_is_not_finished_leaves_the_rest_as_it_is(found):
    scores = found.scores
    part = scores[~((scores["method"] == "iv") & (scores["seed"] == 1) & (scores["stage"] == 3))]
    some = results(part)
    whole, rest = (x.to_dataframe().set_index(["method", "metric"]) for x in (found, some))
    pd.testing.assert_frame_equal(whole.loc[["lora"]], rest.loc[["lora"]])
    assert set(rest.loc["iv", "n_seeds"]) == {1}
    assert rest["mean"]["iv", "BWT"] == pytest.approx(by_hand(means(scores, "iv", 0))["BWT"])
    assert list(map(tuple, some.by_seed()[["method", "seed"]].to_numpy())) == [("lora", 0), ("lora", 1), ("iv", 0)]
    versus = some.versus().set_index("metric")
    apart = by_hand(means(scores, "iv", 0))["OP"] - by_hand(means(scores, "lora", 0))["OP"]
    assert versus["mean"]["OP"] == pytest.approx(apart) and versus["n_seeds"]["OP"] == 1
    none = results(scores[~((scores["method"] == "iv") & (scores["stage"] > 1))])
    assert none.to_dataframe().query("method == 'iv'")["mean"].isna().all()
    assert none.pareto() == ["lora"] and none.table().loc["iv", "OP"] == "–"
    assert none.matrix("iv")["one"].tolist()[:2] == pytest.approx([0.1, 0.85]) and len(none.matrix("iv")) == 2


def test_one_missing_prompt_is_not_passed_over(found):
    scores = found.scores
    hole = (scores["method"] == "iv") & (scores["seed"] == 0) & (scores["task"] == "near") & (scores["prompt"] == 2)
    table = results(scores[~hole]).to_dataframe().set_index(["method", "metric"])
    assert table["n_seeds"]["iv", "GP"] == 1 and table["n_seeds"]["lora", "GP"] == 2


def test_a_cut_needs_something_to_cut():
    nothing, some = np.zeros((5, 1)), np.full((5, 1), 0.2)
    assert np.isnan(cut_in_forgetting(some, nothing)["mean"])
    assert cut_in_forgetting(nothing, some) == pytest.approx(
        {"mean": 1, "low": 1, "high": 1, "sd": np.nan, "n_seeds": 1}, nan_ok=True
    )
    unsure = np.array([[0.2], [0.3], [-0.1], [0.2], [0.1]])
    cut = cut_in_forgetting(some, unsure)
    assert cut["mean"] == pytest.approx(0) and np.isnan(cut["low"])
    two = cut_in_forgetting(np.array([[0.1, 0.1]] * 3), np.array([[0.2, 0.4]] * 3))
    assert two["mean"] == pytest.approx(1 - 0.2 / 0.6)
    assert two["sd"] == pytest.approx(np.std([0.5, 0.75], ddof=1))


def test_a_sequence_that_was_not_scored_is_refused(found):
    with pytest.raises(ValueError, match=r"\['one', 'four'\] .* there are one \(0-shot\), two \(0-shot\), three"):
        resampled(found.scores, ["one", "four"])


# -- results -----------------------------------------------------------------------------------------------------------
def test_matrix_is_the_mean_over_seeds_and_prompts(found):
    table = found.matrix("lora")
    assert list(table.index) == [0, 1, 2, 3]
    assert list(table.columns) == [*SEQUENCE, *(f"{task}, {shots}-shot" for task, shots in GENERAL)]
    for k, cell in enumerate(CELLS):
        assert table.iloc[0, k] == pytest.approx(HITS["lora"][0][k] / N[cell])
        for stage in (1, 2, 3):
            count = [min(N[cell], HITS["lora"][stage][k] + seed) for seed in (0, 1)]
            assert table.iloc[stage, k] == pytest.approx(sum(count) / 2 / N[cell])


def test_table_shows_points_with_intervals(found):
    table, numbers = found.table(), found.to_dataframe().set_index(["method", "metric"])
    assert list(table.index) == ["base", "lora", "iv"]
    assert list(table) == ["OP", "BWT", "GP", "IP", "plasticity", "forgetting", "cut vs lora"]
    mean, low, high = (100 * numbers[x]["iv", "BWT"] for x in ("mean", "low", "high"))
    assert table.loc["iv", "BWT"] == f"{mean:.1f} [{low:.1f}, {high:.1f}]"
    assert table.loc["base", "BWT"] == "–" and table.loc["lora", "cut vs lora"] == "–"
    cut = found.versus().set_index("metric").loc["cut in forgetting"]
    lost = numbers["mean"]["iv", "forgetting"], numbers["mean"]["lora", "forgetting"]
    assert cut["mean"] == pytest.approx(1 - lost[0] / lost[1])
    assert table.loc["iv", "cut vs lora"].startswith(f"{100 * cut['mean']:.1f}% [")
    renamed = results(found.scores.replace({"method": {"lora": "plain"}}))
    assert "cut vs lora" not in renamed.table()
    assert "cut vs lora" in results(found.scores[found.scores["method"] != "iv"]).table()  # alone


def test_versus_is_paired_with_the_reference(found):
    versus, numbers = found.versus("iv"), found.to_dataframe().set_index(["method", "metric"])["mean"]
    assert set(versus["method"]) == {"lora"} and set(versus["reference"]) == {"iv"}
    for row in versus[versus["metric"] != "cut in forgetting"].itertuples():
        assert row.mean == pytest.approx(numbers["lora", row.metric] - numbers["iv", row.metric])
        assert row.low <= row.mean <= row.high


def test_pareto_front(found):
    # lora learns more, iv keeps more; a copy of lora that forgets more is on no front
    worse = {**HITS, "worse": [*HITS["lora"][:3], [2, 6, 13, 1, 3, 1, 2]]}
    some = results(frame(worse))
    assert some.pareto() == ["lora", "iv"]
    assert results(frame({"iv": HITS["iv"], "same": HITS["iv"]})).pareto() == ["iv", "same"]


def test_everything_comes_back_from_the_file(found, tmp_path):
    again = ContinualResults.load(found.save(tmp_path / "new" / "results.json"))
    for name in ("scores", "similarity", "costs"):
        pd.testing.assert_frame_equal(getattr(again, name), getattr(found, name))
    assert again.metadata == found.metadata and repr(again) == repr(found)
    empty = ContinualResults(found.scores, pd.DataFrame(), pd.DataFrame(), found.metadata)
    assert len(ContinualResults.load(empty.save(tmp_path / "empty.json")).similarity) == 0
    (tmp_path / "other.json").write_text('{"kind": "evaluation"}')
    with pytest.raises(ValueError, match="holds no continual"):
        ContinualResults.load(tmp_path / "other.json")


def test_shown_as_text_and_as_html(found):
    text = repr(found)
    assert text.startswith("ContinualResults(2 method(s) on tiny, 2 seed(s), one → two → three)\n")
    assert found.table().loc["iv", "GP"] in text
    ugly = results(found.scores.replace({"method": {"iv": "<b>iv</b> & co"}}))
    shown = ugly._repr_html_()
    assert "<b>" not in shown and "&lt;b&gt;iv&lt;/b&gt; &amp; co" in shown and "<table" in shown


def test_unknown_names_are_explained(found):
    with pytest.raises(ValueError, match="method='ewc' is unknown; there are lora, iv"):
        found.matrix("ewc")
    with pytest.raises(ValueError, match="reference='ewc' is unknown; there are lora, iv"):
        found.versus("ewc")
    with pytest.raises(ValueError, match="kind='bars' is unknown; choose one of scatter, matrix, similarity, general"):
        found.plot("bars")

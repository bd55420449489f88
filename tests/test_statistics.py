"""Statistics against scipy's, transformer-lens's and plain code."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ivlens as ivl
from ivlens.common import statistics

NUMBERS = st.lists(st.integers(-40, 40).map(lambda n: n / 8), min_size=2, max_size=7)  # sums of these are exact


def flips_by_hand(groups, queries):
    """Every flip of every query's sign, one after another."""
    asked = [(g, query) for g, each in enumerate(queries) for query in dict.fromkeys(each)]

    def mean(sign):
        of_groups = [
            sum(sign[g, q] * v for q, v in zip(queries[g], values)) / len(values) for g, values in enumerate(groups)
        ]
        return abs(sum(of_groups) / len(groups))

    found = mean(dict.fromkeys(asked, 1))
    all_flips = [dict(zip(asked, signs)) for signs in itertools.product([1, -1], repeat=len(asked))]
    return sum(mean(sign) >= found * (1 - 1e-9) - 1e-15 for sign in all_flips) / len(all_flips)


@settings(max_examples=40, deadline=None)
@given(st.lists(NUMBERS, min_size=1, max_size=2), st.data())
def test_all_flips_query_by_query_equal_flips_by_hand(groups, data):
    queries = [data.draw(st.lists(st.sampled_from("abc"), min_size=len(g), max_size=len(g))) for g in groups]
    assert statistics.sign_flip(groups, queries) == pytest.approx(flips_by_hand(groups, queries))


@pytest.mark.parametrize("unit", [1e-20, 1.0, 1e20])
def test_sign_flip_does_not_depend_on_the_unit(unit):
    """An absolute tolerance takes tiny effects for ties: p = 1 whatever they are."""
    values = unit * np.array([0.1, 0.2, 0.3, 0.4, 0.5, 0.6])
    assert statistics.sign_flip([values]) == 2 / 2**6
    assert statistics.sign_flip([values], n_flips=63) < 0.2
    assert statistics.sign_flip([values * [1, -1, 1, -1, 1, -1]]) == pytest.approx(
        flips_by_hand([[1, -2, 3, -4, 5, -6]], [range(6)])
    )


@pytest.mark.parametrize("n", [5, 11])
def test_sign_flip_equals_that_of_transformer_lens_on_heads_of_several_prompts(n):
    theirs = pytest.importorskip("transformer_lens.utilities.statistics", reason="from transformer-lens 4 on")
    values = torch.randn(n, 6, generator=torch.Generator().manual_seed(n)).double()
    values[:, 2] = 0
    expected = theirs.sign_flip_permutation_pvalue(values, dim=0)
    assert statistics.sign_flip([values.numpy()]) == pytest.approx(expected.numpy())
    error = theirs.standard_error(values, dim=0)
    assert statistics.standard_error([values.numpy()]) == pytest.approx(error.numpy())


def test_against_scipy():
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(0)
    x = rng.normal(0.3, 1, size=9)
    exact = stats.permutation_test((x,), np.mean, permutation_type="samples", n_resamples=np.inf)
    assert statistics.sign_flip([x]) == pytest.approx(exact.pvalue)
    interval = stats.bootstrap((x,), np.mean, method="percentile", n_resamples=9999, rng=rng).confidence_interval
    assert statistics.bootstrap_mean([x], n_bootstrap=9999) == pytest.approx((interval.low, interval.high), abs=0.03)
    for hits, n in ((0, 7), (3, 8), (40, 40)):
        expected = stats.binomtest(hits, n).proportion_ci(method="wilson")
        mine = statistics.wilson([1.0] * hits + [0.0] * (n - hits))
        assert mine == pytest.approx((expected.low, expected.high), abs=1e-6)
        other = stats.binomtest(hits, n).proportion_ci(confidence_level=0.99, method="wilson")
        mine = statistics.wilson([1.0] * hits + [0.0] * (n - hits), level=0.99)
        assert mine == pytest.approx((other.low, other.high), abs=1e-6)
    p = rng.uniform(size=(5, 6)) ** 3
    assert statistics.benjamini_hochberg(p) == pytest.approx(stats.false_discovery_control(p, axis=None).reshape(5, 6))
    y = np.round(x + rng.normal(size=9))
    assert statistics.correlation(x, y)["spearman"] == pytest.approx(stats.spearmanr(x, y).statistic)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=30))
def test_corrected_p_values_are_larger_in_the_same_order_and_one_test_needs_no_correction(p):
    corrected = statistics.benjamini_hochberg(np.array(p))
    assert (corrected >= np.array(p) * (1 - 1e-12)).all() and corrected.max() <= max(p) * (1 + 1e-12)
    order = np.argsort(p, kind="stable")
    assert (np.diff(corrected[order]) >= 0).all()
    below = [k for k, q in enumerate(sorted(p), 1) if q <= 0.05 * k / len(p) * (1 - 1e-9)]  # the rule in their paper
    assert (corrected <= 0.05).sum() >= (below[-1] if below else 0)


def test_repeated_queries_count_once():
    rng = np.random.default_rng(1)
    values, queries = rng.normal(0.5, 1, size=12), list(range(12))
    four = np.repeat(values, 4)
    asked = [q for q in queries for _ in range(4)]
    assert statistics.sign_flip([four], [asked]) == pytest.approx(statistics.sign_flip([values]))
    assert statistics.bootstrap_mean([four], [asked]) == pytest.approx(statistics.bootstrap_mean([values]))
    assert statistics.standard_error([four], [asked]) == pytest.approx(values.std(ddof=1) / 12**0.5)
    assert statistics.wilson([1.0] * 8 + [0.0] * 8, list("ab") * 8) == pytest.approx(statistics.wilson([1.0, 0.0]))
    rows = np.stack([values > 0, values > 1, values > 0.5], axis=1).astype(float)
    assert statistics.bootstrap_share([np.repeat(rows, 4, axis=0)], [asked]) == pytest.approx(
        statistics.bootstrap_share([rows]), nan_ok=True
    )


def test_queries_asked_unequally_often_are_resampled_whole():
    values, queries = [1.0, 3.0, 5.0, 0.0, 2.0], list("aaabc")
    by_query, rng = {"a": [1.0, 3.0, 5.0], "b": [0.0], "c": [2.0]}, random.Random(0)
    means = []
    for _ in range(20_000):
        drawn = [v for q in rng.choices("abc", k=3) for v in by_query[q]]
        means.append(sum(drawn) / len(drawn))
    expected = np.quantile(means, [0.025, 0.975])
    assert statistics.bootstrap_mean([values], [queries], n_bootstrap=20_000) == pytest.approx(expected, abs=0.05)


def test_one_query_has_no_interval_and_says_why():
    values, queries = np.array([0.1, 0.5, 0.2]), ["a"] * 3
    assert np.isnan(statistics.bootstrap_mean([values], [queries])).all()
    with pytest.warns(UserWarning, match="one query has no standard error and no interval; use n_prompts >= 2"):
        assert np.isnan(statistics.standard_error([values], [queries]))
    assert statistics.sign_flip([values], [queries]) == 1.0
    effects = ivl.HeadEffects(torch.randn(1, 2, 3), torch.zeros(1), ("a",))
    with pytest.warns(UserWarning, match="one query"):
        frame = effects.to_dataframe()
    assert frame[["stderr", "low", "high", "stability"]].isna().all(axis=None) and set(frame["p"]) == {1.0}
    assert "resampled" not in repr(effects)


# -- effects of heads ----------------------------------------------------------------------------------------------------


@pytest.fixture
def repeated():
    """Four queries, each asked three times in task a; five in task b."""
    values = torch.randn(17, 2, 3, generator=torch.Generator().manual_seed(2)) + torch.tensor([2.0, 0, 0])
    return ivl.HeadEffects(
        values, torch.zeros(17), ("a",) * 12 + ("b",) * 5, queries=tuple("wxyz" * 3) + tuple("vwxyz")
    )


def test_effects_are_counted_by_query(repeated):
    assert (repeated.n_queries(), repeated.n_queries("a")) == (9, 4) and "17 prompts of 9 queries" in repr(repeated)
    means = torch.stack([repeated.of("a").values[i::4].mean(0) for i in range(4)])
    once = ivl.HeadEffects(means, torch.zeros(4), ("a",) * 4)
    for statistic in ("mean", "stderr", "pvalue", "stability"):
        torch.testing.assert_close(getattr(repeated, statistic)(task="a"), getattr(once, statistic)())
    assert repeated.pvalue("a").min() >= 2 / 2**4
    with pytest.raises(ValueError, match="17 effects and 2 queries don't match"):
        ivl.HeadEffects(repeated.values, repeated.baseline, repeated.tasks, queries=("v", "w"))


def test_p_values_are_corrected_for_the_number_of_heads(repeated):
    raw, corrected = repeated.pvalue().flatten(), repeated.pvalue(corrected=True).flatten()
    ordered = raw.sort().values * 6 / torch.arange(1, 7)
    expected = [min(ordered[k:]).item() for k in range(6)]
    assert sorted(corrected.tolist()) == pytest.approx(expected)
    frame = repeated.to_dataframe()
    assert (frame["p_corrected"] >= frame["p"]).all() and (frame["p_corrected"] > frame["p"]).any()


def test_stability_is_how_often_a_head_stays_among_the_strongest():
    values = torch.zeros(30, 1, 4)
    noise = torch.randn(30, generator=torch.Generator().manual_seed(0))
    values[:, 0, 0] = 9  # always there
    values[:, 0, 1], values[:, 0, 2] = noise - noise.mean(), -(noise - noise.mean())  # one or the other
    values[:, 0, 3] = -9  # never
    effects = ivl.HeadEffects(values, torch.zeros(30), ("a",) * 30)
    stable = effects.stability(2)[0]
    assert stable.sum() == pytest.approx(2) and (stable[0], stable[3]) == (1.0, 0.0)
    assert stable[1].item() == pytest.approx(0.5, abs=0.1) and stable[2].item() == pytest.approx(0.5, abs=0.1)
    assert torch.equal(effects.stability(4)[0], torch.ones(4))
    assert "resampled, 100% of the top 4 stay" in repr(effects)

"""Confidence intervals, paired tests and correlations. What counts is different queries: of a query asked several times, all values
are resampled, or flipped, together."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from statistics import NormalDist
from typing import Any

import numpy as np
import pandas as pd

__all__ = [
    "benjamini_hochberg",
    "bootstrap_difference",
    "bootstrap_mean",
    "bootstrap_share",
    "correlation",
    "resampled_means",
    "sign_flip",
    "standard_error",
    "wilson",
]

# Arrays [prompt, ...], such as one per task; groups count the same, however many prompts they have.
Groups = Sequence[Any]
Queries = Sequence[Sequence[Any]]  # by group: which query each prompt asks; None: each prompt its own


def wilson(hits: Sequence[float], queries: Sequence[Any] | None = None, *, level: float = 0.95) -> tuple[float, float]:
    """Wilson interval of a proportion, of as many observations as there are different queries; of hits, or of means of hits (over
    draws), for which it is rather too wide.

    Examples
    --------
    >>> low, high = wilson([1.0] * 8 + [0.0] * 2)
    >>> round(low, 3), round(high, 3)
    (0.49, 0.943)
    """
    n, z = len(hits) if queries is None else len(set(queries)), NormalDist().inv_cdf(0.5 + level / 2)
    p = sum(hits) / len(hits)
    middle = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z * (p * (1 - p) / n + z**2 / (4 * n**2)) ** 0.5 / (1 + z**2 / n)
    return max(middle - half, 0.0), min(middle + half, 1.0)


def resampled_means(
    groups: Groups, queries: Queries | None = None, *, n_bootstrap: int = 2000, seed: int = 0
) -> np.ndarray:
    """Mean of the groups' means under resampled queries, [draw, ...]. NaN where a group asks one query only: nothing varies."""
    rng = np.random.default_rng(seed)
    total: Any = 0.0
    for sums, sizes in _by_query(groups, queries):
        n = len(sums)
        drawn = rng.integers(n, size=(n_bootstrap, n)) + n * np.arange(n_bootstrap)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=n_bootstrap * n).reshape(n_bootstrap, n)
        means = (counts @ sums.reshape(n, -1) / (counts @ sizes)[:, None]).reshape(n_bootstrap, *sums.shape[1:])
        total = total + (means if n > 1 else np.full_like(means, np.nan))
    return total / len(groups)


def bootstrap_mean(
    groups: Groups, queries: Queries | None = None, *, level: float = 0.95, n_bootstrap: int = 2000, seed: int = 0
) -> tuple[Any, Any]:
    """Percentile bootstrap interval of the mean of the groups' means, resampling queries within each group."""
    draws = resampled_means(groups, queries, n_bootstrap=n_bootstrap, seed=seed)
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return (float(low), float(high)) if draws.ndim == 1 else (low, high)


def bootstrap_difference(
    groups: Groups, queries: Queries | None = None, *, level: float = 0.95, n_bootstrap: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """As `bootstrap_mean`, of paired differences of hits. Where all are alike, resampling says nothing: then what differs in none of n
    queries may yet in as many as `wilson` allows for no hit of n (our choice).

    Examples
    --------
    >>> low, high = bootstrap_difference([[0.0] * 30])
    >>> round(low, 3), round(high, 3)
    (-0.114, 0.114)
    """
    low, high = bootstrap_mean(groups, queries, level=level, n_bootstrap=n_bootstrap, seed=seed)
    if not high - low < 1e-12:
        return low, high
    asked = queries or [range(len(values)) for values in groups]
    n = sum(len(set(some)) for some in asked)
    edge = wilson([0.0] * n, level=level)[1]
    return max(low - edge, -1.0), min(high + edge, 1.0)


def standard_error(groups: Groups, queries: Queries | None = None) -> np.ndarray:
    """Of the mean of the groups' means, groups taken as fixed; NaN, with a warning, where a group asks one query only."""
    variance: Any = 0.0
    for sums, sizes in _by_query(groups, queries):
        n, size = len(sums), sizes.sum()
        if n < 2:
            warnings.warn("one query has no standard error and no interval; use n_prompts >= 2", stacklevel=3)
        apart = sums - sizes.reshape(-1, *[1] * (sums.ndim - 1)) * sums.sum(0) / size
        variance = variance + ((apart**2).sum(0) * n / (n - 1) / size**2 if n > 1 else np.full(sums.shape[1:], np.nan))
    return np.sqrt(variance) / len(groups)


def sign_flip(groups: Groups, queries: Queries | None = None, *, n_flips: int = 10_000, seed: int = 0) -> Any:
    """Two-sided p-value of the mean of the groups' means against zero: signs of paired differences flipped, query by query.

    All flips where there are no more than `n_flips` of them: exact. Else as many at random, and 1 / (n_flips + 1) is the least.
    """
    parts = [sums / sizes.sum() / len(groups) for sums, sizes in _by_query(groups, queries)]
    weighted = np.concatenate(parts).reshape(sum(map(len, parts)), -1)
    n, rng = len(weighted), np.random.default_rng(seed)
    exact = 2**n <= n_flips
    found = np.abs(weighted.sum(0))
    least = found - 1e-12 * np.abs(weighted).sum(0)  # equal but for the order of summing, whatever the unit
    extreme, n_flips = np.zeros(weighted.shape[1]), 2**n if exact else n_flips
    for start in range(0, n_flips, 1000):
        rows = np.arange(start, min(start + 1000, n_flips))
        ones = (rows[:, None] >> np.arange(n)) & 1 if exact else rng.integers(2, size=(len(rows), n))
        extreme += (np.abs((2.0 * ones - 1) @ weighted) >= least).sum(0)
    p = extreme / n_flips if exact else (extreme + 1) / (n_flips + 1)
    shape = parts[0].shape[1:]
    return p.reshape(shape) if shape else float(p[0])


def benjamini_hochberg(p: np.ndarray) -> np.ndarray:
    """p-values corrected for their number: calling all below α found, a share α of these at most is expected to be false
    (Benjamini and Hochberg 1995; of tests that are independent or positively dependent)."""
    flat = np.ravel(p)
    order = np.argsort(flat)[::-1]
    corrected = np.empty_like(flat)
    corrected[order] = np.minimum.accumulate(flat[order] * len(flat) / np.arange(len(flat), 0, -1))
    return corrected.reshape(np.shape(p))


def _by_query(groups: Groups, queries: Queries | None) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Each group's sums per query, [query, ...], and how often each was asked."""
    for i, values in enumerate(groups):
        values = np.asarray(values, float)
        asked = list(range(len(values)) if queries is None else queries[i])
        place = {query: k for k, query in enumerate(dict.fromkeys(asked))}
        sums, sizes = np.zeros((len(place), *values.shape[1:])), np.zeros(len(place))
        at = [place[query] for query in asked]
        np.add.at(sums, at, values)
        np.add.at(sizes, at, 1)
        yield sums, sizes


def correlation(
    x: Sequence[float],
    y: Sequence[float],
    *,
    groups: Sequence[str] | None = None,
    n_bootstrap: int = 2000,
    seed: int = 0,
) -> dict[str, float]:
    """R² of a straight line and Spearman's ρ, each with the 95 % percentile bootstrap interval.

    Points are resampled, or, where they come in five groups or more (such as tasks seen at several checkpoints), whole groups.

    Examples
    --------
    >>> found = correlation([1, 2, 3, 4, 5], [2, 4, 6, 8, 10])
    >>> round(found["r2"], 6), round(found["spearman"], 6), found["n"]
    (1.0, 1.0, 5)
    """
    names = range(len(x)) if groups is None or len(set(groups)) < 5 else groups
    table = pd.DataFrame({"x": list(x), "y": list(y), "group": list(names)}).dropna()
    points = table[["x", "y"]].to_numpy(float)
    members = list(table.reset_index(drop=True).groupby("group").indices.values())
    rng = np.random.default_rng(seed)

    def measures(some: np.ndarray) -> tuple[float, float]:
        if len(some) < 3 or np.ptp(some[:, 0]) == 0 or np.ptp(some[:, 1]) == 0:
            return float("nan"), float("nan")
        ranks = pd.DataFrame(some).rank().to_numpy()
        return np.corrcoef(some.T)[0, 1] ** 2, np.corrcoef(ranks.T)[0, 1]

    found = measures(points)
    drawn = rng.integers(len(members), size=(n_bootstrap if len(points) else 0, len(members)))
    draws = [measures(points[np.concatenate([members[i] for i in row])]) for row in drawn]
    low, high = np.nanquantile(draws, [0.025, 0.975], axis=0) if draws and np.isfinite(draws).any() else (found, found)
    ends = {"": found, "_low": low, "_high": high}
    names = [(i, name, end) for i, name in enumerate(("r2", "spearman")) for end in ends]
    return {**{f"{name}{end}": float(ends[end][i]) for i, name, end in names}, "n": len(points)}


def bootstrap_share(
    groups: Groups, queries: Queries | None = None, *, n_bootstrap: int = 2000, seed: int = 0
) -> tuple[float, float, float]:
    """Summed gains over summed losses, with its 95 % percentile bootstrap interval, resampling queries within each group.

    A group has a row per prompt: before, after, and restored. Gain: mean restored − mean after; loss: mean before − mean after.
    No interval (NaN) where the loss itself isn't certain: where more than 2.5 % of the resamples lost nothing.
    """
    before, after, restored = sum(np.asarray(rows).mean(axis=0) for rows in groups)
    share = float((restored - after) / (before - after)) if before != after else float("nan")
    draws = resampled_means(groups, queries, n_bootstrap=n_bootstrap, seed=seed)
    gains, losses = draws[:, 2] - draws[:, 1], draws[:, 0] - draws[:, 1]
    if (losses > 0).mean() < 0.975:
        return share, float("nan"), float("nan")
    low, high = np.quantile(gains[losses > 0] / losses[losses > 0], [0.025, 0.975])
    return share, float(low), float(high)

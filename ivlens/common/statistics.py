"""Confidence intervals, paired tests and correlations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

__all__ = ["bootstrap_mean", "bootstrap_share", "correlation", "sign_flip", "wilson"]


def wilson(hits: Sequence[float]) -> tuple[float, float]:
    """95 % Wilson interval of a proportion.

    Examples
    --------
    >>> low, high = wilson([1.0] * 8 + [0.0] * 2)
    >>> round(low, 3), round(high, 3)
    (0.49, 0.943)
    """
    n, z = len(hits), 1.959964
    p = sum(hits) / n
    middle = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z * (p * (1 - p) / n + z**2 / (4 * n**2)) ** 0.5 / (1 + z**2 / n)
    return max(middle - half, 0.0), min(middle + half, 1.0)


def bootstrap_mean(groups: Sequence[np.ndarray], *, n_bootstrap: int = 2000, seed: int = 0) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the mean of the groups' means, resampling within each group."""
    import numpy as np

    rng = np.random.default_rng(seed)
    total = np.zeros(n_bootstrap)
    for values in groups:
        values = np.asarray(values, float)
        total += values[rng.integers(len(values), size=(n_bootstrap, len(values)))].mean(axis=1)
    low, high = np.quantile(total / len(groups), [0.025, 0.975])
    return float(low), float(high)


def sign_flip(groups: Sequence[np.ndarray], *, n_flips: int = 10_000, seed: int = 0) -> float:
    """Two-sided p-value of the mean of the groups' means against zero: signs of paired differences flipped at random."""
    import numpy as np

    rng = np.random.default_rng(seed)
    found, flipped = 0.0, np.zeros(n_flips)
    for values in groups:
        values = np.asarray(values, float)
        found += values.mean()
        flipped += (rng.integers(2, size=(n_flips, len(values))) * 2 - 1) @ values / len(values)
    return float(((np.abs(flipped) >= abs(found) - 1e-12).sum() + 1) / (n_flips + 1))


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
    import numpy as np
    import pandas as pd

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
    return {
        "r2": float(found[0]),
        "r2_low": float(low[0]),
        "r2_high": float(high[0]),
        "spearman": float(found[1]),
        "spearman_low": float(low[1]),
        "spearman_high": float(high[1]),
        "n": len(points),
    }


def bootstrap_share(
    groups: Sequence[np.ndarray], *, n_bootstrap: int = 2000, seed: int = 0
) -> tuple[float, float, float]:
    """Summed gains over summed losses, with its 95 % percentile bootstrap interval, resampling rows within each group.

    A group has a row per prompt: before, after, and restored. Gain: mean restored − mean after; loss: mean before − mean after.
    No interval (NaN) where the loss itself isn't certain: where more than 2.5 % of the resamples lost nothing.
    """
    import numpy as np

    rng = np.random.default_rng(seed)
    found, gains, losses = np.zeros(2), np.zeros(n_bootstrap), np.zeros(n_bootstrap)
    for rows in groups:
        means = rows.mean(axis=0)
        found += means[2] - means[1], means[0] - means[1]
        drawn = rows[rng.integers(len(rows), size=(n_bootstrap, len(rows)))].mean(axis=1)
        gains += drawn[:, 2] - drawn[:, 1]
        losses += drawn[:, 0] - drawn[:, 1]
    share = float(found[0] / found[1]) if found[1] else float("nan")
    if (losses <= 0).mean() > 0.025:
        return share, float("nan"), float("nan")
    low, high = np.quantile(gains[losses > 0] / losses[losses > 0], [0.025, 0.975])
    return share, float(low), float(high)

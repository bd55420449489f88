"""Confidence intervals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

__all__ = ["bootstrap_mean", "wilson"]


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

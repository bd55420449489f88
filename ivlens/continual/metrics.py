"""What methods learn and forget along a sequence, in numbers with intervals.

In shapes, `stage` counts from 0, the base model, to J, the last of J trained tasks: a[i, j] is the score on task j after stage i.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from jaxtyping import Float

__all__ = ["MEASURES", "backward_transfer", "cut_in_forgetting", "final", "forgetting", "interval", "measures"]
__all__ += ["plasticity", "resampled"]

MEASURES = ("OP", "OP change", "BWT", "GP", "GP change", "IP", "IP change", "plasticity", "forgetting", "stability")
OF_BASE = ("OP", "GP", "IP")
LEAST = 0.1  # what the base model does less often can't be forgotten


def final(scores: Float[np.ndarray, "*draws stage task"]) -> Float[np.ndarray, "*draws"]:
    """mean_j a[J, j]: on trained tasks OP (TRACE, arXiv 2310.06762), which FVG calls FP; on general ones GP and IP (FVG)."""
    return _mean(scores[..., -1, :])


def plasticity(trained: Float[np.ndarray, "*draws stage task"]) -> Float[np.ndarray, "*draws"]:
    """mean_j a[j, j]: how well each task is done right after training on it."""
    return _mean(_learned(trained))


def backward_transfer(trained: Float[np.ndarray, "*draws stage task"]) -> Float[np.ndarray, "*draws"]:
    """BWT = mean_{j<J} (a[J, j] − a[j, j]) (GEM, arXiv 1706.08840; TRACE). NaN for one task."""
    return -_mean(_lost(trained))


def forgetting(
    trained: Float[np.ndarray, "*draws stage task"], general: Float[np.ndarray, "*draws stage other"]
) -> Float[np.ndarray, "*draws"]:
    """How much was lost, positive where it's worse: the average of two means, of earlier tasks and of general ones.

    Earlier tasks: a[j, j] − a[J, j] for j < J. General tasks, each under every number of demonstrations: a[0, g] − a[J, g].
    Our choice: BWT is blind to what the base model could do, GP and IP to what was learned; here both count the same, however
    many tasks there are of either. Where there are no general tasks, the earlier ones alone. `measures` leaves those out on
    which the base scores under 0.1: what it can't do, it can't forget.
    """
    groups = [_mean(lost) for lost in (_lost(trained), general[..., 0, :] - general[..., -1, :]) if lost.shape[-1]]
    return _mean(np.stack(groups, axis=-1)) if groups else np.full(trained.shape[:-2], np.nan)


def measures(
    trained: Float[np.ndarray, "*draws stage task"],
    zero: Float[np.ndarray, "*draws stage other"],
    shown: Float[np.ndarray, "*draws stage some"],
) -> dict[str, Float[np.ndarray, "*draws"]]:
    """All of `MEASURES`; `change` is the difference from the base, and stability is −forgetting.

    General tasks are scored without (`zero`: GP) and with demonstrations (`shown`: IP, five in FVG, arXiv 2502.11019).
    """
    found = {}
    general = np.concatenate([zero, shown], axis=-1)
    base = general[(0,) * (general.ndim - 1)]  # as found, in the first draw: the same tasks in all of them
    for name, scores in (("OP", trained), ("GP", zero), ("IP", shown)):
        found[name] = final(scores)
        found[f"{name} change"] = found[name] - _mean(scores[..., 0, :])
    lost = forgetting(trained, general[..., base >= LEAST])
    found |= {"BWT": backward_transfer(trained), "plasticity": plasticity(trained)}
    found |= {"forgetting": lost, "stability": -lost}
    return {name: found[name] for name in MEASURES}


def _learned(trained: np.ndarray) -> np.ndarray:
    """a[j, j] of every task; a[0, :] is the base's."""
    tasks = np.arange(trained.shape[-1])
    return trained[..., tasks + 1, tasks]


def _lost(trained: np.ndarray) -> np.ndarray:
    return (_learned(trained) - trained[..., -1, :])[..., :-1]


def _mean(values: np.ndarray) -> np.ndarray:
    """Over the last axis; NaN, without numpy's warning, where that is empty."""
    return values.mean(axis=-1) if values.shape[-1] else np.full(values.shape[:-1], np.nan)


def resampled(
    scores: pd.DataFrame, sequence: Sequence[str], *, n_bootstrap: int = 2000, seed: int = 0
) -> dict[str, dict[str, Float[np.ndarray, "draw seed"]]]:
    """Every measure of every method: as found in the first row, under resampled prompts below it, a column per seed.

    Queries, with all prompts that ask them, are resampled within each task and number of demonstrations, the trained tasks in
    order before the general ones. Draws are the same for all methods, seeds and stages, so that differences between rows of two
    methods are paired.
    A method and seed that aren't finished, or lack some prompt's score that a measure is made of, have NaN.

    Parameters
    ----------
    scores
        One row per prompt: `method`, `seed`, `stage`, `task`, `kind`, `shots`, `prompt`, `score`, and `query`, without
        which each prompt is its own; see `ContinualResults`.
    """
    parts = dict(iter(scores.groupby(["kind", "task", "shots"], sort=False)))
    cells = [cell for task in sequence for cell in parts if cell[:2] == ("trained", task)]
    if [cell[1] for cell in cells] != list(sequence):
        scored = [f"{task} ({shots}-shot)" for kind, task, shots in parts if kind == "trained"]
        needed = f"sequence={list(sequence)} must have scores of every task under one number of demonstrations each"
        raise ValueError(f"{needed}; there are {', '.join(scored) or 'none'}: score what is missing")
    cells += [cell for cell in parts if cell[0] == "general"]
    methods = [method for method in dict.fromkeys(scores["method"]) if method != "base"]
    seeds = sorted(set(scores.loc[scores["method"] != "base", "seed"]))
    stages = range(1, len(sequence) + 1)
    runs = [("base", 0, 0), *((m, s, i) for m in methods for s in seeds for i in stages)]
    rng = np.random.default_rng(seed)
    means = np.stack([_means(parts[cell], runs, n_bootstrap, rng) for cell in cells], axis=-1)
    base = means[:, None, :1]  # draw, seed, stage, cell
    after = means[:, 1:].reshape(len(means), len(methods), len(seeds), len(stages), len(cells))
    kinds = ["trained" if cell[0] == "trained" else "shown" if cell[2] else "zero" for cell in cells]
    of_kind = [np.array([kind == name for kind in kinds]) for name in ("trained", "zero", "shown")]

    def measured(a: np.ndarray) -> dict[str, np.ndarray]:
        return measures(*(a[..., here] for here in of_kind))

    # A model that never trains has no plasticity, and nothing to forget.
    start = measured(np.repeat(base, len(stages) + 1, axis=2))
    found = {"base": {name: start[name] for name in OF_BASE}}
    for i, method in enumerate(methods):
        begin = np.broadcast_to(base, (len(means), len(seeds), 1, len(cells)))
        values = np.concatenate([begin, after[:, i]], axis=2)
        used = values[0].copy()
        used[:, 1:-1, ~of_kind[0]] = 0  # no measure is of general tasks on the way
        values[:, np.isnan(used).any(axis=(1, 2))] = np.nan
        found[method] = measured(values)
    return found


def _means(
    part: pd.DataFrame, runs: Sequence[tuple[str, int, int]], n_bootstrap: int, rng: np.random.Generator
) -> Float[np.ndarray, "draw run"]:
    """Mean scores of one task under one number of demonstrations: as found, then resampled."""
    index = pd.MultiIndex.from_tuples(runs)
    table = part.pivot(index="prompt", columns=["method", "seed", "stage"], values="score").reindex(columns=index)
    asked = (part if "query" in part else part.assign(query=part["prompt"])).groupby("prompt")["query"]
    if asked.nunique().max() > 1:
        raise ValueError("runs were asked different queries under one number: scores of other data can't be paired")
    at, queries = pd.factorize(asked.first())
    n = len(queries)
    drawn = rng.integers(n, size=(n_bootstrap, n)) + n * np.arange(n_bootstrap)[:, None]
    counts = np.bincount(drawn.ravel(), minlength=n_bootstrap * n).reshape(n_bootstrap, n)
    counts = np.concatenate([np.ones((1, n)), counts])[:, at]
    return counts @ table.to_numpy(float) / counts.sum(axis=1, keepdims=True)


def interval(found: Float[np.ndarray, "draw seed"]) -> dict[str, float]:
    """Mean over seeds with the 95 % percentile interval over draws, the standard deviation over seeds, and their number."""
    known = found[:, np.isfinite(found[0])]
    means = _mean(known)
    return _summary(means[0], means[1:], known[0])


def cut_in_forgetting(
    method: Float[np.ndarray, "draw seed"], reference: Float[np.ndarray, "draw seed"]
) -> dict[str, float]:
    """1 − F_method / F_reference over the seeds that both have, as `interval` gives it.

    NaN where the reference forgets nothing; no interval where that isn't certain: in more than 2.5 % of the draws it forgets
    nothing. No deviation where it forgets nothing under some seed.
    """
    both = np.isfinite(method[0]) & np.isfinite(reference[0])
    mine, theirs = _mean(method[:, both]), _mean(reference[:, both])
    with np.errstate(divide="ignore", invalid="ignore"):
        cuts = np.where(theirs > 0, 1 - mine / theirs, np.nan)
        of_seeds = np.where(reference[0, both] > 0, 1 - method[0, both] / reference[0, both], np.nan)
    draws = cuts[1:][theirs[1:] > 0]
    certain = len(draws) >= 0.975 * len(cuts[1:]) and np.isfinite(cuts[0])
    return _summary(cuts[0], draws if certain else draws[:0], of_seeds)


def _summary(mean: float, draws: np.ndarray, of_seeds: np.ndarray) -> dict[str, float]:
    low, high = np.quantile(draws, [0.025, 0.975]) if len(draws) else (np.nan, np.nan)
    sd = of_seeds.std(ddof=1) if len(of_seeds) > 1 else np.nan
    return {"mean": float(mean), "low": float(low), "high": float(high), "sd": float(sd), "n_seeds": len(of_seeds)}

"""Scores of finished chains (a sequence by one method and seed), one small file per sequence, so that studies go on on another machine.

Of prompts only a hash is kept, and of a method what it says of itself: with other options it is another one. All else that scores depend
on (tasks, training, scoring) is in the file's name, which the caller gives.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pandas as pd

from ivlens.continual import ContinualResults
from ivlens.training.methods import Method

COLUMNS = ["method", "options", "seed", "stage", "task", "kind", "shots", "prompt", "query", "score"]


def chains(
    path: Path,
    sequence: Sequence[str],
    methods: Mapping[str, Method],
    seeds: Sequence[int],
    run: Callable[[dict[str, Method], list[int]], ContinualResults] | None,
) -> ContinualResults:
    """The results of these methods and seeds: those in `path` as they are there, the others by `run`, if it is given, and then kept
    in `path`, too."""
    options = {label: repr(method) for label, method in methods.items()}
    for label, method in methods.items():
        there = _read(path)
        done = set(there.loc[there["options"] == options[label], "seed"])
        missing = [seed for seed in seeds if seed not in done]
        if run is not None and missing:
            _write(path, run({label: method}, missing).scores, options)
    there = _read(path)
    ours = there["options"].isin(options.values()) & there["seed"].isin(seeds) | (there["method"] == "base")
    labels = {said: label for label, said in options.items()}
    scores = there[ours].assign(method=lambda x: x["options"].map(labels).fillna("base"))
    order = {label: i for i, label in enumerate(["base", *methods])}
    scores = scores.sort_values("method", key=lambda x: x.map(order), kind="stable").drop(columns="options")
    nothing = pd.DataFrame()
    return ContinualResults(scores.reset_index(drop=True), nothing, nothing, {"sequence": list(sequence)})


def _read(path: Path) -> pd.DataFrame:
    return pd.read_parquet(path) if path.exists() else pd.DataFrame(columns=COLUMNS)


def _write(path: Path, scores: pd.DataFrame, options: Mapping[str, str]) -> None:
    """Beside what is there; the base model's scores once."""
    there = _read(path)
    new = scores[(scores["method"] != "base") | (not len(there))]
    said = new["method"].map(options).fillna("base")
    hashes = new["query"].map(lambda query: hashlib.sha256(str(query).encode()).hexdigest()[:8])
    frame = pd.concat([there, new.assign(options=said, query=hashes)[COLUMNS]], ignore_index=True)
    for name, kind in (("seed", "int16"), ("stage", "int16"), ("shots", "int16"), ("prompt", "int16")):
        frame[name] = frame[name].astype(kind)
    path.parent.mkdir(parents=True, exist_ok=True)
    frame.assign(score=frame["score"].astype("float32")).to_parquet(path, compression="zstd")

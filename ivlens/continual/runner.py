"""`run`: tasks one after the other, by several methods and seeds; every stage kept, so that nothing is done twice."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from ivlens.common.processes import everyones, on_main
from ivlens.continual.experiment import Experiment, experiment
from ivlens.continual.results import ContinualResults
from ivlens.continual.stages import check_stages, own_stages, scores
from ivlens.models.loading import load_model
from ivlens.tasks.task import Task
from ivlens.training.methods import Method
from ivlens.training.run import TrainingRun
from ivlens.vectors.vector import InstructionVector

if TYPE_CHECKING:
    from peft import PeftConfig

    from ivlens.continual.plan import Plan

__all__ = ["collect", "run"]

DAYS = 24.0 * 30  # for which a process waits that has no stages left; in hours


def run(
    sequence: str | Iterable[Task] | Mapping[str, Task],
    *,
    folder: str | Path,
    methods: Sequence[str | Method] | Mapping[str, str | Method] = ("lora", "iv"),
    model: str | Path = "smollm2",
    general: Iterable[str] | Iterable[Task] | Mapping[str, Task] = (),
    seeds: Sequence[int] = (0,),
    steps: int = 100,
    batch_size: int = 8,
    learning_rate: float = 1e-4,
    lora: bool | PeftConfig = True,
    shots: int = 0,
    instruction: bool | str | int = True,
    style: str = "qa",
    dtype: str = "float32",
    save_every: int | None = 25,
    n_prompts: int = 100,
    split: str = "test",
    metric: str = "auto",
    general_shots: Sequence[int] = (0, 5),
    general_after: str = "every",
    heads_per_vector: int = 10,
    vector_shots: int = 5,
    similarity: bool = True,
    progress: bool = True,
    dry_run: bool = False,
    **arguments: Any,
) -> ContinualResults | Plan:
    """Fine-tune on tasks one after the other and score trained and general tasks after each (TRACE; FVG).

    Parameters
    ----------
    sequence
        Tasks in order, or the name of a recipe (see `ivlens.continual.RECIPES`; for one in a folder, `load_sequence`).
    folder
        Where every (method, seed, stage) is kept. Called again, an interrupted run goes on where it was, methods and seeds can
        be added, and nothing finished is repeated.
    methods
        Names in `ivlens.training.METHODS`, `Method`s, or a mapping of your labels to either.
    model
        A name or folder as for `load_model`; every stage begins with it.
    general
        Tasks that are not trained on: names of built-in tasks, or tasks (see `load_general`).
    seeds
        Each trains every method once, on the same examples.
    steps, batch_size, learning_rate, lora, dtype, save_every
        Of every stage; see `fine_tune`. Models are scored in the same dtype.
    shots, instruction, style
        How the prompts look; see `build_prompts`. Those of training and of trained tasks.
    n_prompts
        Prompts per task that are scored, the same for all models, with one wording and one set of demonstrations, which is
        read once. Fewer where the split has fewer.
    split
        `train`, `valid` or `test`: where the prompts' queries come from.
    metric, general_shots, general_after
        How answers are scored, and how and when general tasks are asked; see `Scoring`.
    heads_per_vector, vector_shots
        How many heads make a task's vector, and how many demonstrations it comes from (0: the instruction instead).
    similarity
        Follow the vectors of the sequence's tasks along it.
    progress
        Show a progress bar.
    dry_run
        Only say what is to be done and about how long it takes.
    arguments
        More of `transformers.TrainingArguments`, for every stage: `bf16=True`, `gradient_accumulation_steps=4`, …

    Raises
    ------
    ValueError
        If a method or task is unknown, a task both trained on and general, or the folder holds another experiment.
    """
    look = {"shots": shots, "instruction": instruction, "style": style, "general_shots": general_shots}
    training = {"steps": steps, "batch_size": batch_size, "learning_rate": learning_rate, "lora": lora, "dtype": dtype}
    scored = {"n_prompts": n_prompts, "split": split, "metric": metric, "general_after": general_after}
    kept = {"save_every": save_every, "similarity": similarity, "heads_per_vector": heads_per_vector}
    options = {**look, **training, **scored, **kept, "vector_shots": vector_shots, **arguments}
    about = {"folder": folder, "methods": methods, "model": model, "general": general, "seeds": seeds}
    what = experiment(sequence, **about, **options)
    if dry_run:
        from ivlens.continual.plan import plan

        return plan(what)
    on_main(what.settle, f"an experiment in {folder}", hours=DAYS)
    on_main(lambda: check_stages(what), "its stages")
    vectors: dict[str, InstructionVector] = {}
    if what.similarity or any(method.needs_vectors for method in what.methods.values()):
        from ivlens.continual.vectors import base_vectors

        vectors = base_vectors(what, progress=progress)
    if on_main(lambda: what.scores(what.folder / "base"), "scores of the base model") is None:
        found = scores(what, load_model(what.model, backend="bridge", dtype=what.dtype))
        what.keep_scores(what.folder / "base", {"scores": found})
    todo = on_main(lambda: [stop for stop in what.stops() if not what.done(stop)], "what is to be done")
    list(everyones(own_stages(what, todo, vectors, progress), "stages", hours=DAYS))
    return on_main(lambda: _whole(what), "results")


def _whole(what: Experiment) -> ContinualResults:
    """The results, which must all be there."""
    if missing := [str(stop) for stop in what.stops() if not what.done(stop)]:
        said = f"{what.folder} lacks what another process has just finished ({missing[0]})"
        raise FileNotFoundError(f"{said}; give a folder that all machines share")
    return _results(what)


def collect(
    sequence: str | Iterable[Task] | Mapping[str, Task],
    *,
    folder: str | Path,
    methods: Sequence[str | Method] | Mapping[str, str | Method] = ("lora", "iv"),
    model: str | Path = "smollm2",
    general: Iterable[str] | Iterable[Task] | Mapping[str, Task] = (),
    seeds: Sequence[int] = (0,),
    steps: int = 100,
    batch_size: int = 8,
    learning_rate: float = 1e-4,
    lora: bool | PeftConfig = True,
    shots: int = 0,
    instruction: bool | str | int = True,
    style: str = "qa",
    dtype: str = "float32",
    save_every: int | None = 25,
    n_prompts: int = 100,
    split: str = "test",
    metric: str = "auto",
    general_shots: Sequence[int] = (0, 5),
    general_after: str = "every",
    heads_per_vector: int = 10,
    vector_shots: int = 5,
    similarity: bool = True,
    **arguments: Any,
) -> ContinualResults:
    """The results of what `run` with the same options has finished so far; trains and scores nothing.

    Parameters
    ----------
    sequence, folder, methods, model, general, seeds
        As in `run`.
    steps, batch_size, learning_rate, lora, shots, instruction, style, dtype, save_every
        As in `run`.
    n_prompts, split, metric, general_shots, general_after, heads_per_vector, vector_shots, similarity, arguments
        As in `run`.

    Raises
    ------
    FileNotFoundError
        If the folder holds no scores with these options.
    """
    arguments.pop("progress", None)  # of `run`, whose call may be copied
    look = {"shots": shots, "instruction": instruction, "style": style, "general_shots": general_shots}
    training = {"steps": steps, "batch_size": batch_size, "learning_rate": learning_rate, "lora": lora, "dtype": dtype}
    scored = {"n_prompts": n_prompts, "split": split, "metric": metric, "general_after": general_after}
    kept = {"save_every": save_every, "similarity": similarity, "heads_per_vector": heads_per_vector}
    options = {**look, **training, **scored, **kept, "vector_shots": vector_shots, **arguments}
    about = {"folder": folder, "methods": methods, "model": model, "general": general, "seeds": seeds}
    what = experiment(sequence, **about, **options)
    if what.scores(what.folder / "base") is None:
        missing = f"{folder} holds no scores of the base model with these options"
        raise FileNotFoundError(f"{missing}; start ivl.continual.run first")
    what.settle()
    return _results(what)


def _results(what: Experiment) -> ContinualResults:
    """Of all stages that are scored."""
    rows, similarity, costs = [*_rows("base", 0, 0, what.scores(what.folder / "base"))], [], []
    for stop in what.stops():
        found = what.scores(stop.folder) if stop.trained else None
        if found is None:
            continue
        at = {"method": stop.label, "seed": stop.seed, "stage": stop.number}
        rows += _rows(*at.values(), found)
        similarity += [{**at, "task": t, "similarity": value} for t, value in found.get("similarity", {}).items()]
        costs.append({**at, **TrainingRun.load(stop.folder).cost})
    metadata = {"model": what.model, "sequence": what.sequence.names, "general": what.general.names}
    metadata["methods"] = {label: repr(method) for label, method in what.methods.items()}
    metadata |= {k: v if isinstance(v, (int, float, str, bool)) else repr(v) for k, v in what.training.items()}
    metadata |= {"n_prompts": what.scoring.n_prompts, "split": what.scoring.split}
    return ContinualResults(pd.DataFrame(rows), pd.DataFrame(similarity), pd.DataFrame(costs), metadata)


def _rows(method: str, seed: int, stage: int, found: Any) -> Iterator[dict[str, Any]]:
    for part in found["scores"]:
        about = {"method": method, "seed": seed, "stage": stage, **{k: part[k] for k in ("task", "kind", "shots")}}
        asked = part.get("queries", range(len(part["scores"])))  # older files have none
        for i, (query, score) in enumerate(zip(asked, part["scores"])):
            yield {**about, "prompt": i, "query": query, "score": score}

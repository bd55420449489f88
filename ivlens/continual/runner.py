"""`run`: tasks one after the other, by several methods and seeds; every stage kept, so that nothing is done twice."""

from __future__ import annotations

import inspect
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from tqdm.auto import tqdm
from transformers import TrainingArguments

from ivlens.continual.experiment import Experiment, Stop, experiment
from ivlens.continual.results import ContinualResults
from ivlens.continual.scoring import score_task, scored_prompts
from ivlens.models.adapters import check_stackable
from ivlens.models.backends import backend_of
from ivlens.models.checkpoints import checkpoints_in, open_checkpoints
from ivlens.models.hooking import tokenizing_backend
from ivlens.models.loading import load_hf, load_model
from ivlens.tasks.suite import as_suite
from ivlens.tasks.task import Task, same_input
from ivlens.training.data import rows_needed, training_rows
from ivlens.training.finetune import fine_tune
from ivlens.training.guidance import checked_guidance
from ivlens.training.hooks import TaskInjection
from ivlens.training.methods import Guided, Method
from ivlens.training.run import TrainingRun
from ivlens.vectors.vector import InstructionVector

if TYPE_CHECKING:
    from peft import PeftConfig

    from ivlens.continual.plan import Plan

__all__ = ["collect", "run"]


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
    what.settle()
    _check_stages(what)
    vectors: dict[str, InstructionVector] = {}
    if what.similarity or any(method.needs_vectors for method in what.methods.values()):
        from ivlens.continual.vectors import base_vectors

        vectors = base_vectors(what, progress=progress)
    if what.scores(what.folder / "base") is None:
        found = _scores(what, load_model(what.model, backend="bridge", dtype=what.dtype))
        what.keep_scores(what.folder / "base", {"scores": found})
    previous: TrainingRun | None = None
    with tqdm(total=len(list(what.stops())), desc="stages", disable=not progress) as bar:
        for stop in what.stops():
            bar.set_postfix_str(str(stop))
            if stop.trained and what.scores(stop.folder) is not None:
                previous = TrainingRun.load(stop.folder)
            else:
                previous = _train(what, stop, vectors, None if stop.number == 1 else previous, progress)
                _score(what, stop, previous, vectors)
            bar.update()
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


def _check_stages(what: Experiment) -> None:
    """Raise now what would only be raised in a later stage, of training arguments, adapters, layers and rows."""
    waiting = [(stop.task, stop.seed) for stop in what.stops() if not stop.trained]
    if not waiting:
        return
    own = inspect.signature(experiment).parameters
    TrainingArguments(str(what.folder), use_cpu=True, **{k: v for k, v in what.training.items() if k not in own})
    loaded = load_hf(what.model, dtype=what.dtype)
    backend = tokenizing_backend(*loaded)
    for method in what.methods.values():
        if method.fresh and what.training["lora"] is not True:
            check_stackable(what.training["lora"])
        for part in (part for part in method.parts if isinstance(part, Guided)):
            TaskInjection.of(None, (), checked_guidance(part.guidance, {}, part.keep_teacher), loaded[0].config)
    shots = max(method.teacher_shots for method in what.methods.values())
    n = rows_needed(what.training["steps"], what.training["batch_size"], what.training)
    look = {name: what.training[name] for name in ("shots", "instruction", "style")}
    for task, seed in dict.fromkeys(waiting):
        training_rows(backend, as_suite(what.sequence[task]), n, {**look, "seed": seed}, teacher_shots=shots)


def _train(
    what: Experiment, stop: Stop, vectors: dict[str, InstructionVector], previous: TrainingRun | None, progress: bool
) -> TrainingRun:
    # Rows of earlier tasks have their own tasks' vectors.
    tasks = list(what.sequence)[: stop.number] if "rows" in stop.method.changes else [stop.task]
    guide = {task: vectors[task] for task in tasks} if stop.method.needs_vectors else None
    options = {"folder": stop.folder, "method": stop.method, "seed": stop.seed, "progress": progress, **what.training}
    done = fine_tune(what.model, what.sequence[stop.task], vectors=guide, previous=previous, **options)
    # These were for going on after an interruption.
    for checkpoint in checkpoints_in(stop.folder):
        shutil.rmtree(checkpoint)
    for kept in stop.folder.glob("teacher-*.safetensors"):
        kept.unlink()
    return done


def _score(what: Experiment, stop: Stop, trained: TrainingRun, vectors: dict[str, InstructionVector]) -> None:
    checkpoint = open_checkpoints(what.model, [trained.final], dtype=what.dtype)[0][1]
    with checkpoint.use() as model:
        general = what.scoring.general_after == "every" or stop.number == len(what.sequence)
        found: dict[str, Any] = {"scores": _scores(what, model, general)}
        if what.similarity:
            from ivlens.continual.vectors import similarities

            found["similarity"] = similarities(model, what, vectors)
    what.keep_scores(stop.folder, found)


def _scores(what: Experiment, model: Any, general: bool = True) -> list[dict[str, Any]]:
    backend, found = backend_of(model), []
    for kind, task, look in (x for x in what.looks() if general or x[0] == "trained"):
        prompts = scored_prompts(task, what.scoring, **look)
        values, asked = score_task(backend, task, prompts, what.scoring), [same_input(p.query) for p in prompts]
        found.append({"task": task.name, "kind": kind, "shots": look["shots"], "scores": values, "queries": asked})
    return found


def _results(what: Experiment) -> ContinualResults:
    """Of all stages that are scored."""
    scores, similarity, costs = [*_rows("base", 0, 0, what.scores(what.folder / "base"))], [], []
    for stop in what.stops():
        found = what.scores(stop.folder) if stop.trained else None
        if found is None:
            continue
        at = {"method": stop.label, "seed": stop.seed, "stage": stop.number}
        scores += _rows(*at.values(), found)
        similarity += [{**at, "task": t, "similarity": value} for t, value in found.get("similarity", {}).items()]
        costs.append({**at, **TrainingRun.load(stop.folder).cost})
    metadata = {"model": what.model, "sequence": what.sequence.names, "general": what.general.names}
    metadata["methods"] = {label: repr(method) for label, method in what.methods.items()}
    metadata |= {k: v if isinstance(v, (int, float, str, bool)) else repr(v) for k, v in what.training.items()}
    metadata |= {"n_prompts": what.scoring.n_prompts, "split": what.scoring.split}
    return ContinualResults(pd.DataFrame(scores), pd.DataFrame(similarity), pd.DataFrame(costs), metadata)


def _rows(method: str, seed: int, stage: int, found: Any) -> Iterator[dict[str, Any]]:
    for part in found["scores"]:
        about = {"method": method, "seed": seed, "stage": stage, **{k: part[k] for k in ("task", "kind", "shots")}}
        asked = part.get("queries", range(len(part["scores"])))  # older files have none
        for i, (query, score) in enumerate(zip(asked, part["scores"])):
            yield {**about, "prompt": i, "query": query, "score": score}

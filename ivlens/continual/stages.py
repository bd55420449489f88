"""One stage after the other: trained and scored, each method and seed in one process from its first stage on."""

from __future__ import annotations

import inspect
import shutil
from collections.abc import Iterator, Sequence
from typing import Any

from tqdm.auto import tqdm
from transformers import TrainingArguments

from ivlens.common.processes import alone, here, hidden
from ivlens.continual.experiment import Experiment, Stop, experiment
from ivlens.continual.scoring import score_task, scored_prompts
from ivlens.models.adapters import check_stackable
from ivlens.models.backends import backend_of
from ivlens.models.checkpoints import checkpoints_in, open_checkpoints
from ivlens.models.hooking import tokenizing_backend
from ivlens.models.loading import load_hf
from ivlens.tasks.suite import as_suite
from ivlens.tasks.task import same_input
from ivlens.training.data import rows_needed, training_rows
from ivlens.training.finetune import fine_tune
from ivlens.training.guidance import checked_guidance
from ivlens.training.hooks import TaskInjection
from ivlens.training.methods import Guided
from ivlens.training.run import TrainingRun
from ivlens.vectors.vector import InstructionVector

__all__ = ["check_stages", "own_stages", "scores"]


@alone()
def check_stages(what: Experiment) -> None:
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


def own_stages(
    what: Experiment, todo: Sequence[Stop], vectors: dict[str, InstructionVector], progress: bool
) -> Iterator[None]:
    """Those that aren't done, and of several processes this one's: each method and seed is one process's, from its first stage on."""
    index, count = here()
    chains = list(dict.fromkeys((stop.label, stop.seed) for stop in todo))[index::count]
    stops = [stop for stop in what.stops() if (stop.label, stop.seed) in chains]
    n, previous, shown = len(list(what.stops())), None, not hidden(progress)
    with alone(), tqdm(total=n, initial=n - len(stops), desc="stages", disable=not shown) as bar:
        for stop in stops:
            bar.set_postfix_str(str(stop))
            if what.done(stop):
                previous = TrainingRun.load(stop.folder)
            else:
                previous = _train(what, stop, vectors, None if stop.number == 1 else previous, shown)
                _score(what, stop, previous, vectors)
            bar.update()
    yield


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
        found: dict[str, Any] = {"scores": scores(what, model, general)}
        if what.similarity:
            from ivlens.continual.vectors import similarities

            found["similarity"] = similarities(model, what, vectors)
    what.keep_scores(stop.folder, found)


def scores(what: Experiment, model: Any, general: bool = True) -> list[dict[str, Any]]:
    backend, found = backend_of(model), []
    for kind, task, look in (x for x in what.looks() if general or x[0] == "trained"):
        prompts = scored_prompts(task, what.scoring, **look)
        values, asked = score_task(backend, task, prompts, what.scoring), [same_input(p.query) for p in prompts]
        found.append({"task": task.name, "kind": kind, "shots": look["shots"], "scores": values, "queries": asked})
    return found

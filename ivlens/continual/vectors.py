"""The vectors that guide training and are followed along a sequence: all from the base model, before any of it."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ivlens.common.processes import on_main
from ivlens.common.storage import safe_name
from ivlens.continual.experiment import Experiment
from ivlens.models.loading import load_model
from ivlens.patching.locating import locate_heads
from ivlens.steering.tuning import tune_injection
from ivlens.training.methods import Guided
from ivlens.vectors.extraction import extract_vector
from ivlens.vectors.files import FILE
from ivlens.vectors.vector import InstructionVector

__all__ = ["base_vectors", "similarities"]

WEAK = 0.75  # a teacher that answers less than this held back each of five tasks (docs/findings.md)


def base_vectors(experiment: Experiment, *, progress: bool) -> dict[str, InstructionVector]:
    """The vector of every task of the sequence, with the layer and scale that are best on the validation split.

    Heads: those with the highest effects over all tasks together, from training splits (IV §3). Layer and scale: the base
    model's accuracy on prompts as they are trained on (our choice). Each is kept in the experiment's folder once it is done.
    """
    folder = experiment.folder / "vectors"
    names = list(experiment.sequence)
    missing = on_main(lambda: [x for x in names if not (folder / safe_name(x) / FILE).is_file()], "vectors there are")
    if missing:
        _make(experiment, missing, folder, progress)
    vectors = on_main(lambda: {x: InstructionVector.load(folder / safe_name(x)) for x in names}, "vectors")
    weak = [name for name, vector in vectors.items() if vector.metadata.get("accuracy", 1.0) < WEAK]
    if weak and any(isinstance(p, Guided) for method in experiment.methods.values() for p in method.parts):
        does = "; ".join(vectors[name].metadata["search"] for name in weak)
        weakly = f"with its vector in it, the model still answers little of {', '.join(weak)} ({does})"
        why = "A teacher that can't do the task holds training back"
        advice = "compare `lora` and `averaging`, or look for a better vector (other heads, demonstrations)"
        warnings.warn(f"{weakly}. {why}: {advice}", stacklevel=3)
    return vectors


def _make(experiment: Experiment, names: Sequence[str], folder: Path, progress: bool) -> None:
    """Those of these tasks."""
    model, look = load_model(experiment.model, backend="bridge", dtype=experiment.dtype), _look(experiment)
    kind = "shuffled_labels" if look["shots"] >= 2 else "no_instruction"
    options = {"counterfactual": kind, "folder": folder / "partial", "progress": progress, **look}
    effects = locate_heads(model, experiment.sequence, n_prompts=20, **options)  # from its folder, where it was done
    effects.save(folder / "effects.safetensors")
    heads = effects.top(experiment.heads_per_vector)
    asked = {key: experiment.training[key] for key in ("shots", "instruction", "style")}
    for name in names:
        task = experiment.sequence[name]
        vector = extract_vector(model, task, heads, n_prompts=30, **look)
        search = tune_injection(model, task, vector, n_prompts=min(20, len(task.valid)), progress=False, **asked)
        best = search.best
        replace(best, metadata={**best.metadata, "search": repr(search)}).save(folder / safe_name(name))


def similarities(model: Any, experiment: Experiment, vectors: dict[str, InstructionVector]) -> dict[str, float]:
    """Cosine of each task's vector in this model with the base model's, over the same heads and prompts."""
    found = {}
    for name, vector in vectors.items():
        task = experiment.sequence[name]
        found[name] = vector.cosine(extract_vector(model, task, vector.heads, n_prompts=30, **_look(experiment)))
    return found


def _look(experiment: Experiment) -> dict[str, Any]:
    shots = experiment.vector_shots
    return {"shots": shots, "instruction": shots == 0, "style": experiment.training["style"], "seed": 0}

"""The vectors that guide training and are followed along a sequence: all from the base model, before any of it."""

from __future__ import annotations

from typing import Any

from ivlens.continual.experiment import Experiment
from ivlens.extraction import extract_vector
from ivlens.patching.heads import locate_heads
from ivlens.storage import read_json, write_json
from ivlens.tuning import tune_injection
from ivlens.vectors import InstructionVector

__all__ = ["base_vectors", "similarities"]

KIND = "vectors of the base model"


def base_vectors(model: Any, experiment: Experiment, *, progress: bool) -> dict[str, InstructionVector]:
    """The vector of every task of the sequence, with the layer and scale that are best on the validation split.

    Heads: those with the highest effects over all tasks together, from training splits (IV §3). Layer and scale: the base
    model's accuracy on prompts as they are trained on (our choice). Kept in the experiment's folder.
    """
    folder = experiment.folder / "vectors"
    about = folder / "about.json"
    if about.is_file() and read_json(about, KIND)["tasks"] == experiment.sequence.names:
        return {name: InstructionVector.load(folder / name) for name in experiment.sequence}
    look = _look(experiment)
    kind = "shuffled_labels" if look["shots"] >= 2 else "no_instruction"
    effects = locate_heads(
        model,
        experiment.sequence,
        n_prompts=20,
        counterfactual=kind,
        folder=folder / "partial",
        progress=progress,
        **look,
    )
    effects.save(folder / "effects.safetensors")
    heads = effects.top(experiment.heads_per_vector)
    vectors, found = {}, {}
    asked = {key: experiment.training[key] for key in ("shots", "instruction", "style")}
    for name, task in experiment.sequence.items():
        vector = extract_vector(model, task, heads, n_prompts=30, **look)
        search = tune_injection(model, task, vector, n_prompts=min(20, len(task.valid)), **asked)
        vectors[name], found[name] = search.best, repr(search)
        vectors[name].save(folder / name)
    write_json(about, KIND, {"tasks": experiment.sequence.names, "heads": [str(h) for h in heads], "search": found})
    return vectors


def similarities(model: Any, experiment: Experiment, vectors: dict[str, InstructionVector]) -> dict[str, float]:
    """Cosine of each task's vector in this model with the base model's, over the same heads and prompts."""
    return {
        name: vector.cosine(
            extract_vector(model, experiment.sequence[name], vector.heads, n_prompts=30, **_look(experiment))
        )
        for name, vector in vectors.items()
    }


def _look(experiment: Experiment) -> dict[str, Any]:
    shots = experiment.vector_shots
    return {"shots": shots, "instruction": shots == 0, "style": experiment.training["style"], "seed": 0}

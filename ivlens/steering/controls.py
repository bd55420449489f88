"""What a vector is compared with: random vectors, random heads, another task's vector."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from ivlens.models.backends import backend_of
from ivlens.models.head import Head
from ivlens.tasks.task import Task
from ivlens.vectors.extraction import extract_vector
from ivlens.vectors.vector import InstructionVector

__all__ = ["CONTROLS", "random_vector", "with_controls"]

CONTROLS = ("random vector", "random heads", "other task")


def random_vector(like: InstructionVector, *, seed: int = 0) -> InstructionVector:
    """A control: a random direction of the same norm, at the same layer and scale."""
    noise = torch.randn(like.d_model, generator=torch.Generator().manual_seed(seed))
    metadata = {k: like.metadata[k] for k in ("model", "signature") if k in like.metadata}
    return InstructionVector(
        noise / noise.norm() * like.norm(),
        layer=like.layer,
        scale=like.scale,
        metadata={**metadata, "task": f"random vector {seed}"},
    )


def with_controls(
    model: Any, task: Task, vectors: Mapping[str, InstructionVector], controls: Sequence[str], seed: int
) -> dict[str, InstructionVector]:
    """The task's vector and its controls, all with its layer and scale."""
    vector = vectors[task.name]
    out = {"vector": vector}
    if "random vector" in controls:
        out["random vector"] = random_vector(vector, seed=seed)
    if "random heads" in controls and vector.heads:
        out["random heads"] = replace(_random_heads(model, task, vector, seed), layer=vector.layer, scale=vector.scale)
    names = list(vectors)
    other = vectors[names[(names.index(task.name) + 1) % len(names)]]
    if "other task" in controls and other is not vector:
        out["other task"] = replace(other, layer=vector.layer, scale=vector.scale)
    return out


def _random_heads(model: Any, task: Task, vector: InstructionVector, seed: int) -> InstructionVector:
    """As many heads that aren't the vector's, their shares taken from prompts like those behind the vector."""
    backend = backend_of(model)
    rest = [Head(layer, h) for layer in range(backend.n_layers) for h in range(backend.n_heads)]
    rest = [head for head in rest if head not in vector.heads]
    heads = random.Random(f"{seed}/{task.name}").sample(rest, min(len(vector.heads), len(rest)))
    options = {k: vector.metadata[k] for k in ("shots", "instruction", "style") if k in vector.metadata}
    return extract_vector(model, task, heads, n_prompts=20, seed=seed, **options)

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

LIKEWISE = ("model", "signature", "unit", "positions", "how", "projections")  # what a random vector has of its model's
HOW = ("positions", "how")
CONTROLS = ("random vector", "random heads", "other task")


def random_vector(
    like: InstructionVector, *, seed: int = 0, draw: int = 0, by_heads: bool = False
) -> InstructionVector:
    """A control: a random direction of the same norm, at the same layer and scale; another one for every task and draw.

    Parameters
    ----------
    by_heads
        A random direction for each head instead, of its share's norm: the control of `mode="heads"`.
    """
    generator = torch.Generator().manual_seed(random.Random(f"{seed}/{like.name}/{draw}").getrandbits(63))
    rows = like.shares if by_heads else like.vector[None]
    noise = torch.randn(rows.shape, generator=generator).to(rows)
    noise *= rows.norm(dim=-1, keepdim=True) / noise.norm(dim=-1, keepdim=True)
    about = {k: like.metadata[k] for k in LIKEWISE if k in like.metadata}
    about["task"] = f"random vector {seed}/{draw}"
    heads, shares = (like.heads, noise) if by_heads else ((), None)
    return InstructionVector(noise.sum(0), heads, shares, layer=like.layer, scale=like.scale, metadata=about)


def with_controls(
    model: Any,
    task: Task,
    vectors: Mapping[str, InstructionVector],
    controls: Sequence[str],
    *,
    mode: str = "sum",
    draws: int = 1,
    seed: int = 0,
) -> dict[str, list[InstructionVector]]:
    """The task's vector and its controls, all with its layer and scale; of those that are random so many draws."""
    vector = vectors[task.name]
    out = {"vector": [vector]}
    if "random vector" in controls:
        by_heads = mode == "heads"
        out["random vector"] = [random_vector(vector, seed=seed, draw=i, by_heads=by_heads) for i in range(draws)]
    if "random heads" in controls and vector.heads:
        drawn = [_random_heads(model, task, vector, f"{seed}/{task.name}" + f"/{i}" * (i > 0)) for i in range(draws)]
        out["random heads"] = [_as(vector, each) for each in drawn]
    names = list(vectors)
    other = vectors[names[(names.index(task.name) + 1) % len(names)]]
    if "other task" in controls and other is not vector and (mode == "sum" or other.heads):
        out["other task"] = [_as(vector, other)]
    return out


def _as(vector: InstructionVector, other: InstructionVector) -> InstructionVector:
    """Another one injected where, how strongly and how this one is."""
    about = {k: v for k, v in other.metadata.items() if k not in HOW}
    about |= {k: vector.metadata[k] for k in HOW if k in vector.metadata}
    return replace(other, layer=vector.layer, scale=vector.scale, metadata=about)


def _random_heads(model: Any, task: Task, vector: InstructionVector, seed: str) -> InstructionVector:
    """As many heads that aren't the vector's, their shares taken from prompts like those behind the vector."""
    backend = backend_of(model)
    rest = [Head(layer, h) for layer in range(backend.n_layers) for h in range(backend.n_heads)]
    rest = [head for head in rest if head not in vector.heads]
    heads = random.Random(seed).sample(rest, min(len(vector.heads), len(rest)))
    look = ("shots", "instruction", "style", "template", "way")
    options = {"shots": 0, "instruction": True} if task.is_checked else {}
    options |= {k: vector.metadata[k] for k in look if k in vector.metadata}
    return extract_vector(model, task, heads, n_prompts=20, seed=int(seed.split("/")[0]), **options)

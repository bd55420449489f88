"""Whether a skill is still there: the base model's vector found, and tried in both models."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ivlens.dynamics.skills import Sizes
from ivlens.models.backends import backend_of
from ivlens.models.head import Head
from ivlens.patching.locating import locate_heads
from ivlens.running.decoding import choice_hits, complete
from ivlens.running.injection import Injection
from ivlens.running.positions import injected
from ivlens.running.scores import exact_match
from ivlens.running.tokens import TokenizedPrompt, room_for, tokenize
from ivlens.steering.tuning import tune_injection
from ivlens.tasks.checks import passes
from ivlens.tasks.prompts import Prompt, common_stop
from ivlens.tasks.suite import TaskSuite
from ivlens.tasks.task import Task
from ivlens.vectors.extraction import extract_vector
from ivlens.vectors.vector import InstructionVector

__all__ = ["find_heads", "find_vector", "hits", "put_back", "shares", "still_written"]

SCALES, SCALES_BESIDE = (0.5, 1.0, 2.0, 4.0), (0.25, 0.5, 1.0, 2.0)  # alone, and beside demonstrations
DEPTHS = (0.6, 0.75, 0.87)  # where vectors of free answers are tried
N_HEADS = 10
Answers = dict[str, dict[str, list[Any]]]  # by what is added: `hit` and `text` of every prompt


def hits(
    model: Any, prompts: Sequence[Prompt], tries: Mapping[str, InstructionVector | None], max_new_tokens: int = 40
) -> Answers:
    """Greedy answers under every vector (None for none), and whether they are right. Prompts of like demonstrations stand together."""
    backend = backend_of(model)
    injections = {name: None if v is None else Injection.of(backend, v) for name, v in tries.items()}
    found: Answers = {name: {"hit": [], "text": []} for name in tries}
    for _, group in groupby(prompts, key=lambda prompt: prompt.demonstrations):
        some = list(group)
        if all(prompt.query.choices for prompt in some):
            for name, injection in injections.items():
                with nullcontext() if injection is None else injected(model, injection):
                    found[name]["hit"] += choice_hits(backend, some)
                found[name]["text"] += [""] * len(some)
            continue
        rows, free = tokenize(backend, some), any(prompt.query.check for prompt in some)
        room = max_new_tokens if free else room_for(backend, some, rows)
        bare = [TokenizedPrompt(row.prompt) for row in rows]
        done = complete(backend, bare, injections, max_new_tokens=room, stop=common_stop(some))
        for name, result in done.items():
            for prompt, text in zip(some, result.texts):
                query = prompt.query
                right = (
                    passes(query.check, text.strip())
                    if query.check
                    else exact_match(backend.tokenizer, text, query.answers)
                )
                found[name]["hit"].append(float(right))
                found[name]["text"].append(text.strip())
    return found


def find_heads(model: Any, suite: TaskSuite, look: Mapping[str, Any], sizes: Sizes, folder: Path | None) -> list[Head]:
    """The ten heads that carry these tasks on average (universal heads of IV §3)."""
    kind = "shuffled_labels" if look["shots"] >= 2 else "no_instruction"
    amounts = {"n_prompts": max(sizes.sweep // len(suite), 2), "n_mean": sizes.mean, "counterfactual": kind}
    return locate_heads(model, suite, **amounts, folder=folder, progress=False, **look).top(N_HEADS)


def find_vector(
    model: Any, task: Task, heads: Sequence[Head], look: Mapping[str, Any], sizes: Sizes
) -> InstructionVector:
    """The task's vector, where it works best on validation prompts that ask for nothing.

    Of free answers the difference of residual streams, told minus untold, at one of three layers (our choice: no heads have to be
    located, and it is as good).
    """
    amounts = {"n_prompts": sizes.mean, **look}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a vector that does nothing shows in its verdict
        if task.is_checked:
            n = backend_of(model).n_layers
            layers = sorted({min(round(depth * n), n - 1) for depth in DEPTHS})
            tries = [extract_vector(model, task, way="residual", layer=layer, **amounts) for layer in layers]
            asked = {
                "style": look["style"],
                "instruction": look["instruction"],
                "seed": look["seed"],
                "progress": False,
            }
            return tune_injection(
                model, task, tries, n_prompts=sizes.valid_free, max_new_tokens=sizes.length, **asked
            ).best
        vector = extract_vector(model, task, heads, **amounts)
        return _placed(model, task, vector, sizes, {**look, "shots": 0, "instruction": False}, SCALES)


def put_back(
    model: Any, task: Task, vector: InstructionVector, look: Mapping[str, Any], sizes: Sizes
) -> InstructionVector:
    """The vector where it works best on validation prompts that ask; of free answers, where it is."""
    return vector if task.is_checked else _placed(model, task, vector, sizes, look, SCALES_BESIDE)


def _placed(
    model: Any, task: Task, vector: InstructionVector, sizes: Sizes, look: Mapping[str, Any], scales: Sequence[float]
) -> InstructionVector:
    layers = range(1, backend_of(model).n_layers, 3)
    n = min(sizes.valid, len(task.valid))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return tune_injection(
            model, task, vector, layers=layers, scales=scales, n_prompts=n, progress=False, **look
        ).best


def shares(
    model: Any, task: Task, vector: InstructionVector, look: Mapping[str, Any], sizes: Sizes, *, own: bool = False
) -> tuple[tuple[Head, ...], Tensor]:
    """Every head's part in the vector, [head d_model]: of the vector's own heads, or, where it has none, of all up to its layer, as the
    difference that being told makes. `own`: the vector is this model's."""
    if own and vector.heads:
        return vector.heads, vector.shares
    amounts = {"n_prompts": sizes.mean, **look}
    heads, way = vector.heads, "heads"
    if not heads:
        heads = [Head(layer, h) for layer in range(vector.layer + 1) for h in range(backend_of(model).n_heads)]
        way = "difference"
    found = extract_vector(model, task, heads, way=way, **amounts)
    return found.heads, found.shares


def still_written(
    vector: InstructionVector, heads: Sequence[Head], before: Tensor, after: Tensor
) -> list[dict[str, Any]]:
    """Of the ten heads that write most along the vector in the base model, the share ⟨after, before⟩ / ⟨before, before⟩ of their old
    output that they still write."""
    along = before @ vector.vector.to(before)
    top = torch.topk(along, min(N_HEADS, len(heads))).indices.tolist()
    still = ((after * before).sum(-1) / before.square().sum(-1)).tolist()
    return [{"head": str(heads[i]), "written": still[i]} for i in top]

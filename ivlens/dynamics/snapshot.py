"""One checkpoint seen through the instruction vectors: its own, how its residual streams lie to the base's, and its answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from ivlens.common.storage import read_tensors, write_tensors
from ivlens.common.tables import table_html
from ivlens.models.backend import Backend
from ivlens.models.backends import backend_of
from ivlens.models.head import Head
from ivlens.patching.effects import HeadEffects
from ivlens.patching.heads import head_means
from ivlens.running.reading import SCORES, read_batches
from ivlens.running.tokens import TokenizedPrompt
from ivlens.vectors.extraction import vector_from_heads
from ivlens.vectors.vector import InstructionVector

__all__ = ["Snapshot", "TaskPrompts", "take_snapshot"]

KIND = "snapshot"
MEASURED = ("hidden", "accuracy", "log_probability")


@dataclass(frozen=True)
class TaskPrompts:
    """What every checkpoint is shown of a task: prompts behind the vector (training split), and prompts to answer."""

    mean: list[TokenizedPrompt]
    answered: list[TokenizedPrompt]  # these alone have their answers


@dataclass(frozen=True)
class Snapshot:
    """A checkpoint's instruction vectors and answers, by task.

    Attributes
    ----------
    vectors
        θ of each task, over the same heads at every checkpoint.
    hidden
        Hidden-to-IV similarity: cosine of the residual stream after each layer with the base's θ, at the last prompt token,
        mean over the answered prompts, [layer].
    accuracy, log_probability
        Of the whole answer, teacher-forced, [prompt].
    distance
        Euclidean distance of the weights from the base's.
    effects
        Indirect effects of all heads, where they were located.
    """

    label: str
    step: int | None
    vectors: dict[str, InstructionVector]
    hidden: dict[str, Float[Tensor, " layer"]]
    accuracy: dict[str, Float[Tensor, " prompt"]]
    log_probability: dict[str, Float[Tensor, " prompt"]]
    distance: float = 0.0
    effects: HeadEffects | None = field(default=None, compare=False)

    @property
    def task_names(self) -> list[str]:
        return list(self.vectors)

    def save(self, path: str | Path) -> Path:
        """Save to one `.safetensors` file."""
        tensors: dict[str, Tensor] = {}
        for task, vector in self.vectors.items():
            tensors[f"{task}/shares"] = vector.shares
            for name in MEASURED:
                tensors[f"{task}/{name}"] = getattr(self, name)[task]
        about: dict[str, Any] = {"kind": KIND, "label": self.label, "step": self.step, "distance": self.distance}
        about |= {"tasks": self.task_names, "vectors": {task: v.metadata for task, v in self.vectors.items()}}
        about["heads"] = [list(h) for h in next(iter(self.vectors.values())).heads]
        if (e := self.effects) is not None:
            tensors |= {"effects/values": e.values, "effects/baseline": e.baseline}
            about["effects"] = [list(e.tasks), e.metric, e.metadata, list(e.queries)]
        return write_tensors(path, tensors, about)

    @classmethod
    def load(cls, path: str | Path) -> Snapshot:
        """Load what `save` wrote."""
        tensors, about = read_tensors(path, kind=KIND)
        heads = tuple(Head(*h) for h in about["heads"])
        parts: dict[str, Any] = {name: {t: tensors[f"{t}/{name}"] for t in about["tasks"]} for name in MEASURED}
        vectors = {}
        for task in about["tasks"]:
            shares = tensors[f"{task}/shares"]
            vectors[task] = InstructionVector(shares.sum(0), heads, shares, metadata=about["vectors"][task])
        effects = None
        if "effects" in about:
            tasks, metric, metadata, *queries = about["effects"]  # older files have no queries
            rest = tuple(tasks), metric, metadata, *map(tuple, queries)
            effects = HeadEffects(tensors["effects/values"], tensors["effects/baseline"], *rest)
        return cls(about["label"], about["step"], vectors, distance=about["distance"], effects=effects, **parts)

    def __repr__(self) -> str:
        return f"Snapshot({self.label}, tasks {', '.join(self.task_names)})"

    def _repr_html_(self) -> str:
        rows = [
            {"task": task, **{name: getattr(self, name)[task].mean().item() for name in MEASURED}}
            for task in self.task_names
        ]
        return table_html(pd.DataFrame(rows).round(4), title=repr(self), index=False)


def take_snapshot(
    model: Any,
    prompts: Mapping[str, TaskPrompts],
    heads: Sequence[Head],
    *,
    label: str,
    step: int | None = None,
    base: Snapshot | None = None,
    distance: float = 0.0,
    effects: HeadEffects | None = None,
    batch_size: int | None = None,
    bar: tqdm | None = None,
) -> Snapshot:
    """One forward pass of every prompt, from which everything is read.

    The residual streams are compared with the vectors of `base`; None: this model's own.
    """
    backend = backend_of(model)
    found: dict[str, dict[str, Any]] = {name: {} for name in ("vectors", "hidden", "accuracy", "log_probability")}
    for task, shown in prompts.items():
        means = head_means(backend, shown.mean, batch_size=batch_size, bar=bar)
        vector = vector_from_heads(model, means, heads, task=task, n_prompts=len(shown.mean))
        found["vectors"][task] = vector
        old = vector.vector if base is None else base.vectors[task].vector
        hidden, scores = _answered(backend, shown.answered, old, batch_size, bar)
        found["hidden"][task] = hidden
        found["accuracy"][task], found["log_probability"][task] = scores
    return Snapshot(label, step, **found, distance=distance, effects=effects)


def _answered(
    backend: Backend, rows: Sequence[TokenizedPrompt], old: Tensor, batch_size: int | None, bar: tqdm | None
) -> tuple[Float[Tensor, " layer"], Float[Tensor, "score prompt"]]:
    """Mean cosine of the residual streams with the old vector, and every prompt's accuracy and log-probability."""

    def compared(read: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        cosines = torch.nn.functional.cosine_similarity(read["resid"], old.to(read["resid"]), dim=-1)
        return cosines.double().sum(0), torch.stack([read[name] for name in SCORES])

    total, scores = torch.zeros(backend.n_layers, dtype=torch.double), torch.empty(len(SCORES), len(rows))
    for index, (cosines, some) in read_batches(backend, rows, compared, resid=True, batch_size=batch_size, bar=bar):
        total += cosines
        scores[:, index] = some
    return (total / len(rows)).float(), scores

"""Elastic weight consolidation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ivlens.common.storage import read_tensors, write_tensors
from ivlens.training.losses import lm_loss
from ivlens.training.methods.method import Method
from ivlens.training.methods.stage import Stage, sample_rows, trained_weights

__all__ = ["EWC", "fisher_information"]

KIND, FILE = "fisher information", "fisher.safetensors"


@dataclass(frozen=True)
class EWC(Method):
    """Elastic weight consolidation, online: λ/2 · Σ F (w − w*)² (arXiv 1612.00796; one running F as in arXiv 1805.06370).

    F is the Fisher information of the weights in training, summed over the stages so far; w* are the weights after the last
    of them. The first stage has nothing to hold on to.

    Attributes
    ----------
    strength
        λ.
    n_examples
        Training examples that a stage's Fisher information is estimated from, of every task of the stage.
    """

    changes: ClassVar[frozenset[str]] = frozenset({"penalty", "same adapter"})
    keeps: ClassVar[bool] = True
    strength: float = 1e4
    n_examples: int = 64

    def __post_init__(self) -> None:
        if self.strength < 0 or self.n_examples < 1:
            raise ValueError(f"strength={self.strength} must be 0 or more, and n_examples={self.n_examples} at least 1")

    def penalty(self, stage: Stage) -> Callable[[], Tensor] | None:
        path = stage.remembered(FILE)
        if path is None:
            return None
        kept, _ = read_tensors(path, kind=KIND)
        weights = trained_weights(stage.model)
        fisher = {name: kept[f"fisher/{name}"].to(weight.device) for name, weight in weights.items()}
        before = {name: kept[f"weight/{name}"].to(weight.device) for name, weight in weights.items()}

        def penalty() -> Tensor:
            parts = [(fisher[name] * (weight - before[name]).square()).sum() for name, weight in weights.items()]
            return self.strength / 2 * torch.stack(parts).sum()

        return penalty

    def finish(self, stage: Stage) -> None:
        fisher = fisher_information(stage.model, sample_rows(stage.dataset, self.n_examples, stage.seed))
        if (path := stage.remembered(FILE)) is not None:
            kept, _ = read_tensors(path, kind=KIND)
            fisher = {name: value + kept[f"fisher/{name}"] for name, value in fisher.items()}
        weights = {f"weight/{name}": weight for name, weight in trained_weights(stage.model).items()}
        write_tensors(stage.memory(FILE), {f"fisher/{k}": v for k, v in fisher.items()} | weights, {"kind": KIND})


def fisher_information(model: Any, rows: Any) -> dict[str, Tensor]:
    """Diagonal of the empirical Fisher information: mean over examples of the squared gradient of log P(answer | prompt)."""
    weights = trained_weights(model)
    total = {name: torch.zeros_like(weight, device="cpu", dtype=torch.float32) for name, weight in weights.items()}
    training = model.training
    model.eval()
    try:
        for row in rows:
            tokens, labels = (torch.tensor([row[key]], device=model.device) for key in ("input_ids", "labels"))
            # The sum over the answer's tokens, not their mean: the whole answer is one observation.
            loss = lm_loss(model(input_ids=tokens).logits, labels, count=1)
            for value, gradient in zip(total.values(), torch.autograd.grad(loss, list(weights.values()))):
                value += gradient.float().square().cpu()
    finally:
        model.train(training)
    return {name: value / len(rows) for name, value in total.items()}

"""Plain fine-tuning whose model computes logits only where an answer is predicted: a large vocabulary costs time, and more memory."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor
from transformers import Trainer

from ivlens.training.losses import answer_loss, answer_positions
from ivlens.training.sharding import learns_prompts

__all__ = ["AnswerTrainer"]


class AnswerTrainer(Trainer):
    """A `transformers.Trainer` with the same loss, to rounding; for models that take `logits_to_keep`, others are trained as ever.

    So are those whose loss is more than the answers' cross-entropy (label smoothing, experts' balance), adapters that put tokens of
    their own before a row, and rows that one process spreads over several GPUs.
    """

    def __init__(self, model: Any, **arguments: Any):
        super().__init__(model, **arguments)
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        configs = (inner.config, inner.config.get_text_config())
        balanced = any(getattr(config, "output_router_logits", False) for config in configs)
        simple = self.label_smoother is None and not balanced
        takes = "logits_to_keep" in inspect.signature(inner.forward).parameters and not learns_prompts(model)
        if takes and simple and self.args.n_gpu <= 1:
            self.compute_loss_func = _loss

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **options: Any) -> Any:
        if self.compute_loss_func is not None and model.training:
            inputs = {**inputs, "logits_to_keep": _columns(inputs["labels"]).nonzero().flatten()}
        return super().compute_loss(model, inputs, *args, **options)


def _columns(labels: Tensor) -> Tensor:
    """In which columns a row has an answer's token to predict: [pos]."""
    return answer_positions(labels).any(0)


def _loss(outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
    """Of logits in all columns, or in those of `_columns`."""
    where, logits = answer_positions(labels), outputs["logits"]
    if logits.shape[1] < where.shape[1]:
        where = where[:, _columns(labels)]
    return answer_loss(logits[where], labels, num_items_in_batch)

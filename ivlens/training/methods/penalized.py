"""The trainer of a stage, with a method's penalty on the weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor
from transformers import Trainer

from ivlens.training.methods.method import Method
from ivlens.training.methods.stage import Stage

__all__ = ["Penalized", "trainer"]


def trainer(method: Method, stage: Stage, **common: Any) -> Trainer:
    """The trainer of a stage by this method; `common` are the Trainer's own arguments."""
    stage = replace(stage, dataset=method.data(stage))
    kind, own = method.loss(stage)
    if (penalty := method.penalty(stage)) is not None:
        kind, own = type("PenaltyTrainer", (Penalized, kind), {}), {**own, "penalty": penalty}
    found = kind(stage.model, train_dataset=stage.dataset, **own, **common)
    for callback in method.callbacks(stage):
        found.add_callback(callback)
    return found


class Penalized(Trainer):
    """Any Trainer with a penalty on the weights, logged apart as `penalty`."""

    def __init__(self, *args: Any, penalty: Callable[[], Tensor], **options: Any):
        super().__init__(*args, **options)
        self._penalty = penalty
        self._seen: list[float] = []

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        found = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        penalty = self._penalty()
        self._seen.append(float(penalty.detach()))
        if (self.model_accepts_loss_kwargs or self.compute_loss_func) and num_items_in_batch is not None:
            # Losses are then normalized over the accumulated batch already, and a penalty per part would count as often.
            penalty = penalty / self.current_gradient_accumulation_steps
        return (found[0] + penalty, found[1]) if return_outputs else found + penalty

    def log(self, logs: dict[str, float], *args: Any, **options: Any) -> None:
        """As the Trainer, with the penalty's mean since the last time."""
        if "loss" in logs and self._seen:
            logs = {**logs, "penalty": sum(self._seen) / len(self._seen)}
            self._seen.clear()
        super().log(logs, *args, **options)

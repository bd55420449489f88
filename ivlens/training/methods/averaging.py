"""Averaging a stage's model with the one before it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from transformers import TrainerCallback

from ivlens.training.methods.method import Method
from ivlens.training.methods.stage import Stage

__all__ = ["Averaging"]


@dataclass(frozen=True)
class Averaging(Method):
    """Model averaging (arXiv 2109.01903): after each stage w ← (1 − share) · w_before + share · w_after.

    With an adapter of its own for every stage, that is its change times `share`, exactly.

    Attributes
    ----------
    share
        Weight of the model after the stage.
    every
        Average along the way, too, each time that this fraction of the steps is done (arXiv 2501.05559); 1: at the end only.
    last
        The share in the last layer; that of the others grows evenly from `share` in the first (LiNeS, arXiv 2410.17146). None:
        `share` everywhere.
    """

    changes: ClassVar[frozenset[str]] = frozenset({"step", "stage", "fresh adapter"})
    share: float = 0.5
    every: float = 1.0
    last: float | None = None

    def __post_init__(self) -> None:
        for name in ("share", "every", "last"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise ValueError(f"{name}={value} is outside (0, 1]")

    def callbacks(self, stage: Stage) -> list[TrainerCallback]:
        average = self.average

        class OnTheWay(TrainerCallback):
            def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                if state.global_step in times(state.max_steps):
                    average(stage.model)

        def times(steps: int) -> set[int]:
            """All but the end, which is `finish`'s."""
            return {round(i * self.every * steps) for i in range(1, int(1 / self.every) + 1)} - {0, steps}

        return [OnTheWay()] if self.every < 1 else []

    def finish(self, stage: Stage) -> None:
        self.average(stage.model)

    @torch.no_grad()
    def average(self, model: torch.nn.Module) -> None:
        weights = {name: weight for name, weight in model.named_parameters() if ".lora_B.default." in name}
        shares = self.shares(list(weights), model.config.get_text_config().num_hidden_layers)
        for name, weight in weights.items():
            weight.mul_(shares[name])

    def shares(self, names: list[str], depth: int) -> dict[str, float]:
        """Of each weight, by the first number in its name, which is its layer's."""
        if self.last is None:
            return dict.fromkeys(names, self.share)
        layers = {name: int(found[1]) for name in names if (found := re.search(r"\.(\d+)\.", name))}
        if len(layers) < len(names):
            nowhere = next(name for name in names if name not in layers)
            raise ValueError(f"last={self.last} needs layers, and {nowhere} is in none; leave last out")
        return {
            name: self.share + (self.last - self.share) * layer / max(depth - 1, 1) for name, layer in layers.items()
        }

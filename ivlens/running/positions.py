"""What is added to the residual stream, and at which positions of which forward pass it lands."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ivlens.models.backend import Backend
from ivlens.models.backends import backend_of

__all__ = ["Injection", "injected"]

POSITIONS = ("last", "generated", "all")
MODES = ("sum", "heads")


@dataclass(frozen=True)
class Injection:
    """What is added to the residual stream after which layers, and at which positions.

    `additions` maps a layer to a tensor [d_model], or [batch d_model] for one vector per row, already scaled.
    """

    additions: dict[int, Tensor]
    positions: str | Tensor = "last"

    @classmethod
    def of(
        cls,
        backend: Backend,
        vector: Any,
        *,
        layer: int | None = None,
        scale: float | None = None,
        positions: str | Tensor = "last",
        mode: str = "sum",
    ) -> Injection:
        """Check the arguments of `inject` and turn them into additions."""
        if mode not in MODES:
            raise ValueError(f"mode={mode!r} is unknown; choose one of {', '.join(MODES)}")
        if not isinstance(positions, Tensor) and positions not in POSITIONS:
            raise ValueError(
                f"positions={positions!r} is unknown; choose one of {', '.join(POSITIONS)}, or a tensor with one per row"
            )
        whole = not isinstance(vector, Tensor)
        if whole:
            vector.check_model(backend.model)
        elif vector.shape[-1] != backend.d_model or vector.dim() > 2:
            raise ValueError(
                f"the vector has shape {tuple(vector.shape)}, but {backend.name} needs [d_model] = ({backend.d_model},)"
            )
        elif not torch.isfinite(vector).all():
            raise ValueError("the vector holds NaN or infinite values")
        scale = (vector.scale if whole else 1.0) if scale is None else scale
        if mode == "heads":
            if not whole or vector.shares is None:
                raise ValueError("mode='heads' needs an InstructionVector with heads; use mode='sum'")
            additions: dict[int, Tensor] = {}
            for head, share in zip(vector.heads, vector.shares):
                additions[head.layer] = additions.get(head.layer, 0) + scale * share
            return cls(additions, positions)
        layer = vector.layer if layer is None and whole else layer
        if layer is None:
            raise ValueError(
                f"no layer given and the vector has none; pass layer= (a third of the depth, {backend.n_layers // 3}, is a fair "
                "first try) or choose one on validation data with ivl.tune_injection"
            )
        return cls({backend.check_layer(layer): scale * (vector.vector if whole else vector)}, positions)

    @property
    def per_row(self) -> bool:
        return any(v.dim() == 2 for v in self.additions.values())

    def check_rows(self, n: int) -> None:
        """Raise where one vector per row doesn't fit this many prompts."""
        wrong = next((len(v) for v in self.additions.values() if v.dim() == 2 and len(v) != n), None)
        if wrong is not None:
            raise ValueError(f"the vector has {wrong} rows for {n} prompts; pass one per prompt, or a single [d_model]")
        if isinstance(self.positions, Tensor):
            raise ValueError(
                f"positions is a tensor, but here prompts are batched anew; choose one of {', '.join(POSITIONS)}, or run the "
                "model inside ivl.inject"
            )

    def of_rows(self, index: list[int]) -> Injection:
        """The same for these rows only."""
        return Injection({k: v[index] if v.dim() == 2 else v for k, v in self.additions.items()}, self.positions)

    def hooks(
        self, backend: Backend, add: Callable[[Tensor, Tensor], Tensor], fired: set[int]
    ) -> list[tuple[str, Callable]]:
        """One hook per layer; `add(x, vector)` says where the vector goes."""

        def hook_for(layer: int, vector: Tensor) -> Callable:
            def hook_fn(x: Tensor, hook: Any) -> Tensor:
                fired.add(layer)
                v = vector.to(x)
                return add(x, v[:, None] if v.dim() == 2 else v)

            return hook_fn

        return [(backend.resid_hook(layer), hook_for(layer, v)) for layer, v in self.additions.items()]


class _Place:
    """Tells a new prompt from the continuation of the last one, by looking at what enters the first layer.

    (`hook_embed` won't do: `HookedTransformer.generate` embeds tokens without it.)

    With a cache, `generate` runs the prompt and then single tokens; without one, the same prompt with one token more each
    time. Both count as continuation, so that a vector lands in the same places either way.
    """

    def __init__(self, positions: str | Tensor):
        self.positions = positions
        self.seen: Tensor | None = None
        self.start = 0  # position of the last prompt token in the forward pass under way
        self.runs = 0

    def watch(self, entering: Tensor, hook: Any) -> None:
        self.runs += 1
        now, before = entering.detach(), self.seen
        if before is not None and now.shape[0] == before.shape[0]:
            if now.shape[1] == 1:
                self.start = -1  # a decoding step over a cache
                return
            n = before.shape[1]
            if now.shape[1] == n + 1 and torch.equal(now[:, :n], before):
                self.seen = now  # the same again and one token more: decoding without a cache
                return
        self.seen, self.start = now, now.shape[1] - 1

    def add(self, x: Tensor, vector: Tensor) -> Tensor:
        if not self.runs:
            raise RuntimeError("can't tell where the prompt ends: run the model from its first layer inside inject")
        if isinstance(self.positions, Tensor):
            if self.start < 0:
                return x
            rows = torch.arange(x.shape[0], device=x.device)
            here = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device)
            here[rows, self.positions.to(x.device)] = True
            return x + here[..., None] * vector
        if self.positions == "all":
            return x + vector
        start = max(self.start, 0)
        if self.positions == "last":
            if self.start < 0:
                return x
            return torch.cat([x[:, :start], x[:, start : start + 1] + vector, x[:, start + 1 :]], dim=1)
        return x + vector if start == 0 else torch.cat([x[:, :start], x[:, start:] + vector], dim=1)


@contextmanager
def injected(model: Any, injection: Injection) -> Iterator[Any]:
    """Inside, the injection acts on every forward pass of the model; see `steering.inject`."""
    backend = backend_of(model)
    place, fired = _Place(injection.positions), set()
    hooks = [("blocks.0.hook_resid_pre", place.watch), *injection.hooks(backend, place.add, fired)]
    with model.hooks(fwd_hooks=hooks):
        yield model
        if place.runs and fired != set(injection.additions):
            missing = sorted(set(injection.additions) - fired)
            raise RuntimeError(
                f"the model ran, but nothing was injected after layer(s) {missing}: did it stop at an earlier layer?"
            )

"""Injecting into, and reading heads of, a Hugging Face model while it trains.

The hooks stay for as long as training does and follow a state: with gradient checkpointing a layer runs again in the
backward pass, and must then find what it found in the forward pass.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ivlens.models.loading import tokenizing_backend
from ivlens.vectors import Head

__all__ = ["TrainingHooks"]


@dataclass
class TrainingHooks:
    """Hooks of one model. Set `positions` and `additions` before each forward pass.

    Attributes
    ----------
    positions
        Position of each row's last prompt token, [row].
    additions
        What is added there, [row d_model], by layer.
    heads
        The heads whose outputs `z` gives after a pass.
    """

    heads: tuple[Head, ...] = ()
    site: str = "residual"
    positions: Int[Tensor, " row"] | None = None
    additions: dict[int, Float[Tensor, "row d_model"]] = field(default_factory=dict)
    _z: dict[int, Tensor] = field(default_factory=dict)
    _handles: list[Any] = field(default_factory=list)

    def attach(self, hf_model: Any, tokenizer: Any, layers: Iterable[int]) -> TrainingHooks:
        """Put hooks on the layers where something is added and on those of the heads."""
        inner = hf_model.get_base_model() if hasattr(hf_model, "get_base_model") else hf_model
        backend = tokenizing_backend(inner, tokenizer, "model")
        blocks = backend.model.adapter.component_mapping[
            "blocks"
        ]  # transformer-lens knows where an architecture has what
        attention = blocks.submodules["attn"]
        output = f"{attention.name}.{attention.submodules['o'].name}"
        modules = inner.get_submodule(blocks.name)
        for layer in layers:
            module = modules[layer] if self.site == "residual" else modules[layer].get_submodule(output)
            self._handles.append(module.register_forward_hook(self._add_at(layer)))
        for layer in {head.layer for head in self.heads}:
            module = modules[layer].get_submodule(output)
            self._handles.append(module.register_forward_pre_hook(self._read_at(layer, backend.d_head)))
        return self

    def detach(self) -> None:
        while self._handles:
            self._handles.pop().remove()

    @property
    def z(self) -> Float[Tensor, "row head d_head"]:
        """Outputs of the heads at each row's last prompt token, in the last pass."""
        return torch.stack([self._z[head.layer][:, head.head] for head in self.heads], dim=1)

    def _add_at(self, layer: int) -> Any:
        def hook(module: Any, args: tuple, output: Any) -> Any:
            addition = self.additions.get(layer)
            if addition is None:
                return None
            x = output[0] if isinstance(output, tuple) else output
            where = torch.zeros(x.shape[:2], dtype=x.dtype, device=x.device)
            where = where.scatter(1, self.positions[:, None].to(x.device), 1.0)
            x = x + where[..., None] * addition[:, None].to(x)
            return (x, *output[1:]) if isinstance(output, tuple) else x

        return hook

    def _read_at(self, layer: int, d_head: int) -> Any:
        def hook(module: Any, args: tuple) -> None:
            rows = torch.arange(len(args[0]), device=args[0].device)
            self._z[layer] = args[0][rows, self.positions.to(args[0].device)].unflatten(-1, (-1, d_head))

        return hook

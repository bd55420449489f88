"""Injecting into, and reading heads of, a Hugging Face model while it trains.

The hooks stay for as long as training does and follow a state: with gradient checkpointing a layer runs again in the
backward pass, and must then find what it found in the forward pass.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ivlens.models.backend import Backend
from ivlens.models.head import Head
from ivlens.models.hooking import text_part, tokenizing_backend
from ivlens.training.batch import Batch
from ivlens.training.branches import Fed
from ivlens.training.guidance import Guidance
from ivlens.vectors.vector import InstructionVector

__all__ = ["TaskInjection", "TrainingHooks"]


@dataclass
class TrainingHooks:
    """Hooks of one model. Set `positions`, `additions` and `read` before each forward pass; `z` has the heads' outputs after it.

    `positions` are the columns of the last prompt token in the first rows, `additions` what is added there, by layer; further
    rows are left alone. `read` is row and column of every place where `z` is read.
    """

    heads: tuple[Head, ...] = ()
    site: str = "residual"
    positions: Int[Tensor, " row"] | None = None
    additions: dict[int, Float[Tensor, "row d_model"]] = field(default_factory=dict)
    read: tuple[Int[Tensor, " row"], Int[Tensor, " row"]] | None = None
    _z: dict[int, Tensor] = field(default_factory=dict)
    _handles: list[Any] = field(default_factory=list)

    def attach(self, hf_model: Any, tokenizer: Any, layers: Iterable[int]) -> TrainingHooks:
        """Put hooks on the layers where something is added and on those of the heads."""
        inner = text_part(hf_model.get_base_model() if hasattr(hf_model, "get_base_model") else hf_model)
        backend = tokenizing_backend(inner, tokenizer, "model")
        # Transformer-lens knows where an architecture has what.
        blocks = backend.model.adapter.component_mapping["blocks"]
        attention = blocks.submodules["attn"]
        output = f"{attention.name}.{attention.submodules['o'].name}"
        modules = inner.get_submodule(blocks.name)
        for layer in layers:
            module = modules[layer] if self.site == "residual" else modules[layer].get_submodule(output)
            self._handles.append(module.register_forward_hook(partial(self._add, layer)))
        for layer in {head.layer for head in self.heads}:
            module = modules[layer].get_submodule(output)
            self._handles.append(module.register_forward_pre_hook(partial(self._read, layer, backend)))
        return self

    def detach(self) -> None:
        while self._handles:
            self._handles.pop().remove()

    def rest(self) -> None:
        """In the next passes nothing is added and nothing read."""
        self.additions, self.read = {}, None

    @property
    def z(self) -> Float[Tensor, "row head d_head"]:
        """Outputs of the heads at the places read, in the last pass."""
        return torch.stack([self._z[head.layer][:, head.head] for head in self.heads], dim=1)

    def _add(self, layer: int, module: Any, args: tuple, output: Any) -> Any:
        addition = self.additions.get(layer)
        if addition is None:
            return None
        x = output[0] if isinstance(output, tuple) else output
        places = (torch.arange(len(addition), device=x.device), self.positions.to(x.device))
        x = x.index_put(places, addition.to(x), accumulate=True)
        return (x, *output[1:]) if isinstance(output, tuple) else x

    def _read(self, layer: int, backend: Backend, module: Any, args: tuple) -> None:
        if self.read is not None:
            rows, columns = (index.to(args[0].device) for index in self.read)
            self._z[layer] = backend.padded(args[0][rows, columns].unflatten(-1, (backend.n_heads, -1)))


@dataclass(frozen=True)
class TaskInjection:
    """What is injected for each task, scaled, and after which layer; for no task where nothing is."""

    layers: Int[Tensor, " task"]
    thetas: Float[Tensor, "task d_model"]

    @classmethod
    def of(
        cls, vectors: Mapping[str, InstructionVector] | None, tasks: Sequence[str], guidance: Guidance, config: Any
    ) -> TaskInjection:
        """Of the vectors of these tasks, as the guidance says, in a model with this config; ValueError where they don't fit."""
        width, depth = config.hidden_size, config.num_hidden_layers
        if guidance.layer is not None:
            _within(guidance.layer, depth)
        if vectors is None:
            return cls(torch.empty(0, dtype=torch.long), torch.empty(0, width))
        if missing := [task for task in tasks if task not in vectors]:
            raise ValueError(f"no vector for task(s) {', '.join(missing)}; extract one each with ivl.extract_vector")
        chosen = [vectors[task] for task in tasks]
        for task, vector in zip(tasks, chosen):
            if vector.d_model != width:
                widths = f"the vector of task {task!r} has width {vector.d_model}, but the model has {width}"
                raise ValueError(f"{widths}; extract a vector from this model with ivl.extract_vector")
        scales = [vector.scale if guidance.scale is None else guidance.scale for vector in chosen]
        thetas = torch.stack([scale * vector.vector.float() for scale, vector in zip(scales, chosen)])
        return cls(torch.tensor([_layer(guidance, vector, depth) for vector in chosen]), thetas)

    def aim(self, hooks: TrainingHooks, fed: Fed, batch: Batch, strength: float) -> None:
        """What the hooks add in the next pass, each row its task's vector at its task's layer, and where they read."""
        hooks.positions = batch.last
        columns = fed.plain.columns.gather(1, batch.last[:, None])[:, 0]
        hooks.read = (torch.arange(len(columns), device=columns.device) + fed.plain.first, columns)
        tasks = batch.tasks.cpu()
        hooks.additions = {
            layer: (strength * self.thetas[tasks] * (self.layers[tasks] == layer)[:, None]).to(columns.device)
            for layer in set(self.layers.tolist())
            if strength
        }


def _layer(guidance: Guidance, vector: InstructionVector, depth: int) -> int:
    layer = vector.layer if guidance.layer is None else guidance.layer
    if layer is None or (guidance.site == "attention" and guidance.layer is None):
        layer = depth // 3 if guidance.site == "residual" else depth * 9 // 32
    return _within(layer, depth)


def _within(layer: int, depth: int) -> int:
    if not -depth <= layer < depth:
        raise ValueError(f"layer={layer} is out of range: the model has layers 0 to {depth - 1}")
    return layer % depth

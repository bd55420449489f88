"""Heads that carry the instruction, left as they are."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from transformers import TrainerCallback

from ivlens.models.hooking import text_part, tokenizing_backend
from ivlens.training.methods.method import Method
from ivlens.training.methods.stage import Stage

if TYPE_CHECKING:
    from ivlens.vectors.vector import InstructionVector

__all__ = ["FrozenHeads"]


@dataclass(frozen=True)
class FrozenHeads(Method):
    """The queries and values of the heads that the tasks' vectors are made of keep their weights: an ablation (our choice).

    Where several heads share a value (GQA), it keeps its weights for all of them.
    """

    changes: ClassVar[frozenset[str]] = frozenset({"trained weights"})
    needs_vectors: ClassVar[bool] = True

    def check(self, tasks: Sequence[str], vectors: Mapping[str, InstructionVector] | None) -> None:
        if missing := [task for task in tasks if not getattr((vectors or {}).get(task), "heads", ())]:
            there = f"frozen_heads needs vectors made of heads, and there is none for task(s) {', '.join(missing)}"
            raise ValueError(f"{there}; extract one each with ivl.extract_vector")

    def callbacks(self, stage: Stage) -> list[TrainerCallback]:
        handles: list[Any] = []

        class Frozen(TrainerCallback):
            def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
                for weight, rows in frozen_rows(stage):
                    handles.append(weight.register_hook(lambda g, rows=rows: g.index_fill(0, rows.to(g.device), 0)))

            def on_train_end(self, *args: Any, **kwargs: Any) -> None:
                while handles:
                    handles.pop().remove()

        return [Frozen()]


def frozen_rows(stage: Stage) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Each weight in training that makes a query or value of the heads, and which of its rows do."""
    inner = text_part(stage.model.get_base_model() if hasattr(stage.model, "get_base_model") else stage.model)
    backend = tokenizing_backend(inner, stage.tokenizer, "model")
    blocks = backend.model.adapter.component_mapping["blocks"]
    attention = blocks.submodules["attn"]
    unknown = f"{backend.name} doesn't make each head's query and value by rows of its own, which frozen_heads would leave alone"
    if not {"q", "v"} <= attention.submodules.keys():
        raise ValueError(unknown)
    counts = {"q": backend.n_heads}
    counts["v"] = getattr(inner.config.get_text_config(), "num_key_value_heads", None) or backend.n_heads
    heads = sorted({head for vector in stage.vectors.values() for head in vector.heads})
    for layer, name in itertools.product(sorted({head.layer for head in heads}), counts):
        place = f"{blocks.name}.{layer}.{attention.name}.{attention.submodules[name].name}"
        module = inner.get_submodule(place)
        numbers = {head.head * counts[name] // backend.n_heads for head in heads if head.layer == layer}
        width, left = divmod(getattr(module, "out_features", 1), counts[name])
        if left or width != backend.d_head:
            raise ValueError(unknown)
        rows = torch.cat([torch.arange(width) + number * width for number in sorted(numbers)])
        for label, weight in module.named_parameters():
            if weight.requires_grad and "lora_A" not in label:
                yield weight, rows

"""Where a sweep patches, the prompts it patches together, and what it finds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ivlens.running.tokens import fed_with_answers

__all__ = ["Sites", "SweepBatch", "Swept"]


@dataclass(frozen=True)
class Sites:
    """The patches of a sweep, one copy each: their layers, ascending (patches are sorted by their first), and hooks by layer.

    `write(layer, sites, rows, x)` patches in place: x [batch, len(sites), ...] are the activations of these sites' copies at the patched
    position; `sites` index into `layers`, `rows` into the prompts. `about` is what tells these patches from others.
    """

    layers: Sequence[Sequence[int]]
    hook: Callable[[int], str]
    write: Callable[[int, list[int], list[int], Tensor], None]
    about: Any = None


@dataclass
class SweepBatch:
    """Prompts that are patched together, as many tokens from the end in all; `block` counts the tokens of a copy."""

    index: list[int]
    tokens: Int[Tensor, "batch pos"]
    mask: Int[Tensor, "batch pos"]
    answers: Int[Tensor, "batch answer"]
    answer_mask: Bool[Tensor, "batch answer"]
    distractors: Int[Tensor, " batch"] | None
    block: int

    @property
    def keep(self) -> int:
        return self.answers.shape[1]

    @classmethod
    def of(
        cls,
        index: list[int],
        rows: Sequence[tuple[tuple[int, ...], tuple[int, ...]]],
        distractors: Sequence[int] | None,
        from_end: int,
        device: torch.device,
    ) -> SweepBatch:
        """Of prompts and the answer tokens that are scored."""
        tokens, mask, answers, answer_mask = fed_with_answers(rows, device)
        wrong = None if distractors is None else torch.tensor(distractors, device=device)
        return cls(index, tokens, mask, answers, answer_mask, wrong, from_end + answers.shape[1] - 1)


@dataclass
class Swept:
    """Scores of some prompts: `values` [batch, site] patched, `baseline` [batch] unpatched; `index` says which prompts."""

    index: list[int]
    values: Float[Tensor, "batch site"]
    baseline: Float[Tensor, " batch"]

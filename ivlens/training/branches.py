"""What a model is fed for one step: a batch with the vector injected (for ℓ_LM), and the same without it (for ℓ_KL).

Both branches share what comes before the last prompt token, where the injection happens. So that token and the answer are
fed a second time at the end of the row, in a pass that costs (T + A) / T of a plain one instead of twice as much.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ivlens.models.backend import additive_mask
from ivlens.running.masks import branch_mask

__all__ = ["Branch", "Fed", "doubled", "packed", "packing_fits", "single"]


@dataclass(frozen=True)
class Branch:
    """Where the positions of a batch stand in what the model is fed: in which column, and from which row on."""

    columns: Int[Tensor, "row pos"]
    first: int = 0

    def places(self, wanted: Bool[Tensor, "row pos"]) -> tuple[Tensor, Tensor]:
        """Rows and columns of the positions wanted."""
        rows, positions = wanted.nonzero(as_tuple=True)
        return rows + self.first, self.columns[rows, positions]


@dataclass(frozen=True)
class Fed:
    """A batch as the model is fed it. In `single`, both branches are the same."""

    inputs: dict[str, Tensor]
    steered: Branch
    plain: Branch

    def run(
        self,
        model: Callable[..., Any],
        steered: Bool[Tensor, "row pos"] | None,
        plain: Bool[Tensor, "row pos"] | None,
        *,
        sparse: bool,
    ) -> tuple[Any, Float[Tensor, "n d_vocab"] | None, Float[Tensor, "m d_vocab"] | None]:
        """The model's outputs, and logits of the branches at the positions wanted, in the order of rows.

        `sparse`: the model can be asked for the logits of some columns only (`logits_to_keep`).
        """
        both = ((self.steered, steered), (self.plain, plain))
        wanted = [None if where is None else branch.places(where) for branch, where in both]
        needed = torch.cat([places[1] for places in wanted if places is not None]).unique() if sparse else None
        outputs = model(**self.inputs) if needed is None else model(**self.inputs, logits_to_keep=needed)
        flat, width = outputs.logits.flatten(0, 1), outputs.logits.shape[1]

        def logits(places: tuple[Tensor, Tensor] | None) -> Tensor | None:
            if places is None:
                return None
            rows, columns = places
            at = columns if needed is None else torch.searchsorted(needed, columns)
            return flat.index_select(0, rows * width + at)

        return outputs, *map(logits, wanted)


def single(inputs: dict[str, Tensor]) -> Fed:
    """The batch as it is, for steps in which the branches don't differ or one is enough."""
    branch = Branch(_columns(inputs))
    return Fed(inputs, branch, branch)


def doubled(inputs: dict[str, Tensor]) -> Fed:
    """Every row twice, first all rows with the injection: for any model."""
    columns = _columns(inputs)
    fed = {key: torch.cat([x, x]) for key, x in inputs.items()}
    return Fed(fed, Branch(columns), Branch(columns, first=len(columns)))


def packed(inputs: dict[str, Tensor], last: Int[Tensor, " row"], dtype: torch.dtype) -> Fed:
    """At the end of each row its last prompt token and its answer once more, which see the prompt and themselves only."""
    real, columns = inputs["attention_mask"].bool(), _columns(inputs)
    width = columns.shape[1]
    before = real & (columns < last[:, None])
    steps = torch.arange(int((real & ~before).sum(1).max()), device=last.device)
    source = (last[:, None] + steps).clamp(max=width - 1)
    copied = real.gather(1, source) & (last[:, None] + steps < width)
    fed = {key: torch.cat([x, x.gather(1, source)], dim=1) for key, x in inputs.items() if key != "attention_mask"}
    fed["attention_mask"] = additive_mask(branch_mask(real, before, copied), dtype)
    plain = torch.where(columns < last[:, None], columns, width + columns - last[:, None])
    return Fed(fed, Branch(columns), Branch(plain))


def packing_fits(config: Any, inputs: dict[str, Tensor], longest: int) -> bool:
    """Whether a packed pass may be tried: the mask is ours, so a window that the model would put on it must not matter."""
    windows = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
    plain = set(inputs) == {"input_ids", "attention_mask", "position_ids"}
    return plain and all(window is None or longest <= window for window in windows)


def _columns(inputs: dict[str, Tensor]) -> Int[Tensor, "row pos"]:
    rows, width = inputs["input_ids"].shape
    return torch.arange(width, device=inputs["input_ids"].device).expand(rows, width)

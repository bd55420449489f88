"""Which positions see which: masks of packed rows."""

from __future__ import annotations

import torch
from jaxtyping import Bool
from torch import Tensor

__all__ = ["block_mask", "branch_mask", "copy_masks"]


def block_mask(visible: Bool[Tensor, "batch block pos"], n_prefix: int, copies: int) -> Bool[Tensor, "batch q k"]:
    """Which keys each packed query sees: the prefix as in `visible`, and of the packed tokens only its own copy's."""
    batch, block, _ = visible.shape
    prefix = visible[:, :, :n_prefix].repeat(1, copies, 1)
    own = torch.zeros(batch, copies, block, copies, block, dtype=torch.bool, device=visible.device)
    index = torch.arange(copies, device=visible.device)
    own[:, index, :, index, :] = visible[:, :, n_prefix:]
    return torch.cat([prefix, own.reshape(batch, copies * block, copies * block)], dim=-1)


def copy_masks(visible: list[Bool[Tensor, "batch block pos"]], n_prefix: int, copies: int) -> list[Tensor]:
    """`block_mask` of every layer; layers that see alike share one tensor."""
    masks: list[Tensor] = []
    for i, here in enumerate(visible):
        same = next((j for j in range(i) if torch.equal(visible[j], here)), None)
        masks.append(block_mask(here, n_prefix, copies) if same is None else masks[same])
    return masks


def branch_mask(
    real: Bool[Tensor, "row pos"], before: Bool[Tensor, "row pos"], copied: Bool[Tensor, "row copy"]
) -> Bool[Tensor, "row q k"]:
    """Which keys each query sees in rows at whose end some tokens stand once more: these see what is `before` and themselves."""
    width, total = real.shape[1], real.shape[1] + copied.shape[1]
    visible = torch.zeros(len(real), total, total, dtype=torch.bool, device=real.device)
    visible[:, :width, :width] = real[:, None]
    visible[:, width:, :width] = before[:, None]
    visible[:, width:, width:] = copied[:, None]
    return visible.tril() | torch.eye(total, dtype=torch.bool, device=real.device)  # padding sees itself: no NaN

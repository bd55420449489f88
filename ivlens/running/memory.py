"""How many prompts, or rows of a sweep, fit into what a device has free."""

from __future__ import annotations

import math
import os
from pathlib import Path

import psutil
import torch

from ivlens.common.processes import gathered, here
from ivlens.models.backend import Backend

__all__ = ["MASK_SHARE", "free_memory", "prompts_at_once", "rows_at_once"]

SHARE = 0.5  # of what is free, for one forward pass; the estimates below know the architecture roughly
MASK_SHARE = 1 / 16  # of what is free, for a sweep's attention mask, which grows with the square of the rows
CGROUP = Path("/sys/fs/cgroup")


def free_memory(backend: Backend) -> int:
    """Bytes that each process can still take on its model's device: the least of all of them, so that they make the same batches."""
    device = backend.device
    if device.type == "cuda":
        found, _ = torch.cuda.mem_get_info(device)
        found += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(
            device
        )  # kept by torch for the next tensors
    else:
        found = int(min(psutil.virtual_memory().available, _left_in_container()))
        found //= int(os.environ.get("LOCAL_WORLD_SIZE", here()[1]))
    return min(gathered(found, "free memory"))


def _left_in_container() -> float:
    """What control groups (version 2) leave, which psutil doesn't see: beyond it the process is killed, without an error to catch."""
    try:
        limit, used = (int((CGROUP / f"memory.{name}").read_text()) for name in ("max", "current"))
        parts = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # no such group, or "max": no limit
        return math.inf
    return limit - used + int(parts.get("inactive_file", 0))  # files that were read are let go of


def prompts_at_once(backend: Backend, free: int, length: int, answer: int, copies: int = 1) -> int:
    """How many prompts of so many tokens, with answers of so many, a forward pass can take.

    Each has the keys and values of all its tokens in `copies`.
    """
    tokens = length + answer
    each = tokens * (_per_token(backend) + _per_score(backend) * tokens) + max(answer, 1) * _per_logits(backend)
    return max(int(SHARE * free / (each + (copies - 1) * tokens * _kept(backend))), 1)


def rows_at_once(backend: Backend, free: int, prefix: int) -> int:
    """How many rows a sweep can pack behind prompts of so many tokens; its mask is held to its own share."""
    one, square = _per_token(backend) + _per_logits(backend), _per_score(backend)
    whole = _most(SHARE * free, one + square * prefix, square)
    mask = _size(backend) + 2  # added to the scores, and made from two of booleans
    return max(min(whole, _most(MASK_SHARE * free, mask * prefix, mask)), 1)


def _most(budget: float, one: float, square: float) -> int:
    """The largest n with one · n + square · n² in the budget."""
    return int((math.sqrt(one**2 + 4 * square * budget) - one) / (2 * square))


def _size(backend: Backend) -> int:
    return next(backend.model.parameters()).element_size()


def _kept(backend: Backend) -> int:
    """Bytes of a token's keys and values."""
    cfg = backend.model.cfg
    return (
        2
        * backend.n_layers
        * (getattr(cfg, "n_key_value_heads", None) or backend.n_heads)
        * backend.d_head
        * _size(backend)
    )


def _per_token(backend: Backend) -> int:
    """Bytes for a token in the widest layer, and its keys and values."""
    inside = 3 * (getattr(backend.model.cfg, "d_mlp", None) or 4 * backend.d_model) + 8 * backend.d_model
    return inside * _size(backend) + _kept(backend)


def _per_score(backend: Backend) -> int:
    """Bytes for what one token's attention to another takes in the layer under way: scores, the mask added, their softmax."""
    return 3 * backend.n_heads * max(_size(backend), 4)


def _per_logits(backend: Backend) -> int:
    return backend.d_vocab * (_size(backend) + 8)  # and twice in float32

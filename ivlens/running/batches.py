"""The one way many prompts become batches: of like length, halved where memory runs out."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import torch

__all__ = ["in_batches", "out_of_memory"]


def in_batches(lengths: Sequence[int], batch_size: int, work: Callable[[list[int]], None]) -> None:
    """Give `work` the numbers of all rows, some at a time, those of like length together.

    A batch that doesn't fit is halved, and so are those after it; `work` is called anew for it.
    """
    left = sorted(range(len(lengths)), key=lambda i: lengths[i])
    while left:
        index = left[:batch_size]
        try:
            work(index)
        except RuntimeError as error:
            if not out_of_memory(error) or len(index) == 1:
                raise
            batch_size = len(index) // 2
            warnings.warn(f"out of memory; going on with batch_size={batch_size}", stacklevel=4)
            continue
        left = left[len(index) :]


def out_of_memory(error: BaseException) -> bool:
    """Whether a smaller batch may help: an accelerator's own error, or the plain one of torch's allocator on a CPU."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)

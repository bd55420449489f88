"""The one way many prompts become batches: of like length, as many as fit, halved where memory runs out, split over processes."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch

from ivlens.common.keys import in_use, key
from ivlens.common.processes import everyones, here
from ivlens.models.backend import Backend
from ivlens.running.memory import free_memory, prompts_at_once
from ivlens.running.tokens import TokenizedPrompt

__all__ = ["by_length", "described", "in_batches", "in_parts", "out_of_memory"]

T = TypeVar("T")


def in_batches(
    backend: Backend,
    rows: Sequence[TokenizedPrompt],
    batch_size: int | None,
    work: Callable[[list[int]], T],
    what: str,
    *options: Any,
    most: tuple[int, int],
    new: int = 0,
    copies: int = 1,
) -> Iterator[tuple[list[int], T]]:
    """The numbers of some prompts, those of like length together, and what `work` makes of them, until all are done.

    Parameters
    ----------
    batch_size
        How many together; None for as many as there is room for, up to the `most` that are any faster: on a CPU, and elsewhere.
    what, options
        What is done, and with which options: must be the same in every process.
    new, copies
        How many tokens are written behind each prompt, and how often its keys and values are kept.
    """
    answer = max([new, *(len(row.answer) for row in rows)])
    size: int | Callable[[int], int] | None = batch_size
    if batch_size is None:
        free, limit = free_memory(backend), most[backend.device.type != "cpu"]

        def size(length: int) -> int:
            return min(prompts_at_once(backend, free, length, answer, copies), limit)

    yield from by_length([len(row.prompt) for row in rows], size, work, described(what, backend, rows, *options))


def described(what: str, backend: Backend, rows: Sequence[TokenizedPrompt], *options: Any) -> str:
    """What is done by which model on which prompts, for `everyones`."""
    if here()[1] == 1:
        return what
    return f"{what} {len(rows)} prompts ({key(in_use(backend.model), hash(tuple(rows)), options)})"


def by_length(
    lengths: Sequence[int], batch_size: int | Callable[[int], int], work: Callable[[list[int]], T], what: str = ""
) -> Iterator[tuple[list[int], T]]:
    """As `in_batches`; `batch_size` is a number, or says how many of a length. A batch that doesn't fit is halved, and so are those
    after it."""
    if not callable(batch_size) and batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1")
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    most = len(lengths)

    def size(rows: Sequence[int], start: int) -> int:
        if not callable(batch_size):
            return min(batch_size, most)
        first = min(batch_size(lengths[rows[start]]), most)
        longest = rows[min(start + first, len(rows)) - 1]
        return min(batch_size(lengths[longest]), first)

    def halve(error: RuntimeError, rows: list[int]) -> None:
        nonlocal most
        if len(rows) == 1:
            raise error
        most = len(rows) // 2
        warnings.warn(f"out of memory; going on with batch_size={most}", stacklevel=6)

    yield from in_parts(order, size, work, halve, what)


def in_parts(
    order: Sequence[int],
    size: Callable[[Sequence[int], int], int],
    work: Callable[[list[int]], T],
    halve: Callable[[RuntimeError, list[int]], None],
    what: str,
) -> Iterator[tuple[list[int], T]]:
    """Rows in their order, part by part, and what `work` makes of each; of several processes, each does its share of the parts.

    Where there are as many parts as processes or more, they are those of one process alone, and so are the numbers, to the last digit.

    Parameters
    ----------
    size
        From rows and where the next part begins, how many it has.
    halve
        Is told of a part that didn't fit the memory, so that `size` gives less from now on; raises where it can't.
    """
    index, count = here()
    parts = _cut(order, size)
    if len(parts) < count:
        share = -(-len(order) // count)
        parts = _cut(order, lambda rows, start: min(size(rows, start), share))

    def mine() -> Iterator[tuple[list[int], T]]:
        left = deque(parts[index::count])
        while left:
            try:
                done = work(left[0])
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
                halve(error, left[0])
            else:
                yield left.popleft(), done
                continue
            _clear()
            left = deque(_cut([row for part in left for row in part], size))

    yield from everyones(mine(), what)


def _cut(order: Sequence[int], size: Callable[[Sequence[int], int], int]) -> list[list[int]]:
    parts, start = [], 0
    while start < len(order):
        parts.append(list(order[start : start + size(order, start)]))
        start += len(parts[-1])
    return parts


def out_of_memory(error: BaseException) -> bool:
    """Whether a smaller batch may help: an accelerator's own error, or the plain one of torch's allocator on a CPU."""
    from accelerate.utils.memory import should_reduce_batch_size

    return isinstance(error, torch.OutOfMemoryError) or should_reduce_batch_size(error)


def _clear() -> None:
    """Give back what torch holds on to for tensors like those that didn't fit."""
    from accelerate.utils.memory import clear_device_cache

    clear_device_cache()

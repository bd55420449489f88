"""Prompts read once, up to their last token, and continued from there under one injection after another."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from ivlens.models.backend import Backend
from ivlens.running.batches import in_batches
from ivlens.running.injection import Injection
from ivlens.running.tokens import TokenizedPrompt, common_beginning, pad_left

__all__ = ["Reader", "Run"]

T = TypeVar("T")
MOST = 64, 512  # prompts together on a CPU, and elsewhere, beyond which steps of one token each gain little
LEAST_SHARED = 8  # tokens; below, reading a common beginning apart isn't worth a forward pass


class Reader:
    """Reads prompts up to their last token; what all of them begin with, such as the same demonstrations, only once."""

    def __init__(self, backend: Backend, rows: Sequence[TokenizedPrompt]):
        self.backend, self.rows = backend, rows
        # Under hooks of someone else's (such as `inject` around us) a prompt is run whole: they look for its last token.
        self.hooked = any(point.fwd_hooks for point in backend.model.hook_dict.values())
        self.beginning = common_beginning([row.prompt[:-1] for row in rows]) if len(rows) > 1 else ()
        self.caches: dict[int | None, Any] = {}

    def in_batches(
        self,
        batch_size: int | None,
        work: Callable[[list[int], Tensor, Tensor], T],
        what: str,
        *options: Any,
        new: int = 0,
    ) -> Iterator[tuple[list[int], T]]:
        """The numbers of some prompts, and what `work` makes of them, of their tokens, padded on the left, and their mask; see
        `batches.in_batches`."""

        def padded(index: list[int]) -> T:
            some = [self.rows[i].prompt for i in index]
            return work(index, *pad_left(some, some[0][0], self.backend.device))

        sizes: dict[str, Any] = {
            "most": MOST,
            "new": new,
            "copies": 3,
        }  # as read, as read under an injection, and in use
        yield from in_batches(self.backend, self.rows, batch_size, padded, what, *options, **sizes)

    def read(self, tokens: Tensor, mask: Tensor, injection: Injection | None = None) -> Any:
        """Keys and values of all but the last prompt token (None for prompts of one token, and under others' hooks)."""
        if tokens.shape[1] == 1 or self.hooked:
            return None
        n = 0 if injection is not None and injection.per_row else len(self.beginning)
        if n < LEAST_SHARED:
            n, cache = 0, self.backend.new_cache(tokens.shape[0])
        else:
            cache = self.backend.spread_cache(self._cache_of_beginning(injection), mask[:, :n])
        if tokens.shape[1] - 1 > n:
            with _injected(self.backend, injection, _before):
                self.backend.forward(tokens[:, n:-1], mask[:, :-1], cache=cache)
        return cache

    def runs(self, tokens: Tensor, mask: Tensor, plain: Any, injection: Injection | None) -> Callable[[], Run]:
        """Runs from the keys and values of `read` without an injection (`plain`), or, where it acts before the last token, its own."""
        everywhere = injection is not None and injection.everywhere
        cache = self.read(tokens, mask, injection) if everywhere else plain
        return partial(Run, self.backend, tokens, mask, cache, injection)

    def _cache_of_beginning(self, injection: Injection | None) -> Any:
        key = None if injection is None else id(injection)
        if key not in self.caches:
            self.caches[key] = self.backend.new_cache(1)
            tokens = torch.tensor([self.beginning], device=self.backend.device)
            with _injected(self.backend, injection, _before):
                self.backend.forward(tokens, torch.ones_like(tokens), cache=self.caches[key])
        return self.caches[key]


def _before(positions: str) -> slice | None:
    """Which of the columns before the last prompt token."""
    return slice(None) if positions == "all" else None


@contextmanager
def _injected(
    backend: Backend,
    injection: Injection | None,
    columns: Callable[[str], slice | None],
    end: int | None = None,
    opened: dict[int, Tensor] | None = None,
) -> Iterator[None]:
    """Add to these columns of the forward passes inside, by positions; `end` is the prompt's last one, for gates."""
    if injection is None:
        yield
        return

    def adder(positions: str) -> Callable[[Tensor, Tensor], Tensor] | None:
        if (here := columns(positions)) is None:
            return None

        def add(x: Tensor, change: Tensor) -> Tensor:
            changed = x.clone()
            changed[:, here] = (x + change)[:, here]
            return changed

        return add

    awaited: set[int] = set()
    with backend.model.hooks(fwd_hooks=injection.hooks(backend, adder, awaited, end, opened)):
        yield
    if awaited:
        raise RuntimeError(f"nothing was injected after layer(s) {sorted(awaited)}")


class Run:
    """A batch of prompts about to be continued, from a cache of all but their last token or from nothing."""

    def __init__(self, backend: Backend, tokens: Tensor, mask: Tensor, cache: Any, injection: Injection | None):
        self.backend, self.mask, self.injection = backend, mask, injection
        self.fed = tokens if cache is None else tokens[:, -1:]
        self.cache = backend.new_cache(len(tokens)) if cache is None else copy.deepcopy(cache)
        self.opened: dict[int, Tensor] = {}  # which rows' gates are open, once the prompt's last token has been seen

    def first(self) -> Tensor:
        """Logits after the prompt, [batch 1 d_vocab]."""
        end = self.fed.shape[1] - 1
        with _injected(
            self.backend, self.injection, lambda at: slice(0 if at == "all" else end, None), end, self.opened
        ):
            return self.backend.forward(self.fed, self.mask, cache=self.cache)

    def step(self, tokens: Tensor) -> Tensor:
        """Logits after one more token, [batch 1 d_vocab]."""
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(tokens), 1)], dim=1)
        with _injected(
            self.backend, self.injection, lambda at: None if at == "last" else slice(None), None, self.opened
        ):
            return self.backend.forward(tokens, self.mask, cache=self.cache)

    def along(self, answers: Tensor) -> Tensor:
        """Logits along given answers, [batch answer d_vocab]."""
        length = answers.shape[1]
        if self.fed.shape[1] > 1:  # hooks around us look for the prompt's last token, so answer tokens come one by one
            return torch.cat([self.first(), *(self.step(answers[:, j : j + 1]) for j in range(length - 1))], dim=1)
        fed = torch.cat([self.fed, answers[:, :-1]], dim=1)
        mask = torch.cat([self.mask, self.mask.new_ones(len(answers), length - 1)], dim=1)
        with _injected(self.backend, self.injection, lambda at: slice(0, 1 if at == "last" else None), 0, self.opened):
            return self.backend.forward(fed, mask, cache=self.cache, keep=length)

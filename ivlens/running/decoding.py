"""Greedy decoding and answer scoring of many prompts under several injections, the prompts read once for all of them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ivlens.models.backend import Backend
from ivlens.models.comparison import without_training
from ivlens.running.batches import in_batches
from ivlens.running.injection import Injection
from ivlens.running.scores import check_finite, measure, normalized
from ivlens.running.tokens import TokenizedPrompt, common_beginning, fill_right, pad_left, tokenize
from ivlens.tasks.prompts import Prompt

__all__ = ["Completions", "choice_hits", "choose", "complete"]

LEAST_SHARED = 8  # tokens; below, reading a common beginning apart isn't worth a forward pass


@dataclass
class Completions:
    """Per prompt: the greedy text, whether the answer's first token is ranked first, the answer's log-probability (nats)."""

    texts: list[str]
    first_token: list[float]
    log_probability: list[float]


@without_training
@torch.inference_mode()
def complete(
    backend: Backend,
    rows: Sequence[TokenizedPrompt],
    injections: Mapping[Hashable, Injection | None],
    *,
    max_new_tokens: int | None = None,
    stop: str | None = "\n",
    wanted: Sequence[Sequence[str]] | None = None,
    temperature: float = 0.0,
    seed: int = 0,
    batch_size: int = 64,
    bar: tqdm | None = None,
) -> dict[Hashable, Completions]:
    """Decode and score every prompt under every injection.

    A vector at the last prompt token leaves the keys and values before it alone, so these are computed once per prompt and
    forked for each injection (unless it acts on all positions). What all prompts begin with is read once.

    Without `max_new_tokens` the prompts' answers are scored only. `wanted` are, per prompt, the only texts that matter: decoding ends
    early where it can become none of them. With a temperature tokens are sampled, else decoding is greedy.
    """
    done = {name: Completions([""] * len(rows), [0.0] * len(rows), [0.0] * len(rows)) for name in injections}
    for injection in filter(None, injections.values()):
        injection.check_rows(len(rows))
    if wanted is not None:
        wanted = [[normalized(backend.tokenizer, text) for text in texts] for texts in wanted]
    reader = _Reader(backend, rows)
    chosen_by = partial(_chosen, temperature=temperature, generator=torch.Generator(backend.device).manual_seed(seed))

    def work(index: list[int], tokens: Tensor, mask: Tensor) -> None:
        plain = reader.read(tokens, mask)
        for name, injection in injections.items():
            everywhere = injection is not None and injection.everywhere
            if injection is not None and injection.per_row:
                injection = injection.of_rows(index)
            cache = reader.read(tokens, mask, injection) if everywhere else plain
            begin = partial(_Run, backend, tokens, mask, cache, injection)
            if rows[index[0]].answer:
                for i, *scores in zip(index, *_score(begin(), [rows[i].answer for i in index])):
                    done[name].first_token[i], done[name].log_probability[i] = scores
            if max_new_tokens:
                only = None if wanted is None else [wanted[i] for i in index]
                for i, text in zip(index, _decode(begin(), max_new_tokens, stop, only, chosen_by)):
                    done[name].texts[i] = text
            if bar is not None:
                bar.update(len(index))

    reader.in_batches(batch_size, work)
    return done


@without_training
@torch.inference_mode()
def choose(
    backend: Backend,
    rows: Sequence[TokenizedPrompt],
    choices: Sequence[Sequence[tuple[int, ...]]],
    *,
    batch_size: int = 64,
) -> list[list[float]]:
    """Log-probability (nats) of each of a prompt's choices as its answer, the prompt read once for all of them."""
    found: list[list[float]] = [[] for _ in rows]
    reader = _Reader(backend, rows)

    def work(index: list[int], tokens: Tensor, mask: Tensor) -> None:
        cache, columns = reader.read(tokens, mask), []
        for k in range(max(len(choices[i]) for i in index)):
            # Where a prompt has fewer choices, its last one runs along and isn't counted.
            answers = [choices[i][min(k, len(choices[i]) - 1)] for i in index]
            columns.append(_score(_Run(backend, tokens, mask, cache, None), answers)[1])
        for i, values in zip(index, zip(*columns)):
            found[i] = list(values[: len(choices[i])])

    reader.in_batches(batch_size, work)
    return found


def choice_hits(backend: Backend, prompts: Sequence[Prompt], *, batch_size: int = 64) -> list[float]:
    """1 where the likeliest of a prompt's choices, per character, is a right answer."""
    options = [[replace(p, query=replace(p.query, output=choice)) for choice in p.query.choices or ()] for p in prompts]
    flat = iter(tokenize(backend, [prompt for each in options for prompt in each]))
    answers = [[next(flat).answer for _ in each] for each in options]
    hits = []
    for prompt, values in zip(prompts, choose(backend, tokenize(backend, prompts), answers, batch_size=batch_size)):
        choices = prompt.query.choices or ()
        # Per character, so that a long option isn't unlikely for its length alone.
        best = max(range(len(choices)), key=lambda k: values[k] / len(choices[k]))
        hits.append(float(choices[best] in prompt.query.answers))
    return hits


class _Reader:
    """Reads prompts up to their last token; what all of them begin with, such as the same demonstrations, only once."""

    def __init__(self, backend: Backend, rows: Sequence[TokenizedPrompt]):
        self.backend, self.prompts = backend, [row.prompt for row in rows]
        # Under hooks of someone else's (such as `inject` around us) a prompt is run whole: they look for its last token.
        self.hooked = any(point.fwd_hooks for point in backend.model.hook_dict.values())
        self.beginning = common_beginning([prompt[:-1] for prompt in self.prompts]) if len(rows) > 1 else ()
        self.caches: dict[int | None, Any] = {}

    def in_batches(self, batch_size: int, work: Callable[[list[int], Tensor, Tensor], None]) -> None:
        """Give `work` the numbers of some prompts, their tokens, padded on the left, and their mask, until all are done."""

        def padded(index: list[int]) -> None:
            some = [self.prompts[i] for i in index]
            work(index, *pad_left(some, some[0][0], self.backend.device))

        in_batches(list(map(len, self.prompts)), batch_size, padded)

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


class _Run:
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


def _score(run: _Run, given: Sequence[tuple[int, ...]]) -> tuple[list[float], list[float]]:
    """First-token hit and log-probability of each answer, teacher-forced."""
    answers, counted = fill_right(given, run.fed.device)
    logits = run.along(answers)
    first = (logits[:, 0].argmax(-1) == answers[:, 0]).float().tolist()
    return first, measure("log_probability", logits[:, None], answers, counted)[:, 0].tolist()


def _decode(
    run: _Run,
    max_new_tokens: int,
    stop: str | None,
    wanted: Sequence[Sequence[str]] | None,
    chosen_by: Callable[[Tensor], Tensor],
) -> list[str]:
    tokenizer, ends, n = run.backend.tokenizer, set(run.backend.end_tokens), len(run.fed)
    written: list[list[int]] = [[] for _ in range(n)]
    texts, open_rows = [""] * n, set(range(n))
    logits = run.first()
    for step in range(max_new_tokens):
        last = chosen_by(logits[:, -1])
        for row in sorted(open_rows):
            token = int(last[row, 0])
            if token in ends:
                open_rows.discard(row)
                continue
            written[row].append(token)
            texts[row] = tokenizer.decode(written[row])
            if stop and stop in texts[row].lstrip():
                lead = len(texts[row]) - len(texts[row].lstrip())
                texts[row] = texts[row][:lead] + texts[row].lstrip().split(stop)[0]
                open_rows.discard(row)
            elif wanted is not None and not any(_may_become(normalized(tokenizer, texts[row]), x) for x in wanted[row]):
                open_rows.discard(row)
        if not open_rows or step == max_new_tokens - 1:
            break
        logits = run.step(last)
    return texts


def _may_become(text: str, wanted: str) -> bool:
    """Whether more tokens can make this text that one, but for white space, which some tokenizers take back later."""
    begun, whole = ("".join(x.split()) for x in (text, wanted))
    return whole.startswith(begun.rstrip("\ufffd"))  # half a character


def _chosen(logits: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    """The next tokens, [batch 1]: the likeliest, or sampled."""
    best = logits.max(-1, keepdim=True)
    check_finite(best.values, logits.dtype)
    if not temperature:
        return best.indices
    return torch.multinomial((logits.float() / temperature).softmax(-1), 1, generator=generator)

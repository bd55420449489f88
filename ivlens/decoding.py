"""Greedy decoding and answer scoring of many prompts under several injections, the prompts read once for all of them."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Iterator

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ivlens.models.backends import Backend
from ivlens.prompts import TokenizedPrompt, pad_left
from ivlens.steering import Injection

__all__ = ["Completions", "complete"]


@dataclass
class Completions:
    """Per prompt: the greedy text, whether the answer's first token is ranked first, the answer's log-probability (nats)."""

    texts: list[str]
    first_token: list[float]
    log_probability: list[float]


@torch.inference_mode()
def complete(
    backend: Backend,
    rows: Sequence[TokenizedPrompt],
    injections: Mapping[str, Injection | None],
    *,
    max_new_tokens: int | None = None,
    stop: str | None = "\n",
    batch_size: int = 64,
    bar: tqdm | None = None,
) -> dict[str, Completions]:
    """Decode and score every prompt under every injection.

    A vector at the last prompt token leaves the keys and values before it alone, so these are computed once per prompt and
    forked for each injection (unless it acts on all positions).

    Parameters
    ----------
    max_new_tokens
        How far to decode; None scores the prompts' answers only.
    """
    done = {name: Completions([""] * len(rows), [0.0] * len(rows), [0.0] * len(rows)) for name in injections}
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].prompt))
    for start in range(0, len(order), batch_size):
        index = order[start : start + batch_size]
        batch = [rows[i] for i in index]
        tokens, mask = pad_left([r.prompt for r in batch], batch[0].prompt[0], backend.device)
        plain = _read(backend, tokens, mask)
        for name, injection in injections.items():
            everywhere = injection is not None and injection.positions == "all"
            cache = _read(backend, tokens, mask, injection) if everywhere else plain
            if batch[0].answer:
                first, log_probability = _score(backend, batch, tokens, mask, _fork(cache), injection)
                for i, f, lp in zip(index, first, log_probability):
                    done[name].first_token[i], done[name].log_probability[i] = f, lp
            if max_new_tokens:
                texts = _decode(backend, tokens, mask, _fork(cache), injection, max_new_tokens, stop)
                for i, text in zip(index, texts):
                    done[name].texts[i] = text
            if bar is not None:
                bar.update(len(index))
    return done


def _read(backend: Backend, tokens: Tensor, mask: Tensor, injection: Injection | None = None) -> Any:
    """Keys and values of all but the last prompt token (None for prompts of one token)."""
    if tokens.shape[1] == 1:
        return None
    cache = backend.new_cache(tokens.shape[0])
    with _injected(backend, injection, everywhere=True):
        backend.forward(tokens[:, :-1], mask[:, :-1], cache=cache)
    return cache


def _fork(cache: Any) -> Any:
    return copy.deepcopy(cache)


@contextmanager
def _injected(backend: Backend, injection: Injection | None, *, everywhere: bool) -> Iterator[None]:
    """Add to every position of the forward passes inside, or to the first position only."""
    if injection is None:
        yield
        return

    def add(x: Tensor, vector: Tensor) -> Tensor:
        return x + vector if everywhere else torch.cat([x[:, :1] + vector, x[:, 1:]], dim=1)

    fired: set[int] = set()
    with backend.model.hooks(fwd_hooks=injection.hooks(backend, add, fired)):
        yield
    if fired != set(injection.additions):
        raise RuntimeError(f"nothing was injected after layer(s) {sorted(set(injection.additions) - fired)}")


def _score(
    backend: Backend, batch: Sequence[TokenizedPrompt], tokens: Tensor, mask: Tensor, cache: Any, injection: Injection | None
) -> tuple[list[float], list[float]]:
    """First-token hit and log-probability of each answer, teacher-forced from the last prompt token on."""
    longest = max(len(r.answer) for r in batch)
    device = tokens.device
    answers = torch.tensor([r.answer + r.answer[-1:] * (longest - len(r.answer)) for r in batch], device=device)
    counted = torch.tensor([[j < len(r.answer) for j in range(longest)] for r in batch], device=device)
    fed = torch.cat([tokens[:, -1:], answers[:, :-1]], dim=1)
    seen = torch.cat([mask, mask.new_ones(len(batch), longest - 1)], dim=1)
    with _injected(backend, injection, everywhere=injection is not None and injection.positions != "last"):
        logits = backend.forward(fed, seen, cache=cache or backend.new_cache(len(batch)), keep=longest).float()
    first = (logits[:, 0].argmax(-1) == answers[:, 0]).float().tolist()
    per_token = logits.gather(-1, answers[..., None])[..., 0] - logits.logsumexp(-1)
    return first, torch.where(counted, per_token, 0.0).sum(-1).tolist()


def _decode(
    backend: Backend, tokens: Tensor, mask: Tensor, cache: Any, injection: Injection | None, max_new_tokens: int, stop: str | None
) -> list[str]:
    tokenizer = backend.tokenizer
    ends = set(_as_list(tokenizer.eos_token_id))
    written: list[list[int]] = [[] for _ in range(len(tokens))]
    texts, open_rows = [""] * len(tokens), set(range(len(tokens)))
    cache = cache or backend.new_cache(len(tokens))
    last = tokens[:, -1:]
    for step in range(max_new_tokens):
        here = injection if step == 0 or injection is None or injection.positions != "last" else None
        with _injected(backend, here, everywhere=True):
            logits = backend.forward(last, mask, cache=cache)
        last = logits[:, -1].argmax(-1, keepdim=True)
        mask = torch.cat([mask, mask.new_ones(len(tokens), 1)], dim=1)
        for row in sorted(open_rows):
            token = int(last[row, 0])
            if token in ends:
                open_rows.discard(row)
                continue
            written[row].append(token)
            texts[row] = tokenizer.decode(written[row])
            if stop and stop in texts[row].lstrip():
                texts[row] = texts[row][: len(texts[row]) - len(texts[row].lstrip())] + texts[row].lstrip().split(stop)[0]
                open_rows.discard(row)
        if not open_rows:
            break
    return texts


def _as_list(ids: int | Sequence[int] | None) -> list[int]:
    return [] if ids is None else [ids] if isinstance(ids, int) else list(ids)

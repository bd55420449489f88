"""Greedy decoding and answer scoring of many prompts under several injections, the prompts read once for all of them."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ivlens.models.backend import Backend
from ivlens.models.comparison import evaluating, without_training
from ivlens.running.continuing import Reader, Run
from ivlens.running.injection import Injection
from ivlens.running.scores import check_finite, measure, normalized
from ivlens.running.tokens import TokenizedPrompt, fill_right, pad_left, tokenize
from ivlens.tasks.prompts import Prompt

__all__ = ["Completions", "choice_hits", "choose", "complete", "stream"]


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
    batch_size: int | None = None,
    bar: tqdm | None = None,
) -> dict[Hashable, Completions]:
    """Decode and score every prompt under every injection.

    A vector at the last prompt token leaves the keys and values before it alone, so these are computed once per prompt and
    forked for each injection (unless it acts on all positions). What all prompts begin with is read once.

    Without `max_new_tokens` the prompts' answers are scored only. `wanted` are, per prompt, the only texts that matter: decoding ends
    early where it can become none of them. With a temperature tokens are sampled, each prompt's by itself, else decoding is greedy.
    """
    for injection in filter(None, injections.values()):
        injection.check_rows(len(rows))
    if wanted is not None:
        wanted = [[normalized(backend.tokenizer, text) for text in texts] for texts in wanted]
    reader, sampling = Reader(backend, rows), (temperature, seed)
    done = {name: Completions([""] * len(rows), [0.0] * len(rows), [0.0] * len(rows)) for name in injections}

    def work(index: list[int], tokens: Tensor, mask: Tensor) -> list[tuple[list[str], Any]]:
        plain, found = reader.read(tokens, mask), []
        for injection in injections.values():
            if injection is not None and injection.per_row:
                injection = injection.of_rows(index)
            begin, texts, scores = reader.runs(tokens, mask, plain, injection), [""] * len(index), None
            if rows[index[0]].answer:
                scores = _score(begin(), [rows[i].answer for i in index])
            if max_new_tokens:
                only = None if wanted is None else [wanted[i] for i in index]
                for written, _ in _decode(begin(), max_new_tokens, stop, only, _chooser(index, *sampling)):
                    texts = written
            found.append((texts, scores))
        return found

    options = (list(injections.items()), max_new_tokens, stop, wanted, sampling)
    for index, found in reader.in_batches(batch_size, work, "completing", *options, new=max_new_tokens or 0):
        for each, (texts, scores) in zip(done.values(), found):
            for j, i in enumerate(index):
                each.texts[i] = texts[j]
                if scores is not None:
                    each.first_token[i], each.log_probability[i] = (x[j] for x in scores)
        if bar is not None:
            bar.update(len(index) * len(injections))
    return done


def stream(
    backend: Backend,
    row: TokenizedPrompt,
    injections: Mapping[Hashable, Injection | None],
    *,
    max_new_tokens: int,
    stop: str | None = "\n",
) -> Iterator[tuple[Hashable, str, Tensor]]:
    """What `complete` writes after one prompt, as it is written: one token under each injection in turn.

    Gives the injection's name, its text so far, and the logits [d_vocab] that its last token was chosen by. Between two tokens
    the model is as without us, so whoever reads may stop at any.
    """

    for injection in filter(None, injections.values()):
        injection.check_rows(1)

    def begun(injection: Injection | None, reader: Reader, *prompt: Any) -> Iterator[tuple[list[str], Tensor]]:
        yield from _decode(reader.runs(*prompt, injection)(), max_new_tokens, stop, None, _chosen)

    def in_turn() -> Iterator[tuple[Hashable, str, Tensor]]:
        reader, (tokens, mask) = Reader(backend, [row]), pad_left([row.prompt], row.prompt[0], backend.device)
        prompt = tokens, mask, reader.read(tokens, mask)
        still_open = {name: begun(injection, reader, *prompt) for name, injection in injections.items()}
        while still_open:
            for name, steps in list(still_open.items()):
                step = next(steps, None)
                if step is None:
                    del still_open[name]
                else:
                    yield name, step[0][0], step[1][0, -1]

    steps = in_turn()
    while True:
        with evaluating(backend.model, getattr(backend.model, "original_model", backend.model)), torch.inference_mode():
            step = next(steps, None)
        if step is None:
            return
        yield step


@without_training
@torch.inference_mode()
def choose(
    backend: Backend,
    rows: Sequence[TokenizedPrompt],
    choices: Sequence[Sequence[tuple[int, ...]]],
    *,
    batch_size: int | None = None,
) -> list[list[float]]:
    """Log-probability (nats) of each of a prompt's choices as its answer, the prompt read once for all of them."""
    found: list[list[float]] = [[] for _ in rows]
    reader = Reader(backend, rows)

    def work(index: list[int], tokens: Tensor, mask: Tensor) -> list[list[float]]:
        cache, columns = reader.read(tokens, mask), []
        for k in range(max(len(choices[i]) for i in index)):
            # Where a prompt has fewer choices, its last one runs along and isn't counted.
            answers = [choices[i][min(k, len(choices[i]) - 1)] for i in index]
            columns.append(_score(Run(backend, tokens, mask, cache, None), answers)[1])
        return [list(values[: len(choices[i])]) for i, values in zip(index, zip(*columns))]

    longest = max((len(answer) for some in choices for answer in some), default=0)
    for index, values in reader.in_batches(batch_size, work, "choosing", hash(tuple(map(tuple, choices))), new=longest):
        for i, each in zip(index, values):
            found[i] = each
    return found


def choice_hits(backend: Backend, prompts: Sequence[Prompt], *, batch_size: int | None = None) -> list[float]:
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


def _score(run: Run, given: Sequence[tuple[int, ...]]) -> tuple[list[float], list[float]]:
    """First-token hit and log-probability of each answer, teacher-forced."""
    answers, counted = fill_right(given, run.fed.device)
    logits = run.along(answers)
    first = (logits[:, 0].argmax(-1) == answers[:, 0]).float().tolist()
    return first, measure("log_probability", logits[:, None], answers, counted)[:, 0].tolist()


def _decode(
    run: Run,
    max_new_tokens: int,
    stop: str | None,
    wanted: Sequence[Sequence[str]] | None,
    chosen_by: Callable[[Tensor], Tensor],
) -> Iterator[tuple[list[str], Tensor]]:
    """The rows' texts after every step (the same list), and the logits [batch 1 d_vocab] that it chose by."""
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
        yield texts, logits
        if not open_rows or step == max_new_tokens - 1:
            break
        logits = run.step(last)


def _may_become(text: str, wanted: str) -> bool:
    """Whether more tokens can make this text that one, but for white space, which some tokenizers take back later."""
    begun, whole = ("".join(x.split()) for x in (text, wanted))
    return whole.startswith(begun.rstrip("\ufffd"))  # half a character


def _chosen(logits: Tensor, temperature: float = 0.0, generators: Sequence[torch.Generator] = ()) -> Tensor:
    """The next tokens, [batch 1]: the likeliest, or sampled."""
    best = logits.max(-1, keepdim=True)
    check_finite(best.values, logits.dtype)
    if not temperature:
        return best.indices
    drawn = torch.cat([torch.rand(1, 1, dtype=torch.double, generator=x) for x in generators])
    exact = torch.float32 if logits.device.type == "mps" else torch.float64  # which has no more
    below = (logits.to(exact) / temperature).softmax(-1).cumsum(-1)
    return torch.searchsorted(below, drawn.to(exact).to(below.device) * below[:, -1:], right=True).clamp(
        max=logits.shape[-1] - 1
    )


def _chooser(index: Sequence[int], temperature: float, seed: int) -> Callable[[Tensor], Tensor]:
    """Each row draws from numbers of its own, so that what it draws is the same in any batch."""
    generators = [torch.Generator().manual_seed(seed * 1_000_003 + i) for i in index] if temperature else []
    return partial(_chosen, temperature=temperature, generators=generators)

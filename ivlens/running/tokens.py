"""Text to token numbers, as the model's own `to_tokens` would (one BOS where the model wants it, never two), and padding."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ivlens.models.backend import Backend
from ivlens.tasks.prompts import Prompt

__all__ = ["TokenizedPrompt", "TooLongError", "common_beginning", "fill_right", "pad_left", "room_for", "tokenize"]

MARK = "\ue000"  # within what looks like a special token in data, while a template is rendered


class TooLongError(ValueError):
    """A prompt and its answer don't fit the model's context."""


@dataclass(frozen=True)
class TokenizedPrompt:
    """Token numbers of a prompt and of the answer that continues it."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...] = ()


def tokenize(
    backend: Backend,
    prompts: Sequence[Prompt | str | Tensor],
    answers: Sequence[str] | None = None,
    *,
    spare: int = 0,
) -> list[TokenizedPrompt]:
    """Token numbers of prompts (1-D tensors of them are taken as they are) and of answers; `spare` more must fit the context.

    Answers continue the prompts exactly as given (mind the leading space); `Prompt` objects have their own. ValueError where one (but a
    free answer) tokenizes to nothing, their numbers don't match, or both together are longer than the context.
    """
    if not len(prompts):
        raise ValueError("no prompts given; pass at least one")
    if answers is None and all(isinstance(p, Prompt) for p in prompts):
        answers = [p.answered(backend.tokenizer)[0] for p in prompts]
    if answers is not None and len(answers) != len(prompts):
        raise ValueError(f"{len(prompts)} prompts but {len(answers)} answers; give one answer per prompt")
    out = []
    for i, prompt in enumerate(prompts):
        ids, answer = _encode_pair(backend, prompt, "" if answers is None else answers[i])
        if not ids:
            raise ValueError(f"prompt {i} tokenizes to nothing; give it some text")
        unanswered = isinstance(prompt, Prompt) and (prompt.query.check or not prompt.query.output)
        free = unanswered and not (answers and answers[i])
        if answers is not None and not answer and not free:
            raise ValueError(f"answer {i} ({answers[i]!r}) tokenizes to nothing; give every prompt an answer with text")
        if backend.n_ctx and len(ids) + len(answer) + spare > backend.n_ctx:
            at = f" ({prompt.task}, {prompt.source}: {prompt.query.input[:40]!r})" if isinstance(prompt, Prompt) else ""
            said = f"prompt {i}{at} has {len(ids)} tokens and its answer {len(answer)}"
            there = f"{backend.name} has a context of {backend.n_ctx}"
            raise TooLongError(f"{said}, but {there}; use fewer shots or shorter inputs (nothing is ever cut off)")
        out.append(TokenizedPrompt(ids, answer))
    return out


def _encode_pair(backend: Backend, prompt: Prompt | str | Tensor, answer: str) -> tuple[tuple[int, ...], ...]:
    """Tokens of the prompt and of its answer, which begins with one that says something."""
    ids = _encode_prompt(backend, prompt)
    found = _encode_answer(backend, prompt, ids, answer)
    if not isinstance(prompt, Prompt) or prompt.query.choices:  # a prompt must not know which option is right
        return ids, found
    if found and prompt.style == "chat":
        # The template's own tokens, where the answer begins within one of those that the prompt alone would end with.
        together = _encode_prompt(backend, prompt, answer)
        same = len(common_beginning([ids, together]))
        ids, found = together[:same], together[same:]
    while len(found) > 1 and not backend.tokenizer.decode([found[0]]).strip():  # " 7" may be a space token and a digit
        ids, found = ids + found[:1], found[1:]
    return ids, found


def _encode_prompt(backend: Backend, prompt: Prompt | str | Tensor, more: str = "") -> tuple[int, ...]:
    """The prompt's tokens, and those of a text that follows it."""
    if isinstance(prompt, Tensor):
        return tuple(prompt.flatten().tolist())
    tokenizer, chat = backend.tokenizer, isinstance(prompt, Prompt) and prompt.style == "chat"
    if isinstance(prompt, str):  # one's own text, in which a special token is meant
        ids = tokenizer.encode(prompt + more, add_special_tokens=False)
    elif chat:
        ids = _encode_chat(tokenizer, prompt, more)
    else:
        ids = _encode_data(tokenizer, prompt.render() + more)
    bos = tokenizer.bos_token_id
    prepends = not chat and getattr(backend.model.cfg, "default_prepend_bos", True)  # a template has its own, or none
    if bos is not None and prepends and ids[:1] != [bos]:
        ids = [bos, *ids]
    return tuple(ids)


def _encode_data(tokenizer: Any, text: str) -> list[int]:
    """Data is text: where it looks like a special token, it isn't one."""
    return tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)


def _encode_chat(tokenizer: Any, prompt: Prompt, more: str) -> list[int]:
    """The template's special tokens, and text that looks like them as text."""
    added = (str(token) for token in tokenizer.added_tokens_decoder.values() if token.special)
    special = sorted({*tokenizer.all_special_tokens, *added}, key=len, reverse=True)
    looks = re.compile("|".join(map(re.escape, special)) or "(?!)")

    def marked(text: str) -> str:
        return looks.sub(lambda found: found[0][:1] + MARK + found[0][1:], text)

    text = prompt.mapped(marked).render(tokenizer) + marked(more)
    ids: list[int] = []
    alike = "|".join(re.escape(token[:1] + MARK + token[1:]) for token in special)
    for i, part in enumerate(re.split(f"({alike})", text)):
        if i % 2:  # what was marked
            ids += _encode_data(tokenizer, part.replace(MARK, ""))
        else:
            ids += tokenizer.encode(part, add_special_tokens=False)
    return ids


def _encode_answer(backend: Backend, prompt: Any, ids: tuple[int, ...], answer: str) -> tuple[int, ...]:
    alone = tuple(_encode_data(backend.tokenizer, answer))
    if isinstance(prompt, Tensor) or not alone:
        return alone
    # Tokenized together where that leaves the prompt's tokens alone: some tokenizers add a space to a text's beginning.
    together = _encode_prompt(backend, prompt, answer)
    return together[len(ids) :] if together[: len(ids)] == ids and len(together) > len(ids) else alone


def room_for(backend: Backend, prompts: Sequence[Prompt], rows: Sequence[TokenizedPrompt]) -> int:
    """Tokens that the longest right answer may take, and the one that ends it."""
    others = [len(_encode_data(backend.tokenizer, f" {x}")) for p in prompts for x in p.query.outputs or ()]
    return max([*others, *(len(row.answer) for row in rows)]) + 1


def pad_left(rows: Sequence[Sequence[int]], pad: int, device: Any = None) -> tuple[Tensor, Tensor]:
    """Token rows padded on the left, and their attention mask, both [batch pos]."""
    width = max(map(len, rows))
    tokens = torch.tensor([[pad] * (width - len(r)) + list(r) for r in rows], device=device)
    mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows], device=device)
    return tokens, mask


def fill_right(rows: Sequence[Sequence[int]], device: Any = None) -> tuple[Tensor, Tensor]:
    """Answers filled up on the right, where nothing looks back, with their last token; and which tokens count."""
    longest = max(map(len, rows))
    filled = [list(r) + list(r[-1:]) * (longest - len(r)) for r in rows]
    counted = [[j < len(r) for j in range(longest)] for r in rows]
    return torch.tensor(filled, dtype=torch.long, device=device), torch.tensor(counted, dtype=torch.bool, device=device)


def fed_with_answers(
    rows: Sequence[tuple[Sequence[int], Sequence[int]]], device: Any = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Prompts with their answers but for the last token, which is never an input, and their mask; answers as in `fill_right`."""
    answers, counted = fill_right([answer for _, answer in rows], device)
    fed = [(*prompt, *answer[:-1]) for (prompt, _), answer in zip(rows, answers.tolist())]
    return *pad_left(fed, fed[0][0], device), answers, counted


def common_beginning(rows: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """The tokens that all rows begin with."""
    low, high = min(rows), max(rows)  # whatever these two share, in this order all between them share
    n = next((i for i, (a, b) in enumerate(zip(low, high)) if a != b), min(len(low), len(high)))
    return low[:n]

"""Text to token numbers, as the model's own `to_tokens` would (one BOS where the model wants it, never two), and padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ivlens.models.backend import Backend
from ivlens.tasks.prompts import Prompt

__all__ = ["TokenizedPrompt", "common_beginning", "fill_right", "pad_left", "tokenize"]


@dataclass(frozen=True)
class TokenizedPrompt:
    """Token numbers of a prompt and of the answer that continues it."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...] = ()


def tokenize(
    backend: Backend, prompts: Sequence[Prompt | str | Tensor], answers: Sequence[str] | None = None
) -> list[TokenizedPrompt]:
    """Token numbers of prompts and answers.

    Parameters
    ----------
    prompts
        `Prompt` objects, texts, or 1-D tensors of token numbers (taken as they are).
    answers
        Texts that continue the prompts exactly as given (mind the leading space). For `Prompt` objects, their own answers.

    Raises
    ------
    ValueError
        If a prompt or answer is empty or tokenizes to nothing, numbers don't match, or it is longer than the context.
    """
    if not len(prompts):
        raise ValueError("no prompts given; pass at least one")
    if answers is None and all(isinstance(p, Prompt) for p in prompts):
        answers = [p.answer for p in prompts]
    if answers is not None and len(answers) != len(prompts):
        raise ValueError(f"{len(prompts)} prompts but {len(answers)} answers; give one answer per prompt")
    out = []
    for i, prompt in enumerate(prompts):
        ids = _encode_prompt(backend, prompt)
        answer = () if answers is None else _encode_answer(backend, prompt, ids, answers[i])
        # " 7" may be a space token and a digit: the answer's first token should be one that says something.
        while isinstance(prompt, Prompt) and len(answer) > 1 and not backend.tokenizer.decode([answer[0]]).strip():
            ids, answer = ids + answer[:1], answer[1:]
        if not ids:
            raise ValueError(f"prompt {i} tokenizes to nothing; give it some text")
        if answers is not None and not answer:
            raise ValueError(
                f"answer {i} ({answers[i]!r}) tokenizes to nothing; give every prompt an answer with text in it"
            )
        if backend.n_ctx and len(ids) + len(answer) > backend.n_ctx:
            name = (
                f" ({prompt.task}, {prompt.source}: {prompt.query.input[:40]!r})" if isinstance(prompt, Prompt) else ""
            )
            raise ValueError(
                f"prompt {i}{name} has {len(ids)} tokens and its answer {len(answer)}, but {backend.name} has a context of "
                f"{backend.n_ctx}; use fewer shots or shorter inputs (nothing is ever cut off)"
            )
        out.append(TokenizedPrompt(ids, answer))
    return out


def _encode_prompt(backend: Backend, prompt: Prompt | str | Tensor) -> tuple[int, ...]:
    if isinstance(prompt, Tensor):
        return tuple(prompt.flatten().tolist())
    tokenizer = backend.tokenizer
    text = prompt.render(tokenizer) if isinstance(prompt, Prompt) else prompt
    ids = tokenizer.encode(text, add_special_tokens=False)
    bos = tokenizer.bos_token_id
    if bos is not None and getattr(backend.model.cfg, "default_prepend_bos", True) and ids[:1] != [bos]:
        ids = [bos, *ids]
    return tuple(ids)


def _encode_answer(backend: Backend, prompt: Any, ids: tuple[int, ...], answer: str) -> tuple[int, ...]:
    alone = tuple(backend.tokenizer.encode(answer, add_special_tokens=False))
    if isinstance(prompt, Tensor) or not alone:
        return alone
    # Tokenized together where that leaves the prompt's tokens alone: some tokenizers add a space to a text's beginning.
    text = prompt.render(backend.tokenizer) if isinstance(prompt, Prompt) else prompt
    together = _encode_prompt(backend, text + answer)
    return together[len(ids) :] if together[: len(ids)] == ids and len(together) > len(ids) else alone


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


def common_beginning(rows: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """The tokens that all rows begin with."""
    low, high = min(rows), max(rows)  # whatever these two share, in this order all between them share
    n = next((i for i, (a, b) in enumerate(zip(low, high)) if a != b), min(len(low), len(high)))
    return low[:n]

"""Prompts as training data: the loss is on the answer's tokens only, and nothing is cut off."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ivlens.running.tokens import tokenize
from ivlens.tasks.prompts import Prompt

if TYPE_CHECKING:
    import datasets

    from ivlens.models.backend import Backend

__all__ = ["answer_dataset"]

IGNORED = -100  # what Hugging Face models leave out of the loss


def answer_dataset(backend: Backend, prompts: Sequence[Prompt]) -> datasets.Dataset:
    """Prompt, answer and end of every prompt, tokenized as everywhere in ivlens.

    The end is the end-of-text token or, in style `chat`, the token with which the template ends an answer.

    Columns: `input_ids`, `attention_mask`, `labels`, which are -100 on the prompt, and `task`.

    Raises
    ------
    ValueError
        If an answer tokenizes to nothing, or prompt and answer are longer than the context.
    """
    import datasets

    rows = []
    for prompt, row in zip(prompts, tokenize(backend, prompts)):
        ids = [*row.prompt, *row.answer, *_end(backend, prompt)]
        labels = [IGNORED] * len(row.prompt) + ids[len(row.prompt) :]
        rows.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels, "task": prompt.task})
    return datasets.Dataset.from_list(rows)


def _end(backend: Backend, prompt: Prompt) -> tuple[int, ...]:
    """The token that ends the answer."""
    behind = prompt.answered(backend.tokenizer)[1]
    for token in backend.tokenizer.encode(behind, add_special_tokens=False) if behind else ():
        if token in backend.end_tokens or token in backend.tokenizer.all_special_ids:
            return (token,)
    end = backend.tokenizer.eos_token_id
    return () if end is None else (end if isinstance(end, int) else end[0],)

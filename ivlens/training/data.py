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
    """Prompt, answer and end-of-text token of every prompt, tokenized as everywhere in ivlens.

    Columns: `input_ids`, `attention_mask`, `labels`, which are -100 on the prompt, and `task`.

    Raises
    ------
    ValueError
        If an answer tokenizes to nothing, or prompt and answer are longer than the context.
    """
    import datasets

    end = backend.tokenizer.eos_token_id
    ends = () if end is None else (end if isinstance(end, int) else end[0],)
    rows = []
    for prompt, row in zip(prompts, tokenize(backend, prompts)):
        ids = [*row.prompt, *row.answer, *ends]
        labels = [IGNORED] * len(row.prompt) + ids[len(row.prompt) :]
        rows.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels, "task": prompt.task})
    return datasets.Dataset.from_list(rows)

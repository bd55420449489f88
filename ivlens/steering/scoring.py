"""Answers scored where there is a right one: its first token, exact match, ROUGE-L, probability."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ivlens.models.backend import Backend
from ivlens.running.decoding import complete
from ivlens.running.injection import Injection
from ivlens.running.scores import exact_match, rouge_l
from ivlens.running.tokens import room_for, tokenize
from ivlens.tasks.prompts import Prompt, common_stop
from ivlens.tasks.task import Task, same_input

__all__ = ["score_right"]

Condition = tuple[str, int]  # its name, and which draw of a random control


def score_right(
    backend: Backend,
    task: Task,
    prompts: Sequence[Prompt],
    conditions: Mapping[Condition, Injection | None],
    metrics: Sequence[str],
    batch_size: int | None,
) -> list[dict[str, Any]]:
    """The metrics of every prompt under each condition, all in one pass of decoding."""
    tokenized = tokenize(backend, prompts)
    generated = "exact_match" in metrics or "rouge_l" in metrics
    room = room_for(backend, prompts, tokenized) if generated else None
    options = {"max_new_tokens": room, "stop": common_stop(prompts), "batch_size": batch_size}
    done = complete(backend, tokenized, conditions, **options)
    rows = []
    for (condition, draw), result in done.items():
        for i, prompt in enumerate(prompts):
            query, text = prompt.query, result.texts[i].strip()
            values = {"first_token": result.first_token[i], "probability": math.exp(result.log_probability[i])}
            if generated:
                values["exact_match"] = exact_match(backend.tokenizer, text, query.answers)
                values["rouge_l"] = rouge_l(text, query.answers) if "rouge_l" in metrics else 0.0
            row = {"task": task.name, "condition": condition, "draw": draw, "prompt": i}
            row |= {metric: values[metric] for metric in metrics}
            rows.append(row | {"query": same_input(query), "input": query.input, "answer": query.output, "text": text})
    return rows

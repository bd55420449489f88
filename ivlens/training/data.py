"""Prompts as training data: the loss is on the answer's tokens only, and nothing is cut off."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ivlens.running.tokens import TooLongError, tokenize
from ivlens.tasks.prompts import Prompt, build_prompts
from ivlens.tasks.suite import TaskSuite

if TYPE_CHECKING:
    import datasets

    from ivlens.models.backend import Backend

__all__ = ["answer_dataset", "rows_needed", "training_rows"]

IGNORED = -100  # what Hugging Face models leave out of the loss


def answer_dataset(
    backend: Backend, prompts: Sequence[Prompt], *, teacher: Sequence[Prompt] | None = None, on_too_long: str = "error"
) -> datasets.Dataset:
    """Prompt, answer and end of every prompt, tokenized as everywhere in ivlens.

    The end is the end-of-text token or, in style `chat`, the token with which the template ends an answer.

    Parameters
    ----------
    teacher
        What a teacher is asked instead of each prompt, such as the same with demonstrations.
    on_too_long
        `error`, or `skip`, which leaves out rows that are longer than the context and says how many.

    Columns: `input_ids`, `attention_mask`, `labels`, which are -100 on the prompt, and `task`; with a teacher `teacher_ids`, its
    prompt and the same answer.

    Raises
    ------
    ValueError
        If there is no answer or it tokenizes to nothing, or prompt and answer are longer than the context.
    """
    import datasets

    if on_too_long not in ("error", "skip"):
        raise ValueError(f"on_too_long={on_too_long!r} is unknown; choose 'error' or 'skip'")
    rows, skipped = [], []
    for i, prompt in enumerate(prompts):
        try:
            (row,) = tokenize(backend, [prompt], spare=1)
            asked = tokenize(backend, [teacher[i]], spare=1)[0].prompt if teacher else ()
        except TooLongError:
            if on_too_long == "error":
                raise
            skipped.append(f"{prompt.task}, {prompt.source}")
            continue
        if not row.answer:
            said = f"{prompt.source or 'a prompt'} of task {prompt.task!r} ({prompt.query.input[:40]!r}) has no answer to train on"
            raise ValueError(f"{said}; give its example an output")
        ids = [*row.prompt, *row.answer, *_end(backend, prompt)]
        labels = [IGNORED] * len(row.prompt) + ids[len(row.prompt) :]
        rows.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels, "task": prompt.task})
        if teacher:
            rows[-1]["teacher_ids"] = [*asked, *ids[len(row.prompt) :]]
    if skipped:
        which = sorted(set(skipped))
        amounts = f"{len(skipped)} of {len(prompts)} rows are longer than the context and left out"
        more = ", …" if len(which) > 1 else ""
        warnings.warn(f"{amounts}, of {len(which)} example(s): {which[0]}{more}", stacklevel=3)
    if not rows:
        raise ValueError("every row is longer than the context; use fewer shots or shorter inputs")
    return datasets.Dataset.from_list(rows)


def _end(backend: Backend, prompt: Prompt) -> tuple[int, ...]:
    """The token that ends the answer."""
    behind = prompt.answered(backend.tokenizer)[1]
    for token in backend.tokenizer.encode(behind, add_special_tokens=False) if behind else ():
        if token in backend.end_tokens or token in backend.tokenizer.all_special_ids:
            return (token,)
    end = backend.tokenizer.eos_token_id
    return () if end is None else (end if isinstance(end, int) else end[0],)


def rows_needed(steps: int, batch_size: int, arguments: Mapping[str, Any]) -> int:
    """Rows that training takes, over all processes."""
    accumulated, processes = arguments.get("gradient_accumulation_steps", 1), os.environ.get("WORLD_SIZE", "1")
    return steps * batch_size * int(accumulated) * int(processes)


def training_rows(
    backend: Backend,
    suite: TaskSuite,
    n: int,
    look: Mapping[str, Any],
    on_too_long: str = "error",
    *,
    teacher_shots: int = 0,
) -> datasets.Dataset:
    """At least `n` rows, as many of each task, from its training split; see `answer_dataset`."""

    def prompts(**look: Any) -> list[Prompt]:
        return [p for t in suite.values() for p in build_prompts(t, n=-(-n // len(suite)), repeat=True, **look)]

    asked, teacher = prompts(**look), None
    if teacher_shots:  # the same queries, whatever the number of demonstrations
        shown = prompts(**{**look, "shots": teacher_shots})
        teacher = [replace(p, demonstrations=more.demonstrations) for p, more in zip(asked, shown, strict=True)]
    return answer_dataset(backend, asked, teacher=teacher, on_too_long=on_too_long)

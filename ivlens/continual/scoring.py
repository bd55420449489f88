"""Scores of tasks on fixed prompts, which share their demonstrations so that these are read once."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Any

from ivlens.models.backend import Backend
from ivlens.running.decoding import choice_hits, complete
from ivlens.running.scores import exact_match, rouge_l, words
from ivlens.running.tokens import room_for, tokenize
from ivlens.tasks.checks import passes
from ivlens.tasks.prompts import Prompt, build_prompts, common_stop
from ivlens.tasks.task import Task

__all__ = ["METRICS", "Scoring", "free_text", "score_task", "scored_prompts"]

METRICS = ("auto", "exact_match", "rouge_l")


@dataclass(frozen=True)
class Scoring:
    """How tasks are scored.

    Attributes
    ----------
    n_prompts
        Prompts per task; fewer where the split has fewer.
    split
        `test`, or `valid` while options are chosen.
    metric
        `exact_match` of the greedily generated answer, `rouge_l` (F1), or `auto`: ROUGE-L where answers are free text. Multiple
        choice is always scored by which option is likeliest per character, and free answers by their check.
    general_shots
        Demonstrations for general tasks: each number gives a score of its own (0: GP, 5: IP of FVG). General tasks with a check
        are asked in style `chat` without any (our choice).
    general_after
        `every` stage, or the `last` one only, which is all that the measures need.
    max_new_tokens
        How long free answers may be.
    """

    n_prompts: int = 100
    split: str = "test"
    metric: str = "auto"
    general_shots: tuple[int, ...] = (0, 5)
    general_after: str = "every"
    max_new_tokens: int = 40
    batch_size: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        if self.metric not in METRICS:
            raise ValueError(f"metric={self.metric!r} is unknown; choose one of {', '.join(METRICS)}")
        if self.general_after not in ("every", "last"):
            raise ValueError(f"general_after={self.general_after!r} is unknown; choose 'every' or 'last'")
        if self.n_prompts < 1 or any(shots < 0 for shots in self.general_shots):
            wanted = f"n_prompts={self.n_prompts} must be at least 1"
            raise ValueError(f"{wanted} and general_shots={self.general_shots} 0 or more")


def scored_prompts(
    task: Task, scoring: Scoring, *, shots: int, instruction: bool | str | int, style: str
) -> list[Prompt]:
    """Prompts with one wording of the instruction and the same demonstrations in all of them."""
    n = min(scoring.n_prompts, len(task.split(scoring.split)))
    options: dict[str, Any] = {"style": style, "split": scoring.split, "seed": scoring.seed}
    prompts = build_prompts(task, n=n or None, instruction=0 if instruction is True else instruction, **options)
    if not shots:
        return prompts
    if len(task.train) < shots:
        raise ValueError(f"task {task.name!r} has {len(task.train)} training examples, too few for shots={shots}")
    shown = tuple(random.Random(f"{scoring.seed}/{task.name}").sample(task.train, shots))
    return [replace(prompt, demonstrations=shown) for prompt in prompts]


def free_text(task: Task) -> bool:
    """Whether answers are of more than five words on average, and so not to be matched exactly (our choice)."""
    answers = [words(x.output) for x in (*task.train, *task.test)[:200]]
    return sum(answers) / len(answers) > 5


def score_task(backend: Backend, task: Task, prompts: list[Prompt], scoring: Scoring) -> list[float]:
    """One score between 0 and 1 per prompt."""
    if all(prompt.query.choices for prompt in prompts):
        return choice_hits(backend, prompts, batch_size=scoring.batch_size)
    rows = tokenize(backend, prompts)
    if task.is_checked:
        lengths = {"max_new_tokens": scoring.max_new_tokens, "batch_size": scoring.batch_size}
        bare = [replace(row, answer=()) for row in rows]
        written = complete(backend, bare, {"": None}, stop=None, **lengths)[""].texts
        return [float(passes(prompt.query.check, text)) for prompt, text in zip(prompts, written)]
    overlap = scoring.metric == "rouge_l" or (scoring.metric == "auto" and free_text(task))
    answers = [prompt.query.answers for prompt in prompts]
    options: dict[str, Any] = {"stop": common_stop(prompts), "batch_size": scoring.batch_size}
    options |= {"max_new_tokens": room_for(backend, prompts, rows), "wanted": None if overlap else answers}
    found = complete(backend, [replace(row, answer=()) for row in rows], {"": None}, **options)[""].texts
    if overlap:
        return [rouge_l(text, right) for right, text in zip(answers, found)]
    return [exact_match(backend.tokenizer, text, right) for right, text in zip(answers, found)]

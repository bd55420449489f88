"""Counterfactual prompts: the same query, with the instruction's information destroyed (IV §3, step 2 of locating heads)."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from ivlens.tasks.prompts import Prompt
from ivlens.tasks.task import Task

__all__ = ["COUNTERFACTUALS", "counterfactual"]


def shuffled_labels(prompt: Prompt, rng: random.Random, others: Sequence[Task], tokenizer: Any) -> Prompt:
    """Demonstrations with permuted outputs (Function Vectors, arXiv 2310.15213; needs two demonstrations or more)."""
    if len(prompt.demonstrations) < 2:
        raise ValueError("'shuffled_labels' needs shots >= 2; use 'no_instruction' or 'random_text' instead")
    told = [x.output for x in prompt.demonstrations]
    outputs = list(told)
    while outputs == told and len(set(told)) > 1:  # of two demonstrations, every other shuffle changes nothing
        rng.shuffle(outputs)
    return replace(prompt, demonstrations=tuple(replace(x, output=y) for x, y in zip(prompt.demonstrations, outputs)))


def no_instruction(prompt: Prompt, rng: random.Random, others: Sequence[Task], tokenizer: Any) -> Prompt:
    """The bare query: no instruction, no demonstrations (as the code of arXiv 2502.11019 does)."""
    return replace(prompt, demonstrations=(), instruction=None)


def other_instruction(prompt: Prompt, rng: random.Random, others: Sequence[Task], tokenizer: Any) -> Prompt:
    """Another task's instruction, demonstrations left out (arXiv 2505.12075)."""
    names = [task for task in others if task.name != prompt.task]
    if not names:
        raise ValueError("'other_instruction' needs at least two tasks; pass more tasks")
    return replace(prompt, demonstrations=(), instruction=rng.choice(rng.choice(names).instructions))


_RANDOM_TEXT = (
    "The river bends twice before it reaches the mill, and in spring the lower path is under water for a week. My aunt "
    "kept bees on the slope behind her house, where the wind was weak and the lavender grew without much care. Trains "
    "stop at the small station only on Sundays now; the waiting room has a stove, two benches and a clock that runs late. "
    "In the evening the shutters are closed one after another, and someone always forgets the one beside the bakery."
)


def random_text(prompt: Prompt, rng: random.Random, others: Sequence[Task], tokenizer: Any) -> Prompt:
    """Real text of the same token length in the instruction's place, demonstrations left out (arXiv 2505.12075).

    The demonstrations count as part of the instruction: they are replaced by text too.
    """
    plain = replace(prompt, style="qa") if prompt.style == "chat" else prompt
    told = plain.render().removesuffix(replace(plain, demonstrations=(), instruction=None).render())
    length = len(tokenizer.encode(told, add_special_tokens=False))
    ids = tokenizer.encode(_RANDOM_TEXT, add_special_tokens=False)
    start = rng.randrange(len(ids))
    text = tokenizer.decode([ids[(start + i) % len(ids)] for i in range(max(length - 1, 1))]).strip()
    return replace(prompt, demonstrations=(), instruction=text)


COUNTERFACTUALS: dict[str, Callable[[Prompt, random.Random, Sequence[Task], Any], Prompt]] = {
    f.__name__: f for f in (shuffled_labels, no_instruction, other_instruction, random_text)
}


def counterfactual(
    prompts: Sequence[Prompt], kind: str, *, tasks: Sequence[Task] = (), tokenizer: Any = None, seed: int = 0
) -> list[Prompt]:
    """The same queries with the instruction's information destroyed; `other_instruction` takes one of `tasks`."""
    if kind not in COUNTERFACTUALS:
        raise ValueError(f"counterfactual={kind!r} is unknown; choose one of {', '.join(COUNTERFACTUALS)}")
    return [COUNTERFACTUALS[kind](p, random.Random(f"{seed}/{i}"), tasks, tokenizer) for i, p in enumerate(prompts)]

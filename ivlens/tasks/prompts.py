"""How instruction, demonstrations and query become text.

A `Prompt` keeps its parts, so that a counterfactual can change one of them; `render` turns it into text.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ivlens.tasks.task import Example, Task

__all__ = ["STYLES", "Prompt", "build_prompts", "common_stop"]

STYLES = ("plain", "qa", "chat")


@dataclass(frozen=True)
class Prompt:
    """One query with what comes before it.

    Attributes
    ----------
    query
        The example asked about; `answer` is its output.
    demonstrations
        Solved examples shown first.
    instruction
        The instruction c of the paper, or None for the bare query.
    style
        `qa` ("Q: …\\nA: …"), `plain` (lines only) or `chat` (the tokenizer's own template).
    task
        Name of the task it was built from.
    """

    query: Example
    demonstrations: tuple[Example, ...] = ()
    instruction: str | None = None
    style: str = "qa"
    task: str = ""

    @property
    def answer(self) -> str:
        """The answer as it continues the rendered prompt (with its leading space in style `qa`)."""
        return f" {self.query.output}" if self.style == "qa" else self.query.output

    def render(self, tokenizer: Any = None) -> str:
        """The prompt as text, up to where the answer begins.

        Examples
        --------
        >>> Prompt(Example("go", "went"), (Example("walk", "walked"),)).render()
        'Q: walk\\nA: walked\\n\\nQ: go\\nA:'
        """
        if self.style == "chat":
            return self._render_chat(tokenizer)
        head = [self.instruction] if self.instruction else []
        if self.style == "qa":
            shown = [f"Q: {x.input}\nA: {x.output}" for x in self.demonstrations]
            return "\n\n".join([*head, *shown, f"Q: {self.query.input}\nA:"])
        shown = [f"{x.input}\n{x.output}" for x in self.demonstrations]
        return "\n\n".join([*head, *shown, f"{self.query.input}\n"])

    def _render_chat(self, tokenizer: Any) -> str:
        if getattr(tokenizer, "chat_template", None) is None:
            raise ValueError(
                "style='chat' needs a tokenizer with a chat template; use style='qa' or 'plain' for this model"
            )
        turns: list[dict[str, str]] = []
        lead = f"{self.instruction}\n\n" if self.instruction else ""
        for example in self.demonstrations:
            turns.append({"role": "user", "content": lead + example.input})
            turns.append({"role": "assistant", "content": example.output})
            lead = ""
        turns.append({"role": "user", "content": lead + self.query.input})
        return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)


def common_stop(prompts: Sequence[Prompt]) -> str | None:
    """The text that ends generated answers: a line's end, or None, where the model says so, if some have several lines."""
    return None if any("\n" in prompt.query.output.strip() for prompt in prompts) else "\n"


def build_prompts(
    task: Task,
    *,
    n: int | None = None,
    shots: int = 0,
    instruction: bool | str | int = False,
    style: str = "qa",
    split: str = "train",
    seed: int = 0,
) -> list[Prompt]:
    """Prompts of a task: queries from `split`, demonstrations from the training split, never the query itself.

    Parameters
    ----------
    n
        How many; None takes every example of the split once. More than there are reuses queries with new demonstrations.
    instruction
        False for the bare query, True for a paraphrase drawn per prompt, a number for that paraphrase, or your own text.

    Raises
    ------
    ValueError
        If the split is empty, or the task has fewer training examples than `shots` + 1.
    """
    if style not in STYLES:
        raise ValueError(f"style={style!r} is unknown; choose one of {', '.join(STYLES)}")
    queries = list(task.split(split))
    if not queries:
        raise ValueError(f"task {task.name!r} has no examples in its {split!r} split; give the task more records")
    if shots and len(task.train) < shots + 1:
        raise ValueError(
            f"shots={shots} needs at least {shots + 1} training examples, but task {task.name!r} has {len(task.train)}; "
            "use fewer shots or give the task more records"
        )
    rng = random.Random(f"{seed}/{task.name}/{split}")
    if n is not None:
        order = list(queries)
        rng.shuffle(order)
        queries = [order[i % len(order)] for i in range(n)]
    prompts = []
    for query in queries:
        others = [x for x in task.train if x != query]
        text = _instruction(task, instruction, rng)
        prompts.append(Prompt(query, tuple(rng.sample(others, shots)), text, style, task.name))
    return prompts


def _instruction(task: Task, choice: bool | str | int, rng: random.Random) -> str | None:
    if isinstance(choice, str):
        return choice
    if choice is False or choice is None:
        return None
    if choice is True:
        return rng.choice(task.instructions)
    return task.instructions[choice]

"""Instruction, demonstrations and query: kept apart in a `Prompt`, so that counterfactuals can change one; `render` makes them text."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ivlens.tasks.chat import chat_parts
from ivlens.tasks.task import Example, Task, plain_text, same_input

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
    template
        Options of the chat template, by name; see `build_prompts`.
    source
        Where the query stands in it, for messages.
    """

    query: Example
    demonstrations: tuple[Example, ...] = ()
    instruction: str | None = None
    style: str = "qa"
    task: str = ""
    template: tuple[tuple[str, Any], ...] = ()
    source: str = field(default="", compare=False)

    @property
    def answer(self) -> str:
        """The answer as it continues the rendered prompt (with its leading space in style `qa`); empty where it is free."""
        return f" {self.query.output}" if self.style == "qa" and self.query.output else self.query.output

    def render(self, tokenizer: Any = None) -> str:
        """The prompt as text, up to where the answer begins; style `chat` needs the `tokenizer`, for its template.

        Examples
        --------
        >>> Prompt(Example("go", "went"), (Example("walk", "walked"),)).render()
        'Q: walk\\nA: walked\\n\\nQ: go\\nA:'
        """
        if self.style == "chat":
            return chat_parts(tokenizer, self._turns(), dict(self.template))[0]
        head = [self.instruction] if self.instruction else []
        if self.style == "qa":
            shown = [f"Q: {x.input}\nA: {x.output}" for x in self.demonstrations]
            return "\n\n".join([*head, *shown, f"Q: {self.query.input}\nA:"])
        shown = [f"{x.input}\n{x.output}" for x in self.demonstrations]
        return "\n\n".join([*head, *shown, f"{self.query.input}\n"])

    def answered(self, tokenizer: Any) -> tuple[str, str]:
        """The answer as it continues the rendered prompt, and what ends it (in style `chat`, by the template of `tokenizer`)."""
        if self.style != "chat":
            return self.answer, ""
        _, lead, end = chat_parts(tokenizer, self._turns(), dict(self.template))
        return (lead + self.query.output if self.query.output else ""), end

    def mapped(self, change: Callable[[str], str]) -> Prompt:
        """With `change` done to each of its texts that come from data."""

        def changed(x: Example) -> Example:
            return replace(x, input=change(x.input), output=change(x.output))

        told = None if self.instruction is None else change(self.instruction)
        shown = tuple(map(changed, self.demonstrations))
        return replace(self, query=changed(self.query), demonstrations=shown, instruction=told)

    def _turns(self) -> list[dict[str, str]]:
        turns: list[dict[str, str]] = []
        lead = f"{self.instruction}\n\n" if self.instruction else ""
        for example in self.demonstrations:
            turns.append({"role": "user", "content": lead + example.input})
            turns.append({"role": "assistant", "content": example.output})
            lead = ""
        return [*turns, {"role": "user", "content": lead + self.query.input}]


def common_stop(prompts: Sequence[Prompt]) -> str | None:
    """The text that ends generated answers: a line's end, or None, where the model says so, if some have several lines."""
    return (
        None
        if any(prompt.query.check or "\n" in answer.strip() for prompt in prompts for answer in prompt.query.answers)
        else "\n"
    )


def build_prompts(
    task: Task,
    *,
    n: int | None = None,
    shots: int = 0,
    instruction: bool | str | int = False,
    style: str = "qa",
    split: str = "train",
    template: Mapping[str, Any] | None = None,
    seed: int = 0,
    repeat: bool = False,
) -> list[Prompt]:
    """Prompts of a task: queries from `split`, demonstrations from the training split, never the query itself.

    Parameters
    ----------
    task
        Its training split must have more examples than `shots`.
    n
        How many; None takes every example of the split once. More than there are reuses queries with new demonstrations, with a
        warning.
    shots
        Demonstrations before each query.
    instruction
        False for the bare query, True for a paraphrase drawn per prompt (on the test split of those held out, if there are any),
        a number for that paraphrase, or your own text. Examples with an instruction of their own keep it.
    style
        `qa` ("Q: …\\nA: …"), `plain` (lines only) or `chat` (the tokenizer's own template).
    split
        `train`, `valid` or `test`: where the prompts' queries come from.
    template
        In style `chat`: `system` (a system prompt), `date` (default 2025-01-01), and what the tokenizer's template takes, such as
        `enable_thinking` (default False where it knows that).
    seed
        Of all that is drawn at random; global random states are left alone.
    repeat
        Queries may repeat without a word: for training, and for means.

    Raises
    ------
    ValueError
        If the split is empty, the task has fewer training examples than `shots` + 1, or none with an answer to show.
    """
    if style not in STYLES:
        raise ValueError(f"style={style!r} is unknown; choose one of {', '.join(STYLES)}")
    queries = list(task.split(split))
    if not queries:
        raise ValueError(f"task {task.name!r} has no examples in its {split!r} split; give the task more records")
    numbered = list(enumerate(queries))
    rng = random.Random(f"{seed}/{task.name}/{split}")
    if n is not None:
        if not repeat and n > (different := len(set(map(same_input, queries)))):
            there = f"the {split!r} split of task {task.name!r} has {different} different queries"
            warnings.warn(f"n={n} prompts were asked for, but {there}; repeated, they say no more", stacklevel=2)
        rng.shuffle(numbered)
        numbered = [numbered[i % len(numbered)] for i in range(n)]
    pool = [(plain_text(x.input), x) for x in dict.fromkeys(task.train)] if shots else []
    if task.is_checked:
        pool = [(given, x) for given, x in pool if x.output]
        if shots and not pool:
            said = f"shots={shots}, but the answers of task {task.name!r} are free, so there are none to show"
            raise ValueError(f"{said}; pass shots=0, and instruction=True where prompts should state the task")
    told = tuple(sorted((template or {}).items()))
    prompts, mixed = [], 0
    for number, query in numbered:
        asked = plain_text(query.input)
        others = [x for given, x in pool if given != asked]
        if len(others) < shots:
            needed = f"shots={shots} needs at least {shots + 1} training examples with different inputs"
            there = f"task {task.name!r} has {len({given for given, _ in pool})}"
            raise ValueError(f"{needed}, but {there}; use fewer shots or give the task more records")
        text = _instruction(task, query, instruction, split, rng)
        if text and text == query.instruction:  # its own: rows of another one answer something else
            alike = [x for x in others if x.instruction == text]
            others = alike if len(alike) >= shots else others
            mixed += others is not alike
        shown = tuple(rng.sample(others, shots))
        prompts.append(Prompt(query, shown, text, style, task.name, told, f"{split} example {number}"))
    if mixed:
        said = f"{mixed} of {len(prompts)} prompts of task {task.name!r} show demonstrations that follow other instructions"
        warnings.warn(f"{said}: fewer than {shots} training examples share theirs; use shots=0", stacklevel=2)
    return prompts


def _instruction(task: Task, query: Example, choice: bool | str | int, split: str, rng: random.Random) -> str | None:
    if isinstance(choice, str):
        return choice
    if choice is False or choice is None:
        return None
    if query.instruction is not None:  # its own, "" where the input says it all
        return query.instruction or None
    if choice is True:
        return rng.choice((split == "test" and task.held_out) or task.instructions)
    return (*task.instructions, *task.held_out)[choice]

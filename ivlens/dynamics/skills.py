"""The skills that a checkup asks about, and how it asks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ivlens.steering.compliance import told_by
from ivlens.tasks.examples import SPLITS, Example, plain_text, same_input
from ivlens.tasks.prompts import Prompt, build_prompts
from ivlens.tasks.suite import TaskSuite, as_suite, load_tasks
from ivlens.tasks.task import Task

__all__ = [
    "FAST",
    "FULL",
    "SKILLS",
    "SKILLS_FAST",
    "Sizes",
    "as_skills",
    "asked_prompts",
    "look_of",
    "skill_about",
    "why_not",
]

SKILLS = ("present_past", "singular_plural", "capitalize", "lowercase", "last_of_list", "country_continent")
SKILLS += ("general_choice", "title", "spanish", "one_sentence")
SKILLS_FAST = ("present_past", "singular_plural", "capitalize", "general_choice", "title")
BY_CONTENT = "general_choice"  # asked for what the answer says, not for its letter: knowledge apart from form
GROUP = 25  # prompts with the same demonstrations, which are read once for all of them


@dataclass(frozen=True)
class Sizes:
    """How many prompts: tested per skill (with one right answer, or free ones), to choose layer and scale by, behind means, and swept
    for heads (of all skills together). And how long free answers may be, in tokens."""

    prompts: int = 100
    free: int = 48
    valid: int = 20
    valid_free: int = 8
    mean: int = 30
    sweep: int = 24
    length: int = 40


FULL, FAST = Sizes(), Sizes(prompts=50, free=20, mean=15, sweep=9)


def as_skills(given: Any, fast: bool) -> TaskSuite:
    """The user's tasks, or the built-in ones; each has all three splits."""
    if given is not None:
        suite = as_suite(given)
    else:
        suite = TaskSuite(
            _by_content(t) if t.name == BY_CONTENT else t for t in load_tasks(SKILLS_FAST if fast else SKILLS).values()
        )
    for name, task in suite.items():
        if lacking := [split for split in SPLITS if not task.split(split)]:
            said = f"task {name!r} has no {' and no '.join(lacking)} examples"
            raise ValueError(
                f"{said}; a checkup needs all three splits: give more records, or leave out their column `split`"
            )
    return suite


def _by_content(task: Task) -> Task:
    """Multiple choice asked for what the answer says: the question alone, and which option's text is likeliest."""

    def plain(x: Example) -> Example:
        options = tuple(line.split(". ", 1)[1] for line in x.input.splitlines()[1:])
        return Example(x.question or "", x.content or "", choices=options)

    return replace(task, **{split: tuple(map(plain, task.split(split))) for split in SPLITS})


def look_of(task: Task, shots: int, instruction: bool | str | int, style: str | None, seed: int) -> dict[str, Any]:
    """How its prompts ask."""
    if task.is_checked:
        return {"shots": 0, "instruction": told_by(instruction), "style": style or "chat", "seed": seed}
    if shots == 0 and (instruction is False or instruction is None):
        raise ValueError("with shots=0 and instruction=False nothing is asked; pass shots=5 or instruction=True")
    return {"shots": shots, "instruction": instruction, "style": style or "qa", "seed": seed}


def asked_prompts(task: Task, sizes: Sizes, look: Mapping[str, Any]) -> list[Prompt]:
    """Prompts of the test split; 25 in a row have the same demonstrations, but for those whose query is among them."""
    n = min(sizes.free if task.is_checked else sizes.prompts, len({same_input(x) for x in task.test}))
    prompts = build_prompts(task, n=n, split="test", **look)
    for i, prompt in enumerate(prompts):
        lead = prompts[i - i % GROUP]
        others = {plain_text(x.input) for x in lead.demonstrations}
        if prompt.query.instruction == lead.query.instruction and plain_text(prompt.query.input) not in others:
            prompts[i] = replace(prompt, demonstrations=lead.demonstrations)
    return prompts


def skill_about(task: Task, fast: bool) -> dict[str, Any]:
    chances = [1 / len(x.choices) if x.choices else 0.0 for x in task.test]
    why = why_not(task) or (
        "--fast takes no second look at free answers; run without it" if fast and task.is_checked else ""
    )
    return {"chance": sum(chances) / len(chances), "group": task.group, "not_looked_at": why}


def why_not(task: Task) -> str:
    """Why there is no second look at a task."""
    choice = any(x.choices for x in task.test)
    return "it is asked by its options, which no vector brings out; what is known may have changed" if choice else ""

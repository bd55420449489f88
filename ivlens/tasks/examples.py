"""Examples of a task, which of them ask the same, and how they are cut into splits."""

from __future__ import annotations

import itertools
import random
import unicodedata
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

__all__ = ["SPLITS", "Example", "plain_text", "same_input", "split_examples", "warn_of_shared"]

SPLITS = ("train", "valid", "test")


@dataclass(frozen=True)
class Example:
    """An input and the output expected for it.

    Attributes
    ----------
    input, output
        What is asked, and the right answer, shown and trained on; of free answers it may be empty.
    question, content
        Of tasks whose output is a form of the real answer, such as multiple choice: the question asked plainly, and the answer's
        text where `output` is its letter.
    choices
        The options' texts, of which `output` is one: such examples are scored by which option is likeliest.
    outputs
        All right answers where there are several, any of which counts.
    instruction
        The example's own, where instructions differ from example to example.
    check
        The verifier of a free answer's form, by name (`tasks.checks`).
    """

    input: str
    output: str
    question: str | None = None
    content: str | None = None
    choices: tuple[str, ...] | None = None
    outputs: tuple[str, ...] | None = None
    instruction: str | None = None
    check: str | None = None

    @property
    def answers(self) -> tuple[str, ...]:
        """All right answers; `output` is the first."""
        return self.outputs or (self.output,)


def split_examples(parts: Mapping[str | None, list[Example]]) -> dict[str, list[Example]]:
    """Examples by split: those without one are shuffled and cut, and part of train is valid where nothing else is."""
    examples = {split: parts[split] for split in SPLITS}
    if loose := parts[None]:
        random.Random(0).shuffle(loose)
        cut = _cut(loose, round(len(loose) * 0.5), round(len(loose) * 0.65))
        return {split: examples[split] + part for split, part in zip(SPLITS, cut)}
    if examples["train"] and not examples["valid"]:
        random.Random(0).shuffle(examples["train"])
        valid, train = _cut(examples["train"], min(len(examples["train"]) // 5, 200))
        return {**examples, "train": train, "valid": valid}
    return examples


def plain_text(text: str) -> str:
    """But for case, white space and how accents are composed."""
    return " ".join(unicodedata.normalize("NFC", text).casefold().split())


def same_input(example: Example) -> str:
    """What two examples share that ask the same: input and own instruction, as plain texts."""
    return plain_text(f"{example.instruction or ''} {example.input}")


def _cut(examples: Sequence[Example], *sizes: int) -> list[list[Example]]:
    """Cut where the counts are reached, with all repeats of an input where its first is."""
    counts = Counter(map(same_input, examples))
    parts: list[list[Example]] = [[] for _ in range(len(sizes) + 1)]
    where, seen = {}, 0
    for example in examples:
        text = same_input(example)
        if text not in where:
            middle = seen + (counts[text] - 1) / 2
            where[text] = next((i for i, size in enumerate(sizes) if middle < size), len(sizes))
            seen += counts[text]
        parts[where[text]].append(example)
    return parts


def warn_of_shared(name: str, examples: Mapping[str, Sequence[Example]]) -> None:
    """Where given splits overlap."""
    texts = {split: set(map(same_input, examples[split])) for split in SPLITS}
    for other, split in itertools.combinations(SPLITS, 2):
        if shared := [x for x in examples[split] if same_input(x) in texts[other]]:
            where = "training" if other == "train" else other
            said = f"{len(shared)} of {len(examples[split])} {split} inputs of task {name!r} stand in its {where} split too"
            warnings.warn(f"{said} (such as {shared[0].input[:60]!r}): scores on them say little", stacklevel=3)

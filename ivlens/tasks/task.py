"""One task: what is asked (instruction paraphrases) and examples in fixed train, valid and test splits."""

from __future__ import annotations

import itertools
import random
import re
import unicodedata
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ivlens.common.hints import hint
from ivlens.tasks.cells import cell_text, cell_texts
from ivlens.tasks.files import read_rows

if TYPE_CHECKING:
    import datasets
    import pandas as pd

__all__ = ["Example", "Task"]

KEYS = ("input", "output", "instruction", "question", "content", "choices", "outputs")
LISTS = ("choices", "outputs")
SPLITS = ("train", "valid", "test")
SPLIT_ALIASES = {"validation": "valid", "dev": "valid"}


@dataclass(frozen=True)
class Example:
    """An input and the output expected for it.

    `question` and `content` belong to tasks whose output is a form of the real answer, such as multiple choice: the
    question asked plainly, and the answer's text where `output` is its letter. `choices` are the options' texts, of which
    `output` is one: such examples are scored by which option is likeliest. `outputs` are all right answers where there are
    several, any of which counts. `instruction` is the example's own, where instructions differ from example to example.
    """

    input: str
    output: str
    question: str | None = None
    content: str | None = None
    choices: tuple[str, ...] | None = None
    outputs: tuple[str, ...] | None = None
    instruction: str | None = None

    @property
    def answers(self) -> tuple[str, ...]:
        """All right answers; `output` is the first."""
        return self.outputs or (self.output,)


@dataclass(frozen=True)
class Task:
    """A task with its instruction in several wordings.

    Examples
    --------
    >>> records = [{"input": f"{n} + 1", "output": str(n + 1)} for n in range(40)]
    >>> task = Task.from_records(records, name="plus_one", instruction="Add one.")
    >>> len(task.train), len(task.valid), len(task.test)
    (20, 6, 14)
    """

    name: str
    instructions: tuple[str, ...]
    train: tuple[Example, ...]
    valid: tuple[Example, ...]
    test: tuple[Example, ...]
    group: str = "own"
    description: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", re.sub(r"[/\\\0]", "_", self.name))  # names become folders
        if not self.name.strip(" ."):
            raise ValueError(f"name={self.name!r} is no name for a task; give one with a letter or digit in it")
        if not self.instructions or not all(self.instructions):
            raise ValueError(f"task {self.name!r} has no instruction; give at least one sentence that says what to do")

    def split(self, name: str) -> tuple[Example, ...]:
        """The examples of `train`, `valid` or `test`."""
        if name not in SPLITS:
            raise ValueError(f"split={name!r} is unknown; choose one of {', '.join(SPLITS)}")
        return getattr(self, name)

    def __len__(self) -> int:
        return len(self.train) + len(self.valid) + len(self.test)

    @classmethod
    def from_records(
        cls,
        records: Iterable[Mapping[str, Any]],
        *,
        name: str,
        instruction: str | Sequence[str] | None = None,
        columns: Mapping[str, str] | None = None,
        group: str = "own",
        description: str = "",
    ) -> Task:
        """A task from a list of dictionaries with the keys `input` and `output`.

        Parameters
        ----------
        instruction
            What to do, in one wording or several; None takes the records' own (key `instruction`).
        columns
            Where your keys have other names: `{"input": "question", "output": "answer"}`. Optional keys are `split`
            (train, valid, test), `instruction`, `question`, `content`, `choices` (a list of texts) and `outputs` (all right
            answers, instead of `output`); see `Example`.

        Notes
        -----
        Without a `split` key the examples are shuffled with a fixed seed and cut 50 : 15 : 35, repeated inputs on one side. Where
        there is a train but no valid split, a fifth of train (at most 200) becomes the valid split. An answer's white space at
        its end is dropped. An instruction that stands in a record stays with it.

        Raises
        ------
        ValueError
            If there are no records, a cell is missing or no text, an output is not among its choices, or only some records
            have an instruction where these differ.
        """
        keys = (*KEYS, "split")
        if unknown := sorted(set(columns or {}) - set(keys)):
            raise ValueError(f"columns names {unknown[0]!r}, which is unknown; {hint(unknown[0], keys)}")
        names = {key: key for key in keys} | dict(columns or {})
        parts: dict[str | None, list[Example]] = {None: [], **{split: [] for split in SPLITS}}
        for i, record in enumerate(records):
            place = f"{getattr(record, 'place', f'record {i}')} of task {name!r}"
            if not isinstance(record, Mapping):
                raise ValueError(f"{place} is {record!r}, no dictionary; of a DataFrame, give to_dict('records')")
            example = _example(record, names, place)
            split = cell_text(record.get(names["split"]), names["split"], place)
            split = SPLIT_ALIASES.get(split, split)
            if split not in parts:
                raise ValueError(f"{place} has split={split!r}; choose one of {', '.join(SPLITS)}")
            parts[split].append(example if instruction is None else replace(example, instruction=None))
        everything = [x for part in parts.values() for x in part]
        if not everything:
            needed = f"{names['input']!r} and {names['output']!r}"
            raise ValueError(f"task {name!r} is empty; give it at least one record with {needed}")
        examples = _splits(parts)
        _warn_of_shared(name, examples)
        if instruction is None:
            instruction = list(dict.fromkeys(x.instruction for x in everything if x.instruction))
            bare = sum(x.instruction is None for x in everything)
            if bare and len(instruction) > 1:
                said = f"{bare} of {len(everything)} records of task {name!r} have no {names['instruction']!r}"
                raise ValueError(f"{said}, and those of the others differ; give each its own, or one (instruction=)")
            if len(instruction) == 1:  # the task's
                examples = {s: [replace(x, instruction=x.instruction and None) for x in examples[s]] for s in SPLITS}
        wordings = (instruction,) if isinstance(instruction, str) else tuple(instruction)
        return cls(name, wordings, *(tuple(examples[s]) for s in SPLITS), group=group, description=description)

    @classmethod
    def from_file(
        cls,
        path: str | Path,
        *,
        instruction: str | Sequence[str] | None = None,
        name: str | None = None,
        columns: Mapping[str, str] | None = None,
    ) -> Task:
        """A task from a file, a record in each row, every cell as it is written; see `tasks.files.read_rows`."""
        path = Path(path)
        rows, stem = read_rows(path), path.name.removesuffix(".gz").rsplit(".", 1)[0]
        return cls.from_records(rows, name=name or stem, instruction=instruction, columns=columns)

    @classmethod
    def from_dataset(
        cls,
        dataset: datasets.Dataset | datasets.DatasetDict,
        *,
        name: str,
        instruction: str | Sequence[str] | None = None,
        columns: Mapping[str, str] | None = None,
    ) -> Task:
        """A task from a `datasets.Dataset`, or a `DatasetDict` whose splits (train, validation, test) are kept."""
        if isinstance(dataset, Mapping):
            records = [{**row, "split": split} for split, rows in dataset.items() for row in _labelled(rows)]
            columns = {**(columns or {}), "split": "split"}
        else:
            records = _labelled(dataset)
        return cls.from_records(records, name=name, instruction=instruction, columns=columns)

    def to_dataframe(self) -> pd.DataFrame:
        """One row per example: split, input, output, question, content, choices."""
        import pandas as pd

        return pd.DataFrame([{"split": split, **vars(x)} for split in SPLITS for x in self.split(split)])

    def __repr__(self) -> str:
        shown = ", ".join(f"{x.input!r} → {x.output!r}" for x in self.train[:2])
        sizes = " / ".join(str(len(self.split(s))) for s in SPLITS)
        return f"Task({self.name}: {self.instructions[0]!r}, {sizes} train/valid/test, {shown})"


def _example(record: Mapping[str, Any], names: Mapping[str, str], place: str) -> Example:
    cells = {key: cell_text(record.get(names[key]), names[key], place) for key in KEYS if key not in LISTS}
    choices, outputs = (cell_texts(record.get(names[key]), names[key], place) for key in LISTS)
    if outputs and not cells["output"]:
        cells["output"] = outputs[0]
    if not cells["input"] and cells["instruction"]:  # the instruction says it all
        cells |= {"input": cells["instruction"], "instruction": ""}
    for key in ("input", "output"):
        if not cells[key]:
            there = ", ".join(map(str, record)) or "nothing"
            raise ValueError(f"{place} has no {names[key]!r}; it has {there}: name your columns with columns={{...}}")
    output = cells["output"] = cells["output"].rstrip()
    for key, texts, one in (("choices", choices, "option"), ("outputs", outputs, "answer")):
        if texts is not None and output not in texts:
            said = f"{place} has the output {output!r}, which is not among its {names[key]} {texts}"
            raise ValueError(f"{said}; give one {one}'s text, not its letter")
    outputs = outputs and (output, *(x for x in outputs if x != output))
    return Example(**cells, choices=choices, outputs=outputs)


def _splits(parts: Mapping[str | None, list[Example]]) -> dict[str, list[Example]]:
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


def _labelled(dataset: Any) -> list[Mapping[str, Any]]:
    """Rows of a `Dataset`, class labels by their names."""
    labels = {n: f for n, f in (getattr(dataset, "features", None) or {}).items() if hasattr(f, "int2str")}
    names = {n: lambda x, f=f: None if x is None or x < 0 else f.int2str(x) for n, f in labels.items()}
    return [{**row, **{name: text(row[name]) for name, text in names.items()}} for row in dataset]


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


def _warn_of_shared(name: str, examples: Mapping[str, Sequence[Example]]) -> None:
    """Where given splits overlap."""
    texts = {split: set(map(same_input, examples[split])) for split in SPLITS}
    for other, split in itertools.combinations(SPLITS, 2):
        if shared := [x for x in examples[split] if same_input(x) in texts[other]]:
            where = "training" if other == "train" else other
            said = f"{len(shared)} of {len(examples[split])} {split} inputs of task {name!r} stand in its {where} split too"
            warnings.warn(f"{said} (such as {shared[0].input[:60]!r}): scores on them say little", stacklevel=3)

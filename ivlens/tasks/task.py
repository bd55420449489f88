"""One task: what is asked (instruction paraphrases) and examples in fixed train, valid and test splits."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import datasets
    import pandas as pd

__all__ = ["Example", "Task"]

SPLITS = ("train", "valid", "test")
SPLIT_ALIASES = {"validation": "valid", "dev": "valid"}


@dataclass(frozen=True)
class Example:
    """An input and the output expected for it.

    `question` and `content` belong to tasks whose output is a form of the real answer, such as multiple choice: the
    question asked plainly, and the answer's text where `output` is its letter. `choices` are the options' texts, of which
    `output` is one: such examples are scored by which option is likeliest.
    """

    input: str
    output: str
    question: str | None = None
    content: str | None = None
    choices: tuple[str, ...] | None = None


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
        if not self.instructions or not all(self.instructions):
            raise ValueError(
                f"task {self.name!r} has no instruction; give at least one sentence that says what to do (instruction)"
            )

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
            (train, valid, test), `instruction`, `question`, `content` and `choices` (a list of texts; see `Example`).

        Notes
        -----
        Without a `split` key the examples are shuffled with a fixed seed and cut 50 : 15 : 35. Where there is a train but no
        valid split, a fifth of train (at most 200) becomes the valid split.

        Raises
        ------
        ValueError
            If there are no records, an input or output is missing or empty, or an output is not among its choices.
        """
        keys = ("input", "output", "split", "instruction", "question", "content", "choices")
        names = {key: (columns or {}).get(key, key) for key in keys}
        told: dict[str, None] = {}
        examples: dict[str, list[Example]] = {split: [] for split in SPLITS}
        loose: list[Example] = []
        for i, record in enumerate(records):
            example = _example(record, names, name, i)
            split = record.get(names["split"])
            split = SPLIT_ALIASES.get(split, split)
            if split is not None and split not in SPLITS:
                raise ValueError(f"record {i} of task {name!r} has split={split!r}; choose one of {', '.join(SPLITS)}")
            (loose if split is None else examples[split]).append(example)
            told[str(record.get(names["instruction"]) or "")] = None
        if not loose and not any(examples.values()):
            raise ValueError(
                f"task {name!r} is empty; give it at least one record with {names['input']!r} and {names['output']!r}"
            )
        random.Random(0).shuffle(loose)
        first, second = round(len(loose) * 0.5), round(len(loose) * 0.65)
        examples["train"] += loose[:first]
        examples["valid"] += loose[first:second]
        examples["test"] += loose[second:]
        if examples["train"] and not loose and not examples["valid"]:
            cut = min(len(examples["train"]) // 5, 200)
            random.Random(0).shuffle(examples["train"])
            examples["valid"], examples["train"] = examples["train"][:cut], examples["train"][cut:]
        instruction = [text for text in told if text] if instruction is None else instruction
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
        """A task from a `.jsonl`, `.json` or `.csv` file (one record a line or row)."""
        import datasets

        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"no file {path}; give the path of a .jsonl, .json or .csv file")
        kind = {".jsonl": "json", ".json": "json", ".csv": "csv"}.get(path.suffix.lower())
        if kind is None:
            raise ValueError(f"can't read {path.name}: choose a .jsonl, .json or .csv file")
        if path.stat().st_size == 0:
            raise ValueError(f"{path} is empty; put one record in each line")
        table = datasets.Dataset.from_json(str(path)) if kind == "json" else datasets.Dataset.from_csv(str(path))
        return cls.from_dataset(table, name=name or path.stem, instruction=instruction, columns=columns)

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
            records = [{**row, "split": split} for split, rows in dataset.items() for row in rows]
            columns = {**(columns or {}), "split": "split"}
        else:
            records = list(dataset)
        return cls.from_records(records, name=name, instruction=instruction, columns=columns)

    def to_dataframe(self) -> pd.DataFrame:
        """One row per example: split, input, output, question, content, choices."""
        import pandas as pd

        return pd.DataFrame([{"split": split, **vars(x)} for split in SPLITS for x in self.split(split)])

    def __repr__(self) -> str:
        shown = ", ".join(f"{x.input!r} → {x.output!r}" for x in self.train[:2])
        sizes = " / ".join(str(len(self.split(s))) for s in SPLITS)
        return f"Task({self.name}: {self.instructions[0]!r}, {sizes} train/valid/test, {shown})"


def _example(record: Mapping[str, Any], names: Mapping[str, str], task: str, i: int) -> Example:
    for key in ("input", "output"):
        value = record.get(names[key])
        if value is None or str(value).strip() == "":
            raise ValueError(
                f"record {i} of task {task!r} has no {names[key]!r}; it has {', '.join(map(str, record)) or 'nothing'}: "
                "name your columns with columns={'input': ..., 'output': ...}"
            )
    optional = {key: record.get(names[key]) for key in ("question", "content")}
    return Example(
        str(record[names["input"]]),
        str(record[names["output"]]),
        **{k: None if v is None else str(v) for k, v in optional.items()},
        choices=_choices(record, names, task, i),
    )


def _choices(record: Mapping[str, Any], names: Mapping[str, str], task: str, i: int) -> tuple[str, ...] | None:
    given = record.get(names["choices"])
    if given is None:
        return None
    if isinstance(given, (str, Mapping)) or not isinstance(given, Iterable):
        raise ValueError(
            f"record {i} of task {task!r} has {names['choices']}={given!r}; give a list of the options' texts"
        )
    choices, output = tuple(map(str, given)), str(record[names["output"]])
    if output not in choices:
        raise ValueError(
            f"record {i} of task {task!r} has the output {output!r}, which is not among its {names['choices']} {choices}; "
            "the output must be one option's text, not its letter"
        )
    return choices

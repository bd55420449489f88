"""One task: what is asked (instruction paraphrases) and examples in fixed train, valid and test splits."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from ivlens.common.hints import hint
from ivlens.common.tables import table_html
from ivlens.tasks.cells import cell_text, cell_texts
from ivlens.tasks.checks import parse_check
from ivlens.tasks.examples import SPLITS, Example, plain_text, same_input, split_examples, warn_of_shared
from ivlens.tasks.files import read_rows

if TYPE_CHECKING:
    import datasets

__all__ = ["Example", "Task", "plain_text", "same_input"]

KEYS = ("input", "output", "instruction", "question", "content", "check", "choices", "outputs")
LISTS = ("choices", "outputs")
SPLIT_ALIASES = {"validation": "valid", "dev": "valid"}


@dataclass(frozen=True)
class Task:
    """A task with its instruction in several wordings.

    Attributes
    ----------
    name
        By which suites and results know it.
    instructions
        Wordings of what to do, one or more.
    train, valid, test
        Examples to demonstrate, train on and locate with; to choose settings by; to score.
    group, description
        For tables.
    held_out
        Further wordings, which only the test split is asked with.

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
    held_out: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", re.sub(r"[/\\\0]", "_", self.name))  # names become folders
        if not self.name.strip(" ."):
            raise ValueError(f"name={self.name!r} is no name for a task; give one with a letter or digit in it")
        if not self.instructions or not all(self.instructions):
            raise ValueError(f"task {self.name!r} has no instruction; give at least one sentence that says what to do")

    def split(self, name: str) -> tuple[Example, ...]:
        """The examples of the split called `name`: `train`, `valid` or `test`."""
        if name not in SPLITS:
            raise ValueError(f"split={name!r} is unknown; choose one of {', '.join(SPLITS)}")
        return getattr(self, name)

    @property
    def check(self) -> str | None:
        """The verifier that all examples share; None where there is none, or where they have their own."""
        checks = {x.check for split in SPLITS for x in self.split(split)}
        return checks.pop() if len(checks) == 1 else None

    @property
    def is_checked(self) -> bool:
        """Whether answers are free, and a verifier decides on their form."""
        return any(x.check for split in SPLITS for x in self.split(split))

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
        check: str | None = None,
        held_out: Sequence[str] = (),
        group: str = "own",
        description: str = "",
    ) -> Task:
        """A task from a list of dictionaries with the keys `input` and `output`, or `input` and `check`.

        Parameters
        ----------
        records
            One per example; every cell a text, as it is written.
        name
            By which suites and results know the task.
        instruction
            What to do, in one wording or several; None takes the records' own (key `instruction`).
        columns
            Where your keys have other names: `{"input": "question", "output": "answer"}`. Optional keys are `split`
            (train, valid, test), `instruction`, `question`, `content`, `choices` (a list of texts), `outputs` (all right
            answers, instead of `output`) and `check` (the verifier of a free answer); see `Example`.
        check
            One verifier for all records, such as `bullets` or `language: es`; see `tasks.checks.CHECKS`.
        held_out
            Further wordings of the instruction, which only the test split is asked with.
        group, description
            For tables.

        Notes
        -----
        Without a `split` key the examples are shuffled with a fixed seed and cut 50 : 15 : 35, repeated inputs on one side. Where
        there is a train but no valid split, a fifth of train (at most 200) becomes the valid split. An answer's white space at
        its end is dropped. An instruction that stands in a record stays with it.

        Raises
        ------
        ValueError
            If there are no records, a cell is missing or no text, an output is not among its choices, a check is unknown, or only
            some records have a check, or an instruction where these differ.
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
            example = _example(record, names, place, check)
            split = cell_text(record.get(names["split"]), names["split"], place)
            split = SPLIT_ALIASES.get(split, split)
            if split not in parts:
                raise ValueError(f"{place} has split={split!r}; choose one of {', '.join(SPLITS)}")
            parts[split].append(example if instruction is None else replace(example, instruction=None))
        everything = [x for part in parts.values() for x in part]
        if not everything:
            needed = f"{names['input']!r} and {names['output']!r}"
            raise ValueError(f"task {name!r} is empty; give it at least one record with {needed}")
        if unchecked := sum(x.check is None for x in everything) % len(everything):
            said = f"{unchecked} of {len(everything)} records of task {name!r} have no {names['check']!r}"
            raise ValueError(f"{said}, the others have one; give each its own, or all the same (check=)")
        examples = split_examples(parts)
        warn_of_shared(name, examples)
        if instruction is None:
            instruction = list(dict.fromkeys(x.instruction for x in everything if x.instruction))
            bare = sum(x.instruction is None for x in everything)
            if bare and len(instruction) > 1:
                said = f"{bare} of {len(everything)} records of task {name!r} have no {names['instruction']!r}"
                raise ValueError(f"{said}, and those of the others differ; give each its own, or one (instruction=)")
            if len(instruction) == 1:  # the task's
                examples = {s: [replace(x, instruction=x.instruction and None) for x in examples[s]] for s in SPLITS}
        wordings = (instruction,) if isinstance(instruction, str) else tuple(instruction)
        about = {"group": group, "description": description, "held_out": tuple(held_out)}
        return cls(name, wordings, *(tuple(examples[s]) for s in SPLITS), **about)

    @classmethod
    def from_file(
        cls,
        path: str | Path,
        *,
        instruction: str | Sequence[str] | None = None,
        name: str | None = None,
        columns: Mapping[str, str] | None = None,
        check: str | None = None,
    ) -> Task:
        """A task from a file, a record in each row, every cell as it is written; see `tasks.files.read_rows`.

        Parameters
        ----------
        path
            A `.csv`, `.tsv`, `.jsonl`, `.json` or `.parquet` file, also gzipped.
        name
            By which suites and results know the task; default: the file's.
        instruction, columns, check
            As in `from_records`.
        """
        path = Path(path)
        rows, stem = read_rows(path), path.name.removesuffix(".gz").rsplit(".", 1)[0]
        return cls.from_records(rows, name=name or stem, instruction=instruction, columns=columns, check=check)

    @classmethod
    def from_dataset(
        cls,
        dataset: datasets.Dataset | datasets.DatasetDict,
        *,
        name: str,
        instruction: str | Sequence[str] | None = None,
        columns: Mapping[str, str] | None = None,
        check: str | None = None,
    ) -> Task:
        """A task from a `datasets.Dataset`, or a `DatasetDict` whose splits (train, validation, test) are kept.

        Parameters
        ----------
        dataset
            Class labels become their names.
        name, instruction, columns, check
            As in `from_records`.
        """
        if isinstance(dataset, Mapping):
            records = [{**row, "split": split} for split, rows in dataset.items() for row in _labelled(rows)]
            columns = {**(columns or {}), "split": "split"}
        else:
            records = _labelled(dataset)
        return cls.from_records(records, name=name, instruction=instruction, columns=columns, check=check)

    def to_dataframe(self) -> pd.DataFrame:
        """One row per example: split, input, output, question, content, check, choices."""
        return pd.DataFrame([{"split": split, **vars(x)} for split in SPLITS for x in self.split(split)])

    def __repr__(self) -> str:
        shown = ", ".join(f"{x.input!r} → {x.output or x.check!r}" for x in self.train[:2])
        sizes = " / ".join(str(len(self.split(s))) for s in SPLITS)
        return f"Task({self.name}: {self.instructions[0]!r}, {sizes} train/valid/test, {shown})"

    def _repr_html_(self) -> str:
        frame = self.to_dataframe()
        used = frame.mask(frame.eq("")).dropna(axis="columns", how="all").columns
        wordings = " · ".join((*self.instructions, *self.held_out))
        return table_html(frame[used].fillna(""), title=f"Task({self.name}: {wordings})", index=False)


def _example(record: Mapping[str, Any], names: Mapping[str, str], place: str, check: str | None) -> Example:
    cells = {key: cell_text(record.get(names[key]), names[key], place) for key in KEYS if key not in LISTS}
    choices, outputs = (cell_texts(record.get(names[key]), names[key], place) for key in LISTS)
    if outputs and not cells["output"]:
        cells["output"] = outputs[0]
    if not cells["input"] and cells["instruction"]:  # the instruction says it all
        cells |= {"input": cells["instruction"], "instruction": ""}
    cells["check"] = check or cells["check"]
    if cells["check"] is not None:
        try:
            parse_check(cells["check"])
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from None
        cells["output"] = cells["output"] or ""
    for key in ("input", "output"):
        if not cells[key] and not (key == "output" and cells["check"]):
            there = ", ".join(map(str, record)) or "nothing"
            raise ValueError(f"{place} has no {names[key]!r}; it has {there}: name your columns with columns={{...}}")
    output = cells["output"] = cells["output"].rstrip()
    for key, texts, one in (("choices", choices, "option"), ("outputs", outputs, "answer")):
        if texts is not None and output not in texts:
            said = f"{place} has the output {output!r}, which is not among its {names[key]} {texts}"
            raise ValueError(f"{said}; give one {one}'s text, not its letter")
    outputs = outputs and (output, *(x for x in outputs if x != output))
    return Example(**cells, choices=choices, outputs=outputs)


def _labelled(dataset: Any) -> list[Mapping[str, Any]]:
    """Rows of a `Dataset`, class labels by their names."""
    labels = {n: f for n, f in (getattr(dataset, "features", None) or {}).items() if hasattr(f, "int2str")}
    names = {n: lambda x, f=f: None if x is None or x < 0 else f.int2str(x) for n, f in labels.items()}
    return [{**row, **{name: text(row[name]) for name, text in names.items()}} for row in dataset]

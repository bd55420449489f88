"""General benchmarks, which are scored but not trained on, and their overlap with what is."""

from __future__ import annotations

import json
import random
import re
import string
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ivlens.continual.layouts import checked_rows, sample
from ivlens.continual.recipes import check_known
from ivlens.tasks.files import KINDS
from ivlens.tasks.suite import TaskSuite
from ivlens.tasks.task import SPLIT_ALIASES, SPLITS, Task, plain_text

__all__ = ["GENERAL", "Benchmark", "load_general", "overlapping"]

SET_ASIDE = 20  # rows for demonstrations, where a benchmark has only a test split
SUFFIXES = tuple(f".{kind}{zipped}" for kind in KINDS for zipped in ("", ".gz"))
Record = dict[str, Any]


def _numbered(question: str, choices: Any, answer: Any) -> Record:
    texts = _parsed(choices)
    number = int(answer)
    if not 0 <= number < len(texts):
        raise ValueError(f"no option of number {number}")
    return {"input": question, "output": texts[number], "choices": texts}


def _labelled(question: str, choices: Any, answer: str) -> Record:
    options = _parsed(choices)
    texts = list(options["text"])
    return {"input": question, "output": texts[list(options["label"]).index(answer)], "choices": texts}


def _last_word(text: str) -> Record:
    return _answered(*text.rsplit(maxsplit=1))


def _answered(question: str, answer: str) -> Record:
    return {"input": question, "output": answer}


def _parsed(value: Any) -> Any:
    return json.loads(value) if isinstance(value, str) else value  # a cell of a .csv file


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """A general benchmark.

    Attributes
    ----------
    hub, config
        Dataset on the Hugging Face hub.
    train, test
        Its splits for demonstrations (None: there is none, so some rows are set aside) and for scores.
    columns
        Its columns, the last of which holds the answer, as they are passed to `convert`.
    """

    hub: str
    columns: tuple[str, ...]
    convert: Callable[..., Record]
    instruction: str
    licence: str
    config: str | None = None
    train: str | None = None
    test: str = "test"


ARC: dict[str, Any] = {"columns": ("question", "choices", "answerKey"), "convert": _labelled, "train": "train"}
ARC |= {"instruction": "Answer the science question.", "licence": "CC BY-SA 4.0"}
GENERAL = {
    "hellaswag": Benchmark(
        hub="Rowan/hellaswag",
        train="train",
        test="validation",  # the answers of its test split are not public
        columns=("ctx", "endings", "label"),
        convert=_numbered,
        instruction="Continue the text.",
        licence="MIT",
    ),
    "arc_easy": Benchmark(hub="allenai/ai2_arc", config="ARC-Easy", **ARC),
    "arc_challenge": Benchmark(hub="allenai/ai2_arc", config="ARC-Challenge", **ARC),
    "openbookqa": Benchmark(
        hub="allenai/openbookqa",
        config="main",
        train="train",
        columns=("question_stem", "choices", "answerKey"),
        convert=_labelled,
        instruction="Complete the sentence or answer the question.",
        licence="Apache-2.0",
    ),
    "lambada": Benchmark(
        hub="EleutherAI/lambada_openai",
        columns=("text",),
        convert=_last_word,
        instruction="Write the last word of the passage.",
        licence="CC BY 4.0",
    ),
    "bbh_object_counting": Benchmark(
        hub="SaylorTwift/bbh",  # the one of its copies that needs no code from the hub
        config="object_counting",
        columns=("input", "target"),
        convert=_answered,
        instruction="Count the objects and answer with a number.",
        licence="MIT",
    ),
    "mmlu": Benchmark(
        hub="cais/mmlu",
        config="all",
        train="dev",
        columns=("question", "choices", "answer"),
        convert=_numbered,
        instruction="Answer the question.",
        licence="MIT",
    ),
}


def load_general(
    names: str | Iterable[str], folder: str | Path | None = None, *, n: int | None = None, seed: int = 0
) -> TaskSuite:
    """General benchmarks as tasks, multiple choice with the options' texts as `choices`.

    Parameters
    ----------
    names
        Of `GENERAL`: `hellaswag`, `arc_easy`, `arc_challenge`, `openbookqa`, `lambada`, `bbh_object_counting`, `mmlu`.
    folder
        With `<name>.jsonl`, `.json` or `.csv`, or a folder `<name>` with a file per split; None downloads from the hub. Rows have the
        hub dataset's columns, or `input`, `output` and, for multiple choice, `choices`; a column `split` is kept.
    n
        At most so many examples of the test split; None takes them all.
    seed
        Of all that is drawn at random; global random states are left alone. Here: which examples these are,
        and which are set aside for demonstrations.

    Notes
    -----
    Options that stand lettered at the end of an `input` are cut off, and the letter in `output` becomes its option's text. Without a train
    split the validation split gives the demonstrations, or else 20 rows of the test split, which then aren't scored. Without a test
    split the validation split is scored.

    Raises
    ------
    ValueError, FileNotFoundError
        If a name is unknown, or a file is missing, empty, broken or has other columns.
    """
    names = [names] if isinstance(names, str) else list(names)
    for name in names:
        check_known(name, GENERAL, "general task")
    tasks = [_load(name, GENERAL[name], None if folder is None else Path(folder), seed) for name in names]
    chosen = [sample(task.test, n, seed=seed, name=task.name, argument="n") for task in tasks]
    return TaskSuite(replace(task, test=test) for task, test in zip(tasks, chosen))


def overlapping(general: Task, trained: Task) -> list[str]:
    """Inputs of the general task's test split that stand in the trained task's training split, but for case and white space."""
    seen = {plain_text(example.input) for example in trained.train}
    return [example.input for example in general.test if plain_text(example.input) in seen]


def _load(name: str, benchmark: Benchmark, folder: Path | None, seed: int) -> Task:
    rows, source = _from_hub(benchmark) if folder is None else _from_folder(name, benchmark, folder)
    records, wordings = [], set()
    for i, row in enumerate(rows):
        if row.get(benchmark.columns[-1]) == "":
            continue  # an answer that isn't public
        records.append({**_converted(row, benchmark, f"row {i} of {source}"), "split": row.get("split") or "test"})
        wordings.add(row.get("instruction"))
    told = wordings.pop() if len(wordings) == 1 else None  # several would be questions of several kinds, not wordings
    about = {"name": name, "instruction": told or benchmark.instruction, "group": "general"}
    return Task.from_records(_with_splits(records, name, seed), **about)


def _from_hub(benchmark: Benchmark) -> tuple[list[Record], str]:
    import datasets

    rows = []
    for kind, split in (("train", benchmark.train), ("test", benchmark.test)):
        if split is not None:
            try:
                table = datasets.load_dataset(benchmark.hub, benchmark.config, split=split)
            except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
                by_hand = "try again, or download it and pass its folder"
                raise OSError(f"can't get {benchmark.hub} from the hub ({error}); {by_hand}") from error
            rows += [{**row, "split": kind} for row in table]
    return rows, benchmark.hub


def _from_folder(name: str, benchmark: Benchmark, folder: Path) -> tuple[list[Record], Path]:
    expected = f"rows with {', '.join(benchmark.columns)}, or with input and output"
    for suffix in SUFFIXES:
        if (path := folder / f"{name}{suffix}").is_file():
            return checked_rows(path, (), expected), path
    path, files = folder / name, []
    for part in (benchmark.config or "", "", "data"):  # as the hub's repositories are laid out
        here = sorted((path / part).iterdir()) if (path / part).is_dir() else []
        files = files or [f for f in here if f.name.endswith(SUFFIXES) and not f.name.startswith((".", "dataset_info"))]
    if not files:
        missing = f"no {name}{', '.join(SUFFIXES)} and no folder {name} with a file per split in {folder}"
        raise FileNotFoundError(f"{missing}; expected {expected}, as in {benchmark.hub} on the hub")
    words = {f: re.split("[^a-z]+", f.name.lower()) for f in files}
    splits = {f: next((word for word in words[f] if word in (*SPLITS, *SPLIT_ALIASES)), None) for f in files}
    if None in (found := set(splits.values())) and len(found) > 1:
        unknown = next(f for f in files if splits[f] is None)
        advice = f"call it {', '.join(SPLITS)} as the others, or move it away"
        raise ValueError(f"can't tell which split {unknown} is; {advice}")
    return [{**row, "split": splits[f] or "test"} for f in files for row in checked_rows(f, (), expected)], path


def _converted(row: Mapping[str, Any], benchmark: Benchmark, where: str) -> Record:
    try:
        if "input" in row and "output" in row:
            return _asked_plainly(row)
        return benchmark.convert(*(row[column] for column in benchmark.columns))
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        expected = f"expected {', '.join(benchmark.columns)} as on the hub, or input and output"
        raise ValueError(f"{where} can't be read ({error}); it has {', '.join(map(str, row))}, {expected}") from error


def _asked_plainly(row: Mapping[str, Any]) -> Record:
    if not row.get("choices"):
        return {"input": row["input"], "output": row["output"]}
    choices = list(_parsed(row["choices"]))
    record = {"input": row["input"], "output": row["output"], "choices": choices}
    lettered = "".join(f"\n{letter}. {text}" for letter, text in zip(string.ascii_uppercase, choices))
    letters = string.ascii_uppercase[: len(choices)]
    if record["input"].endswith(lettered) and record["output"] in list(letters):
        record["input"] = record["input"].removesuffix(lettered)
        record["output"] = choices[letters.index(record["output"])]
    return record


def _with_splits(records: list[Record], name: str, seed: int) -> list[Record]:
    by_split: dict[str, list[Record]] = {"train": [], "valid": [], "test": []}
    for record in records:
        split = SPLIT_ALIASES.get(record["split"], record["split"])
        by_split.setdefault(split, []).append(record)  # Task.from_records objects to an unknown one
    if not by_split["test"]:
        by_split["test"], by_split["valid"] = by_split["valid"], []
    if not by_split["train"]:
        by_split["train"], by_split["valid"] = by_split["valid"], []
    if not by_split["train"]:
        aside = set(random.Random(f"{seed}/{name}").sample(range(len(records)), min(SET_ASIDE, len(records) // 2)))
        by_split["train"] = [record for i, record in enumerate(records) if i in aside]
        by_split["test"] = [record for i, record in enumerate(records) if i not in aside]
    if not by_split["test"]:
        advice = "give some of them split='test', or name the file or split of them test"
        raise ValueError(f"{name} has no test rows; {advice}")
    return [{**record, "split": split} for split, group in by_split.items() for record in group]

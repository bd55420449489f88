"""The layouts in which benchmarks are published, and tasks read from them."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from ivlens.tasks.files import json_value, read_rows, read_text
from ivlens.tasks.task import Task

__all__ = ["EXPECTED", "READERS", "checked_rows", "sample"]

Item = TypeVar("Item")

EXPECTED = {
    "trace": 'one folder per task, such as FOMC/, with train.json, eval.json and test.json: [{"prompt": ..., "answer": ...}, ...]',
    "o-lora": (
        "CL_Benchmark/<category>/<task>/, such as CL_Benchmark/SC/yelp/, with train.json, dev.json and test.json: "
        '[{"sentence": ..., "label": ...}, ...], and labels.json: ["...", ...]'
    ),
    "natural-instructions": (
        'tasks/taskNNN_*.json with "Definition" and "Instances": [{"input": ..., "output": [...]}, ...], or '
        '*/taskNNN_*.jsonl with {"definition": ..., "inputs": ..., "targets": ...} in each line'
    ),
}

SEVERAL = ("output", "targets", "definition")  # may hold lists of texts


def checked_rows(path: Path, keys: Sequence[str], expected: str) -> list[Any]:
    """Rows of a file (see `tasks.files`), which all have the keys; the error names the layout that is expected."""
    try:
        return _checked(read_rows(path), keys, path, expected)
    except (ValueError, FileNotFoundError) as error:
        raise error if expected in str(error) else type(error)(f"{error}. Expected {expected}") from error


def _checked(rows: Any, keys: Sequence[str], path: Path, expected: str) -> list[Any]:
    if not isinstance(rows, list) or not rows:
        raise ValueError(f"{path} holds no list of rows; expected {expected}")
    for i, row in enumerate(rows):
        for key in keys:
            value = row.get(key) if isinstance(row, Mapping) else None
            texts = value if isinstance(value, list) and key in SEVERAL else [value]
            if not all(isinstance(text, str) for text in texts):
                what = f"text under {key!r}" if value is not None else repr(key)
                raise ValueError(f"row {i} of {path} has no {what}; expected {expected}")
    return rows


def _content(path: Path, expected: str) -> Any:
    """A JSON file that holds no table."""
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}; expected {expected}")
    try:
        return json_value(read_text(path), str(path))
    except ValueError as error:
        raise ValueError(f"{error}. Expected {expected}") from error


def sample(items: Sequence[Item], n: int | None, *, seed: int, name: str, argument: str) -> tuple[Item, ...]:
    """`n` of the items (all of them where they are fewer, or with None): the first ones in an order that the seed fixes."""
    if n is None:
        return tuple(items)
    if n < 1:
        raise ValueError(f"{argument}={n} must be at least 1; leave it out to take everything")
    shuffled = list(items)
    random.Random(f"{seed}/{name}/{argument}").shuffle(shuffled)
    return tuple(shuffled[:n])


# Where prompts share no first line. The wordings from here on are ours.
TRACE_INSTRUCTIONS = {"Py150": "Write the next line of the Python code."}

O_LORA_CATEGORIES = {
    **dict.fromkeys(["yelp", "amazon", "IMDB", "SST-2"], "SC"),
    **dict.fromkeys(["dbpedia", "agnews", "yahoo"], "TC"),
    **dict.fromkeys(["MNLI", "CB", "RTE"], "NLI"),
}  # every other task is a category of its own
O_LORA_INSTRUCTIONS = {
    "SC": "Classify the sentiment of the text.",
    "TC": "Classify the topic of the text.",
    "NLI": "Tell how sentence 2 follows from sentence 1.",
    "QQP": "Tell whether the two sentences mean the same.",
    "BoolQA": "Tell from the passage whether the answer to the question is true or false.",
    "MultiRC": "Tell from the passage whether the candidate answers the question correctly.",
    "WiC": "Tell whether the word has the same meaning in both sentences.",
    "COPA": "Answer with the letter of the more plausible sentence.",
}


def _trace(folder: Path, name: str) -> Task:
    rows = [
        {**row, "split": split}
        for file, split in {"train": "train", "eval": "valid", "test": "test"}.items()
        for row in checked_rows(folder / name / f"{file}.json", ("prompt", "answer"), EXPECTED["trace"])
    ]
    # Only the first line: the prompts share the label of their first field ("Text:") too, which belongs to the input.
    line = rows[0]["prompt"].split("\n", 1)[0] + "\n"
    line = line if all(row["prompt"].startswith(line) for row in rows) else ""
    instruction = line.strip() or TRACE_INSTRUCTIONS.get(name, "Do what the text asks for.")
    records = [
        {"input": row["prompt"][len(line) :].lstrip("\n"), "output": row["answer"], "split": row["split"]}
        for row in rows
    ]
    return _task(records, name, instruction, "trace")


def _o_lora(folder: Path, name: str) -> Task:
    category, expected = O_LORA_CATEGORIES.get(name, name), EXPECTED["o-lora"]
    root = folder / "CL_Benchmark" if (folder / "CL_Benchmark").is_dir() else folder
    labels = _checked(_content(root / category / name / "labels.json", expected), (), root, expected)
    records = [
        {"input": row["sentence"], "output": row["label"], "split": split}
        for split in ("train", "dev", "test")
        for row in checked_rows(root / category / name / f"{split}.json", ("sentence", "label"), expected)
    ]
    instruction = f"{O_LORA_INSTRUCTIONS[category]} Options: {', '.join(map(str, labels))}."
    return _task(records, name, instruction, "long")


def _natural_instructions(folder: Path, name: str) -> Task:
    expected = EXPECTED["natural-instructions"]
    found = [path for pattern in ("", "*/") for path in sorted(folder.glob(f"{pattern}{name}_*.json*"))]
    if not found:
        raise FileNotFoundError(f"no file {name}_*.json in {folder} or its tasks/; expected {expected}")
    path = found[0]
    if path.suffix == ".jsonl":
        rows = checked_rows(path, ("definition", "inputs", "targets"), expected)
        definition, pairs = rows[0]["definition"], [(row["inputs"], row["targets"]) for row in rows]
    else:
        content = _content(path, expected)
        if not isinstance(content, Mapping) or not content.get("Definition"):
            raise ValueError(f"{path} has no 'Definition'; expected {expected}")
        instances = _checked(content.get("Instances"), ("input", "output"), path, expected)
        definition, pairs = content["Definition"], [(x["input"], x["output"]) for x in instances]
    outputs: dict[str, list[str]] = {}  # of an input that comes again only the first, or it would stand in two splits
    for text, output in pairs:
        outputs.setdefault(text, [x for x in ([output] if isinstance(output, str) else output) if x.strip()])
    records = [{"input": text, "outputs": out} for text, out in outputs.items() if text.strip() and out]
    title = path.stem.removesuffix("_train").removesuffix("_test")
    wording = definition if isinstance(definition, str) else " ".join(definition)
    return _task(records, title, wording.strip(), "natural-instructions")


READERS = {"trace": _trace, "o-lora": _o_lora, "natural-instructions": _natural_instructions}


def _task(records: list[dict[str, Any]], name: str, instruction: str, group: str) -> Task:
    # Some benchmarks repeat their test split as the validation split: choices made on that would be made on the test.
    test = {record["input"] for record in records if record.get("split") == "test"}
    held = [r for r in records if r.get("split") not in ("valid", "dev") or r["input"] not in test]
    return Task.from_records(held, name=name, instruction=instruction, group=group)

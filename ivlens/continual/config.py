"""A run's options from a YAML file."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from ivlens.common.hints import hint
from ivlens.continual.general import GENERAL, load_general
from ivlens.continual.recipes import load_sequence
from ivlens.tasks.suite import TaskSuite, load_tasks
from ivlens.tasks.task import Task
from ivlens.training.methods import Method, as_method

__all__ = ["read_config"]


def read_config(path: str | Path) -> dict[str, Any]:
    """Options of `ivl.continual.run` from `path`, a YAML file whose keys are their names.

    `sequence` is a recipe's name, a mapping (`recipe`, `folder`, `n_train`, `n_test`), or a list of built-in tasks and files;
    `general` a list of built-in tasks, benchmarks and files, or a mapping (`tasks`, `folder`, `n`); `methods` a list, or a mapping of your
    labels to names or to mappings (`method` and its options). Paths are relative to the file.

    Raises
    ------
    ValueError
        If the file isn't YAML, or a key is unknown; the message suggests near ones.
    """
    import yaml

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}; give the path of a .yaml file")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML ({' '.join(str(error).split())})") from error
    if not isinstance(content, Mapping) or "sequence" not in content:
        raise ValueError(f"{path} names no sequence; it needs at least `sequence:` with a recipe or a list of tasks")
    _check_keys(content, str(path))
    options = dict(content)
    options["sequence"] = _sequence(content["sequence"], path.parent)
    options["general"] = _general(content.get("general") or (), path.parent)
    if "methods" in content:
        named = content["methods"]
        if not isinstance(named, Mapping):
            named = {x if isinstance(x, str) else repr(as_method(x)): x for x in named}
        options["methods"] = {label: _method(label, x) for label, x in named.items()}
    if isinstance(content.get("lora"), Mapping):
        from peft import LoraConfig

        options["lora"] = LoraConfig(**{"task_type": "CAUSAL_LM", **content["lora"]})
    if isinstance(content.get("folder"), str):
        options["folder"] = path.parent / content["folder"]
    return options


def _check_keys(content: Mapping[str, Any], where: str) -> None:
    from transformers import TrainingArguments

    from ivlens.continual.experiment import experiment

    known = [name for name in inspect.signature(experiment).parameters if name != "arguments"]
    known += [f.name for f in fields(TrainingArguments)]
    for key in content:
        if key not in known:
            otherwise = "see ivl.continual.run for what there is"
            raise ValueError(f"{where}: unknown key {key!r}; {hint(key, known, otherwise)}")


def _sequence(given: Any, folder: Path) -> TaskSuite:
    if isinstance(given, str):
        return load_sequence(given)
    if isinstance(given, Mapping):
        options = {key: value for key, value in given.items() if key not in ("recipe", "folder")}
        return load_sequence(given["recipe"], folder / given["folder"] if "folder" in given else None, **options)
    return TaskSuite([_task(entry, folder) for entry in given])


def _general(given: Any, folder: Path) -> TaskSuite:
    if isinstance(given, Mapping):
        options = {key: value for key, value in given.items() if key not in ("tasks", "folder")}
        return load_general(given["tasks"], folder / given["folder"] if "folder" in given else None, **options)
    known = [name for name in given if name in GENERAL]
    loaded = load_general(known) if known else {}
    return TaskSuite([loaded[entry] if entry in loaded else _task(entry, folder) for entry in given])


def _task(entry: Any, folder: Path) -> Task:
    """A built-in task's name, a file, or a mapping of `file` with `instruction` and `name`."""
    if isinstance(entry, Mapping):
        options = {key: value for key, value in entry.items() if key != "file"}
        return Task.from_file(folder / entry["file"], **options)
    return Task.from_file(folder / entry) if "." in entry else load_tasks(entry)[entry]


def _method(label: str, given: Any) -> Method:
    """A name, several, or a mapping of `method` and the options of the one named."""
    options = dict(given) if isinstance(given, Mapping) else {"method": given}
    if "method" not in options:
        raise ValueError(f"methods: {label} has no `method:`; name the one whose options these are")
    method = options.pop("method")
    if options and not isinstance(method, str):
        raise ValueError(
            f"methods: {label} has options of several methods; give each with its own: {{ewc: {{strength: 10}}}}"
        )
    try:
        return as_method({method: options} if options else method)
    except ValueError as error:
        raise ValueError(f"methods: {label}: {error}") from error

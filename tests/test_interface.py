"""The public interface says what it takes: every parameter spelled out, documented, and in the same words everywhere."""

from __future__ import annotations

import dataclasses
import inspect
import re
import types
from collections.abc import Callable, Iterator
from typing import Any

import ivlens as ivl
from ivlens.continual.experiment import Experiment, experiment
from ivlens.continual.scoring import Scoring

NUMPY_SECTION = r"^{}\n-+\n(.*?)(?=^\S[^\n]*\n-+\n|\Z)"
# What a shared parameter's description begins with wherever it has one of its own.
SHARED = {
    "batch_size": "Prompts per forward pass; None for as many as there is room for. Halved where memory runs out.",
    "n_prompts": "Prompts per task",
    "progress": "Show a progress bar.",
    "seed": "Of all that is drawn at random; global random states are left alone.",
    "split": "`train`, `valid` or `test`: where the prompts' queries come from.",
    "tasks": "A task, a list of tasks, or tasks by name, such as `load_tasks` gives.",
    "model": "A hooked model, such as `load_model` gives.",
    "shots": "How the prompts look; see `build_prompts`.",
    "instruction": "How the prompts look; see `build_prompts`.",
    "style": "How the prompts look; see `build_prompts`.",
    "template": "How the prompts look; see `build_prompts`.",
}
# Where the word is about something else, or the base model, which is opened here.
OTHERWISE = {
    "batch_size": {"continual.run", "fine_tune"},
    "instruction": {"AnswerProbabilities", "Example", "Prompt", "Task.from_records", "build_prompts", "checkup"},
    "model": {"Checkup.hits", "IVTrainer", "continual.run", "fine_tune", "track"},
    "shots": {"Guidance", "build_prompts", "checkup"},
    "style": {"Prompt", "build_prompts", "checkup"},
    "tasks": {"HeadEffects", "TaskSuite", "explore"},
    "template": {"Prompt", "build_prompts"},
}


def public() -> Iterator[tuple[str, Any]]:
    """Functions and classes of `ivl.__all__` and `ivl.continual.__all__`, by the name a user types after `ivl.`."""
    for name in ivl.__all__:
        if not isinstance(getattr(ivl, name), types.ModuleType):
            yield name, getattr(ivl, name)
    for name in ivl.continual.__all__:
        if callable(getattr(ivl.continual, name)):
            yield f"continual.{name}", getattr(ivl.continual, name)


def documented_callables() -> Iterator[tuple[str, Callable[..., Any], str]]:
    """Name, what is called, and its docstring: functions, constructors (documented by their class), and a class's own public methods.

    Not its own are those that override a method of another library, which documents it.
    """
    for name, thing in public():
        if not isinstance(thing, type):
            yield name, thing, inspect.getdoc(thing) or ""
            continue
        yield name, thing, inspect.getdoc(thing) or ""
        foreign = [base for base in thing.__mro__[1:] if not base.__module__.startswith("ivlens")]
        for key, value in vars(thing).items():
            is_method = isinstance(value, (types.FunctionType, classmethod, staticmethod))
            if is_method and not key.startswith("_") and not any(hasattr(base, key) for base in foreign):
                yield f"{name}.{key}", getattr(thing, key), inspect.getdoc(getattr(thing, key)) or ""


def parameters(function: Callable[..., Any]) -> list[str]:
    return [name for name in inspect.signature(function).parameters if name not in ("self", "cls")]


def sections(doc: str, *titles: str) -> dict[str, str]:
    """From each parameter to its description, of numpy's sections with these titles."""
    found: dict[str, str] = {}
    for title in titles:
        if match := re.search(NUMPY_SECTION.format(title), doc, re.S | re.M):
            for part in re.split(r"\n(?=\S)", match[1].strip()):
                head, _, text = part.partition("\n")
                names = [name.strip().lstrip("*") for name in head.split(":")[0].split(",")]
                found |= dict.fromkeys(names, " ".join(text.split()))
    return found


CALLABLES = {name: (function, doc) for name, function, doc in documented_callables()}


def test_every_parameter_is_documented():
    """In a section of numpy's, or, of a call with one or two parameters, by its name in the text."""
    missing = {}
    for name, (function, doc) in CALLABLES.items():
        takes = parameters(function)
        told = set(sections(doc, "Parameters", "Attributes"))
        if len(takes) <= 2:
            told |= set(re.findall(r"`(\w+)`", doc))
        missing[name] = [x for x in takes if x not in told]
    assert len(CALLABLES) > 100 and not {name: some for name, some in missing.items() if some}


def test_what_is_documented_is_there():
    for name, (function, doc) in CALLABLES.items():
        assert set(sections(doc, "Parameters")) <= set(parameters(function)), name
        if dataclasses.is_dataclass(function):
            assert set(sections(doc, "Attributes")) <= set(parameters(function)), name


def test_shared_parameters_have_one_wording():
    """Unless they are said to be "as in" another function."""
    others: dict[str, set[str]] = {}
    for name, (_, doc) in CALLABLES.items():
        for parameter, text in sections(doc, "Parameters", "Attributes").items():
            if parameter in SHARED and not text.startswith((SHARED[parameter], "As in `")):
                others.setdefault(parameter, set()).add(name)
    assert others == OTHERWISE


def defaults(function: Callable[..., Any]) -> dict[str, Any]:
    return {p.name: p.default for p in inspect.signature(function).parameters.values()}


def test_no_option_hides_behind_others():
    """What is left to `**` goes to another library, which has too many to name."""
    hidden = {
        name: p.name
        for name, (function, _) in CALLABLES.items()
        for p in inspect.signature(function).parameters.values()
        if p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
    }
    training = dict.fromkeys(("IVTrainer", "continual.collect", "continual.run", "fine_tune"), "arguments")
    assert hidden == {**training, "InstructionVector.push_to_hub": "upload"}


def test_what_is_spelled_out_twice_is_the_same():
    run, collect = defaults(ivl.continual.run), defaults(ivl.continual.collect)
    assert {k: v for k, v in run.items() if k not in ("progress", "dry_run")} == collect
    assert set(defaults(experiment)) == set(collect)
    for part in (Scoring, Experiment):
        known = {k: v for k, v in defaults(part).items() if v is not inspect.Parameter.empty and k in run}
        known.pop("batch_size", None)  # of scoring, not of a training step
        assert known == {k: run[k] for k in known} and len(known) >= 3
    compare, track = defaults(ivl.compare), defaults(ivl.track)
    both = set(compare) & set(track)
    assert {"model", "checkpoints"} == set(track) - both and {"before", "after"} == set(compare) - both
    assert {k: compare[k] for k in both} == {**{k: track[k] for k in both}, "n_effects": 8}
    shared = {"steps", "batch_size", "learning_rate", "lora", "shots", "instruction", "style", "dtype"}
    tune = defaults(ivl.fine_tune)
    assert {k: run[k] for k in shared} == {k: tune[k] for k in shared}


def test_the_same_word_comes_in_the_same_order():
    """Model, then tasks, a task or prompts; everything after what a call is about is named."""
    for name in ("answer_probabilities", "evaluate", "locate_heads", "fine_tune"):
        assert parameters(getattr(ivl, name))[:2] == ["model", "tasks"]
    for name in ("extract_vector", "tune_injection", "with_own_answers"):
        assert parameters(getattr(ivl, name))[:2] == ["model", "task"]
    assert parameters(ivl.generate)[:2] == ["model", "prompts"] and parameters(ivl.inject)[:2] == ["model", "vector"]
    unnamed = {
        (name, p.name)
        for name, function in public()
        for p in inspect.signature(function).parameters.values()
        if not isinstance(function, type) and p.kind is p.POSITIONAL_OR_KEYWORD and p.default is not p.empty
    }
    lists = {("load_tasks", "names"), ("continual.load_general", "folder"), ("continual.load_sequence", "folder")}
    assert unnamed == {("load_model", "name"), ("extract_vector", "heads"), ("checkup", "skills"), *lists}

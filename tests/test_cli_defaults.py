"""What a command passes on where nothing is given is the function's own default, or is listed below with the reason.

The command line could read its defaults off the functions, but these import torch, which takes seconds: too long for `--help`. So
they stand in both places, and are compared here, as they arrive.
"""

from __future__ import annotations

import importlib
import inspect
import json
import re
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner

import ivlens as ivl
from ivlens.cli import app
from ivlens.models.head import Head
from tests import tiny

pytestmark = pytest.mark.model

FUNCTIONS = {
    "load_model": "ivlens.models",
    "run_demo": "ivlens.demo",
    "locate_heads": "ivlens.patching",
    "extract_vector": "ivlens.vectors.extraction",
    "tune_injection": "ivlens.steering.tuning",
    "generate": "ivlens.steering.generate",
    "export_vector": "ivlens.vectors.export",
    "evaluate": "ivlens.steering.evaluation",
    "fine_tune": "ivlens.training",
    "track": "ivlens.dynamics",
    "recover": "ivlens.dynamics",
    "run": "ivlens.continual",
    "checkup": "ivlens.dynamics",
}
# What differs, by command and function; a command that needs nothing else is here too, with nothing.
ASKED = {
    "shots": 5,
    "counterfactual": "shuffled_labels",
}  # as `track` asks; the counterfactual is what this makes the default
BEFORE_AND_AFTER = {
    "load_model": {"backend": "bridge"},  # adapters are put on it
    "locate_heads": {**ASKED, "n_prompts": 10, "n_mean": 30},  # on the way to something else, and in less time
    "extract_vector": {"shots": 5, "n_prompts": 30},  # as many as behind the vectors of `track`
    "track": {},
    "recover": {},
}
DIFFERENT = {
    "demo": {"load_model": {}, "run_demo": {}},
    "locate": {"load_model": {}, "locate_heads": {}},
    "extract": {"load_model": {}, "extract_vector": {}, "tune_injection": {}},
    "steer": {"load_model": {}, "generate": {"max_new_tokens": 10}},  # what None comes to
    "export": {"load_model": {"backend": "bridge"}, "export_vector": {}},
    "evaluate": {
        "load_model": {},
        "evaluate": {"reference_shots": 10},
    },  # a table for people wants something to compare with
    "train": {"fine_tune": {}},
    "compare": {**BEFORE_AND_AFTER, "track": {"n_effects": 8}},  # the default of `ivl.compare`
    "track": BEFORE_AND_AFTER,
    "continual": {"run": {}},
    "checkup": {"checkup": {}},
}
GIVEN = ("folder", "heads", "model", "vector")  # what a command is there to bring


class Enough(BaseException):
    """The last function was called; nothing in the command line catches this."""


def effects() -> ivl.HeadEffects:
    return ivl.HeadEffects(torch.arange(12.0).view(1, 3, 4), torch.zeros(1), ("past",))


def vector() -> ivl.InstructionVector:
    shares = torch.ones(1, 32)
    return ivl.InstructionVector(shares.sum(0), (Head(0, 1),), shares, metadata={"task": "past"})


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    """What each command can't do without."""
    folder = tmp_path_factory.mktemp("defaults")
    records = [json.dumps({"input": verb, "output": f"{verb}ed"}) for verb in tiny.VERBS]
    (folder / "past.jsonl").write_text("\n".join(records))
    effects().save(folder / "effects.safetensors")
    vector().save(folder / "vector")
    own = ["--file", f"{folder / 'past.jsonl'}", "--instruction", "Write the past form."]
    return {
        "demo": [],
        "locate": own,
        "extract": [*own, "--heads", f"{folder / 'effects.safetensors'}"],
        "steer": [f"{folder / 'vector'}", "Q: walk\\nA:"],
        "export": [f"{folder / 'vector'}"],
        "evaluate": own,
        "train": own,
        "compare": ["after", *own],
        "track": ["after", *own, "--recover"],
        "continual": ["--task", "antonym", "--task", "present_past"],
        "checkup": ["smollm2", "after"],
    }


@pytest.mark.parametrize("command", DIFFERENT)
def test_defaults_are_the_functions_own(command, arguments, monkeypatch, model, tmp_path):
    expected, calls, shots = DIFFERENT[command], {}, set()
    gives = {"load_model": lambda: model, "locate_heads": effects, "extract_vector": vector, "track": lambda: None}

    def recorder(name: str, real: Any) -> Any:
        known = inspect.signature(real)

        def record(*arguments: Any, **options: Any) -> Any:
            given = known.bind(*arguments, **options).arguments
            own = {key: known.parameters[key].default for key in given}
            own = {
                key: value for key, value in own.items() if value is not inspect.Parameter.empty and key not in GIVEN
            }
            calls[name] = {key: given[key] for key, value in own.items() if given[key] != value}
            shots.update({given["shots"]} if "shots" in given and name != "tune_injection" else ())
            if name == list(expected)[-1]:
                raise Enough
            return gives[name]()

        return record

    for name, place in FUNCTIONS.items():
        module = importlib.import_module(place)
        monkeypatch.setattr(module, name, recorder(name, getattr(module, name)))
    with pytest.raises(Enough):
        CliRunner().invoke(app, [command, *arguments[command], "--out", f"{tmp_path}"])
    assert calls == expected
    said = [p.help for p in typer.main.get_command(app).commands[command].params if p.name == "shots"]
    assert [{int(re.search(r"default: (\d+)", text)[1])} for text in said] == [shots] * len(said)


def test_every_command_is_known():
    assert set(DIFFERENT) == set(typer.main.get_command(app).commands) - {"tasks", "models"}  # which only list

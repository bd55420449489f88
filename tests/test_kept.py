"""Every argument of every function that keeps results in a folder tells them apart, or is known not to matter.

Arguments are read from the signatures: a new one fails here until it is given another value below, or is named in `SAME`.
"""

from __future__ import annotations

import importlib
import inspect
import json
import pkgutil
import shutil

import pytest
import torch
from peft import LoraConfig
from transformers import AutoTokenizer

import ivlens as ivl
from ivlens.common.keys import key
from ivlens.continual import runner
from ivlens.dynamics.checkup import checkup
from ivlens.dynamics.restoring import recover
from ivlens.dynamics.tracking import track
from ivlens.models.head import Head
from ivlens.patching.heads import head_effects
from ivlens.patching.locating import locate_heads
from ivlens.tasks.checks import register_check
from ivlens.training.finetune import fine_tune
from ivlens.training.methods import EWC
from ivlens.vectors.vector import InstructionVector
from tests import tiny

pytestmark = [pytest.mark.model, pytest.mark.filterwarnings("ignore")]

SAME = {  # where results are kept, what is shown, and how much is done at a time
    fine_tune: {"folder", "progress"},
    locate_heads: {"folder", "progress", "max_rows"},
    head_effects: {"folder", "progress", "max_rows"},
    track: {"folder", "progress", "batch_size", "device_map"},
    recover: {"folder", "progress", "device_map"},
    checkup: {"folder", "progress", "tolerance", "device_map"},  # by which answers are judged, not given
    runner.experiment: {"folder"},
}
BESIDE = {  # `run` and `collect` pass theirs on to `experiment`, `compare` to `track`, `find_heads` to `locate_heads`; others read a folder
    ("run", "progress"), ("run", "dry_run"), "collect", "compare", "find_heads", "load_general", "load_sequence", "settled",
    "usable_checkpoint",
}  # fmt: skip


def test_every_function_with_a_folder_is_known():
    for module in pkgutil.walk_packages(ivl.__path__, "ivlens."):
        if module.name.split(".")[1] not in ("patching", "vectors", "steering", "dynamics", "training", "continual"):
            continue
        there = importlib.import_module(module.name)
        for name in getattr(there, "__all__", ()):
            function = getattr(there, name)
            if inspect.isfunction(function) and "folder" in inspect.signature(function).parameters:
                assert function in SAME or name in BESIDE or function is runner.run, f"{module.name}.{name} keeps what?"
    own = set(inspect.signature(runner.run).parameters) - set(inspect.signature(runner.experiment).parameters)
    assert {("run", name) for name in own} <= BESIDE


def check(function, changes, apart=frozenset()):
    """That every argument is either known not to matter or among those changed, here or `apart`."""
    known = set(inspect.signature(function).parameters)
    assert known - SAME[function] - apart == set(changes), "an argument is new, or gone: classify it"


@pytest.fixture(scope="module")
def other_base(base, tmp_path_factory):
    """The same weights, and so the same adapters, computed with otherwise."""
    folder = tmp_path_factory.mktemp("other") / "base"
    shutil.copytree(base, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.1}))
    return str(folder)


@pytest.fixture(scope="module")
def run(base, task, tmp_path_factory):
    options = {"steps": 2, "batch_size": 2, "learning_rate": 1e-2, "progress": False}
    return fine_tune(base, task, folder=tmp_path_factory.mktemp("run"), save_every=1, **options)


def made(inputs, name, output):
    return ivl.Task.from_records([{"input": x, "output": output} for x in inputs], name=name, instruction="Go.")


def vector(seed=0):
    shares = torch.randn(2, 32, generator=torch.Generator().manual_seed(seed))
    return InstructionVector(shares.sum(0), (Head(0, 1), Head(1, 2)), shares, layer=1)


def files_after(function, folder, *arguments, **options):
    function(*arguments, folder=folder, **options)
    return {p for p in folder.rglob("*.safetensors") if "partial" in str(p) or "sweep" in p.name}


def assert_told_apart(function, folder, options, changes, apart=frozenset()):
    """Kept results count for the same arguments, and for no others."""
    check(function, changes, apart)
    seen = files_after(function, folder, **options)
    assert seen and files_after(function, folder, **options) == seen
    for name, value in changes.items():
        more = files_after(function, folder, **{**options, name: value})
        assert more > seen, f"{name}={value!r} brought back results of {options.get(name)!r}"
        seen = more


@pytest.mark.slow
def test_fine_tune(base, other_base, task, other_task, run, tmp_path, tokenizer_folder):
    ending_otherwise = AutoTokenizer.from_pretrained(tokenizer_folder, eos_token="<pad>")
    changed = ivl.Task.from_records(
        [{"input": w, "output": "x"} for w in tiny.VERBS], name="past", instruction="Say x."
    )
    changes = {
        "model": [other_base],
        "tasks": [other_task, [task, other_task], changed],
        "method": ["ewc", EWC(strength=2.0)],
        "vectors": [{"past": vector()}],
        "previous": [run],
        "steps": [3],
        "batch_size": [3],
        "learning_rate": [1e-3],
        "lora": [False, LoraConfig(r=4, task_type="CAUSAL_LM")],
        "shots": [1],
        "instruction": [False, 0, "Do it."],
        "style": ["plain"],
        "template": [{"system": "Be brief."}],
        "save_every": [None],
        "on_too_long": ["skip"],
        "tokenizer": [ending_otherwise],
        "dtype": ["bfloat16"],
        "seed": [1],
        "arguments": [{"weight_decay": 0.1}, {"lr_scheduler_type": "linear"}],
    }
    check(fine_tune, changes)
    options = {"model": base, "tasks": task, "steps": 2, "batch_size": 2, "learning_rate": 1e-2, "save_every": 1}
    for name, value in [(name, value) for name, values in changes.items() for value in values]:
        more = value if name == "arguments" else {name: value}
        with pytest.raises(ValueError, match="holds another training run"):
            fine_tune(folder=run.folder, progress=False, **{**options, **more})
    guided = {**options, "progress": False, "steps": 1, "folder": tmp_path}
    fine_tune(vectors={"past": vector()}, **guided)
    for other in (vector(1), 2 * vector(), InstructionVector(vector().vector, layer=1)):
        with pytest.raises(ValueError, match="holds another training run"):
            fine_tune(vectors={"past": other}, **guided)
    fine_tune(vectors={"past": vector()}, **guided)


@pytest.mark.slow
def test_locate_heads(load, tokenizer, tmp_path):
    model = load("llama")
    task, other = (tiny.answered_task(model, name, "Go.", whole=False, n=24) for name in ("own", "another"))
    options = {"model": model, "tasks": task, "shots": 0, "instruction": 0, "counterfactual": "random_text"}
    changes = {
        "model": tiny.randomize(tiny.hooked_model("llama", tokenizer), seed=1),
        "tasks": other,
        "shots": 2,
        "instruction": "Do it.",
        "style": "plain",
        "counterfactual": "no_instruction",
        "metric": "logit",
        "n_prompts": 4,
        "n_mean": 5,
        "only_correct": True,
        "method": "full",
        "seed": 1,
    }
    options |= {"n_prompts": 3, "n_mean": 6, "progress": False}
    sampling = {"tries": 2, "max_new_tokens": 9, "answer_tokens": 3}
    assert_told_apart(locate_heads, tmp_path, options, changes, apart={"template", *sampling})
    seen = files_after(locate_heads, tmp_path, **options, style="chat")
    assert files_after(locate_heads, tmp_path, **options, style="chat", template={"system": "Be brief."}) > seen
    register_check("anything")(lambda text: True)
    records = [{"input": f"Tell me about {word}."} for word in tiny.VERBS]
    free = ivl.Task.from_records(records, name="free", instruction="Go on.", check="anything")
    options |= {"tasks": free, "instruction": 0, "max_new_tokens": 6, "folder": tmp_path}
    locate_heads(**options)
    seen = set(tmp_path.rglob("*"))
    for name, value in sampling.items():
        locate_heads(**{**options, name: value})
        more = set(tmp_path.rglob("*"))
        assert more > seen, name
        seen = more
    register_check("anything")(lambda text: len(text) > 0)
    locate_heads(**options)
    assert set(tmp_path.rglob("*")) > seen, "answers that another check let pass"


def test_head_effects(load, tokenizer, tmp_path):
    model, z = load("llama"), torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(0))
    options = {"model": model, "prompts": tiny.tokens(6, 9), "answers": ["7", "8"], "replacement": z}
    changes = {
        "model": tiny.randomize(tiny.hooked_model("llama", tokenizer), seed=1),
        "prompts": tiny.tokens(6, 8),
        "answers": ["7", "9"],
        "replacement": z + 1e-3 * (torch.arange(8) == 3),
        "metric": "logit",
        "position": 1,
        "distractors": ["3", "4"],
        "method": "full",
    }
    assert_told_apart(head_effects, tmp_path, options, changes)


@pytest.mark.slow
def test_track(base, other_base, run, task, other_task, tmp_path):
    options = {"checkpoints": [run.checkpoints[0]], "tasks": task, "heads": [Head(0, 1)], "model": base, "shots": 2}
    changes = {
        "checkpoints": [run.checkpoints[1]],
        "tasks": other_task,
        "heads": [Head(0, 1), Head(1, 1)],
        "model": other_base,
        "shots": 1,
        "instruction": True,
        "style": "plain",
        "split": "valid",
        "n_prompts": 2,
        "n_mean": 4,
        "n_effects": 2,
        "seed": 1,
    }
    assert_told_apart(track, tmp_path, {**options, "n_prompts": 3, "n_mean": 3, "progress": False}, changes)


@pytest.mark.slow
def test_recover(base, other_base, run, task, other_task, tmp_path):
    vectors = {"past": vector(), "plural": vector(1)}
    options = {"checkpoints": [run.checkpoints[0]], "tasks": task, "vectors": vectors, "model": base, "shots": 2}
    changes = {
        "checkpoints": [run.checkpoints[1]],
        "tasks": [task, other_task],
        "vectors": {**vectors, "past": InstructionVector(vector().vector, layer=1)},
        "model": other_base,
        "subtract": vector(2),
        "alternatives": {"more": {"past": vector(3)}},
        "shots": 1,
        "instruction": True,
        "style": "plain",
        "layers": [2],
        "scales": (2.0,),
        "n_valid": 3,
        "n_prompts": 4,
        "seed": 1,
    }
    more = {"layers": [1], "scales": (1.0,), "n_valid": 2, "n_prompts": 3, "progress": False}
    assert_told_apart(recover, tmp_path, {**options, **more}, changes)


@pytest.mark.slow
def test_checkup(base, other_base, run, task, other_task, tmp_path):
    options = {"base": base, "after": run.checkpoints[0], "skills": task, "shots": 2, "n_prompts": 3}
    changes = {
        "base": other_base,
        "after": run.checkpoints[1],
        "skills": other_task,
        "fast": True,
        "shots": 1,
        "instruction": True,
        "style": "plain",
        "n_prompts": 4,
        "max_new_tokens": 5,
        "seed": 1,
    }
    check(checkup, changes)
    place = tmp_path / "partial"
    seen: set = set()
    for name, value in [("shots", 2), *changes.items()]:
        given = {**options, "n_prompts": None} if name == "fast" else options  # fewer, where it isn't said how many
        checkup(folder=tmp_path, progress=False, **{**given, name: value})
        more = set(place.iterdir())
        assert more > seen, f"{name}={value!r} brought back results of {options.get(name)!r}"
        seen = more
    checkup(folder=tmp_path, progress=False, **options)
    assert set(place.iterdir()) == seen


def test_continual_run(base, other_base, task, other_task, tmp_path):
    def place(**options):
        """Where results would be kept; None where the folder is refused."""
        what = tiny.experiment(folder=tmp_path, **options)
        try:
            what.settle()
        except ValueError:
            return None
        return what.scores_in(tmp_path), [stop.folder for stop in what.stops()]

    general = [f"{verb}x" for verb in tiny.VERBS]
    options = {
        "sequence": [task, other_task],
        "methods": ["lora"],
        "model": base,
        "general": [made(general, "third", "x")],
    }
    changes = {
        "sequence": [[other_task, task], [task, made(tiny.VERBS, "plural", "x")]],
        "methods": [{"lora": EWC()}, ["ewc"]],
        "model": [other_base],
        "general": [(), [made(general, "third", "y")]],
        "seeds": [(1,), (0, 1)],
        "steps": [3],
        "batch_size": [3],
        "learning_rate": [1e-3],
        "lora": [LoraConfig(r=4)],
        "shots": [1],
        "instruction": [False, 0],
        "style": ["plain"],
        "dtype": ["bfloat16"],
        "save_every": [None],
        "n_prompts": [4],
        "split": ["valid"],
        "metric": ["rouge_l"],
        "general_shots": [(0,)],
        "general_after": ["last"],
        "heads_per_vector": [3],
        "vector_shots": [2],
        "similarity": [False],
        "arguments": [{"weight_decay": 0.1}],
    }  # fmt: skip
    check(runner.experiment, changes)
    mine = place(**options)
    assert mine and place(**options) == mine
    stage = mine[1][0]  # as if it had been trained
    stage.mkdir(parents=True)
    (stage / "settings.json").write_text(
        json.dumps({"method": "x", "keys": {"method": key(ivl.training.METHODS["lora"])}})
    )
    assert place(**options) == mine
    for name, value in [(name, value) for name, values in changes.items() for value in values]:
        assert place(**{**options, **(value if name == "arguments" else {name: value})}) != mine, f"{name}={value!r}"

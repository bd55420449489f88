"""Putting old vectors back, against plain hooked passes by hand."""

from __future__ import annotations

import pandas as pd
import pytest
import torch

import ivlens as ivl
from ivlens.dynamics import Recovery
from ivlens.models.backends import backend_of
from ivlens.models.head import Head
from ivlens.running.tokens import tokenize
from ivlens.tasks.prompts import build_prompts
from ivlens.training import fine_tune
from tests import tiny

pytestmark = [pytest.mark.model, pytest.mark.filterwarnings("ignore")]

HEADS = [Head(0, 1), Head(1, 2), Head(2, 0)]
LOOK = {"shots": 2, "n_prompts": 8, "n_valid": 3, "progress": False}


@pytest.fixture(scope="module")
def task():
    """So easy that a tiny model learns it: one answer to everything."""
    records = [{"input": verb, "output": "73"} for verb in tiny.VERBS]
    return ivl.Task.from_records(records, name="past", instruction="Say it.")


@pytest.fixture(scope="module")
def other_task():
    records = [{"input": verb, "output": "%4"} for verb in tiny.VERBS]
    return ivl.Task.from_records(records, name="plural", instruction="Say the other.")


@pytest.fixture(scope="module")
def base(tmp_path_factory, tokenizer, task):
    """A tiny model that has learned the task, so that something can be lost."""
    folder = tmp_path_factory.mktemp("base")
    tiny.hf_model("llama").save_pretrained(folder / "raw")
    tokenizer.save_pretrained(folder / "raw")
    options = {"lora": False, "shots": 2, "instruction": False, "progress": False}
    run = fine_tune(str(folder / "raw"), task, folder=folder / "run", steps=120, learning_rate=1e-2, **options)
    return str(run.final)


@pytest.fixture(scope="module")
def adapter(base, other_task, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    options = {"steps": 30, "learning_rate": 3e-2, "shots": 2, "instruction": False, "progress": False}
    return fine_tune(base, other_task, folder=folder, **options).final


@pytest.fixture(scope="module")
def vectors(base, task, other_task):
    model = ivl.load_model(base, backend="bridge")
    return {t.name: ivl.extract_vector(model, t, HEADS, shots=2, n_prompts=6) for t in (task, other_task)}


@pytest.fixture(scope="module")
def recovery(base, adapter, task, other_task, vectors):
    new = ivl.extract_vector(
        ivl.load_model(base, adapter=adapter, backend="bridge"), other_task, HEADS, shots=2, n_prompts=6
    )
    more = {"subtract": new, "alternatives": {"the same again": vectors}, "layers": [0, 1, 2]}
    return ivl.recover([adapter], [task, other_task], vectors, model=base, **more, **LOOK)


def test_every_condition_is_scored_on_the_same_test_prompts(recovery):
    assert recovery.conditions == [
        "before", "before + vector", "after", "old vector", "old − new vector", "the same again",
        "old vector, by heads", "random vector", "other task", "original state",
    ]  # fmt: skip
    assert set(recovery.scores.groupby(["task", "condition"]).size()) == {8}
    table = recovery.scores.pivot(index=["task", "prompt"], columns="condition", values="hit")
    assert table["the same again"].equals(table["old vector"].rename("the same again"))


@torch.inference_mode()
def hits(model, prompts, hooks=()):
    found = []
    for i, row in enumerate(tokenize(backend_of(model), prompts)):
        tokens, answer, at = torch.tensor([row.prompt + row.answer]), list(row.answer), len(row.prompt) - 1
        logits = model.run_with_hooks(tokens, fwd_hooks=[(name, make(i, at)) for name, make in hooks])
        found.append(float(logits[0, at:-1].argmax(-1).tolist() == answer))
    return found


def test_hits_equal_plain_hooked_passes_by_hand(recovery, base, adapter, task, vectors):
    prompts = build_prompts(task, n=8, shots=2, split="test")
    before = ivl.load_model(base, backend="bridge")
    after = ivl.load_model(base, adapter=adapter, backend="bridge")
    told = recovery.scores.query("task == 'past'")
    chosen = recovery.choices.query("task == 'past'").set_index("condition")

    def found(condition):
        return told[told["condition"] == condition].sort_values("prompt")["hit"].tolist()

    assert found("before") == hits(before, prompts) and found("after") == hits(after, prompts)
    for condition, model in (("old vector", after), ("before + vector", before)):
        layer, scale = int(chosen.loc[condition, "layer"]), chosen.loc[condition, "scale"]

        def add(i, at, scale=scale):
            def hook(x, hook):
                x[0, at] += scale * vectors["past"].vector
                return x

            return hook

        assert found(condition) == hits(model, prompts, [(f"blocks.{layer}.hook_resid_post", add)])
    layer = int(chosen.loc["original state", "layer"])
    name = f"blocks.{layer}.hook_resid_post"
    states = []
    for row in tokenize(backend_of(before), prompts):
        _, cache = before.run_with_cache(torch.tensor([row.prompt]))
        states.append(cache[name][0, -1])

    def put(i, at):
        def hook(x, hook):
            x[0, at] = states[i]
            return x

        return hook

    assert found("original state") == hits(after, prompts, [(name, put)])


def test_something_was_lost_and_shares_are_of_what_was_lost_on_the_validation_split(recovery):
    table = recovery.to_dataframe().set_index(["task", "condition"])
    assert table.loc[("past", "before"), "accuracy"] > table.loc[("past", "after"), "accuracy"]
    assert ("final", "past") in [(c.rsplit("/")[-1], t) for c, t in recovery.lost()]
    loss = table.loc[("past", "before"), "accuracy"] - table.loc[("past", "after"), "accuracy"]
    gain = table.loc[("past", "old vector"), "accuracy"] - table.loc[("past", "after"), "accuracy"]
    assert table.loc[("past", "old vector"), "share"] == pytest.approx(gain / loss)
    shares = recovery.shares().set_index("condition")
    assert "before" not in shares.index and shares.loc["old vector", "low"] <= shares.loc["old vector", "share"]
    kept = recovery.kept().set_index("condition").loc["old vector"]
    ends = recovery.to_dataframe().groupby("condition")["accuracy"].mean()
    assert kept["ratio"] == pytest.approx(ends["old vector"] / ends["before + vector"])
    assert kept["low"] <= kept["ratio"] <= kept["high"]


def test_checkpoints_share_prompts_so_they_are_resampled_together():
    """Two checkpoints with the same answers tell no more than one."""
    hits = {"before": [1.0] * 20, "after": [0.0] * 10 + [1.0] * 10, "old vector": [1.0, 0.0] * 5 + [1.0] * 10}
    rows = [
        {"checkpoint": c, "task": "past", "condition": k, "prompt": i, "hit": hit}
        for c in ("a", "b")
        for k, v in hits.items()
        for i, hit in enumerate(v)
    ]
    valid = [{"task": "past", "condition": k, "accuracy": a} for k, a in (("before", 1.0), ("after", 0.5))]
    choices = [{"checkpoint": c, **row} for c in ("a", "b") for row in valid]
    two = Recovery(pd.DataFrame(rows), pd.DataFrame(choices))
    one = Recovery(two.scores[two.scores["checkpoint"] == "a"], two.choices[two.choices["checkpoint"] == "a"])
    mine, theirs = (r.shares().iloc[0] for r in (one, two))
    assert theirs["share"] == mine["share"] == 0.5 and (theirs["low"], theirs["high"]) == (mine["low"], mine["high"])
    assert (mine["pairs"], theirs["pairs"], theirs["n"]) == (1, 2, 20)
    assert theirs["gain"] == mine["gain"] == 0.25 and theirs["loss"] == 0.5


def test_recovery_comes_back_from_its_file_and_resumes_from_its_folder(
    recovery, base, adapter, task, other_task, vectors, tmp_path, monkeypatch
):
    again = Recovery.load(recovery.save(tmp_path / "recovery.json"))
    assert again.scores.equals(recovery.scores) and "share of the lost accuracy" in repr(again)
    with pytest.raises(ValueError, match="holds no recovery"):
        (tmp_path / "other.json").write_text("{}")
        Recovery.load(tmp_path / "other.json")
    options = {"model": base, "layers": [0, 1, 2], "folder": tmp_path / "kept", **LOOK}
    one = ivl.recover([adapter], [task, other_task], vectors, **options)
    from ivlens.dynamics import restoring

    monkeypatch.setattr(restoring, "_after", lambda *a: pytest.fail("done again"))
    monkeypatch.setattr(restoring, "_before", lambda *a: pytest.fail("done again"))
    assert ivl.recover([adapter], [task, other_task], vectors, **options).scores.equals(one.scores)


def test_a_task_without_a_vector_is_named(base, adapter, task, other_task, vectors):
    with pytest.raises(ValueError, match=r"no vector for task\(s\) plural"):
        ivl.recover([adapter], [task, other_task], {"past": vectors["past"]}, model=base, **LOOK)

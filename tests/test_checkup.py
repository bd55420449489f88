"""What a checkup says, by hand-made answers; and a whole one on a tiny model."""

from __future__ import annotations

import json
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

import ivlens as ivl
from ivlens.cli import app
from ivlens.common.statistics import bootstrap_mean
from ivlens.dynamics import checkup as checkup_function
from ivlens.dynamics import second_look, skills
from ivlens.dynamics.diagnosis import Checkup
from ivlens.models.adapters import hub_adapter
from tests import tiny

MODULE = sys.modules["ivlens.dynamics.checkup"]  # whose name in its room is the function's
N = 40


def answers(skill, model, asked, added, share):
    """So many right ones first, then wrong ones."""
    hits = [1.0] * round(share * N) + [0.0] * (N - round(share * N))
    about = {"skill": skill, "model": model, "asked": asked, "added": added}
    return [{**about, "prompt": i, "query": f"q{i}", "hit": x, "text": f"{model} {i}"} for i, x in enumerate(hits)]


def made(tolerance=0.05, chance=0.0, why="", **shares):
    """Of each skill: before, after, and in the second look the old vector's and the random one's shares in both models."""
    rows, about = [], {}
    for skill, (before, after, *more) in shares.items():
        rows += answers(skill, "before", True, "", before) + answers(skill, "after", True, "", after)
        places = [(m, added) for m in ("before", "after") for added in ("old vector", "random vector")]
        for (model, added), share in zip(places, more):
            rows += answers(skill, model, False, added, share)
        for added, share in zip(("old vector", "random vector"), more[4:]):
            rows += answers(skill, "after", True, added, share)
        about[skill] = {"chance": chance, "group": "own", "not_looked_at": why}
    heads = pd.DataFrame([["a", "L0H1", 0.9], ["a", "L1H2", 0.25]], columns=["skill", "head", "written"])
    return Checkup(pd.DataFrame(rows), heads, {"tolerance": tolerance, "skills": about, "before": "b", "after": "a"})


def row(found, skill="a"):
    return found.to_dataframe().set_index("skill").loc[skill]


def test_a_fall_beyond_the_tolerance_is_told_and_stops_a_job():
    found = made(a=(1.0, 0.5, 0.8, 0.0, 0.6, 0.0), b=(0.9, 0.9))
    assert found.fell == ["a"] and found.exit_status == 2
    assert (row(found).before, row(found).after, row(found).change) == (1.0, 0.5, -0.5)
    assert row(found, "b").change == 0 and row(found, "b").verdict == "kept"
    assert made(b=(0.9, 0.9)).exit_status == 0


def test_intervals_hold_for_all_skills_that_count_together():
    found = made(a=(1.0, 0.8), b=(0.9, 0.9), c=(0.05, 0.0))
    change = np.array([0.0] * 32 + [-1.0] * 8)
    low, high = bootstrap_mean([change], [[f"q{i}" for i in range(N)]], level=1 - 0.05 / 2, n_bootstrap=10_000)
    assert (row(found).low, row(found).high) == (low, high) and low < -0.2 < high < 0


def test_neither_a_small_fall_nor_an_uncertain_one_counts():
    assert made(tolerance=0.3, a=(1.0, 0.7)).fell == []
    assert made(tolerance=0.29, a=(1.0, 0.7)).fell == ["a"]
    assert made(tolerance=0.0, a=(1.0, 0.95)).fell == []  # 2 of 40


def test_what_the_base_cannot_do_does_not_count():
    assert row(made(a=(0.1, 0.0))).verdict == "not counted"
    assert made(a=(0.6, 0.0), chance=0.25).fell == ["a"]
    assert row(made(a=(0.35, 0.0), chance=0.25)).verdict == "not counted"


@pytest.mark.parametrize(
    ("second", "verdict"),
    [
        ((0.8, 0.0, 0.8, 0.0), "overlaid"),
        ((0.8, 0.0, 0.4, 0.0), "overlaid"),  # half
        ((0.8, 0.0, 0.1, 0.0), "gone"),
        ((0.8, 0.0, 0.1, 0.0, 0.7, 0.0), "gone"),  # put back, it returns 0.2 of 0.5
        ((0.8, 0.0, 0.1, 0.0, 0.75, 0.0), "unclear"),  # half of what fell
        ((0.8, 0.0, 0.375, 0.0), "unclear"),  # less than half, but not certainly
        ((0.0, 0.0, 0.0, 0.0), "unclear"),  # nothing to bring out
        ((0.8, 0.0, 0.8, 0.8), "gone"),  # any vector does it
        ((0.8, 0.8, 0.8, 0.0), "unclear"),  # in the base, too
        ((), "unclear"),  # not looked at
    ],
)
def test_verdicts(second, verdict):
    assert row(made(a=(1.0, 0.5, *second))).verdict == verdict


def test_what_is_left_is_the_vectors_share_beyond_the_random_ones():
    found = row(made(a=(1.0, 0.5, 0.8, 0.1, 0.45, 0.1)))
    assert found.left == pytest.approx(0.35 / 0.7)
    assert (found.vector_before, found.random_before, found.vector_after, found.random_after) == (0.8, 0.1, 0.45, 0.1)
    assert found.stopped == "L1H2 (25%)"


def test_advice_follows_what_was_measured():
    helps = made(a=(1.0, 0.5, 0.8, 0.0, 0.8, 0.0, 0.9, 0.2)).advice()
    assert "put its old vector back (100% before, 50% after, 90% with it)" in helps[0]
    assert "averaging" in helps[-1]
    useless = made(a=(1.0, 0.5, 0.8, 0.0, 0.8, 0.0, 0.4, 0.2)).advice()
    assert "doesn't help (50% → 40%)" in useless[0]
    assert "no second look" in made(a=(1.0, 0.5), why="no second look").advice()[0]
    assert made(a=(1.0, 1.0)).advice() == []


def test_right_answers_that_turned_wrong():
    turned = made(a=(1.0, 0.5)).turned("a", n=2)
    assert turned["query"].tolist() == ["q20", "q21"]
    assert (turned["before"].tolist(), turned["after"].tolist()) == (
        ["before 20", "before 21"],
        ["after 20", "after 21"],
    )


def test_it_prints_plots_and_comes_back_from_its_file(tmp_path):
    found = made(a=(1.0, 0.5, 0.8, 0.0, 0.8, 0.0, 0.9, 0.2), b=(0.9, 0.9))
    assert "1 of 2 skills fell: a" in repr(found) and "80% → 80% (random 0%)" in repr(found)
    assert "overlaid" in found._repr_html_()
    bars = {trace.name: list(trace.y) for trace in found.plot().data}
    assert bars == {"before": [1.0, 0.9], "after": [0.5, 0.9], "old vector": [0.9]}
    path = found.save(tmp_path / "checkup.json")
    pd.testing.assert_frame_equal(Checkup.load(path).to_dataframe(), found.to_dataframe())
    told = json.loads(path.read_text(), parse_constant=lambda x: pytest.fail(f"{x} is no JSON"))
    assert (told["exit_status"], told["fell"], told["skills"][1]["left"]) == (2, ["a"], None)


# -- how it asks --------------------------------------------------------------------------------------------------------


def test_twenty_five_prompts_share_demonstrations_and_none_shows_its_query():
    task = ivl.load_tasks("present_past")["present_past"]
    look = skills.look_of(task, 5, False, None, 0)
    prompts = skills.asked_prompts(task, skills.Sizes(prompts=60), look)
    assert [len({p.demonstrations for p in prompts[i : i + 25]}) for i in (0, 25, 50)] == [1, 1, 1]
    assert len({p.demonstrations for p in prompts}) == 3 and len({p.query for p in prompts}) == 60
    records = [{"input": x, "output": x, "split": split} for x in "abcdef" for split in ("train", "valid", "test")]
    with pytest.warns(UserWarning, match="stand in its"):
        shared = ivl.Task.from_records(records, name="shared", instruction="Say it.")
    for prompt in skills.asked_prompts(shared, skills.Sizes(), {**look, "shots": 3}):
        assert prompt.query.input not in [x.input for x in prompt.demonstrations]


def test_knowledge_is_asked_by_what_the_answer_says():
    task = skills.as_skills(None, fast=True)["general_choice"]
    for example in (*task.train, *task.test):
        assert len(example.choices) == 4 and example.output in example.choices and "\n" not in example.input
    assert skills.skill_about(task, False)["chance"] == 0.25 and skills.why_not(task)


# -- a whole one --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def randomize(adapted, size=1.0):
    for i, weight in enumerate(w for n, w in adapted.named_parameters() if ".lora_" in n):
        weight.copy_(size * torch.randn(weight.shape, generator=torch.Generator().manual_seed(i)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    """A base that answers some of a task right, an adapter that changes nothing, and one of random weights."""
    from peft import LoraConfig, get_peft_model

    folder = tmp_path_factory.mktemp("checkup")
    tiny.ending_model().save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    for name in ("harmless", "spoiled"):
        config = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "o_proj"], task_type="CAUSAL_LM")
        adapted = get_peft_model(tiny.ending_model(), config)
        if name == "spoiled":
            randomize(adapted)
        adapted.save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="module")
def own(folder):
    model = ivl.load_model(str(folder / "base"), backend="bridge")
    return tiny.answered_task(model, "own", "Write the past form.", n=60)


@pytest.mark.model
@pytest.mark.filterwarnings("ignore")
def test_a_checkup_of_a_harmless_and_a_spoiled_adapter(folder, own, tmp_path, monkeypatch):
    options = {"shots": 0, "instruction": 0, "n_prompts": 20, "progress": False}
    base = str(folder / "base")
    kept = checkup_function(base, str(folder / "harmless"), own, **options)
    assert row(kept, "own").change == 0 and kept.exit_status == 0 and row(kept, "own").before > 0.3
    lost = checkup_function(base, str(folder / "spoiled"), own, folder=tmp_path, **options)
    assert lost.exit_status == 2 and row(lost, "own").verdict in ("overlaid", "gone", "unclear")
    assert lost.scores.groupby(["model", "asked", "added"]).size().eq(20).all() and len(lost.scores) == 8 * 20
    assert len(lost.heads) == 10 and not lost.heads["written"].isna().any()
    old = ivl.InstructionVector.load(tmp_path / "vectors" / "own")
    assert old.layer is not None
    monkeypatch.setattr(MODULE, "hits", lambda *_: pytest.fail("asked again"))
    monkeypatch.setattr(MODULE, "find_vector", lambda *_: pytest.fail("found again"))
    again = checkup_function(base, str(folder / "spoiled"), own, folder=tmp_path, **options)
    pd.testing.assert_frame_equal(again.to_dataframe(), lost.to_dataframe())
    pd.testing.assert_frame_equal(Checkup.load(tmp_path / "checkup.json").to_dataframe(), lost.to_dataframe())


@pytest.mark.model
@pytest.mark.filterwarnings("ignore:one query")
def test_skills_that_the_base_cannot_do_say_nothing(folder):
    task = ivl.load_tasks("present_past")["present_past"]
    base, options = str(folder / "base"), {"n_prompts": 4, "progress": False}
    with pytest.warns(UserWarning, match="does none of present_past as asked, so none can fall, and this says nothing"):
        found = checkup_function(base, str(folder / "spoiled"), task, **options)
    assert "none of 0 skills fell (1 not counted" in repr(found) and found.exit_status == 0


@pytest.mark.model
@pytest.mark.filterwarnings("ignore")
def test_the_random_control_is_drawn_by_the_seed(folder, own, monkeypatch):
    drawn, real = [], MODULE.random_vector
    monkeypatch.setattr(MODULE, "random_vector", lambda v, **how: drawn.append(how) or real(v, **how))
    options = {"shots": 0, "instruction": 0, "n_prompts": 20, "progress": False}
    checkup_function(str(folder / "base"), str(folder / "spoiled"), own, seed=7, **options)
    assert drawn and all(how == {"seed": 7} for how in drawn)


@pytest.mark.model
@pytest.mark.filterwarnings("ignore")
def test_free_answers_get_a_second_look(folder, tmp_path):
    task = tiny.free_task(check="even_letters")
    options = {"n_prompts": 6, "max_new_tokens": 4, "progress": False, "tolerance": 0.0}
    found = checkup_function(str(folder / "base"), str(folder / "spoiled"), task, **options)
    assert set(found.scores["asked"]) <= {True, False} and row(found, "free").n == 6
    vector = second_look.find_vector(
        ivl.load_model(str(folder / "base")), task, [], skills.look_of(task, 5, False, None, 0),
        skills.Sizes(mean=4, valid_free=3, length=4),
    )  # fmt: skip
    assert not vector.heads and vector.metadata["positions"] in ("last", "generated")


@pytest.mark.model
def test_hits_are_those_of_evaluate(load):
    model = load("llama")
    task = tiny.answered_task(model, "own", "Write.", whole=False)
    prompts = ivl.build_prompts(task, split="test", instruction=0)
    expected = ivl.evaluate(model, task, instruction=0, metrics=["exact_match"], progress=False).scores
    found = second_look.hits(model, prompts, {"": None})[""]
    assert found["hit"] == expected["exact_match"].tolist() and found["text"] == expected["text"].tolist()


@pytest.mark.model
@pytest.mark.filterwarnings("ignore")
def test_the_command_line_stops_a_job(folder, own, tmp_path):
    file = tmp_path / "own.jsonl"
    records = [
        {"input": x.input, "output": x.output, "split": s} for s in ("train", "valid", "test") for x in own.split(s)
    ]
    file.write_text("\n".join(map(json.dumps, records)))
    asked = ["--file", str(file), "--instruction", "Write the past form.", "--shots", "0", "--n-prompts", "20"]

    def run(after, *more):
        given = ["checkup", str(folder / "base"), str(folder / after), *asked, "--out", str(tmp_path / after), *more]
        return CliRunner().invoke(app, given)

    harmless, spoiled, missing = run("harmless"), run("spoiled"), run("nowhere")
    assert harmless.exit_code == 0 and "none of 1 skills fell" in harmless.output, harmless.output
    assert spoiled.exit_code == 2 and "1 of 1 skills fell" in spoiled.output, spoiled.output
    assert json.loads((tmp_path / "spoiled" / "checkup.json").read_text())["exit_status"] == 2
    assert "Answers: own" in (tmp_path / "spoiled" / "report.html").read_text()
    assert (
        missing.exit_code == 2 and "error: " in missing.output and not (tmp_path / "nowhere" / "checkup.json").exists()
    )


@pytest.mark.slow
def test_random_weights_are_told_on_smollm2(tmp_path):
    from peft import LoraConfig, get_peft_model

    from ivlens.models.loading import load_hf

    config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    adapted = get_peft_model(load_hf("smollm2")[0], config)
    randomize(adapted, 0.15)
    adapted.save_pretrained(tmp_path)
    tasks = ivl.load_tasks("present_past")
    found = ivl.checkup("smollm2", tmp_path, tasks, fast=True, n_prompts=20, progress=False)
    told = row(found, "present_past")
    assert found.exit_status == 2 and told.after < 0.2 and told.verdict != "overlaid"
    assert told.vector_before > 0.3 > told.random_before and told.stopped


@pytest.mark.model
def test_bad_input_is_told_before_anything_is_measured(folder, own, tmp_path, monkeypatch):
    monkeypatch.setattr(MODULE, "hits", lambda *_: pytest.fail("measured"))
    base, after = str(folder / "base"), str(folder / "harmless")
    with pytest.raises(ValueError, match="tolerance=5 must be from 0 to below 1"):
        ivl.checkup(base, after, own, tolerance=5)
    with pytest.raises(ValueError, match=r"nothing is asked; pass shots=5 or instruction=True"):
        ivl.checkup(base, after, own, shots=0)
    bare = ivl.Task.from_records([{"input": x, "output": x, "split": "test"} for x in "abc"], name="x", instruction="y")
    with pytest.raises(ValueError, match="has no train and no valid examples"):
        ivl.checkup(base, after, bare)
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "adapter_config.json").write_text((folder / "harmless" / "adapter_config.json").read_text())
    with pytest.warns(UserWarning, match="left out"), pytest.raises(ValueError, match="has no adapter_model"):
        ivl.checkup(base, tmp_path / "half", own, shots=0, instruction=0)


def test_an_adapter_of_the_hub_is_downloaded(tmp_path, monkeypatch):
    import huggingface_hub

    def there(name, file):
        if name != "you/adapter":
            raise huggingface_hub.errors.LocalEntryNotFoundError("none")
        return str(tmp_path / file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", there)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, allow_patterns: str(tmp_path))
    assert hub_adapter("you/adapter") == str(tmp_path)
    assert hub_adapter("you/model") == "you/model" and hub_adapter("smollm2") == "smollm2"
    assert hub_adapter(str(tmp_path)) == str(tmp_path)

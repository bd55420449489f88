"""The command line with instructions in the place of demonstrations, and with free answers; errors beside."""

import json
from dataclasses import replace

import pytest

import ivlens as ivl
from ivlens.cli import common
from tests import tiny
from tests.test_cli import run

pytestmark = pytest.mark.model
SHORT = ["--max-new-tokens", "6"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, base):
    """A task with free answers and one with right ones, each with its instruction in the file, and the first one's heads."""
    folder = tmp_path_factory.mktemp("formats")
    short = [{"input": f"Say {v}.", "instruction": "Be short.", "check": "at_most_words: 50"} for v in tiny.VERBS]
    past = [{"input": v, "instruction": "Write the past.", "output": f"{v}ed"} for v in tiny.VERBS]
    for name, records in (("short", short), ("past", past)):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, records)))
    run("locate", *own(folder, base), *SHORT, "--n-prompts", "4", "--n-mean", "4", "--out", f"{folder / 'heads'}")
    return folder


def own(folder, base, name="short"):
    return ["--model", base, "--file", f"{folder / f'{name}.jsonl'}"]


@pytest.fixture(scope="module")
def vectors(folder, base):
    """A folder of vectors by each way."""
    heads = ["--heads", f"{folder / 'heads' / 'effects.safetensors'}", "--top", "3"]
    size = ["--n-prompts", "3", "--n-valid", "2", *SHORT]
    for way, more in (("heads", heads), ("difference", heads), ("residual", [])):
        run("extract", *own(folder, base), "--way", way, *more, *size, "--out", f"{folder / way}")
    return folder


def test_free_answers_are_located_told_in_the_chat_template_and_by_their_own_answers(folder):
    about = ivl.HeadEffects.load(folder / "heads" / "effects.safetensors")
    told = {key: about.metadata[key] for key in ("style", "shots", "instruction", "counterfactual")}
    assert told == {"style": "chat", "shots": 0, "instruction": True, "counterfactual": "no_instruction"}
    assert about.metric == "log_probability" and about.metadata["own_answers"]["short"]["asked"] == 4


def test_vectors_are_made_by_every_way_and_know_where_they_act(vectors):
    for way in ("heads", "difference", "residual"):
        vector = ivl.InstructionVector.load(vectors / way / "short")
        assert (vector.metadata["way"], vector.metadata["style"]) == (way, "chat")
        assert vector.metadata["positions"] in ("generated", "last"), "both are tried"
        assert len(vector.heads) == (0 if way == "residual" else 3) and vector.layer in (1, 2)


def test_a_residual_difference_takes_the_layer_given(folder, base, tmp_path):
    size = ["--n-prompts", "3", "--no-tune", "--out", f"{tmp_path}"]
    run("extract", *own(folder, base), "--way", "residual", "--layer", "0", *size)
    vector = ivl.InstructionVector.load(tmp_path / "short")
    assert vector.layer == 0 and vector.scale == 1.0
    assert "needs layer=" in run("extract", *own(folder, base), "--way", "residual", *size, code=2)


def test_evaluate_shows_the_balance_and_answers_side_by_side(vectors, base, tmp_path):
    options = ["--vectors", f"{vectors / 'difference'}", "--n-prompts", "3", *SHORT, "--out", f"{tmp_path}"]
    output = run("evaluate", *own(vectors, base), *options)
    assert "harmonic mean" in output and "told + vector" in output
    found = ivl.Evaluation.load(tmp_path / "evaluation.json")
    assert found.metadata["style"] == "chat" and {"told", "random vector", "random heads"} <= set(found.conditions)
    report = (tmp_path / "report.html").read_text()
    columns = ["prompt", "not told", "told", "with the vector", "random vector"]
    assert all(f">{name}</th>" in report for name in [*columns, "balance", "fluent"])


def test_evaluate_without_vectors_compares_told_and_not_told(folder, base, tmp_path):
    run("evaluate", *own(folder, base), "--n-prompts", "2", *SHORT, "--out", f"{tmp_path}")
    assert ivl.Evaluation.load(tmp_path / "evaluation.json").conditions == ["no vector", "told"]


@pytest.mark.parametrize("positions", ["generated", "last"])
def test_steer_puts_questions_into_the_template_of_the_vector(vectors, base, tmp_path, positions):
    found = ivl.InstructionVector.load(vectors / "heads" / "short")
    replace(found, metadata={**found.metadata, "positions": positions}).save(tmp_path / "short")
    vector, options = f"{tmp_path / 'short'}", ["--model", base, "--out", f"{tmp_path}"]
    run("steer", vector, "Say walk.", *SHORT, *options)
    (row,) = json.loads((tmp_path / "generations.json").read_text())
    loaded = ivl.InstructionVector.load(vector)
    prompt = ivl.Prompt(ivl.Example("Say walk.", ""), style="chat")
    wanted = ivl.generate(ivl.load_model(base), [prompt], vector=loaded, max_new_tokens=6, stop=None)
    assert row == {"prompt": "Say walk.", **{name: texts[0] for name, texts in wanted.texts.items()}}
    run("steer", vector, "walk", "--style", "qa", *SHORT, *options)
    (row,) = json.loads((tmp_path / "generations.json").read_text())
    assert (
        row["no vector"]
        == ivl.generate(ivl.load_model(base), "Q: walk\nA:", max_new_tokens=6, stop=None)["no vector"][0]
    )


def test_an_instruction_stands_where_no_demonstrations_are(folder, base, tmp_path):
    """Right answers too: locate and extract with --shots 0, and with both."""
    small = ["--n-prompts", "3", "--n-mean", "3"]
    run("locate", *own(folder, base, "past"), "--shots", "0", *small, "--out", f"{tmp_path / 'heads'}")
    heads = tmp_path / "heads" / "effects.safetensors"
    about = ivl.HeadEffects.load(heads).metadata
    assert (about["instruction"], about["counterfactual"], about["style"]) == (True, "no_instruction", "qa")
    assert "no prompt states its task" in run(
        "locate", *own(folder, base, "past"), "--shots", "0", "--not-told", code=2
    )
    for shots, told in (("0", []), ("2", ["--told", "--style", "chat"]), ("2", [])):
        out = ["--n-prompts", "3", "--no-tune", "--out", f"{tmp_path / 'vectors'}"]
        run("extract", *own(folder, base, "past"), "--heads", f"{heads}", "--shots", shots, *told, *out)
        made = ivl.InstructionVector.load(tmp_path / "vectors" / "past").metadata
        assert (made["shots"], made["instruction"]) == (int(shots), shots == "0" or bool(told))


def test_a_residual_difference_of_right_answers_is_tuned_at_its_own_layer(folder, base, tmp_path):
    options = ["--shots", "0", "--n-prompts", "3", "--n-valid", "2", "--out", f"{tmp_path}"]
    run("extract", *own(folder, base, "past"), "--way", "residual", *options)
    vector = ivl.InstructionVector.load(tmp_path / "past")
    by_hand = ivl.extract_vector(
        ivl.load_model(base),
        ivl.Task.from_file(folder / "past.jsonl"),
        way="residual",
        layer=vector.layer,
        shots=0,
        instruction=True,
        n_prompts=3,
    )
    assert vector.layer in (1, 2) and vector.cosine(by_hand) > 0.9999


def test_how_prompts_look_by_itself_and_as_told():
    right, free = ivl.load_tasks(["antonym"]), ivl.load_tasks(["bullets", "spanish"])
    assert common.look(right, None, None, None, 10) == {"shots": 10, "instruction": False, "style": "qa"}
    assert common.look(right, 0, None, None, 10) == {"shots": 0, "instruction": True, "style": "qa"}
    assert common.look(right, None, None, "chat", 0, tell=False) == {"shots": 0, "instruction": False, "style": "chat"}
    assert common.look(right, 3, True, None, 0) == {"shots": 3, "instruction": True, "style": "qa"}
    assert common.look(free, None, None, None, 10) == {"shots": 0, "instruction": True, "style": "chat"}
    assert common.look(free, None, False, "qa", 0, tell=False) == {"shots": 0, "instruction": False, "style": "qa"}
    with pytest.raises(ValueError, match="give them apart"):
        common.look(ivl.load_tasks(["antonym", "spanish"]), None, None, None, 10)


def test_groups_are_listed_and_taken():
    output = run("tasks", "--group", "formats")
    assert "Answer in Spanish." in output and "antonym" not in output
    assert "held out" in run("tasks", "spanish")
    assert "unknown group" in run("tasks", "--group", "format", code=2)
    suite = common.read_tasks(["antonym", "spanish"], None, None, "formats")
    assert suite.names[:3] == ["antonym", "spanish", "bullets"] and len(suite) == 20


@pytest.mark.slow
def test_the_models_own_answers_are_trained_on_and_followed(folder, base, tmp_path):
    size = ["--steps", "2", "--batch-size", "2", "--lr", "0.01", "--not-told"]
    run("train", *own(folder, base), *size, "--out", f"{tmp_path / 'trained'}")
    trained = ivl.TrainingRun.load(tmp_path / "trained")
    assert (trained.settings["style"], trained.settings["instruction"]) == ("chat", False)
    heads = [
        "--heads",
        f"{folder / 'heads' / 'effects.safetensors'}",
        "--top",
        "3",
        "--n-prompts",
        "4",
        "--n-effects",
        "0",
    ]
    run("compare", f"{trained.final}", *own(folder, base), *heads, "--out", f"{tmp_path / 'compared'}")
    change = ivl.Change.load(tmp_path / "compared" / "change")
    assert change.task_names == ["short"] and change.base.accuracy["short"].mean() > 0.7  # what it answers itself
    assert ivl.Recovery.load(tmp_path / "compared" / "recovery" / "recovery.json").metadata["instruction"] is True


def test_a_sequence_needs_right_answers(base, tmp_path):
    tasks = ["-t", "spanish", "-t", "french"]
    assert "has free answers, and" in run("continual", *tasks, "--model", base, "--out", f"{tmp_path / 'x'}", code=2)

"""Sequences of tasks: what is trained, scored and kept; interrupted, killed and resumed; plans and configs."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import warnings
from dataclasses import replace

import pandas as pd
import pytest
import torch
from peft import LoraConfig

import ivlens as ivl
from ivlens.continual import collect, read_config, run, runner, stages
from ivlens.continual.scoring import Scoring, free_text, score_task, scored_prompts
from ivlens.continual.vectors import base_vectors
from ivlens.models.backends import backend_of
from ivlens.running.tokens import tokenize
from ivlens.training.guidance import Guidance
from ivlens.training.methods import EWC, Averaging, Guided, Replay
from tests import tiny

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]  # most share one whole run

OPTIONS = {
    "steps": 2,
    "batch_size": 2,
    "learning_rate": 1e-2,
    "n_prompts": 6,
    "general_shots": (0, 2),
    "vector_shots": 2,
    "heads_per_vector": 2,
    "save_every": 1,
    "progress": False,
}


@pytest.fixture(scope="module")
def base(tmp_path_factory, tokenizer):
    """The tiny Llama, more inclined to end its answers."""
    folder = tmp_path_factory.mktemp("base")
    tiny.ending_model().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def scored(model):
    """Two tasks of which the base model answers some right: scores that are all 0 would equal any others."""
    return [tiny.answered_task(model, "one", "Go."), tiny.answered_task(model, "two", "Stop now.")]


@pytest.fixture(scope="module")
def sequence(base):
    return scored(ivl.load_model(base, backend="bridge"))


@pytest.fixture(scope="module")
def choice():
    records = [
        {"input": f"Is {i} even?", "output": "yes" if i % 2 == 0 else "no", "choices": ["yes", "no"]} for i in range(30)
    ]
    return ivl.Task.from_records(records, name="even", instruction="Answer.")


@pytest.fixture(scope="module")
def done(base, sequence, choice, tmp_path_factory):
    folder = tmp_path_factory.mktemp("continual")
    options = {"model": base, "methods": ["lora", "iv"], "general": [choice], "seeds": (0, 1), **OPTIONS}
    return run(sequence, folder=folder, **options), folder, options


def test_every_stage_is_scored_on_every_task(done, sequence, choice):
    found, folder, _ = done
    counts = found.scores.groupby(["method", "seed", "stage", "task", "shots"]).size()
    assert (counts == 6).all()
    assert len(counts) == (1 + 2 * 2 * 2) * (2 + 2)
    assert set(found.scores["score"]) <= {0.0, 1.0}
    assert set(found.scores.query("kind == 'general'")["task"]) == {"even"}
    assert len(found.similarity) == 2 * 2 * 2 * 2 and found.similarity["similarity"].between(-1, 1).all()
    assert len(found.costs) == 8 and (found.costs["seconds"] > 0).all()
    assert sorted(p.name for p in (folder / "iv" / "seed-1").iterdir()) == ["1-one", "2-two"]
    assert not [*folder.rglob("checkpoint-*"), *folder.rglob("teacher-*")]
    assert found.metadata["sequence"] == ["one", "two"]


def test_scores_are_those_of_the_adapter_by_a_slow_greedy_loop(done, base, sequence):
    found, folder, _ = done
    final = folder / "lora" / "seed-0" / "2-two" / "final"
    model = ivl.load_model(base, adapter=final, backend="bridge")
    backend = backend_of(model)
    ends = model.tokenizer.eos_token_id
    prompts = scored_prompts(sequence[0], Scoring(6), shots=0, instruction=True, style="qa")
    scores = []
    for prompt, row in zip(prompts, tokenize(backend, prompts)):
        written, limit = [], 1 + max(len(r.answer) for r in tokenize(backend, prompts))
        while len(written) < limit:
            ids = torch.tensor([[*row.prompt, *written]])
            with torch.inference_mode():
                token = int(backend.forward(ids, torch.ones_like(ids))[0, -1].argmax())
            if token == ends:
                break
            written.append(token)
        text = model.tokenizer.decode(written).strip().split("\n")[0]
        scores.append(float(text == prompt.query.output))
    kept = found.scores.query("method == 'lora' and seed == 0 and stage == 2 and task == 'one'")
    assert kept["score"].tolist() == scores and 0 < sum(scores) < len(scores)


def test_multiple_choice_is_the_likeliest_option_per_character(base, choice):
    backend = backend_of(ivl.load_model(base, backend="bridge"))
    prompts = scored_prompts(choice, Scoring(8), shots=2, instruction=True, style="qa")
    expected = []
    for prompt in prompts:
        (row,) = tokenize(backend, [prompt])
        values = []
        for option in ("yes", "no"):
            answer = backend.tokenizer.encode(f" {option}", add_special_tokens=False)
            ids = torch.tensor([[*row.prompt, *answer]])
            with torch.inference_mode():
                chances = backend.forward(ids, torch.ones_like(ids), keep=len(answer) + 1)[0].log_softmax(-1)
            values.append(sum(chances[j, t].item() for j, t in enumerate(answer)) / len(option))
        expected.append(float(prompt.query.output == ("yes", "no")[values.index(max(values))]))
    assert score_task(backend, choice, prompts, Scoring(8)) == expected


def test_prompts_share_their_demonstrations_and_free_text_gets_rouge(base, sequence):
    prompts = scored_prompts(sequence[0], Scoring(5), shots=3, instruction=True, style="qa")
    assert len({p.demonstrations for p in prompts}) == 1 and len({p.instruction for p in prompts}) == 1
    assert not {x.input for x in prompts[0].demonstrations} & {p.query.input for p in prompts}
    records = [{"input": str(i), "output": f"the answer to this one is {i} and nothing else"} for i in range(20)]
    long = ivl.Task.from_records(records, name="long", instruction="Say it.")
    assert free_text(long) and not free_text(sequence[0])
    backend = backend_of(ivl.load_model(base, backend="bridge"))
    shown = scored_prompts(long, Scoring(4), shots=0, instruction=True, style="qa")
    values = score_task(backend, long, shown, Scoring(4))
    assert all(0 <= value < 1 for value in values)
    assert set(score_task(backend, long, shown, Scoring(4, metric="exact_match"))) == {0.0}


def test_what_is_finished_is_not_done_again_and_methods_can_be_added(done, sequence, monkeypatch):
    found, folder, options = done
    for room, name in ((stages, "fine_tune"), (stages, "scores"), (runner, "scores")):
        monkeypatch.setattr(room, name, lambda *a, **k: pytest.fail("done again"))
    again = run(sequence, folder=folder, **options)
    assert again.scores.equals(found.scores) and again.similarity.equals(found.similarity)
    monkeypatch.undo()
    trained = []
    original = stages.fine_tune
    monkeypatch.setattr(stages, "fine_tune", lambda *a, **k: (trained.append(k["folder"]), original(*a, **k))[1])
    more = run(sequence, folder=folder, **{**options, "methods": ["lora", "iv", "ewc"], "seeds": (0,)})
    assert {p.parent.parent.name for p in trained} == {"ewc"} and len(trained) == 2
    assert set(more.scores["method"]) == {"base", "lora", "iv", "ewc"}


def test_more_prompts_score_again_without_training(done, sequence, monkeypatch):
    _, folder, options = done
    monkeypatch.setattr(stages, "fine_tune", lambda *a, **k: ivl.TrainingRun.load(k["folder"]))
    found = run(sequence, folder=folder, **{**options, "n_prompts": 4, "methods": ["lora"], "seeds": (0,)})
    assert (found.scores.groupby(["method", "stage", "task", "shots"]).size() == 4).all()
    assert len(list((folder / "lora" / "seed-0" / "1-one").glob("scores-*.json"))) == 2


def test_results_of_a_run_that_is_not_finished(done, sequence, tmp_path):
    found, folder, options = done
    options = {key: value for key, value in options.items() if key != "progress"}
    some = collect(sequence, folder=folder, **{**options, "methods": ["iv", "replay"]})
    mine = found.scores[found.scores["method"].isin(["base", "iv"])]
    assert some.scores.equals(mine.reset_index(drop=True))
    with pytest.raises(FileNotFoundError, match="no scores of the base model"):
        collect(sequence, folder=tmp_path, **options)


def test_other_training_in_the_same_folder_is_refused(done, sequence):
    _, folder, options = done
    with pytest.raises(ValueError, match=r"holds another experiment .*training"):
        run(sequence, folder=folder, **{**options, "learning_rate": 1e-3})
    with pytest.raises(ValueError, match=r"holds another experiment .*sequence"):
        run(sequence[::-1], folder=folder, **options)


def test_another_method_under_a_label_of_old_is_refused(done, sequence, monkeypatch):
    _, folder, options = done
    monkeypatch.setattr(stages, "fine_tune", lambda *a, **k: pytest.fail("trained"))
    with pytest.raises(
        ValueError, match=r"was trained by SequentialLoRA\(\), and 'lora' is EWC\(strength=2.0.* another label"
    ):
        run(sequence, folder=folder, **{**options, "methods": {"lora": EWC(strength=2.0)}})
    with pytest.raises(ValueError, match="another label"):
        run(sequence, folder=folder, **{**options, "methods": {"iv": Guided(random=True)}})


@pytest.mark.parametrize(
    "wrong, match",
    [
        ({"lora": False}, "lora=False trains every weight"),
        ({"dtype": "int8"}, "no floating-point dtype"),
        ({"label_smooth": 0.1}, "label_smooth"),
        ({"methods": ["lora", "o_lora"], "lora": LoraConfig(use_dora=True)}, "use_dora=True can't be put together"),
        ({"methods": ["lora", Guided(Guidance(layer=3))]}, "layer=3 is out of range"),
        ({"methods": {"vectors": "lora"}}, "would share a folder"),
        ({"methods": {"a/b": "lora", "a_b": "ewc"}}, "would share a folder"),
        ({"sequence": "long"}, r"\(long, train example .: 'word word"),
    ],
)
def test_what_cannot_work_in_a_later_stage_is_refused_before_the_first(
    base, sequence, tmp_path, monkeypatch, wrong, match
):
    monkeypatch.setattr(stages, "fine_tune", lambda *a, **k: pytest.fail("trained"))
    rows = [{"input": "word " * (300 if i == 3 else 1), "output": "x", "split": "train"} for i in range(10)]
    rows += [{"input": f"{i}", "output": "x", "split": "test"} for i in range(6)]
    long = ivl.Task.from_records(rows, name="long", instruction="x")
    tasks = [*sequence, long] if "sequence" in wrong else sequence
    options = {**OPTIONS, "model": base, "methods": ["lora"], "steps": 10, **wrong}
    options.pop("sequence", None)
    with pytest.raises((ValueError, TypeError), match=match):
        run(tasks, folder=tmp_path, **options)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_folder_with_others_files_is_refused_and_names_never_leave_it(base, sequence, tmp_path):
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "mine").touch()
    with pytest.raises(ValueError, match=r"holds lora, but no plan\.json"):
        run(sequence, folder=tmp_path, **{**OPTIONS, "model": base, "methods": ["lora"]})
    assert [p.name for p in tmp_path.rglob("*")] == ["lora", "mine"]
    options = {k: v for k, v in OPTIONS.items() if k != "progress"}
    up = tiny.experiment(sequence, folder=tmp_path, model=base, methods={"../..": "lora", "x" * 300: "ewc"}, **options)
    for stop in up.stops():
        assert stop.folder.resolve().is_relative_to(tmp_path.resolve()) and max(map(len, stop.folder.parts)) < 120


def test_a_plan_says_what_is_left(done, sequence, tmp_path):
    _, folder, options = done
    nothing = run(sequence, folder=folder, dry_run=True, **options)
    assert set(nothing.stages["state"]) == {"done"} and nothing.minutes == 0
    (scores,) = (folder / "iv" / "seed-1" / "2-two").glob("scores-*.json")
    scores.rename(tmp_path / "kept.json")
    try:
        some = run(sequence, folder=folder, dry_run=True, **{**options, "methods": ["iv", "lwf"]})
    finally:
        (tmp_path / "kept.json").rename(scores)
    states = some.stages.groupby(["method", "state"]).size().to_dict()
    assert states == {("iv", "done"): 3, ("iv", "to score"): 1, ("lwf", "to train"): 4}
    assert some.minutes > 0 and "minutes" in repr(some) and not (folder / "lwf").exists()


# Sums are split among threads, so the same numbers to the last bit need as many threads as this process has.
KILLED = """
import os, signal, sys
import torch
from transformers import Trainer
from ivlens.continual import run
import ivlens as ivl
from tests.test_continual import OPTIONS, scored

left = int(sys.argv[3])
torch.set_num_threads(int(sys.argv[4]))

def counted(original):
    def wrapped(*args, **options):
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **options)
    return wrapped

Trainer.training_step, os.replace = counted(Trainer.training_step), counted(os.replace)
tasks = scored(ivl.load_model(sys.argv[1], backend="bridge"))
run(tasks, folder=sys.argv[2], model=sys.argv[1], methods=["ewc", "iv"], **OPTIONS)
"""


def test_a_run_killed_at_any_moment_ends_with_the_same_numbers(base, sequence, tmp_path):
    whole = run(sequence, folder=tmp_path / "whole", model=base, methods=["ewc", "iv"], **OPTIONS)
    finished = {}
    for moment in (6, 3, 7):  # steps of training and files about to be put in their place, until it is killed
        command = [sys.executable, "-c", KILLED, base, str(tmp_path / "killed"), str(moment)]
        command.append(str(torch.get_num_threads()))
        assert subprocess.run(command, capture_output=True).returncode == -signal.SIGKILL
        now = {p: p.stat().st_mtime_ns for p in (tmp_path / "killed").rglob("log.json")}
        assert all(now[p] == written for p, written in finished.items()), "trained twice"
        finished = now
    again = run(sequence, folder=tmp_path / "killed", model=base, methods=["ewc", "iv"], **OPTIONS)
    assert again.scores.equals(whole.scores) and again.similarity.equals(whole.similarity)
    trained = whole.scores.query("stage > 0").groupby("method")["score"].mean()
    assert trained.between(0, 1, inclusive="neither").all() and (whole.scores.query("stage == 0")["score"] > 0).any()


def test_bad_input(base, sequence, choice, tmp_path):
    def attempt(tasks=sequence, **options):
        return tiny.experiment(tasks, folder=tmp_path, model=base, **options)

    with pytest.raises(ValueError, match="method='lra' is unknown; did you mean 'lora'"):
        attempt(methods=["lra"])
    with pytest.raises(ValueError, match="needs at least two"):
        attempt(sequence[:1])
    with pytest.raises(ValueError, match="both trained on and general"):
        attempt(general=[sequence[0], choice])
    with pytest.raises(ValueError, match="no methods or no seeds"):
        attempt(seeds=())
    with pytest.raises(ValueError, match="not a model object"):
        tiny.experiment(sequence, folder=tmp_path, model=torch.nn.Linear(1, 1))
    with pytest.raises(ValueError, match="metric='bleu' is unknown"):
        attempt(metric="bleu")
    with pytest.raises(ValueError, match="dtype='int8' is no floating-point dtype"):
        attempt(dtype="int8").dtype  # noqa: B018
    with pytest.raises(KeyError, match="unknown task"):
        attempt(general=["presnt_past"])


def test_a_general_task_that_overlaps_the_training_data_is_warned_about(base, sequence, tmp_path):
    shown = [{"input": x.input.upper(), "output": x.output, "split": "test"} for x in sequence[1].train[:3]]
    shown += [{"input": f"new {i}", "output": "x", "split": "train"} for i in range(10)]
    leaked = ivl.Task.from_records(shown, name="leaked", instruction="Add.")
    with pytest.warns(UserWarning, match=r"3 test input\(s\) of the general task 'leaked' .* of 'two'"):
        tiny.experiment(sequence, folder=tmp_path, model=base, general=[leaked])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tiny.experiment(sequence, folder=tmp_path, model=base, general=["antonym"])


def test_a_teacher_that_cannot_do_its_task_is_warned_about(base, sequence, tmp_path):
    def made(method):
        options = {key: value for key, value in OPTIONS.items() if key != "progress"}
        what = tiny.experiment(sequence, folder=tmp_path, model=base, methods=[method], **options)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            vectors = base_vectors(what, progress=False)
        return vectors, [str(w.message) for w in caught if "holds training back" in str(w.message)]

    vectors, none = made("ewc")
    assert not none
    _, (warned,) = made("iv")  # read from the folder
    for vector in vectors.values():  # of a random model
        assert f" → {vector.metadata['accuracy']:.0%} at layer" in vector.metadata["search"]
        assert vector.metadata["accuracy"] < 0.75 and vector.metadata["search"] in warned
    path = tmp_path / "vectors" / "one"
    replace(vectors["one"], metadata={**vectors["one"].metadata, "accuracy": 0.9}).save(path)
    assert "of two (" in made("iv")[1][0]


def test_general_tasks_with_a_check_are_told_and_met(base, sequence, tmp_path):
    records = [{"input": f"Tell me about {word}."} for word in tiny.VERBS]
    free = ivl.Task.from_records(records, name="free", instruction="Be short.", check="at_most_words: 20")
    options = {**OPTIONS, "model": base, "methods": ["lora"], "general": [free], "style": "chat"}
    found = run(sequence, folder=tmp_path, **options)
    scores = found.scores.query("task == 'free'")
    assert set(scores["shots"]) == {0} and set(scores["kind"]) == {"general"} and set(scores["score"]) <= {0.0, 1.0}
    prompts = ivl.build_prompts(free, style="chat", split="test", n=OPTIONS["n_prompts"], instruction=0)
    written = ivl.generate(ivl.load_model(base, backend="bridge"), prompts, max_new_tokens=40)["no vector"]
    by_hand = [float(ivl.passes(free.check, text)) for text in written]
    assert (
        scores.query("stage == 0")["score"].tolist() == by_hand
        and not found.to_dataframe().query("metric == 'GP'").empty
    )


def test_general_tasks_scored_at_the_end_alone_give_the_same_measures(done, sequence, tmp_path):
    found, folder, options = done
    shutil.copytree(folder, tmp_path / "again")
    last = run(sequence, folder=tmp_path / "again", **{**options, "general_after": "last"})
    general = last.scores.query("kind == 'general' and method != 'base'")
    assert set(general["stage"]) == {2} and len(last.scores) < len(found.scores)
    pd.testing.assert_frame_equal(last.to_dataframe(), found.to_dataframe())
    assert last.plot("matrix").data and last.plot("general").data
    with pytest.raises(ValueError, match="general_after='first' is unknown"):
        Scoring(general_after="first")


def test_rows_of_earlier_tasks_are_guided_by_their_own_vectors(base, sequence, tmp_path):
    found = run(sequence, folder=tmp_path, model=base, methods=["iv + replay(share=0.5)"], **OPTIONS)
    assert found.methods == ["iv + replay(share=0.5)"] and found.scores["stage"].max() == 2
    runs = [ivl.TrainingRun.load(path.parent) for path in sorted(tmp_path.glob("*/seed-0/*/log.json"))]
    assert [run.settings["vectors"] for run in runs] == [["one"], ["one", "two"]]


def test_a_config_says_all_of_it(tmp_path, base):
    rows = [{"input": f"{i}", "output": f"{i + 1}"} for i in range(30)]
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "run.yaml").write_text(f"""
model: {base}
folder: out
sequence: [antonym, {{file: mine.jsonl, instruction: Add one., name: next}}]
general: [present_past]
seeds: [0, 3]
steps: 5
bf16: true
lora: {{r: 4, target_modules: [q_proj]}}
methods:
  plain: lora
  strong: {{method: ewc, strength: 5.0}}
  steered: {{method: iv, guidance: {{progressive: false, kl: [{{positions: last, weight: 2.0}}]}}}}
  both: [iv, {{averaging: {{share: 0.7}}}}]
  named: {{method: [replay, ewc]}}
  text: averaging(share=0.7) + iv
""")
    options = read_config(tmp_path / "run.yaml")
    what = tiny.experiment(**options)
    assert what.sequence.names == ["antonym", "next"] and what.sequence["next"].instructions == ("Add one.",)
    assert what.general.names == ["present_past"] and what.seeds == (0, 3) and what.folder == tmp_path / "out"
    assert what.methods["strong"] == EWC(strength=5.0)
    guidance = what.methods["steered"].guidance
    assert isinstance(what.methods["steered"], Guided) and not guidance.progressive and guidance.kl[0].weight == 2.0
    assert what.training["bf16"] is True and what.training["lora"].r == 4 and what.training["steps"] == 5
    assert what.methods["both"] == what.methods["text"] == Guided() + Averaging(0.7)
    assert what.methods["named"] == Replay() + EWC() and len(list(what.stops())) == 6 * 2 * 2


@pytest.mark.parametrize(
    "text, match",
    [
        ("steps: 3", "names no sequence"),
        ("sequence: [antonym, present_past]\nstep: 3", "unknown key 'step'; did you mean 'steps'"),
        ("sequence: [a: b: c", "is not YAML"),
        ("sequence: [antonym, present_past]\nmethods: {x: {strength: 1}}", "x has no `method:`"),
        ("sequence: [antonym, present_past]\nmethods: {x: {method: ewc, lam: 1}}", "methods: x: .* no option 'lam'"),
        ("sequence: [antonym, present_past]\nmethods: {x: {method: [iv, ewc], strength: 1}}", "each with its own"),
        ("sequence: [antonym, present_past]\nmethods: {x: [ewc, averaging]}", "methods: x: .*choose one of them"),
    ],
)
def test_a_wrong_config_is_explained(tmp_path, text, match):
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(ValueError, match=match):
        read_config(tmp_path / "run.yaml")

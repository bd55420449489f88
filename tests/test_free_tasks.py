"""Tasks with free answers and no right ones, wherever a task may be given: what needs an answer says so, and nothing scores 0 quietly."""

from __future__ import annotations

from dataclasses import replace

import pytest

import ivlens as ivl
from ivlens.continual import run
from ivlens.dynamics.probabilities import answer_probabilities
from ivlens.models import backend_of
from ivlens.models.head import Head
from ivlens.patching.heads import head_effects, mean_head_outputs
from ivlens.patching.residual import residual_effects
from ivlens.running.answers import own_answers
from ivlens.training import fine_tune
from ivlens.training.data import answer_dataset
from tests import tiny

pytestmark = [pytest.mark.model, pytest.mark.filterwarnings("ignore")]
NONE = "task 'free' has free answers, and .* of its .* examples no right one to train on or be scored by; give each an output"
HEADS = [Head(0, 1), Head(1, 2)]


@pytest.fixture(scope="module")
def free():
    return tiny.free_task()


def answered(task, **more):
    """With an output each."""
    parts = {
        split: tuple(replace(x, output="jump", **more) for x in task.split(split))
        for split in ("train", "valid", "test")
    }
    return replace(task, **parts)


def test_demonstrations_need_answers_to_show(free):
    with pytest.raises(ValueError, match=r"shots=2, but the answers of task 'free' are free.*pass shots=0"):
        ivl.build_prompts(free, shots=2)
    some = replace(free, train=(*answered(free).train[:3], *free.train[3:]))
    shown = {x for p in ivl.build_prompts(some, shots=2, split="test") for x in p.demonstrations}
    assert shown == set(some.train[:3])


def test_fine_tune(base, free, tmp_path):
    with pytest.raises(ValueError, match=NONE):
        fine_tune(base, free, folder=tmp_path / "a", steps=1)
    assert fine_tune(base, answered(free), folder=tmp_path / "b", steps=1, batch_size=2, progress=False).final.exists()


def test_fine_tune_on_own_answers(base, free, tmp_path):
    """What the message proposes works."""
    model = ivl.load_model(base, backend="bridge")
    own = own_answers(backend_of(model), ivl.build_prompts(free, instruction=0), max_new_tokens=5)
    task = replace(free, train=tuple(p.query for p in own.prompts))  # the test split stays free
    assert fine_tune(base, task, folder=tmp_path, steps=1, batch_size=2, progress=False).final.exists()


def test_answer_dataset(model, free):
    with pytest.raises(
        ValueError, match=r"train example 0 of task 'free' \('Tell me about .*'\) has no answer to train on"
    ):
        answer_dataset(backend_of(model), ivl.build_prompts(free))


def test_track_and_compare(base, free):
    for of in (ivl.compare, lambda before, after, *rest, **more: ivl.track([after], *rest, model=before, **more)):
        with pytest.raises(ValueError, match=NONE):
            of(base, base, free, HEADS, shots=0, instruction=True)


def test_recover(base, model, free):
    vectors = {"free": ivl.extract_vector(model, free, HEADS, shots=0, instruction=True, n_prompts=3)}
    with pytest.raises(ValueError, match=NONE):
        ivl.recover([base], free, vectors, model=base, shots=0, instruction=True)


def test_continual_run(base, free, task, other_task, tmp_path):
    with pytest.raises(ValueError, match=NONE):  # to train on; general tasks need no answers
        run([task, free], model=base, methods=["lora"], folder=tmp_path, steps=1)
    assert not any(tmp_path.iterdir())


def test_answer_probabilities(model, free):
    with pytest.raises(ValueError, match=NONE):
        answer_probabilities(model, free)
    with pytest.raises(ValueError, match="knowledge probability needs records with"):
        answer_probabilities(model, answered(free))
    asked = answered(free, question="Who?", content="walk")
    assert len(answer_probabilities(model, asked, progress=False).instruction["free"]) == len(free.test)


def test_head_and_residual_effects(model, free):
    prompts = ivl.build_prompts(free, n=2)
    z = mean_head_outputs(model, prompts)
    for of in (lambda: head_effects(model, prompts, None, z), lambda: residual_effects(model, prompts, prompts)):
        with pytest.raises(ValueError, match="answers are needed to measure an effect"):
            of()
    assert head_effects(model, prompts, [" jump"] * 2, z).shape == (2, 3, 4)


def test_generate_and_extract_need_no_answers(model, free):
    prompts = ivl.build_prompts(free, n=2)
    vector = ivl.extract_vector(model, free, HEADS, shots=0, instruction=True, n_prompts=3)
    assert vector.metadata["positions"] == "generated"
    assert list(ivl.generate(model, prompts, vector=vector, layer=1, max_new_tokens=3).texts) == [
        "no vector",
        "+ vector",
        "− vector",
    ]

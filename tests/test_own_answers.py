"""A model's own answers against sampling by hand, and the heads behind them against effects on answers cut by hand."""

from __future__ import annotations

import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch

import ivlens as ivl
from ivlens.models import backend_of
from ivlens.patching.heads import head_effects, mean_head_outputs
from ivlens.running.answers import own_answers, with_own_answers
from ivlens.running.tokens import tokenize
from ivlens.tasks import answers as words
from ivlens.tasks import checks
from ivlens.tasks.checks import check_source, passes, register_check
from ivlens.tasks.counterfactuals import counterfactual
from tests import tiny

pytestmark = pytest.mark.model
TOKENS = 5


@pytest.fixture(scope="module")
def free():
    return tiny.free_task()


@pytest.fixture
def prompts(free):
    return ivl.build_prompts(free, n=8, instruction=0)


def bare_rows(model, prompts):
    return [row.prompt for row in tokenize(backend_of(model), [str(p.render()) for p in prompts])]


@torch.inference_mode()
def sampled(model, rows, temperature, seed):
    """Answers of all rows, one token at a time for all, without a cache; each row draws numbers of its own, one a token."""
    backend, order = backend_of(model), range(len(rows))
    drawn = [torch.Generator().manual_seed(seed * 1_000_003 + i) for i in order]
    written, done = {i: [] for i in order}, set()
    for _ in range(TOKENS):
        logits = [model(torch.tensor([[*rows[i], *written[i]]]))[0, -1].float() for i in order]
        if temperature:
            chances = torch.stack(logits).double().div(temperature).softmax(-1).cumsum(-1)
            numbers = [torch.rand(1, dtype=torch.double, generator=x).item() for x in drawn]
            tokens = [
                next(k for k, c in enumerate(row) if c > number) for row, number in zip(chances.tolist(), numbers)
            ]
        else:
            tokens = torch.stack(logits).argmax(-1).tolist()
        for i, token in zip(order, tokens):
            written[i].append(token)
            if token in backend.end_tokens:
                done.add(i)
        if len(done) == len(order):
            break
    ends = {i: [k for k, token in enumerate(x) if token in backend.end_tokens] for i, x in written.items()}
    cut = {i: x[: ends[i][0]] if ends[i] else x for i, x in written.items()}
    return [backend.tokenizer.decode(cut[i]) for i in range(len(rows))]


# -- rejection sampling -------------------------------------------------------------------------------------------------
def test_the_first_greedy_answer_or_sample_that_passes_is_kept(model, prompts):
    found = own_answers(backend_of(model), prompts, tries=4, temperature=0.9, max_new_tokens=TOKENS, seed=3)
    left, expected, tried = list(range(len(prompts))), {}, 0
    for attempt in range(4):
        rows = bare_rows(model, [prompts[i] for i in left])
        texts = sampled(model, rows, 0.9 if attempt else 0, 3 + attempt)
        tried += len(left)
        passed = {i: x for i, x in zip(left, texts) if passes("even_letters", x)}
        expected |= {i: (attempt, x.strip()) for i, x in passed.items()}
        left = [i for i in left if i not in passed]
        if not left:
            break
    assert {0} < {attempt for attempt, _ in expected.values()}, "greedy ones and sampled ones"
    assert [(p.query.input, p.query.output) for p in found.prompts] == [
        (prompts[i].query.input, expected[i][1]) for i in sorted(expected)
    ]
    assert (found.asked, found.tried) == (8, tried)
    assert repr(found) == f"OwnAnswers({len(expected)} of 8 prompts, {tried} answers tried)"


def test_the_answer_continues_the_prompt_as_the_model_wrote_it(model, prompts):
    found = own_answers(backend_of(model), prompts, max_new_tokens=TOKENS, tries=1)
    texts = dict(zip([p.query.input for p in prompts], sampled(model, bare_rows(model, prompts), 0, 0)))
    written = [texts[p.query.input] for p in found.prompts]
    assert any(text.startswith(" ") for text in written)
    for prompt, text in zip(found.prompts, written):
        assert prompt.answer == f" {text.strip()}", "one space, not two"


def test_seeds_give_the_same_samples_and_leave_global_random_state_alone(model, prompts):
    options = {"tries": 3, "temperature": 1.5, "max_new_tokens": TOKENS}
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()  # beartype draws from Python's own
    one, again, other = (own_answers(backend_of(model), prompts, seed=seed, **options) for seed in (0, 0, 7))
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == np.random.get_state()[1].tolist()
    assert one == again and one != other


def test_none_that_passes_is_an_error_which_says_how_many_were_tried(model, prompts, tmp_path):
    register_check("never")(lambda text: False)
    never = [replace(p, query=replace(p.query, check="never")) for p in prompts]
    for _ in range(2):  # the second time from the folder
        with pytest.raises(
            ValueError, match=r"none of 24 answers to 8 prompts of task 'free' meets its check .never.: word"
        ):
            own_answers(backend_of(model), never, tries=3, max_new_tokens=3, folder=tmp_path)


def test_a_check_that_raises_is_named_and_what_was_kept_stays(model, prompts, tmp_path):
    options = {"max_new_tokens": 3, "folder": tmp_path}
    kept = own_answers(backend_of(model), prompts, **options)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}

    @register_check("broken")
    def broken(text):
        raise KeyError("oh")

    with pytest.raises(RuntimeError, match=r"check 'broken' raised KeyError \('oh'\) on "):
        own_answers(backend_of(model), [replace(p, query=replace(p.query, check="broken")) for p in prompts], **options)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert own_answers(backend_of(model), prompts, **options) == kept


def test_answers_are_found_again_by_everything_they_depend_on(model, load, prompts, tmp_path, monkeypatch):
    options = {"max_new_tokens": 3, "folder": tmp_path}
    first = own_answers(backend_of(model), prompts, **options)
    with monkeypatch.context() as m:
        m.setattr("ivlens.running.answers.complete", None)  # nothing is written anew
        assert own_answers(backend_of(model), prompts, **options) == first
    assert own_answers(backend_of(model), prompts, max_new_tokens=3, batch_size=3) == first, "in other batches, too"
    changes = {"tries": 2, "temperature": 0.5, "max_new_tokens": 4, "seed": 1}
    for n, (name, value) in enumerate(changes.items(), start=2):
        own_answers(backend_of(model), prompts, **{**options, name: value})
        assert len(list(tmp_path.iterdir())) == n, name
    own_answers(backend_of(load("gpt2")), prompts, **options)
    own_answers(backend_of(model), prompts[:-1], **options)
    assert len(list(tmp_path.iterdir())) == n + 2


def test_the_source_of_built_in_checks_is_that_of_all_they_call():
    for check in ("bullets", "language: es"):
        source = check_source(check)
        for helper in (
            checks.bullets,
            checks._items,
            checks._mostly,
            checks.passes,
            words.words_of,
            words.is_degenerate,
        ):
            assert helper.__code__.co_name in source
        assert "def _drones" in source and "UNSPACED =" in source
    tiny.free_task()
    assert check_source("even_letters").startswith("def even_letters")
    assert "def bullets" not in check_source("even_letters")


def test_options_that_cannot_work_are_refused(model, prompts, task):
    for wrong in ({"tries": 0}, {"max_new_tokens": 0}, {"temperature": 0.0}):
        with pytest.raises(ValueError, match="must be 1 or more"):
            own_answers(backend_of(model), prompts, **wrong)
    with pytest.raises(ValueError, match="3 of 3 prompts of task 'past' have no check"):
        own_answers(backend_of(model), ivl.build_prompts(task, n=3))


# -- locating -----------------------------------------------------------------------------------------------------------
LOOK = {"shots": 0, "instruction": True}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_effects_of_free_tasks_are_those_on_the_first_tokens_of_own_answers(load, free, name):
    model = load(name)
    options = {"n_prompts": 5, "n_mean": 6, "tries": 3, "max_new_tokens": TOKENS, "answer_tokens": 2, "seed": 4}
    found = ivl.locate_heads(model, free, progress=False, **LOOK, **options)
    clean = ivl.build_prompts(free, n=5, seed=5, split="train", **LOOK)
    own = own_answers(backend_of(model), clean, tries=3, max_new_tokens=TOKENS, seed=4)
    broken = counterfactual(own.prompts, "no_instruction")
    mean = mean_head_outputs(model, ivl.build_prompts(free, n=6, seed=4, split="train", repeat=True, **LOOK))
    encode = lambda text: model.tokenizer.encode(text, add_special_tokens=False)  # noqa: E731
    before, cut = [], []
    for row, prompt in zip(bare_rows(model, broken), broken):
        asked, answer = list(row), encode(prompt.answer)
        while not model.tokenizer.decode(answer[:1]).strip():  # a space of its own says nothing
            asked, answer = [*asked, answer[0]], answer[1:]
        before.append(torch.tensor(asked))
        cut.append(model.tokenizer.decode(answer[:2]))
        assert encode(cut[-1]) == answer[:2]
    expected = head_effects(model, before, cut, mean, metric="log_probability", method="full")
    torch.testing.assert_close(found.values, expected, atol=2e-4, rtol=1e-3)
    assert found.values.abs().max() > 0.01 and found.metric == "log_probability"
    about = {"asked": 5, "tried": own.tried, "kept": len(own.prompts)}
    assert found.metadata["own_answers"] == {"free": about} and found.metadata["answer_tokens"] == 2
    assert found.queries == tuple(p.query.input.lower() for p in own.prompts)


def test_free_tasks_that_cannot_be_located_as_asked_are_refused(model, free, task):
    for more, said in (
        ({"tasks": [free, task]}, "some of the tasks have free answers"),
        ({"answer_tokens": 0}, "answer_tokens=0 is below 1"),
        ({"only_correct": True}, "only_correct=True counts right answers"),
        ({"shots": 10}, "shots=10, but the answers of task 'free' are free"),
        ({"metric": "logit_difference", "tries": 1, "max_new_tokens": 3}, "needs two answers"),
    ):
        with pytest.raises(ValueError, match=said), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ivl.locate_heads(model, **{"tasks": free, "progress": False, "n_prompts": 4, **LOOK, **more})
    with pytest.raises(ValueError, match="only_correct=True needs prompts with a right answer"):
        mean_head_outputs(model, ivl.build_prompts(free, n=3), only_correct=True)


def test_a_task_with_own_answers_can_be_tracked_probed_and_trained_on(model, free, tmp_path):
    options = {"style": "qa", "instruction": 0, "max_new_tokens": TOKENS}
    own = with_own_answers(model, free, splits=("train", "test"), folder=tmp_path, **options)
    assert own.train and own.test and not own.valid and own.check == free.check
    for split in ("train", "test"):
        prompts = ivl.build_prompts(free, split=split, instruction=0)
        expected = own_answers(backend_of(model), prompts, max_new_tokens=TOKENS).prompts
        assert [(x.input, x.output) for x in own.split(split)] == [(p.query.input, p.query.output) for p in expected]
        assert all(passes(x.check, x.output) for x in own.split(split))
    change = ivl.track(
        [model], own, [(0, 1)], model=model, shots=0, instruction=0, n_prompts=2, n_mean=2, progress=False
    )
    assert (change.points()["iv_similarity"] > 0.999).all()

"""Choosing layer and scale against trying every one of them by hand."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch

import ivlens as ivl
from ivlens.models import backend_of
from ivlens.running.tokens import tokenize
from ivlens.steering.controls import random_vector
from ivlens.steering.search import InjectionSearch
from ivlens.steering.tuning import _warn
from ivlens.tasks.prompts import build_prompts
from ivlens.vectors.vector import InstructionVector
from tests import tiny


@torch.inference_mode()
def by_hand(model, rows, vector, layer, scale, positions="last"):
    """Share of prompts whose whole answer is ranked first, token by token, with the vector at these positions."""
    right = 0
    for row in rows:
        tokens, n = torch.tensor([[*row.prompt, *row.answer[:-1]]]), len(row.prompt)
        where = {"last": slice(n - 1, n), "generated": slice(n - 1, None), "all": slice(None)}[positions]

        def add(x, hook, where=where):
            x[:, where] += scale * vector.vector
            return x

        logits = model.run_with_hooks(tokens, fwd_hooks=[(f"blocks.{layer}.hook_resid_post", add)])
        right += logits[0, n - 1 :].argmax(-1).tolist() == list(row.answer)
    return right / len(rows)


@pytest.fixture(scope="module")
def reachable(model, task):
    """A task whose answers the tiny model gives when a certain vector is injected, and that vector."""
    vector = InstructionVector(
        3 * torch.randn(32, generator=torch.Generator().manual_seed(4)), metadata={"task": "made up"}
    )
    records = []
    for verb in [x.input for x in task.train + task.valid + task.test]:
        tokens = model.to_tokens(f"Q: {verb}\nA:")
        with torch.inference_mode(), ivl.inject(model, vector, layer=1, scale=1.5):
            said = model.tokenizer.decode(model(tokens)[0, -1].argmax())
        records.append({"input": verb, "output": said.strip() or "x"})
    return ivl.Task.from_records(records, name="reachable", instruction="Say it."), vector


@pytest.mark.model
def test_the_search_equals_trying_every_layer_and_scale_by_hand(model, reachable):
    task, vector = reachable
    layers, scales = (2, 0, 1), (1.5, -1.0)  # in an order of one's own
    search = ivl.tune_injection(model, task, vector, layers=layers, scales=scales, split="train", seed=5)
    rows, control = (
        tokenize(backend_of(model), build_prompts(task, split="train", seed=5)),
        random_vector(vector, seed=5),
    )
    for i, layer in enumerate(layers):
        for j, scale in enumerate(scales):
            assert search.accuracy[i, j].item() == pytest.approx(by_hand(model, rows, vector, layer, scale))
            assert search.control[i, j].item() == pytest.approx(by_hand(model, rows, control, layer, scale))
    assert search.baseline == pytest.approx(by_hand(model, rows, vector, 0, 0.0))
    assert (search.layers, search.scales, search.n) == (layers, scales, len(task.train))
    assert search.accuracy.max() > search.accuracy.min(), "layers and scales differ, or this would test little"


def two_tokens(model, vector, positions):
    """A task whose answers are the first two tokens that the tiny model writes where the vector acts at these positions."""
    records, tokenizer = [], model.tokenizer
    for word in [f"{verb}{letter}" for verb in tiny.VERBS for letter in "abcd"]:
        tokens = model.to_tokens(f"Q: {word}\nA:")
        where = slice(0 if positions == "all" else tokens.shape[1] - 1, None)

        def add(x, hook, where=where):
            x[:, where] += 1.5 * vector.vector
            return x

        for _ in range(2):
            logits = model.run_with_hooks(tokens, fwd_hooks=[("blocks.1.hook_resid_post", add)])
            tokens = torch.cat([tokens, logits[:, -1:].argmax(-1)], dim=1)
        text = tokenizer.decode(tokens[0, -2:])
        if text.startswith(" ") and tokenizer.encode(text, add_special_tokens=False) == tokens[0, -2:].tolist():
            records.append({"input": word, "output": text.strip()})
    return ivl.Task.from_records(records, name="reachable", instruction="Say it.")


@pytest.mark.model
@pytest.mark.parametrize("positions", ["generated", "all"])
def test_other_positions_than_the_last_equal_trying_by_hand(model, reachable, positions):
    vector = reachable[1]
    task, layers, scales, found = two_tokens(model, vector, positions), (2, 1), (1.5, -1.0), {}
    look = {"split": "train", "seed": 5, "n_prompts": 6}
    for batch_size in (2, 256):
        options = {"positions": positions, "batch_size": batch_size, **look}
        found[batch_size] = ivl.tune_injection(model, task, vector, layers=layers, scales=scales, **options)
    search = found[256]
    rows = tokenize(backend_of(model), build_prompts(task, split="train", n=6, seed=5))
    for v, values in ((vector, search.accuracy), (random_vector(vector, seed=5), search.control)):
        tried = [[by_hand(model, rows, v, layer, scale, positions) for scale in scales] for layer in layers]
        torch.testing.assert_close(values, torch.tensor(tried))
    assert torch.equal(found[2].accuracy, search.accuracy)
    assert search.baseline == pytest.approx(by_hand(model, rows, vector, 0, 0.0))
    best = search.best
    assert (best.layer, best.scale, search.accuracy.max()) == (1, 1.5, 1.0)
    assert by_hand(model, rows, vector, 1, 1.5, "last") < 1, "elsewhere it does something else"
    assert best.metadata["positions"] == search.positions == positions and f"positions {positions}" in repr(search)
    again = ivl.tune_injection(model, task, best, layers=layers, scales=scales, **look)
    assert torch.equal(again.accuracy, search.accuracy), "by default, where the vector itself acts"
    two = [replace(vector, layer=1), replace(best, layer=2)]
    with pytest.raises(ValueError, match=f"the vectors act at {' and '.join(sorted(['last', positions]))}"):
        ivl.tune_injection(model, task, two)


@pytest.mark.model
def test_the_full_way_gives_the_same(model, reachable):
    task, vector = reachable
    found = [ivl.tune_injection(model, task, vector, scales=[1.5], method=m, n_prompts=3) for m in ("auto", "full")]
    assert torch.equal(found[0].accuracy, found[1].accuracy) and torch.equal(found[0].control, found[1].control)


@pytest.mark.model
def test_defaults_are_all_layers_on_validation_and_the_best_vector_can_be_injected(model, reachable):
    task, vector = reachable
    search = ivl.tune_injection(model, task, vector)
    assert search.layers == (0, 1, 2) and min(search.scales) > 0 and search.n == len(task.valid)
    best = search.best
    assert torch.equal(best.vector, vector.vector) and (vector.layer, vector.scale) == (None, 1.0)
    rows = tokenize(backend_of(model), build_prompts(task, split="valid"))
    assert by_hand(model, rows, vector, best.layer, best.scale) == pytest.approx(search.accuracy.max().item())
    suppress = ivl.tune_injection(model, task, vector, goal="suppress", n_prompts=2)
    assert max(suppress.scales) < 0


def made_up(accuracy, control, goal="induce", scales=(1.0, 2.0)):
    vector = InstructionVector(torch.ones(4))
    return InjectionSearch(vector, torch.tensor(accuracy), torch.tensor(control), 0.25, (3, 5), scales, 8, goal)


def test_the_best_has_the_highest_accuracy_and_ties_go_to_the_smaller_scale_then_the_lower_layer():
    zeros = [[0.0, 0.0], [0.0, 0.0]]
    for accuracy, at in [
        ([[0.1, 0.2], [0.3, 0.9]], (5, 2.0)),
        ([[0.1, 0.9], [0.9, 0.9]], (5, 1.0)),
        ([[0.9, 0.9], [0.9, 0.9]], (3, 1.0)),
    ]:
        best = made_up(accuracy, zeros).best
        assert (best.layer, best.scale) == at


def test_suppressing_counts_the_drop_below_the_random_vector():
    search = made_up([[0.1, 0.0], [0.2, 0.0]], [[0.2, 0.0], [0.9, 0.1]], "suppress", (-1.0, -2.0))
    assert (search.best.layer, search.best.scale) == (5, -1.0)
    assert "8 prompts: 25% → 20% at layer 5, scale -1; random vector there 90%" in repr(search)


@pytest.mark.model
def test_bad_arguments_are_refused(model, task):
    vector = InstructionVector(torch.ones(32))
    cases = [
        (InstructionVector(torch.ones(5)), {}, "the vector has width 5, but .* has d_model 32"),
        (vector, {"goal": "improve"}, "goal='improve' is unknown; choose 'induce' or 'suppress'"),
        (vector, {"layers": [3]}, "layer=3 is out of range"),
        (vector, {"shots": 13}, "shots=13 needs at least 14 training examples"),
        (vector, {"split": "dev"}, "split='dev' is unknown"),
    ]
    for value, options, message in cases:
        with pytest.raises(ValueError, match=message):
            ivl.tune_injection(model, task, value, **options)


def test_a_best_no_better_than_a_random_vector_is_said():
    vector = InstructionVector(torch.ones(4))
    good, random = torch.tensor([[0.2, 0.5, 0.3]]), torch.tensor([[0.1, 0.6, 0.1]])
    with pytest.warns(UserWarning, match="no better than a random vector"):
        _warn(InjectionSearch(vector, good, random, 0.1, (1,), (0.5, 1.0, 2.0), 10))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _warn(InjectionSearch(vector, good, random - 0.2, 0.1, (1,), (0.5, 1.0, 2.0), 10))
        _warn(InjectionSearch(vector, 0.6 - good, random, 0.5, (1,), (-0.5, -1.0, -2.0), 10, "suppress"))


@pytest.mark.model
def test_of_free_answers_the_best_keeps_how_it_was_tuned_and_balance_is_said(model):
    records = [{"input": f"Tell me about {word}."} for word in tiny.VERBS]
    task = ivl.Task.from_records(records, name="free", instruction="Go on.", check="at_most_words: 40")
    vector = ivl.extract_vector(model, task, [ivl.Head(0, 1)], shots=0, instruction=True, n_prompts=4)
    options = {"layers": [1], "scales": [1.0, 2.0], "n_prompts": 2, "max_new_tokens": 4, "how": "set"}
    with pytest.warns(UserWarning, match="balance") as warned:
        search = ivl.tune_injection(model, task, vector, **options)
    assert warned[0].filename == __file__
    assert search.measure == "balance" and "2 prompts: balance " in repr(search)
    assert search.best.metadata["how"] == "set" and search.best.metadata["positions"] == "generated"
    assert "how" not in vector.metadata

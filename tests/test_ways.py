"""Vectors by each way against passes by hand: differences of heads' outputs and of residual streams, and projections."""

from __future__ import annotations

import pytest
import torch

import ivlens as ivl
from ivlens.models import backend_of
from ivlens.models.head import Head
from ivlens.running.tokens import tokenize
from ivlens.steering.controls import random_vector, with_controls
from ivlens.tasks.counterfactuals import counterfactual
from ivlens.vectors.vector import InstructionVector
from tests import tiny

pytestmark = pytest.mark.model
HEADS = [Head(0, 1), Head(1, 2), Head(2, 0)]
LOOK = {"shots": 0, "instruction": 0, "n_prompts": 5}


@pytest.fixture(scope="module")
def free():
    return tiny.free_task()


@torch.inference_mode()
def last(model, prompts, hook):
    """Means at the last prompt token, one prompt at a time, in double precision."""
    found = []
    for row in tokenize(backend_of(model), prompts):
        _, cache = model.run_with_cache(torch.tensor([row.prompt]))
        found.append(cache[hook][0, -1].double())
    return torch.stack(found).mean(0)


def told_and_bare(task):
    told = ivl.build_prompts(task, n=5, shots=0, instruction=0, split="train", repeat=True)
    return told, counterfactual(told, "no_instruction")


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_difference_is_that_of_mean_head_outputs_through_w_o(load, free, name):
    model = load(name)
    told, bare = told_and_bare(free)
    shares = []
    for layer, head in HEADS:
        z = last(model, told, f"blocks.{layer}.attn.hook_z") - last(model, bare, f"blocks.{layer}.attn.hook_z")
        z = z.view(4, -1) if z.dim() == 1 else z
        shares.append(z[head].float() @ model.W_O[layer, head].detach().float())
    found = ivl.extract_vector(model, free, HEADS, way="difference", **LOOK)
    torch.testing.assert_close(found.shares, torch.stack(shares), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found.vector, torch.stack(shares).sum(0), atol=1e-5, rtol=1e-4)
    assert (found.name, found.metadata["way"], found.metadata["positions"]) == ("free", "difference", "generated")


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_residual_difference_is_that_of_mean_residual_streams(load, free, name):
    model = load(name)
    told, bare = told_and_bare(free)
    for layer in (0, -1):
        hook = f"blocks.{layer % 3}.hook_resid_post"
        expected = (last(model, told, hook) - last(model, bare, hook)).float()
        found = ivl.extract_vector(model, free, way="residual", layer=layer, **LOOK)
        torch.testing.assert_close(found.vector, expected, atol=1e-5, rtol=1e-4)
        assert found.layer == layer % 3 and not found.heads and found.shares is None
        assert found.metadata["model"] == backend_of(model).name


@pytest.mark.parametrize("way", ["heads", "difference", "residual"])
def test_projections_are_the_told_prompts_mean_and_are_kept(model, free, way, tmp_path):
    where = {"layer": 1} if way == "residual" else {"heads": HEADS}
    found = ivl.extract_vector(model, free, way=way, **where, **LOOK)
    told, _ = told_and_bare(free)
    unit = found.vector.double() / found.vector.double().norm()
    expected = [(last(model, told, f"blocks.{layer}.hook_resid_post") @ unit).item() for layer in range(3)]
    assert found.metadata["projections"] == pytest.approx(expected, abs=1e-4)
    loaded = InstructionVector.load(found.save(tmp_path / way))
    assert loaded == found and loaded.metadata == found.metadata
    assert random_vector(loaded).metadata["projections"] == loaded.metadata["projections"]


def test_arithmetic_that_turns_a_vector_drops_its_projections(model, free):
    a, b = (ivl.extract_vector(model, free, way="residual", layer=layer, **LOOK) for layer in (0, 1))
    for turned in (a + b, a - b, -a, 0 * a, a * -2, a + a):
        assert "projections" not in turned.metadata
    for stretched in (2 * a, a / 4):
        assert stretched.metadata["projections"] == a.metadata["projections"]


def test_only_prompts_answered_correctly_are_compared_with_the_same_ones_bare(model, free):
    told = ivl.build_prompts(free, instruction=0)
    answers = tiny.answers(model, told, whole=False)
    assert 0 < sum(answer is None for answer in answers) < len(told)
    asked = [ivl.Prompt(ivl.Example(p.query.input, a or "@"), instruction=p.instruction) for p, a in zip(told, answers)]
    right, wrong = ([p for p in asked if (p.query.output == "@") == is_wrong] for is_wrong in (False, True))
    for where in ({"way": "difference", "heads": HEADS}, {"way": "residual", "layer": 1}):
        found = ivl.extract_vector(model, [*wrong, *right], only_correct=True, **where)
        assert found == ivl.extract_vector(model, right, **where)


def test_ways_that_cannot_work_are_refused(model, free, task):
    for way, more, said in (
        ("sum", {"heads": HEADS}, "way='sum' is unknown"),
        ("residual", {"heads": HEADS, "layer": 1}, "way='residual' needs layer=, and no heads"),
        ("residual", {}, "way='residual' needs layer=, and no heads"),
        ("difference", {"heads": HEADS, "layer": 1}, "way='difference' needs heads, .* no layer="),
        ("heads", {}, "way='heads' needs heads"),
        ("residual", {"layer": 3}, "layer"),
    ):
        with pytest.raises(ValueError, match=said):
            ivl.extract_vector(model, free, way=way, **more, **LOOK)
    for where in ({"way": "difference", "heads": HEADS}, {"way": "residual", "layer": 1}):
        with pytest.raises(ValueError, match="prompts that state no task is zero; pass instruction=True"):
            ivl.extract_vector(model, task, shots=0, instruction=False, **where)


def test_random_heads_are_made_the_same_way_as_the_vector(model, free):
    vector = ivl.extract_vector(model, free, HEADS, way="difference", **LOOK)
    (found,) = with_controls(model, free, {"free": vector}, ["random heads"])["random heads"]
    look = {"shots": 0, "instruction": 0, "n_prompts": 20}
    assert found == ivl.extract_vector(model, free, found.heads, way="difference", **look)
    assert not set(found.heads) & set(HEADS) and found.metadata["positions"] == "generated"
    own = ivl.extract_vector(model, told_and_bare(free)[0], HEADS)  # of one's own prompts, which say nothing of shots
    assert with_controls(model, free, {"free": own}, ["random heads"])["random heads"]

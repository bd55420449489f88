"""Instruction vectors: arithmetic, files, the hub, and how they are extracted."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from safetensors.torch import save_file

import ivlens as ivl
from ivlens.common.storage import read_tensors, write_tensors
from ivlens.models import backend_of
from ivlens.models.head import Head
from ivlens.patching import mean_head_outputs
from ivlens.steering.controls import random_vector
from ivlens.tasks.prompts import build_prompts
from ivlens.vectors.extraction import vector_from_heads
from ivlens.vectors.files import FILE
from ivlens.vectors.vector import InstructionVector
from tests import tiny

SIGNATURE = {"n_layers": 3, "n_heads": 4, "d_model": 4, "d_vocab": 200}


def make(seed, heads=((0, 1), (2, 3)), **metadata):
    shares = torch.randn(len(heads), 4, generator=torch.Generator().manual_seed(seed))
    heads = tuple(Head(*h) for h in heads)
    about = {"task": f"task{seed}", "model": "tiny", "signature": SIGNATURE, **metadata}
    return InstructionVector(shares.sum(0), heads, shares, layer=1, scale=2.0, metadata=about)


# -- values -------------------------------------------------------------------------------------------------------------


def test_a_head_prints_short_and_is_a_pair():
    assert str(Head(20, 5)) == repr(Head(20, 5)) == "L20H5" and Head(20, 5) == (20, 5)


def test_arithmetic_is_that_of_the_vectors():
    a, b = make(0), make(1)
    for found, expected in [
        (a + b, a.vector + b.vector),
        (a - b, a.vector - b.vector),
        (2 * a, 2 * a.vector),
        (a * 0.5, a.vector / 2),
        (a / 4, a.vector / 4),
        (-a, -a.vector),
    ]:
        torch.testing.assert_close(found.vector, expected)
        torch.testing.assert_close(found.shares.sum(0), expected)
        assert (found.layer, found.scale) == (1, 2.0)
    assert a.name == "task0" and (a + b).name == "task0 + task1"
    assert torch.equal(a.vector, make(0).vector), "operands stay as they were"


def test_adding_joins_the_heads_and_adds_shares_of_common_ones():
    a, b = make(0, ((0, 1), (2, 3))), make(1, ((2, 3), (1, 0)))
    both = a + b
    assert both.heads == ((0, 1), (1, 0), (2, 3))
    torch.testing.assert_close(both.shares, torch.stack([a.shares[0], b.shares[1], a.shares[1] + b.shares[0]]))
    assert (a + random_vector(b)).heads == ()  # shares that don't add up to the sum are none


def test_a_sum_keeps_what_is_true_of_both():
    a, b = make(0), make(1)
    assert (a + b).layer == (b + a).layer == 1 and (a + b).scale == 2.0
    other = dataclasses.replace(b, layer=2, scale=0.5)
    assert (a + other).layer is (other + a).layer is None and (a + other).scale == (other + a).scale == 1.0


def test_vectors_compare_by_their_numbers_heads_layer_and_scale():
    a = make(0, ((0, 1),))
    assert a == make(0, ((0, 1),)) and hash(a) == hash(make(0, ((0, 1),)))
    assert a != make(1, ((0, 1),)) and a != dataclasses.replace(a, layer=2) and a != "a"


def test_edits_of_the_readable_file_count_and_others_are_refused(tmp_path):
    make(0, ((0, 1),)).save(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    card = json.loads((tmp_path / "vector.json").read_text())
    (tmp_path / "vector.json").write_text(json.dumps({**card, "layer": "2", "scale": 5}))
    loaded = ivl.InstructionVector.load(tmp_path)
    assert (loaded.layer, loaded.scale) == (2, 5.0) and (tmp_path / "notes.txt").read_text() == "mine"
    (tmp_path / "vector.json").write_text(json.dumps({**card, "layer": "two"}))
    with pytest.raises(ValueError, match="can't be read"):
        ivl.InstructionVector.load(tmp_path)
    tensors, about = read_tensors(tmp_path / "vector.safetensors")
    write_tensors(tmp_path / "vector.safetensors", tensors, {**about, "layer": 0})
    with pytest.raises(ValueError, match="was changed after it was saved"):
        ivl.InstructionVector.load(tmp_path)


def test_norm_and_cosine_are_the_usual_ones():
    a, b = make(0), make(1)
    dot = sum(x * y for x, y in zip(a.vector.tolist(), b.vector.tolist()))
    assert a.norm() == pytest.approx(sum(x * x for x in a.vector.tolist()) ** 0.5, rel=1e-6)
    assert a.cosine(b) == pytest.approx(dot / a.norm() / b.norm(), abs=1e-6) == a.cosine(b.vector)
    assert a.cosine(a * 3) == pytest.approx(1, abs=1e-6) and a.cosine(-a) == pytest.approx(-1, abs=1e-6)


def test_a_random_vector_has_the_norm_layer_and_scale_but_another_direction():
    a = make(0)
    control, other = random_vector(a), random_vector(a, seed=1)
    assert control.norm() == pytest.approx(a.norm(), rel=1e-5) and (control.layer, control.scale) == (1, 2.0)
    assert torch.equal(control.vector, random_vector(a).vector) and not torch.equal(control.vector, other.vector)
    assert control.metadata["signature"] == SIGNATURE and control.heads == ()


def test_bad_values_are_refused():
    a = make(0)
    wide, foreign = InstructionVector(torch.ones(5)), make(1, signature={**SIGNATURE, "d_vocab": 7})
    with pytest.raises(ValueError, match=r"has one dimension, \[d_model\].*\(1, 4\)"):
        InstructionVector(torch.ones(1, 4))
    for bad in (torch.nan, torch.inf):
        with pytest.raises(ValueError, match="holds NaN or infinite values; extract it again"):
            InstructionVector(torch.tensor([1.0, bad]))
    with pytest.raises(ValueError, match="2 heads of width 4, but shares of shape None"):
        InstructionVector(torch.ones(4), a.heads)
    with pytest.raises(ValueError, match="can't add vectors of width 4 and 5; they belong to different models"):
        a + wide
    with pytest.raises(ValueError, match=r"can't add vectors of different models .*d_vocab 200.*d_vocab 7"):
        a + foreign
    with pytest.raises(
        ValueError, match=r"expected a vector of width 4, got shape \(5,\); they belong to different models"
    ):
        a.cosine(wide)
    with pytest.raises(TypeError):
        a + 1
    with pytest.raises(TypeError):
        a * a


# -- files and the hub --------------------------------------------------------------------------------------------------


def test_saving_and_loading_keeps_everything(tmp_path):
    for vector in (make(0), random_vector(make(0))):
        for where in (vector.save(tmp_path / "v1.0"), tmp_path / "v1.0" / FILE):
            again = InstructionVector.load(where)
            assert torch.equal(again.vector, vector.vector) and again.heads == vector.heads
            assert (again.layer, again.scale, again.metadata) == (vector.layer, vector.scale, vector.metadata)
            assert again.shares is vector.shares or torch.equal(again.shares, vector.shares)
    card = json.loads((make(0).save(tmp_path / "v") / "vector.json").read_text())
    assert card["heads"] == [[0, 1], [2, 3]] and card["layer"] == 1 and card["metadata"]["task"] == "task0"
    assert InstructionVector.from_pretrained(tmp_path / "v").heads == make(0).heads


def test_missing_truncated_foreign_and_nan_files_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file .*vector.safetensors; give the path of a .safetensors file"):
        InstructionVector.load(tmp_path / "nowhere")
    file = make(0).save(tmp_path) / FILE
    whole = file.read_bytes()
    file.write_bytes(whole[:-3])
    with pytest.raises(ValueError, match="is truncated or not a safetensors file"):
        InstructionVector.load(tmp_path)
    save_file({"vector": torch.ones(4)}, file)
    with pytest.raises(ValueError, match="holds something ivlens did not save, not instruction vector"):
        InstructionVector.load(tmp_path)
    effects = ivl.HeadEffects(torch.zeros(1, 2, 3), torch.zeros(1), ("a",)).save(tmp_path / "effects.safetensors")
    with pytest.raises(ValueError, match="holds head effects, not instruction vector"):
        InstructionVector.load(effects)
    file.write_bytes(whole[:-4] + torch.tensor(torch.nan).numpy().tobytes())
    with pytest.raises(ValueError, match="vector holds NaN or infinite values"):
        InstructionVector.load(tmp_path)


def test_pushing_uploads_a_folder_that_loads_with_a_card(monkeypatch, tmp_path):
    import shutil

    import huggingface_hub

    calls = {}

    def upload_folder(*, repo_id, folder_path, token, **options):
        shutil.copytree(folder_path, tmp_path / "hub")
        calls["upload"] = (repo_id, token, options)
        return f"https://huggingface.co/{repo_id}"

    monkeypatch.setattr(
        huggingface_hub, "create_repo", lambda repo_id, **options: calls.update(create=(repo_id, options))
    )
    monkeypatch.setattr(huggingface_hub, "upload_folder", upload_folder)
    address = make(0).push_to_hub("me/past", private=True, token="t", commit_message="first")
    assert address == "https://huggingface.co/me/past"
    assert calls["create"] == ("me/past", {"private": True, "token": "t", "exist_ok": True})
    assert calls["upload"] == ("me/past", "t", {"commit_message": "first"})
    assert torch.equal(InstructionVector.load(tmp_path / "hub").vector, make(0).vector)
    card = (tmp_path / "hub" / "README.md").read_text()
    assert card.startswith("---\n") and "# Instruction vector: task0" in card and "layer=1, scale=2" in card

    fetched = []
    monkeypatch.setattr(
        huggingface_hub,
        "hf_hub_download",
        lambda *args, **options: fetched.append((args, options)) or tmp_path / "hub" / FILE,
    )
    again = InstructionVector.from_pretrained("me/past", revision="abc")
    assert torch.equal(again.vector, make(0).vector)
    assert fetched == [(("me/past", FILE), {"revision": "abc", "token": None})]


# -- extraction ---------------------------------------------------------------------------------------------------------


@pytest.mark.model
@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen3", "gemma2"])
def test_a_vector_is_the_sum_of_the_heads_mean_outputs_through_w_o(load, task, name):
    model, heads = load(name), [(2, 0), (0, 3), (1, 1)]
    vector = ivl.extract_vector(model, task, heads, shots=2, n_prompts=5, seed=3)
    z = torch.stack([mean_head_outputs(model, [p]) for p in build_prompts(task, n=5, shots=2, seed=3)])
    expected = torch.stack([z.mean(0)[layer, head] @ model.W_O[layer, head].detach() for layer, head in sorted(heads)])
    if (
        norm := getattr(model.blocks[0], "ln1_post", None)
    ) is not None:  # divided by the scale on each prompt, times the weight
        for i, (layer, _) in enumerate(sorted(heads)):
            norm = getattr(model.blocks[layer].ln1_post, "original_component", model.blocks[layer].ln1_post)
            bias = model.b_O[layer].detach() if tiny.HOOKED else 0
            rms = (
                torch.stack([torch.einsum("hd,hdm->m", x[layer], model.W_O[layer]) + bias for x in z])
                .square()
                .mean(-1)
                .sqrt()
            )
            gain = 1 + norm.weight if hasattr(norm, "weight") else norm.w
            expected[i] = expected[i] * (1 / rms).mean() * gain.detach()
    assert vector.heads == ((0, 3), (1, 1), (2, 0))
    torch.testing.assert_close(vector.shares, expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(vector.vector, expected.sum(0), atol=1e-5, rtol=1e-4)
    assert not vector.vector.requires_grad


@pytest.mark.model
def test_a_vector_records_where_it_comes_from(model, task):
    vector = ivl.extract_vector(model, task, [(0, 0)], shots=2, n_prompts=3, instruction=True)
    about = vector.metadata
    assert about["task"] == vector.name == "past" and about["signature"] == backend_of(model).signature
    assert (about["shots"], about["n_prompts"], about["instruction"], about["seed"]) == (2, 3, True, 0)
    assert {"model", "hook", "ivlens", "transformer_lens", "torch"} <= set(about)
    own = ivl.extract_vector(model, build_prompts(task, n=3, shots=2, instruction=True), [(0, 0)])
    assert torch.equal(own.vector, vector.vector) and own.metadata["n_prompts"] == 3


@pytest.mark.model
def test_effects_give_their_ten_best_heads_and_doubles_count_once(model, task):
    effects = ivl.HeadEffects(torch.arange(12.0).view(1, 3, 4), torch.zeros(1), ("past",))
    assert set(ivl.extract_vector(model, task, effects, shots=1, n_prompts=2).heads) == set(effects.top(10))
    means = torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(0))
    once, twice = vector_from_heads(model, means, [(2, 1)]), vector_from_heads(model, means, [(2, 1), (-1, 1), (2, 1)])
    assert twice.heads == ((2, 1),) and torch.equal(once.vector, twice.vector)


@pytest.mark.model
def test_bad_heads_are_refused(model, task):
    for heads, message in [
        ([], r"no heads given; pass some, such as effects.top\(10\)"),
        ([(3, 0)], "layer=3 is out of range: .* has layers 0 to 2"),
        ([(0, 4)], "head=4 is out of range: .* has heads 0 to 3"),
    ]:
        with pytest.raises(ValueError, match=message):
            ivl.extract_vector(model, task, heads, shots=1, n_prompts=1)


@pytest.mark.model
def test_a_vector_of_another_model_is_refused(load, model):
    backend = backend_of(model)
    with pytest.raises(
        ValueError, match=r"the vector has width 4, but .* has d_model 32; extract a vector from this model"
    ):
        make(0).check_model(model)
    foreign = InstructionVector(
        torch.ones(32), metadata={"model": "other", "signature": {**backend.signature, "n_layers": 5}}
    )
    with pytest.raises(
        ValueError, match=r"was made for other .*n_layers 5.*, not for .*n_layers 3.*; extract a vector"
    ):
        foreign.check_model(model)
    InstructionVector(torch.ones(32), metadata={"signature": backend.signature}).check_model(model)


@pytest.mark.model
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "gemma3", "olmo2", "gpt2"])
def test_shares_add_up_to_what_the_attention_adds(load, name):
    model = load(name)
    backend, z, resid = backend_of(model), {}, {}

    def keep(where, key):
        return lambda x, hook: where.__setitem__(key, x[0, -1].detach().float())

    hooks = [(backend.z_hook(layer), keep(z, layer)) for layer in range(3)]
    hooks += [
        (f"blocks.{layer}.hook_resid_{at}", keep(resid, (layer, at))) for layer in range(3) for at in ("pre", "mid")
    ]
    with torch.no_grad(), model.hooks(fwd_hooks=hooks):
        model(tiny.tokens(9)[0][None])
    for layer in range(3):
        added = resid[layer, "mid"] - resid[layer, "pre"]
        silent = backend.head_shares(layer, z[layer] * 0).sum(0)
        shares = backend.head_shares(layer, z[layer].reshape(backend.n_heads, -1)).sum(0)
        bias = backend.project(layer, torch.zeros(1, backend.n_heads, backend.d_head)).abs().max()
        assert not silent.any() and torch.cosine_similarity(shares, added, dim=0) > (0.99 if bias == 0 else 0.8)
        if bias == 0:
            torch.testing.assert_close(shares, added, atol=1e-4, rtol=1e-3)


@pytest.mark.model
def test_a_vector_saved_before_the_norm_counted_says_so(load, task):
    model = load("gemma2")
    vector = ivl.extract_vector(model, task, [(0, 0)], shots=2, n_prompts=3)
    assert set(vector.metadata["norm_scales"]) == {"0"}
    vector.check_model(model)
    old = dataclasses.replace(vector, metadata={k: v for k, v in vector.metadata.items() if k != "unit"})
    with pytest.warns(UserWarning, match="before shares went through the norm"):
        old.check_model(model)
    with pytest.raises(ValueError, match="can't add a vector saved before"):
        old + vector

"""Injecting a vector against adding it by hand, in plain forward passes and while generating."""

from __future__ import annotations

import pytest
import torch

import ivlens as ivl
from ivlens.models import backend_of
from ivlens.models.head import Head
from ivlens.running.injection import Injection
from ivlens.running.tokens import pad_left, tokenize
from ivlens.vectors.vector import InstructionVector
from tests import tiny

pytestmark = pytest.mark.model

PLACES = {"last": lambda n: slice(n - 1, n), "generated": lambda n: slice(n - 1, None), "all": lambda n: slice(None)}


@pytest.fixture(scope="module")
def vector():
    return 2 * torch.randn(32, generator=torch.Generator().manual_seed(0))


@torch.inference_mode()
def by_hand(model, tokens, vector, layer, where):
    """Logits of one prompt with the vector added after a layer at the positions `where`."""

    def add(x, hook):
        x = x.clone()
        x[:, where] += vector
        return x

    return model.run_with_hooks(tokens, fwd_hooks=[(f"blocks.{layer}.hook_resid_post", add)])


def greedy(model, tokens, steps, vector, layer, positions):
    """Greedy decoding with one full forward pass per token."""
    where, start = PLACES[positions](tokens.shape[1]), tokens.shape[1]
    for _ in range(steps):
        tokens = torch.cat([tokens, by_hand(model, tokens, vector, layer, where)[:, -1:].argmax(-1)], dim=1)
    return tokens[:, start:]


def hooks_left(model):
    return [name for name, point in model.hook_dict.items() if point.fwd_hooks or point.bwd_hooks]


# -- plain forward passes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("positions", list(PLACES))
@pytest.mark.parametrize("name", ["gpt2", "gptj", "llama", "gemma2", "bloom"])
def test_injecting_equals_adding_by_hand(load, vector, name, positions):
    model, tokens = load(name), tiny.tokens(9)[0][None]
    with torch.inference_mode(), ivl.inject(model, vector, layer=1, scale=1.5, positions=positions):
        found = model(tokens)
    expected = by_hand(model, tokens, 1.5 * vector, 1, PLACES[positions](9))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    with torch.inference_mode():
        assert (found - model(tokens)).abs().max() > 0.1, "injecting did something, and no longer does"


def test_every_layer_can_be_chosen_from_either_end(model, vector):
    tokens = tiny.tokens(9)[0][None]
    for layer in range(3):
        for number in (layer, layer - 3):
            with torch.inference_mode(), ivl.inject(model, vector, layer=number):
                found = model(tokens)
            torch.testing.assert_close(found, by_hand(model, tokens, vector, layer, slice(8, 9)), atol=1e-5, rtol=1e-5)


def test_a_negative_scale_subtracts(model, vector):
    tokens = tiny.tokens(9)[0][None]
    with torch.inference_mode(), ivl.inject(model, vector, layer=1, scale=-1):
        found = model(tokens)
    torch.testing.assert_close(found, by_hand(model, tokens, -vector, 1, slice(8, 9)), atol=1e-5, rtol=1e-5)


def test_nested_injections_add_up_and_end_one_after_the_other(model, vector):
    tokens = tiny.tokens(9)[0][None]
    with torch.inference_mode(), ivl.inject(model, vector, layer=1):
        with ivl.inject(model, vector, layer=1, scale=0.5):
            both = model(tokens)
        outer = model(tokens)
    torch.testing.assert_close(both, by_hand(model, tokens, 1.5 * vector, 1, slice(8, 9)), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(outer, by_hand(model, tokens, vector, 1, slice(8, 9)), atol=1e-5, rtol=1e-5)
    assert hooks_left(model) == []


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "bloom"])
def test_a_left_padded_batch_equals_single_prompts(load, vector, name):
    model, prompts = load(name), tiny.tokens(5, 9, 7)
    tokens, mask = pad_left([p.tolist() for p in prompts], 2)
    for positions in PLACES:
        with torch.inference_mode(), ivl.inject(model, vector, layer=1, positions=positions):
            found = backend_of(model).forward(tokens, mask)[:, -1]
        for row, prompt in zip(found, prompts):
            expected = by_hand(model, prompt[None], vector, 1, PLACES[positions](len(prompt)))[0, -1]
            torch.testing.assert_close(row, expected, atol=2e-5, rtol=1e-4)


def test_one_vector_per_row(model):
    tokens = tiny.tokens(9)[0].repeat(3, 1)
    vectors = torch.randn(3, 32, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode(), ivl.inject(model, vectors, layer=0, scale=2):
        found = model(tokens)
    for row in range(3):
        expected = by_hand(model, tokens[:1], 2 * vectors[row], 0, slice(8, 9))[0]
        torch.testing.assert_close(found[row], expected, atol=1e-5, rtol=1e-4)


def test_one_position_per_row_for_right_padded_batches(model, vector):
    tokens, ends = tiny.tokens(9, 9), torch.tensor([4, 7])
    with torch.inference_mode(), ivl.inject(model, vector, layer=1, positions=ends):
        found = model(torch.stack(tokens))
    for row, end in enumerate(ends.tolist()):
        expected = by_hand(model, tokens[row][None, : end + 1], vector, 1, slice(end, end + 1))[0]
        torch.testing.assert_close(found[row, : end + 1], expected, atol=1e-5, rtol=1e-4)


def test_heads_mode_adds_each_share_after_its_own_layer(model):
    shares = torch.randn(3, 32, generator=torch.Generator().manual_seed(2))
    vector = InstructionVector(shares.sum(0), (Head(0, 1), Head(2, 0), Head(2, 3)), shares)
    tokens = tiny.tokens(9)[0][None]

    def add(share):
        def hook_fn(x, hook):
            x[:, -1] += 2 * share
            return x

        return hook_fn

    by_layer = {0: shares[0], 2: shares[1] + shares[2]}
    with torch.inference_mode():
        with vector.inject(model, scale=2, mode="heads"):
            found = model(tokens)
        hooks = [(f"blocks.{layer}.hook_resid_post", add(share)) for layer, share in by_layer.items()]
        torch.testing.assert_close(found, model.run_with_hooks(tokens, fwd_hooks=hooks), atol=1e-5, rtol=1e-5)


def test_a_vector_brings_its_own_layer_and_scale(model, vector):
    tuned, tokens = InstructionVector(vector, layer=1, scale=1.5), tiny.tokens(9)[0][None]
    with torch.inference_mode():
        with tuned.inject(model):
            found = model(tokens)
        with tuned.inject(model, layer=2, scale=1):
            other = model(tokens)
    torch.testing.assert_close(found, by_hand(model, tokens, 1.5 * vector, 1, slice(8, 9)), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(other, by_hand(model, tokens, vector, 2, slice(8, 9)), atol=1e-5, rtol=1e-5)


# -- afterwards ---------------------------------------------------------------------------------------------------------


def test_the_model_is_as_before_also_after_an_exception(model, vector):
    tokens = tiny.tokens(9)[0][None]
    with torch.inference_mode():
        before = model(tokens)
        with pytest.raises(KeyError, match="inside"), ivl.inject(model, vector, layer=1):
            model(tokens)
            raise KeyError("inside")
        assert torch.equal(model(tokens), before)
    assert hooks_left(model) == []


def test_hooks_of_the_user_s_own_stay(model, vector):
    seen = []
    own = [("blocks.1.hook_resid_post", lambda x, hook: seen.append(1))]
    with torch.inference_mode(), model.hooks(fwd_hooks=own):
        with ivl.inject(model, vector, layer=1):
            model(tiny.tokens(9)[0][None])
        model(tiny.tokens(9)[0][None])
    assert seen == [1, 1] and hooks_left(model) == []


def test_a_run_that_stops_below_the_layer_is_an_error(model, vector):
    message = r"nothing was injected after layer\(s\) \[2\]: did it stop at an earlier layer"
    with torch.inference_mode(), pytest.raises(RuntimeError, match=message), ivl.inject(model, vector, layer=2):
        model(tiny.tokens(9)[0][None], stop_at_layer=1)
    assert hooks_left(model) == []


@pytest.mark.skipif(not tiny.HOOKED, reason="the bridge runs every layer")
def test_a_run_that_starts_above_the_first_layer_is_an_error(model, vector):
    message = "run the model from its first layer inside inject"
    with torch.inference_mode(), pytest.raises(RuntimeError, match=message), ivl.inject(model, vector, layer=2):
        model(torch.zeros(1, 4, 32), start_at_layer=1)


# -- generating ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("positions", list(PLACES))
@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2"])
def test_generating_with_and_without_a_cache_equals_greedy_decoding_by_hand(load, vector, name, positions):
    model, tokens = load(name), tiny.tokens(7)[0][None]
    expected = greedy(model, tokens, 5, vector, 1, positions)
    assert not torch.equal(expected, greedy(model, tokens, 5, 0 * vector, 1, positions)), "the vector changes the text"
    options = {"max_new_tokens": 5, "do_sample": False, "stop_at_eos": False, "return_type": "tokens", "verbose": False}
    for cached in (True, False):
        with ivl.inject(model, vector, layer=1, positions=positions):
            found = model.generate(tokens, use_past_kv_cache=cached, **options)
        assert torch.equal(found[:, 7:], expected), f"cached={cached}"


@pytest.mark.skipif(tiny.HOOKED, reason="HookedTransformer has no hf_generate")
@pytest.mark.parametrize("positions", list(PLACES))
def test_hugging_face_s_generate_equals_greedy_decoding_by_hand(model, vector, positions):
    tokens = tiny.tokens(7)[0][None]
    expected = greedy(model, tokens, 5, vector, 1, positions)
    for cached in (True, False):
        with ivl.inject(model, vector, layer=1, positions=positions):
            options = {"max_new_tokens": 5, "do_sample": False, "use_cache": cached, "eos_token_id": None}
            found = model.hf_generate(tokens, return_type="tokens", **options)
        assert torch.equal(found[:, 7:], expected), f"cached={cached}"


def test_a_second_prompt_in_the_same_context_is_a_new_prompt(model, vector):
    options = {"max_new_tokens": 4, "do_sample": False, "stop_at_eos": False, "return_type": "tokens", "verbose": False}
    prompts = tiny.tokens(7, 7, 5)
    expected = [greedy(model, prompt[None], 4, vector, 1, "last") for prompt in prompts]
    with ivl.inject(model, vector, layer=1):
        found = [model.generate(prompt[None], **options)[:, len(prompt) :] for prompt in prompts]
    assert all(torch.equal(a, b) for a, b in zip(found, expected))


def test_one_position_per_row_holds_for_the_prompt_while_generating(model, vector):
    tokens = tiny.tokens(7)[0][None]
    options = {"max_new_tokens": 4, "do_sample": False, "stop_at_eos": False, "return_type": "tokens", "verbose": False}
    with ivl.inject(model, vector, layer=1, positions=torch.tensor([6])):
        found = model.generate(tokens, **options)[:, 7:]
    assert torch.equal(found, greedy(model, tokens, 4, vector, 1, "last"))


@pytest.mark.parametrize("positions", list(PLACES))
def test_the_library_s_generate_shows_the_text_without_with_and_against_the_vector(model, vector, positions):
    prompts = ["Q: walk\nA:", "Q: jump\nA: jumped\n\nQ: look\nA:", ivl.Prompt(ivl.Example("talk", "talked"))]
    options = {"layer": 1, "positions": positions, "max_new_tokens": 5, "stop": None}
    shown = ivl.generate(model, prompts, vector=vector, **options)
    rows = tokenize(backend_of(model), prompts)
    for condition, sign in {"no vector": 0, "+ vector": 1, "− vector": -1}.items():
        for text, row in zip(shown[condition], rows):
            ids = greedy(model, torch.tensor([row.prompt]), 5, sign * vector, 1, positions)[0].tolist()
            eos = model.tokenizer.eos_token_id
            assert text == model.tokenizer.decode(ids[: ids.index(eos)] if eos in ids else ids)
    assert shown.prompts == ["Q: walk\nA:", "Q: jump\nA: jumped\n\nQ: look\nA:", "Q: talk\nA:"]
    assert list(shown.to_dataframe().columns) == ["prompt", "no vector", "+ vector", "− vector"]
    assert ivl.generate(model, "Q: walk\nA:", max_new_tokens=5, stop=None).texts == {
        "no vector": shown["no vector"][:1]
    }


@pytest.mark.slow
def test_free_answers_are_shown_whole_beside_what_the_user_says(model, vector):
    prompt = ivl.Prompt(
        ivl.Example("Tell me about tea.", "", check="bullets"), instruction="Use bullets.", style="chat"
    )
    shown = ivl.generate(model, prompt, vector=vector, layer=1)
    assert shown.prompts == ["Use bullets.\n\nTell me about tea."]
    assert shown.texts == ivl.generate(model, prompt, vector=vector, layer=1, max_new_tokens=40, stop=None).texts
    assert ivl.generate(model, "Q: go").texts == ivl.generate(model, "Q: go", max_new_tokens=10, stop="\n").texts


def test_generate_inside_inject_is_steered_too(model, vector):
    prompts = ["Q: walk\nA:", "Q: jump\nA: jumped\n\nQ: look\nA:"]
    options = {"max_new_tokens": 5, "stop": None}
    expected = ivl.generate(model, prompts, vector=vector, layer=1, **options)["+ vector"]
    with ivl.inject(model, vector, layer=1):
        assert ivl.generate(model, prompts, **options)["no vector"] == expected


@pytest.mark.parametrize("positions", list(PLACES))
def test_one_vector_per_prompt_follows_its_prompt_through_batches_sorted_by_length(model, positions):
    prompts = ["Q: jump\nA: jumped\n\nQ: look\nA:", "Q: walk\nA:", "Q: jump\nA: jumped\n\nQ: talk\nA:"] * 2
    vectors = 4 * torch.randn(6, 32, generator=torch.Generator().manual_seed(3))
    options = {"layer": 1, "positions": positions, "max_new_tokens": 5, "stop": None}
    alone = [ivl.generate(model, [p], vector=v, **options)["+ vector"][0] for p, v in zip(prompts, vectors)]
    assert len(set(alone)) > 3
    assert ivl.generate(model, prompts, vector=vectors, batch_size=4, **options)["+ vector"] == alone
    with pytest.raises(ValueError, match="the vector has 5 rows for 6 prompts"):
        ivl.generate(model, prompts, vector=vectors[:5], **options)
    with pytest.raises(ValueError, match="positions is a tensor"):
        ivl.generate(model, prompts, vector=vectors, **{**options, "positions": torch.tensor([1] * 6)})


# -- bad input ----------------------------------------------------------------------------------------------------------


def test_bad_arguments_are_refused_with_what_is_allowed(model, vector):
    backend = backend_of(model)
    whole = InstructionVector(vector)
    cases = [
        (vector, {"layer": 3}, r"layer=3 is out of range: .* has layers 0 to 2 \(or -3 to -1 from the end\)"),
        (
            vector,
            {},
            r"no layer given and the vector has none; pass layer= \(a third of the depth, 1, .*ivl.tune_injection",
        ),
        (whole, {}, "no layer given and the vector has none"),
        (vector[:5], {"layer": 1}, r"the vector has shape \(5,\), but .* needs \[d_model\] = \(32,\)"),
        (vector.view(1, 1, 32), {"layer": 1}, r"the vector has shape \(1, 1, 32\)"),
        (InstructionVector(vector[:5]), {"layer": 1}, "the vector has width 5, but .* has d_model 32"),
        (vector * torch.nan, {"layer": 1}, "the vector holds NaN or infinite values"),
        (vector, {"layer": 1, "mode": "mean"}, "mode='mean' is unknown; choose one of sum, heads"),
        (vector, {"mode": "heads"}, "mode='heads' needs an InstructionVector with heads; use mode='sum'"),
        (whole, {"mode": "heads"}, "mode='heads' needs an InstructionVector with heads; use mode='sum'"),
        (
            vector,
            {"layer": 1, "positions": "first"},
            "positions='first' is unknown; choose one of .*or a tensor with one per row",
        ),
    ]
    for value, options, message in cases:
        with pytest.raises(ValueError, match=message):
            Injection.of(backend, value, **options)
        with pytest.raises(ValueError, match=message), ivl.inject(model, value, **options):
            pass


def test_token_numbers_are_continued_as_their_text(model):
    ids = model.tokenizer("Q: walk\nA:", return_tensors="pt", add_special_tokens=False).input_ids[0]
    told, found = ivl.generate(model, "Q: walk\nA:"), ivl.generate(model, ids)
    assert found.prompts == ["Q: walk\nA:"] and len(ivl.generate(model, [ids, "Q: walk\nA:"]).prompts) == 2
    bos = [model.tokenizer.bos_token_id] if told["no vector"] != found["no vector"] else []
    assert ivl.generate(model, torch.cat([ids.new_tensor(bos), ids]))["no vector"] == told["no vector"]

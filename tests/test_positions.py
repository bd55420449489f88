"""Where an injection lands, against a forward pass of the whole text with the vector added by hand."""

from __future__ import annotations

import threading

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import ivlens as ivl
from tests import tiny

pytestmark = pytest.mark.model
bridge_only = pytest.mark.skipif(tiny.HOOKED, reason="options of the Hugging Face model's generate")
V = 3 * torch.randn(32, generator=torch.Generator().manual_seed(0))
QUICK = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
WHERE = ("last", "generated", "all")


def by_hand(model, tokens, columns, vector=V):
    """Logits of one row, the vector added after layer 1 at these columns."""

    def hook(x, hook):
        x = x.clone()
        x[:, columns] += vector
        return x

    with torch.no_grad(), model.hooks(fwd_hooks=[("blocks.1.hook_resid_post", hook)]):
        return model(tokens)


def greedy(model, prompt, n, where, vector=V):
    """The whole text run anew for every token."""
    text, first = prompt, prompt.shape[1] - 1
    for _ in range(n):
        columns = {"last": [first], "generated": list(range(first, text.shape[1])), "all": list(range(text.shape[1]))}[
            where
        ]
        text = torch.cat([text, by_hand(model, text, columns, vector)[:, -1].argmax(-1, keepdim=True)], dim=1)
    return text


@pytest.mark.parametrize("where", WHERE)
def test_every_prompt_is_one_whatever_came_before(model, where):
    first = tiny.tokens(9)[0][None]
    longer, one = torch.cat([first, torch.tensor([[9]])], 1), torch.tensor([[7]])
    for second in (one, longer, first):
        columns = list(range(second.shape[1])) if where == "all" else [second.shape[1] - 1]
        with torch.no_grad(), ivl.inject(model, V, layer=1, positions=where):
            model(first)
            found = model(second)
        torch.testing.assert_close(found, by_hand(model, second, columns), atol=1e-4, rtol=1e-4)


@bridge_only
@QUICK
@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=4),
    st.sampled_from(["left", "right"]),
    st.sampled_from(["last", "all"]),
)
def test_the_last_prompt_token_is_found_on_either_side_of_padding(model, lengths, side, where):
    rows, width = tiny.tokens(*lengths), max(lengths)
    tokens, mask = torch.full((len(rows), width), 5), torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        here = slice(width - len(row), None) if side == "left" else slice(0, len(row))
        tokens[i, here], mask[i, here] = row, 1
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad(), ivl.inject(model, V, layer=1, positions=where):
        found = model.original_model(input_ids=tokens, attention_mask=mask, position_ids=positions).logits
    for i, row in enumerate(rows):
        columns = list(range(len(row))) if where == "all" else [len(row) - 1]
        at = width - 1 if side == "left" else len(row) - 1
        expected = by_hand(model, row[None], columns)[0, -1]
        torch.testing.assert_close(found[i, at], expected, atol=1e-3, rtol=1e-3)


@bridge_only
@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_cache": False},
        {"prompt_lookup_num_tokens": 3},
        {"prefill_chunk_size": 3},
        {"cache_implementation": "static"},
    ],
    ids=str,
)
def test_generate_gives_what_running_the_whole_text_gives(model, where, options):
    prompt = tiny.tokens(4)[0][None].repeat(1, 3)
    with ivl.inject(model, V, layer=1, positions=where):
        found = model.original_model.generate(
            prompt, max_new_tokens=8, min_new_tokens=8, do_sample=False, eos_token_id=None, **options
        )
    assert torch.equal(found, greedy(model, prompt, 8, where))


@bridge_only
@pytest.mark.parametrize("where", WHERE)
def test_beams_samples_and_several_answers_are_the_same_with_and_without_a_cache(model, where):
    prompts = torch.stack(tiny.tokens(6, 6))
    own = torch.stack([V, -V])
    for options in (
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 2},
        {"do_sample": True, "num_return_sequences": 3},
    ):
        texts = []
        for use_cache in (True, False):
            torch.manual_seed(0)
            with ivl.inject(model, own, layer=1, positions=where):
                texts.append(
                    model.original_model.generate(
                        prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=6, use_cache=use_cache,
                        **{"do_sample": False, **options},
                    )
                )  # fmt: skip
        assert torch.equal(*texts), options


@pytest.mark.parametrize("where", WHERE)
def test_the_hooked_model_s_own_generate_gives_what_running_the_whole_text_gives(model, where):
    prompt = tiny.tokens(7)[0][None]
    options = {"max_new_tokens": 5, "do_sample": False, "stop_at_eos": False, "verbose": False, "return_type": "tokens"}
    with ivl.inject(model, V, layer=1, positions=where):
        found = model.generate(prompt, **options)
    assert torch.equal(found.cpu(), greedy(model, prompt, 5, where))


def test_scores_of_answers_inside_inject_have_the_vector_at_the_prompt_s_end(model, task):
    prompts = ivl.build_prompts(task, n=5, shots=2)
    from ivlens.models import backend_of
    from ivlens.running.decoding import complete
    from ivlens.running.injection import Injection
    from ivlens.running.reading import read_prompts
    from ivlens.running.tokens import tokenize

    backend = backend_of(model)
    rows = tokenize(backend, prompts)
    expected = complete(backend, rows, {"": Injection.of(backend, V, layer=1)})[""].log_probability
    with ivl.inject(model, V, layer=1):
        found = read_prompts(backend, rows).scores["log_probability"]
    assert found.tolist() == pytest.approx(expected, abs=1e-3)


def test_another_thread_runs_without_the_vector(model):
    prompt, found = tiny.tokens(7)[0][None], []

    def run():
        with torch.no_grad():
            found.append(model(prompt))

    with torch.no_grad():
        plain = model(prompt)
        with ivl.inject(model, V, layer=1):
            thread = threading.Thread(target=run)
            thread.start()
            thread.join()
            steered = model(prompt)
    torch.testing.assert_close(found[0], plain, atol=1e-5, rtol=0)  # another thread may add up in another order
    assert (steered - plain).abs().max() > 1e-2


@bridge_only
def test_what_cannot_be_placed_is_refused(model):
    prompts = torch.stack(tiny.tokens(6, 6))
    mask = torch.ones_like(prompts)
    mask[0, -2:] = 0
    with (
        ivl.inject(model, V, layer=1),
        pytest.raises(ValueError, match="attention_mask: generate needs prompts padded on the left"),
    ):
        model.original_model.generate(prompts, attention_mask=mask, max_new_tokens=1)
    with (
        ivl.inject(model, torch.stack([V, V, V]), layer=1),
        pytest.raises(ValueError, match="3 vectors or positions for 2 rows"),
    ):
        model(prompts)

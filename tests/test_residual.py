"""The layer × position sweep of the residual stream against one plain forward pass per patch."""

from __future__ import annotations

import pytest
import torch

from ivlens.patching import ResidualEffects, residual_effects
from tests import tiny

pytestmark = pytest.mark.model

ANSWER = "7%$"


@torch.inference_mode()
def reference(model, clean, corrupted, position):
    """[layer], of the first answer token's probability, and of the whole answer's log-probability."""
    answer = model.tokenizer.encode(ANSWER, add_special_tokens=False)
    whole = torch.cat([corrupted, torch.tensor(answer[:-1])])[None]
    _, cache = model.run_with_cache(clean[None])

    def run(hooks):
        chances = model.run_with_hooks(whole, fwd_hooks=hooks)[0, len(corrupted) - 1 :].float().log_softmax(-1)
        return torch.stack([chances[i, token] for i, token in enumerate(answer)])

    plain, first, together = run([]), [], []
    for layer in range(model.cfg.n_layers):
        name = f"blocks.{layer}.hook_resid_post"

        def patch(x, hook, value=cache[name][0, position]):
            x[0, len(corrupted) + position] = value
            return x

        patched = run([(name, patch)])
        first.append(patched[0].exp() - plain[0].exp())
        together.append(patched.sum() - plain.sum())
    return torch.stack(first), torch.stack(together)


@pytest.mark.parametrize("name", ["gpt2", "gptj", "llama", "mistral", "gemma2", "gemma3", "phi", "olmo2"])
def test_every_layer_and_position_equals_the_reference(load, name):
    model, positions = load(name), (-4, -2, -1)
    clean, corrupted = tiny.tokens(7, 9, 12, seed=3), tiny.tokens(8, 6, 12, seed=4)
    options = {"answers": [ANSWER] * 3, "positions": positions, "progress": False}
    first = residual_effects(model, clean, corrupted, method="replay", **options)
    whole = residual_effects(model, clean, corrupted, method="replay", metric="log_probability", **options)
    assert first.values.shape == (3, model.cfg.n_layers, 3)
    for i, (a, b) in enumerate(zip(clean, corrupted)):
        for j, position in enumerate(positions):
            expected = reference(model, a, b, position)
            assert (first.values[i, :, j] - expected[0]).abs().max() <= 1e-5
            torch.testing.assert_close(whole.values[i, :, j], expected[1], atol=2e-4, rtol=1e-4)


def test_the_last_layer_at_the_last_position_brings_the_clean_prediction_back(model):
    clean, corrupted = tiny.tokens(9, seed=3), tiny.tokens(9, seed=4)
    effects = residual_effects(model, clean, corrupted, ["7"], positions=[-1], metric="logit", progress=False)
    token = model.tokenizer.encode("7", add_special_tokens=False)[0]
    with torch.inference_mode():
        expected = (model(clean[0][None]) - model(corrupted[0][None]))[0, -1, token]
    torch.testing.assert_close(effects.values[0, -1, 0], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.filterwarnings("ignore:exact replay can't serve")
def test_the_full_way_gives_the_same_numbers_and_serves_models_that_replay_cannot(load):
    clean, corrupted = tiny.tokens(7, 9, seed=3), tiny.tokens(8, 6, seed=4)
    options = {"answers": ["7"] * 2, "positions": [-2, -1], "progress": False}
    replayed = residual_effects(load("llama"), clean, corrupted, **options)
    full = residual_effects(load("llama"), clean, corrupted, method="full", **options)
    torch.testing.assert_close(replayed.values, full.values, atol=1e-5, rtol=0)
    bloom = residual_effects(load("bloom"), clean, corrupted, **options)
    assert (bloom.values[1, :, 1] - reference(load("bloom"), clean[1], corrupted[1], -1)[0]).abs().max() <= 1e-5


def test_statistics_and_table_are_over_prompts():
    values = torch.randn(5, 2, 3, generator=torch.Generator().manual_seed(0))
    effects = ResidualEffects(values, (-3, -2, -1))
    torch.testing.assert_close(effects.mean()[1, 2], sum(values[:, 1, 2]) / 5)
    spread = (values[:, 1, 2] - values[:, 1, 2].mean()).square().sum() / 4
    torch.testing.assert_close(effects.stderr()[1, 2], (spread / 5).sqrt())
    frame = effects.to_dataframe()
    assert len(frame) == 6 and list(frame.columns) == ["layer", "position", "mean", "stderr"]
    row = frame.query("layer == 1 and position == -2").iloc[0]
    assert row["mean"] == pytest.approx(effects.mean()[1, 1].item())
    best = values.mean(0)
    layer, column = divmod(int(best.argmax()), 3)
    assert f"after layer {layer} at {(-3, -2, -1)[column]}" in repr(effects)


def test_bad_arguments_are_refused_with_what_is_allowed(model):
    one, two = tiny.tokens(5), tiny.tokens(5, 6)
    cases = [
        ((one, two, ["7"] * 2), {}, "1 clean but 2 corrupted prompts; give them in pairs"),
        ((one, one, None), {}, "answers are needed to measure an effect"),
        ((one, one, ["7"]), {"positions": [0]}, "position=0: positions count from the prompt's end"),
        (
            (one, tiny.tokens(9), ["7"]),
            {"positions": [-6]},
            "position=-6 is outside clean prompt 0, which has 5 tokens",
        ),
        ((tiny.tokens(9), one, ["7"]), {"positions": [-6]}, "position=-6 is outside prompt 0, which has 5 tokens"),
        ((one, one, ["7"]), {"metric": "odds"}, "metric='odds' is unknown"),
    ]
    for args, options, message in cases:
        with pytest.raises(ValueError, match=message):
            residual_effects(model, *args, progress=False, **options)


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2"])
def test_edits_over_several_layers_with_a_value_per_prompt_equal_plain_hooks(load, name):
    from ivlens.models import backend_of
    from ivlens.patching.residual import Edit, edit_effects
    from ivlens.running.tokens import tokenize

    model, prompts = load(name), tiny.tokens(7, 9, 12, seed=3)
    backend, generator = backend_of(model), torch.Generator().manual_seed(0)
    each = [torch.randn(3, backend.d_model, generator=generator) for _ in range(3)]
    edits = [Edit({2: each[0][0]}), Edit({0: each[1], 2: each[2]}), Edit({1: each[0]}, replace=True)]
    rows = tokenize(backend, prompts, [ANSWER] * 3)
    values, baseline = edit_effects(backend, rows, edits, metric="log_probability", method="replay")
    for i, row in enumerate(rows):
        whole = torch.tensor([row.prompt + row.answer[:-1]])

        def score(hooks, row=row, whole=whole):
            chances = model.run_with_hooks(whole, fwd_hooks=hooks)[0, len(row.prompt) - 1 :].float().log_softmax(-1)
            return sum(chances[j, token].item() for j, token in enumerate(row.answer))

        def hooks(edit, i=i, row=row):
            def at(layer):
                def change(x, hook):
                    value = edit.values[layer] if edit.values[layer].dim() == 1 else edit.values[layer][i]
                    x[0, len(row.prompt) - 1] = value if edit.replace else x[0, len(row.prompt) - 1] + value
                    return x

                return change

            return [(f"blocks.{layer}.hook_resid_post", at(layer)) for layer in edit.values]

        with torch.inference_mode():
            assert baseline[i].item() == pytest.approx(score([]), abs=1e-4)
            for j, edit in enumerate(edits):
                assert values[i, j].item() == pytest.approx(score(hooks(edit)), abs=2e-4)

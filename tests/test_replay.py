"""Exact suffix replay against plain forward passes with a head replaced: one prompt at a time, no padding, no cache."""

from __future__ import annotations

import pytest
import torch

import ivlens as ivl
from ivlens.models import backend_of
from ivlens.patching import head_effects
from ivlens.running.replay import Sweep
from ivlens.running.sites import Sites
from ivlens.running.tokens import tokenize
from tests import tiny

pytestmark = [
    pytest.mark.model,
    pytest.mark.filterwarnings("error:.*exact replay can't serve"),
]

REPLAYED = [name for name in tiny.CONFIGS if name != "bloom"]
SINGLE = "0123456789!#$%&*+-/<=>@^_~"  # characters that are one token each, whatever stands beside them


@torch.inference_mode()
def reference(model, prompt, answer, replacement, position):
    """Probability of each answer token [site, token]: unpatched, then with one head's output replaced after the other.

    One forward pass per layer over the whole prompt and answer; row h of it has head h replaced.
    """
    n_heads = replacement.shape[1]
    tokens = torch.tensor([[*prompt, *answer[:-1]]]).repeat(n_heads, 1)
    patched = position if position >= 0 else len(prompt) + position

    def run(hooks):
        chances = model.run_with_hooks(tokens, fwd_hooks=hooks)[:, len(prompt) - 1 :].float().softmax(-1)
        return torch.stack([chances[:, i, token] for i, token in enumerate(answer)], dim=-1)

    sites = [run([])[:1]]
    for layer in range(len(replacement)):

        def replace(z, hook, layer=layer):
            for head in range(n_heads):
                z[head, patched, head] = replacement[layer, head]
            return z

        sites.append(run([(f"blocks.{layer}.attn.hook_z", replace)]))
    return torch.cat(sites)


@torch.inference_mode()
def answers_for(model, prompts):
    """For every prompt the three characters the model finds likeliest, so that probabilities are large and can change."""
    ids = model.tokenizer.encode(SINGLE, add_special_tokens=False)
    assert len(ids) == len(SINGLE)
    best = [model(prompt[None])[0, -1, ids].topk(3).indices.tolist() for prompt in prompts]
    return ["".join(SINGLE[i] for i in three) for three in best]


def differences(model, prompts, replacement, position, **options):
    """Largest difference in probability between `head_effects` and the reference, for answers of one and three tokens."""
    answers = answers_for(model, prompts)
    rows = tokenize(backend_of(model), prompts, answers)
    assert {len(row.answer) for row in rows} == {3}
    expected = torch.stack([reference(model, row.prompt, row.answer, replacement, position) for row in rows])
    common = {"position": position, **options}
    first = head_effects(model, prompts, [a[0] for a in answers], replacement, metric="probability", **common).flatten(
        1
    )
    whole = head_effects(model, prompts, answers, replacement, metric="log_probability", **common).flatten(1)
    chance, together = expected[..., 0], expected.prod(-1)
    assert (chance[:, 1:] - chance[:, :1]).abs().max() > 5e-4, "the patches do nothing; the comparison would be empty"
    one = (first - (chance[:, 1:] - chance[:, :1])).abs().max().item()
    three = ((whole + together[:, :1].log()).exp() - together[:, 1:]).abs().max().item()
    return one, three


def replacement_for(model, seed=1):
    shape = (model.cfg.n_layers, model.cfg.n_heads, model.cfg.d_head)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def prompts_with_a_common_beginning(*tails):
    start = tiny.tokens(20)[0]
    return [torch.cat([start, tail]) for tail in tiny.tokens(*tails, seed=2)]


@pytest.mark.parametrize("position", [-1, -3, 2])
@pytest.mark.parametrize("name", REPLAYED)
def test_replay_equals_one_forward_pass_per_head(load, name, position):
    model = load(name)
    prompts = tiny.tokens(6, 9, 9, 14)  # one left-padded batch
    assert max(differences(model, prompts, replacement_for(model), position)) <= 1e-5


@pytest.mark.parametrize("tails", [(7, 7, 7), (4, 7, 7, 11)], ids=["equal lengths", "different lengths"])
@pytest.mark.parametrize("name", REPLAYED)
def test_prompts_sharing_their_beginning_equal_single_prompts(load, monkeypatch, name, tails):
    model = load(name)
    backend, used = type(backend_of(model)), []
    read_prefix = backend.read_prefix

    def watched(self, tokens, mask, **options):
        used.append(options.get("shared") is not None)
        return read_prefix(self, tokens, mask, **options)

    monkeypatch.setattr(backend, "read_prefix", watched)
    assert max(differences(model, prompts_with_a_common_beginning(*tails), replacement_for(model), -3)) <= 1e-5
    assert any(used) == (len(set(tails)) == 1), "shared where nothing is padded"


@pytest.mark.parametrize("max_rows", [1, 7, 60])
@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2"])
def test_chunks_of_any_size_give_the_same_numbers(load, name, max_rows):
    model = load(name)
    prompts = tiny.tokens(5, 8, 11)
    assert max(differences(model, prompts, replacement_for(model), -3, max_rows=max_rows)) <= 1e-5


@pytest.mark.filterwarnings("default:.*exact replay can't serve")
def test_a_model_that_replay_cannot_serve_takes_the_full_way_with_a_warning(load):
    model = load("bloom")
    prompts = tiny.tokens(6, 9, 9, 14)
    with pytest.warns(UserWarning, match="exact replay can't serve this model"):
        assert max(differences(model, prompts, replacement_for(model), -3)) <= 1e-5


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2"])
def test_full_forward_passes_on_request_equal_the_reference(load, name):
    model = load(name)
    assert max(differences(model, tiny.tokens(6, 9, 14), replacement_for(model), -1, method="full")) <= 1e-5


def test_replay_on_request_raises_for_a_model_it_cannot_serve(load):
    model = load("bloom")
    with pytest.raises(RuntimeError, match=r"exact replay can't serve this model .* pass method='full' or 'auto'"):
        head_effects(model, tiny.tokens(6), ["7"], replacement_for(model), method="replay")


@pytest.mark.parametrize(("metric", "distractors"), [("logit", None), ("logit_difference", ["w", "x", "y"])])
def test_logit_metrics_equal_the_reference(model, metric, distractors):
    prompts, replacement = tiny.tokens(6, 9, 14), replacement_for(model)
    ids = [model.tokenizer.encode(text, add_special_tokens=False)[0] for text in ["7", *(distractors or [])]]
    effects = head_effects(model, prompts, ["7"] * 3, replacement, metric=metric, distractors=distractors)
    for i, prompt in enumerate(prompts):

        def score(hooks, prompt=prompt, i=i):
            logits = model.run_with_hooks(prompt[None], fwd_hooks=hooks)[0, -1]
            return logits[ids[0]] - (logits[ids[1 + i]] if distractors else 0)

        def replace(z, hook):
            z[0, -1, 3] = replacement[1, 3]
            return z

        with torch.inference_mode():
            expected = score([("blocks.1.attn.hook_z", replace)]) - score([])
        torch.testing.assert_close(effects[i, 1, 3], expected, atol=1e-4, rtol=1e-4)


def test_replacing_is_assignment_so_a_head_s_own_output_changes_nothing(model):
    prompt = tiny.tokens(9)[0]
    with torch.inference_mode():
        _, cache = model.run_with_cache(prompt[None])
    own = torch.stack([cache[f"blocks.{layer}.attn.hook_z"][0, -1] for layer in range(3)])
    assert head_effects(model, [prompt], ["7"], own).abs().max() <= 1e-6
    assert head_effects(model, [prompt], ["7"], own + 1).abs().max() > 1e-3


def test_running_out_of_memory_halves_the_rows_and_gives_the_same_numbers(model, monkeypatch):
    prompts, replacement = tiny.tokens(6, 9, 9, 14), replacement_for(model)
    expected = head_effects(model, prompts, ["7"] * 4, replacement)
    backend = type(backend_of(model))
    run_copies, sizes = backend.run_copies, []

    def limited(self, prefix, masks, new_copies, hooks, keep):
        sizes.append(prefix.tokens.shape[0] * (1 + sum(new_copies)) * prefix.block)
        if sizes[-1] > 20:
            raise torch.OutOfMemoryError("no memory left")
        return run_copies(self, prefix, masks, new_copies, hooks, keep)

    monkeypatch.setattr(backend, "run_copies", limited)
    with pytest.warns(UserWarning, match="out of memory; going on with max_rows=16"):
        effects = head_effects(model, prompts, ["7"] * 4, replacement, max_rows=64)
    assert max(sizes) > 20 and sizes[-1] <= 20
    torch.testing.assert_close(effects, expected, atol=1e-6, rtol=0)


@pytest.mark.filterwarnings("ignore:out of memory")
def test_out_of_memory_even_for_a_single_copy_is_raised(model, monkeypatch):
    def never(*args):
        raise torch.OutOfMemoryError("no memory left")

    monkeypatch.setattr(type(backend_of(model)), "run_copies", never)
    with pytest.raises(torch.OutOfMemoryError):
        head_effects(model, tiny.tokens(6), ["7"], replacement_for(model), method="replay")


def test_a_replay_that_goes_wrong_later_is_noticed(model, monkeypatch):
    """The unpatched copy goes along in every pass; if it differs from the forward pass, that is an error."""
    backend = type(backend_of(model))
    run_copies, calls = backend.run_copies, []

    def wrong_from_the_second_time(*args):
        calls.append(1)
        logits = run_copies(*args)
        return logits if len(calls) == 1 else logits.flip(-1)

    monkeypatch.setattr(backend, "run_copies", wrong_from_the_second_time)
    with pytest.raises(RuntimeError, match="differs from the forward pass"):
        head_effects(model, tiny.tokens(6, 7), ["7"] * 2, replacement_for(model), max_rows=13)  # one prompt a batch


def test_the_model_is_as_before_after_replay(model):
    prompt = tiny.tokens(9)[0]
    with torch.inference_mode():
        before = model(prompt[None])
        head_effects(model, [prompt], ["7"], replacement_for(model))
        assert torch.equal(model(prompt[None]), before)


def test_unordered_layers_and_unknown_methods_are_refused(model):
    backend, prompts = backend_of(model), tokenize(backend_of(model), tiny.tokens(6), ["7"])
    with pytest.raises(ValueError, match="must be ascending"):
        Sweep(backend, prompts, Sites([[1], [0]], backend.z_hook, lambda *a: None), metric="probability")
    with pytest.raises(ValueError, match="method='quick' is unknown; choose 'auto', 'replay' or 'full'"):
        head_effects(model, tiny.tokens(6), ["7"], replacement_for(model), method="quick")


@pytest.mark.parametrize("position", [-7, 6])
def test_a_position_outside_the_prompt_is_refused(model, position):
    with pytest.raises(ValueError, match=rf"position={position} is outside prompt 0, which has 6 tokens"):
        head_effects(model, tiny.tokens(6, 9), ["7"] * 2, replacement_for(model), position=position)


@pytest.mark.slow
def test_all_heads_of_smollm2_equal_one_forward_pass_per_head(smollm2):
    prompts = ["Q: walk\nA:", "hot ->", "The capital of France is"]
    answers = [" walked out quickly", " cold and dark", " Paris, of"]
    mean = ivl.patching.mean_head_outputs(smollm2, ["Q: go\nA: went\n\nQ: see\nA:", "Q: cat\nA: cats\n\nQ: dog\nA:"])
    rows = tokenize(backend_of(smollm2), prompts, answers)
    assert [len(row.answer) for row in rows] == [3, 3, 3] and all(3 <= len(row.prompt) <= 12 for row in rows)
    expected = torch.stack([reference(smollm2, row.prompt, row.answer, mean, -1) for row in rows])
    first = head_effects(smollm2, prompts, answers, mean).flatten(1)
    whole = head_effects(smollm2, prompts, answers, mean, metric="log_probability").flatten(1)
    chance, together = expected[..., 0], expected.prod(-1)
    assert first.shape == (3, 270)
    assert (first - (chance[:, 1:] - chance[:, :1])).abs().max() <= 1e-5
    assert ((whole + together[:, :1].log()).exp() - together[:, 1:]).abs().max() <= 1e-5


def test_what_all_prompts_share_is_run_once(model, monkeypatch):
    backend, shared = backend_of(model), []
    read = type(backend).read_prefix

    def counted(self, tokens, mask, *, block, **options):
        shared.extend([tokens.shape] if block == 0 else [])
        return read(self, tokens, mask, block=block, **options)

    monkeypatch.setattr(type(backend), "read_prefix", counted)
    prompts = [torch.tensor([*range(5, 30), i, 7]) for i in range(31, 37)]
    effects = head_effects(
        model, prompts, [" a"] * 6, torch.zeros(backend.n_layers, backend.n_heads, backend.d_head), max_rows=30
    )
    assert shared == [(1, 25)] and effects.shape[0] == 6

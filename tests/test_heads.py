"""Mean head outputs, effects of single heads, interrupted sweeps, and locating heads over tasks."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

import ivlens as ivl
from ivlens.models import backend_of
from ivlens.patching import head_effects, mean_head_outputs
from ivlens.tasks.counterfactuals import counterfactual
from ivlens.tasks.prompts import build_prompts
from tests import tiny

pytestmark = pytest.mark.model


@torch.inference_mode()
def last_z(model, tokens):
    """Head outputs [layer, head, d_head] at the last token of one prompt."""
    _, cache = model.run_with_cache(tokens[None])
    return torch.stack([cache[f"blocks.{layer}.attn.hook_z"][0, -1] for layer in range(model.cfg.n_layers)])


@pytest.fixture(scope="module")
def replacement(model):
    return torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(1))


# -- mean head outputs --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral", "gemma3", "bloom"])
def test_mean_of_a_left_padded_batch_equals_the_mean_of_single_prompts(load, name):
    model, prompts = load(name), tiny.tokens(1, 6, 9, 14)
    expected = torch.stack([last_z(model, prompt) for prompt in prompts]).mean(0)
    torch.testing.assert_close(mean_head_outputs(model, prompts), expected, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(mean_head_outputs(model, prompts, batch_size=3), expected, atol=2e-5, rtol=1e-5)


def test_only_correct_averages_the_prompts_answered_correctly(model):
    prompts = [ivl.Prompt(ivl.Example(verb, f"{verb}ed"), style="plain") for verb in tiny.VERBS[:4]]
    with torch.inference_mode():
        said = [int(model(model.to_tokens(p.render()))[0, -1].argmax()) for p in prompts]
    wanted = ivl.Prompt(ivl.Example(prompts[2].query.input, model.tokenizer.decode([said[2]])), style="plain")
    mean = mean_head_outputs(model, [prompts[0], wanted, prompts[1]], only_correct=True)
    torch.testing.assert_close(mean, last_z(model, model.to_tokens(wanted.render())[0]), atol=2e-5, rtol=1e-5)


def test_only_correct_without_a_correct_answer_is_an_error(model):
    with pytest.raises(ValueError, match="answers none of the prompts correctly; use more shots"):
        mean_head_outputs(model, [ivl.Prompt(ivl.Example("walk", "@"))], only_correct=True)


# -- traps of the public research code ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "qwen3", "mistral", "gpt_neox", "phi3"])
def test_head_shares_and_one_output_bias_add_up_to_the_attention_output(load, name):
    model = load(name)
    backend, prompt = backend_of(model), tiny.tokens(9)[0]
    with torch.inference_mode():
        _, cache = model.run_with_cache(prompt[None])
        for layer in range(model.cfg.n_layers):
            shares = backend.head_shares(layer, cache[f"blocks.{layer}.attn.hook_z"][0, -1])
            bias = model.blocks[layer].attn.b_O
            bias = torch.zeros(model.cfg.d_model) if bias is None else bias
            if name == "gpt2":
                assert bias.abs().max() > 0.1, "without a bias this would test nothing"
            expected = cache[f"blocks.{layer}.hook_attn_out"][0, -1]
            torch.testing.assert_close(shares.sum(0) + bias, expected, atol=2e-5, rtol=1e-4)


def test_heads_wider_than_d_model_over_n_heads_are_patched_whole(load):
    model = load("qwen3")
    assert model.cfg.d_head == 16 != model.cfg.d_model // model.cfg.n_heads
    prompt = tiny.tokens(9)[0]
    own = last_z(model, prompt)
    halves = own.clone()
    halves[..., 8:] += 1
    assert head_effects(model, [prompt], ["7"], own).abs().max() <= 1e-6
    assert (head_effects(model, [prompt], ["7"], halves).abs() > 0).float().mean() > 0.5


# -- interrupting and resuming ------------------------------------------------------------------------------------------


@pytest.fixture
def reads(model, monkeypatch):
    """Counts the prompts read, and interrupts where `reads.stop` says so."""
    backend = type(backend_of(model))
    original = backend.read_prefix

    class Reads(list):
        stop = None

    reads = Reads()

    def counted(self, tokens, mask, **options):
        if len(reads) == reads.stop:
            raise KeyboardInterrupt
        reads.append(tokens.shape[0])
        return original(self, tokens, mask, **options)

    monkeypatch.setattr(backend, "read_prefix", counted)
    return reads


def test_an_interrupted_sweep_goes_on_without_repeating_what_is_done(model, replacement, reads, tmp_path):
    prompts = tiny.tokens(5, 6, 7, 8, 9, 10)
    options = {"answers": ["7"] * 6, "replacement": replacement, "max_rows": 13}  # one prompt a batch
    expected = head_effects(model, prompts, **options)
    whole, reads[:] = len(reads), []
    reads.stop = 4
    with pytest.raises(KeyboardInterrupt):
        head_effects(model, prompts, **options, folder=tmp_path)
    done, reads.stop, reads[:] = 4, None, []
    resumed = head_effects(model, prompts, **options, folder=tmp_path)
    assert 0 < len(reads) <= whole - done + 1, "the rest, and at most once more for a self-check"
    torch.testing.assert_close(resumed, expected, atol=1e-6, rtol=0)
    reads[:] = []
    assert torch.equal(head_effects(model, prompts, **options, folder=tmp_path), resumed)
    assert not reads, "a finished sweep is only read from its file"


def test_kept_results_only_count_for_the_same_prompts_patches_and_metric(model, replacement, tmp_path):
    prompts = tiny.tokens(5, 6)
    head_effects(model, prompts, ["7"] * 2, replacement, folder=tmp_path)
    changed = {
        "other answers": ((prompts, ["7", "%"], replacement), {}),
        "other prompts": ((tiny.tokens(5, 6, seed=9), ["7"] * 2, replacement), {}),
        "other replacement": ((prompts, ["7"] * 2, replacement + 1), {}),
        "other metric": ((prompts, ["7"] * 2, replacement), {"metric": "logit"}),
        "other position": ((prompts, ["7"] * 2, replacement), {"position": -2}),
    }
    for what, (args, options) in changed.items():
        kept, fresh = head_effects(model, *args, **options, folder=tmp_path), head_effects(model, *args, **options)
        assert torch.equal(kept, fresh), what


def test_kept_results_do_not_count_for_other_weights(tokenizer, replacement, tmp_path):
    """After fine-tuning the layers, with the embedding as it was."""
    model, prompts = tiny.hooked_model("llama", tokenizer), tiny.tokens(5, 6)
    before = head_effects(model, prompts, ["7"] * 2, replacement, folder=tmp_path)
    with torch.no_grad():
        list(model.parameters())[-2].mul_(1.5)
    after = head_effects(model, prompts, ["7"] * 2, replacement, folder=tmp_path)
    assert not torch.allclose(before, after)
    assert torch.equal(after, head_effects(model, prompts, ["7"] * 2, replacement))


# -- locating -----------------------------------------------------------------------------------------------------------


def test_locate_heads_equals_its_steps_by_hand(model, task, other_task):
    suite = [task, other_task]
    effects = ivl.locate_heads(model, suite, shots=3, n_prompts=4, n_mean=5, seed=7, progress=False)
    assert effects.tasks == ("past",) * 4 + ("plural",) * 4 and effects.values.shape == (8, 3, 4)
    for t in suite:
        mean = mean_head_outputs(model, build_prompts(t, n=5, shots=3, seed=7))
        clean = build_prompts(t, n=4, shots=3, seed=8)
        broken = counterfactual(clean, "shuffled_labels", tasks=suite, tokenizer=model.tokenizer, seed=7)
        torch.testing.assert_close(
            effects.of(t.name).values, head_effects(model, broken, None, mean), atol=1e-6, rtol=0
        )


def test_locate_heads_gives_the_same_numbers_again_and_others_for_another_seed(model, task):
    options = {"shots": 2, "n_prompts": 3, "n_mean": 3, "progress": False}
    state = torch.get_rng_state()
    first, again, other = (ivl.locate_heads(model, task, seed=seed, **options) for seed in (0, 0, 1))
    assert torch.equal(first.values, again.values) and not torch.equal(first.values, other.values)
    assert torch.equal(torch.get_rng_state(), state), "global random state is left alone"


@pytest.mark.parametrize("kind", ["shuffled_labels", "no_instruction", "other_instruction", "random_text"])
def test_locate_heads_takes_every_counterfactual(model, task, other_task, kind):
    options = {"shots": 2, "instruction": True, "n_prompts": 2, "n_mean": 2, "progress": False}
    effects = ivl.locate_heads(model, [task, other_task], counterfactual=kind, **options)
    assert effects.metadata["counterfactual"] == kind and effects.metadata["method"] == "replay"
    assert (effects.values != 0).any()


@pytest.mark.parametrize("metric", ["log_probability", "logit", "logit_difference"])
def test_locate_heads_takes_every_metric(model, task, metric):
    effects = ivl.locate_heads(model, task, metric=metric, shots=2, n_prompts=2, n_mean=2, progress=False)
    assert effects.metric == metric and (effects.values != 0).any()


@pytest.mark.filterwarnings("ignore:exact replay can't serve")
def test_locate_heads_goes_the_full_way_for_every_task_where_replay_fails(load, task, other_task):
    options = {"shots": 2, "n_prompts": 2, "n_mean": 2, "progress": False}
    effects = ivl.locate_heads(load("bloom"), [task, other_task], **options)
    full = ivl.locate_heads(load("bloom"), [task, other_task], **options, method="full")
    assert effects.metadata["method"] == "full"
    torch.testing.assert_close(effects.values, full.values, atol=1e-6, rtol=0)


# -- bad input ----------------------------------------------------------------------------------------------------------


def test_bad_arguments_are_refused_with_what_is_allowed(model, task, replacement):
    prompts = tiny.tokens(5)
    cases = [
        (
            lambda: head_effects(model, prompts, ["7"], replacement[:2]),
            r"has shape \(2, 4, 8\), but .* needs .* = \(3, 4, 8\)",
        ),
        (
            lambda: head_effects(model, prompts, ["7"], replacement * torch.nan),
            "replacement holds NaN or infinite values",
        ),
        (lambda: head_effects(model, prompts, None, replacement), "answers are needed to measure an effect"),
        (lambda: head_effects(model, prompts, ["7", "8"], replacement), "1 prompts but 2 answers"),
        (lambda: head_effects(model, prompts, ["é"], replacement), r"answer 0 \('é'\) tokenizes to nothing"),
        (lambda: head_effects(model, [], [], replacement), "no prompts given"),
        (
            lambda: head_effects(model, tiny.tokens(128), ["7"], replacement),
            "has 128 tokens .* has a context of 128; use fewer",
        ),
        (
            lambda: head_effects(model, prompts, ["7"], replacement, metric="odds"),
            "metric='odds' is unknown; choose one of prob",
        ),
        (lambda: head_effects(model, prompts, ["7"], replacement, metric="logit_difference"), "needs distractors"),
        (lambda: ivl.locate_heads(model, [], progress=False), "no tasks given; pass at least one"),
        (
            lambda: ivl.locate_heads(model, task, shots=12, progress=False),
            "shots=12 needs at least 13 training examples",
        ),
        (
            lambda: ivl.locate_heads(model, task, shots=1, n_prompts=1, progress=False),
            "'shuffled_labels' needs shots >= 2",
        ),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()


def test_a_model_that_is_not_hooked_is_refused_with_the_next_step():
    with pytest.raises(
        TypeError, match=r"expected a TransformerBridge or HookedTransformer, got GPT2LMHeadModel; .*ivl.load_model"
    ):
        mean_head_outputs(tiny.hf_model("gpt2"), tiny.tokens(5))


# -- said, not measured --------------------------------------------------------------------------------------------------


def task_of(outputs, name="own"):
    records = [{"input": w, "output": o, "split": "train"} for w, o in zip(tiny.VERBS, outputs)]
    return ivl.Task.from_records(
        [*records, {"input": "v", "output": "v", "split": "valid"}], name=name, instruction="x"
    )


LOOK = {"shots": 2, "n_prompts": 6, "n_mean": 4, "progress": False}


def test_counterfactuals_that_change_nothing_are_refused_before_anything_is_run(model, monkeypatch):
    monkeypatch.setattr(type(backend_of(model)), "read_prefix", lambda *args, **options: pytest.fail("was run"))
    with pytest.raises(
        ValueError, match=r"'shuffled_labels' leaves 6 of 6 prompts of task 'own' as they are.*one answer"
    ):
        ivl.locate_heads(model, task_of(["a"] * 12), **LOOK)
    for kind in ("no_instruction", "random_text", "shuffled_labels"):
        with pytest.raises(ValueError, match=r"with shots=0 and instruction=False no prompt states its task"):
            ivl.locate_heads(model, task_of("abcdefgh"), counterfactual=kind, **{**LOOK, "shots": 0})
    with pytest.raises(ValueError, match="n_prompts=0 and n_mean=4 must be 1 or more"):
        ivl.locate_heads(model, task_of("abcdefgh"), **{**LOOK, "n_prompts": 0})


def test_counterfactuals_like_their_original_are_left_out_with_their_number(model):
    task = task_of("abaaabaa")
    clean = build_prompts(task, n=6, shots=2, seed=1)
    same = [a.render() == b.render() for a, b in zip(clean, counterfactual(clean, "shuffled_labels", seed=0))]
    assert 0 < sum(same) < 6
    with pytest.warns(UserWarning, match=f"leaves {sum(same)} of 6 prompts of task 'own' as they are.*left out"):
        effects = ivl.locate_heads(model, task, **LOOK)
    kept = [prompt.query.input for prompt, out in zip(clean, same) if not out]
    assert list(effects.queries) == kept and effects.tasks == ("own",) * len(kept) and len(effects.values) == len(kept)


def test_answers_that_a_metric_cannot_tell_apart_are_said(model):
    task = task_of(["aa", "aa", "aa"] * 4)
    with pytest.warns(UserWarning, match=r"6 answers of task 'own' are all the same to metric='probability'"):
        ivl.locate_heads(model, task, instruction=True, counterfactual="no_instruction", **LOOK)


def test_distractors_differ_in_their_first_token(model):
    backend, texts = backend_of(model), ("(a)", "(b)")
    first = {backend.tokenizer.encode(f" {text}", add_special_tokens=False)[0] for text in texts}
    assert len(first) == 1, "they must share it, or this tests nothing"
    with pytest.raises(ValueError, match=r"needs two answers in task 'own' that differ in their first token"):
        ivl.locate_heads(model, task_of(texts * 4), metric="logit_difference", **LOOK)
    effects = ivl.locate_heads(model, task_of((*texts, "7") * 4), metric="logit_difference", **LOOK)
    assert (effects.values.abs().amax(dim=(1, 2)) > 0).all()


def test_distractors_that_begin_like_their_answer_are_refused(model, replacement):
    with pytest.raises(ValueError, match="1 of 2 distractors begin with their answer's own first token"):
        options = {"metric": "logit_difference", "distractors": ["%", "7"]}
        head_effects(model, tiny.tokens(5, 6), ["7", "7"], replacement, **options)


@pytest.mark.model
def test_in_bfloat16_a_heads_own_output_changes_nothing(tokenizer):
    dtype = torch.bfloat16
    model = ivl.load_model(tiny.hf_model("llama"), tokenizer=tokenizer, dtype=dtype)
    own, declared = {name: t.data_ptr() for name, t in model.named_parameters()}, model.cfg.dtype
    for tokens in tiny.tokens(5, 9):
        effects = head_effects(model, [tokens], ["7"], mean_head_outputs(model, [tokens]), metric="log_probability")
        assert effects.abs().max() < 1e-5
    assert {name: t.data_ptr() for name, t in model.named_parameters()} == own and model.cfg.dtype == declared
    assert all(t.dtype == dtype for t in model.parameters())


@pytest.mark.model
def test_half_precision_without_room_for_float32_says_that_small_effects_are_noise(tokenizer, task, monkeypatch):
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=1000))
    model = ivl.load_model(tiny.hf_model("llama"), tokenizer=tokenizer, dtype=torch.bfloat16)
    with pytest.warns(UserWarning, match="effects in bfloat16 carry rounding noise"):
        ivl.locate_heads(model, task, shots=2, n_prompts=2, n_mean=2, progress=False, method="full")


def test_an_interrupted_sweep_leaves_the_model_as_it_was(tokenizer, replacement, monkeypatch):
    model = ivl.load_model(tiny.hf_model("llama"), tokenizer=tokenizer, dtype=torch.bfloat16)
    model.train()

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("tqdm.std.tqdm.update", interrupted)
    try:
        head_effects(model, tiny.tokens(5, 6), ["7", "8"], replacement, method="full")
    except KeyboardInterrupt as error:  # whose traceback a notebook holds, and with it the frames
        assert error.__traceback__ and all(t.dtype == torch.bfloat16 for t in model.parameters()) and model.training
    else:
        pytest.fail("not interrupted")

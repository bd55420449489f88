"""What is compared, mended or refused when a model is loaded."""

from __future__ import annotations

import subprocess
import warnings

import pytest
import torch
import transformers
from peft import IA3Config, LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as TARGETS

import ivlens as ivl
from ivlens.models import backend_of
from ivlens.models.checkpoints import open_checkpoints
from ivlens.models.comparison import evaluating
from tests import tiny

pytestmark = pytest.mark.model
bridge_only = pytest.mark.skipif(tiny.HOOKED, reason="of the bridge")
IDS = tiny.tokens(9)[0][None]

_C = {
    "vocab_size": 200,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
_G = {**_C, "num_key_value_heads": 2, "intermediate_size": 48}
_OLD = {"vocab_size": 200, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
_ROPE = {"rope_theta": 10000.0, "original_max_position_embeddings": 32}
_MOE = {"num_experts": 4, "num_experts_per_tok": 2}
MORE = {  # beside those of tiny.CONFIGS
    "gpt-oss": ("GptOss", {**_G, "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 5}),
    "mixtral": ("Mixtral", {**_G, "num_local_experts": 4}),
    "qwen3-moe": ("Qwen3Moe", {**_G, **_MOE, "head_dim": 16, "moe_intermediate_size": 16}),
    "olmoe": ("Olmoe", {**_G, **_MOE}),
    "falcon": ("Falcon", {"vocab_size": 200, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}),
    "smollm3": ("SmolLM3", {**_G, "pad_token_id": 2}),
    "granite": ("Granite", {**_G, "residual_multiplier": 0.5, "attention_multiplier": 0.3, "logits_scaling": 2.0}),
    "cohere": ("Cohere", {**_G, "logit_scale": 0.5}),
    "opt": ("OPT", {**_C, "ffn_dim": 48, "word_embed_proj_dim": 32}),
    "stablelm": ("StableLm", _G),
    "olmo": ("Olmo", {**_G, "pad_token_id": 2}),
    "olmo3": ("Olmo3", {**_G, "pad_token_id": 2, "sliding_window": 5}),
    "apertus": ("Apertus", {**_G, "pad_token_id": 2, "bos_token_id": 0, "eos_token_id": 1}),
    "starcoder2": ("Starcoder2", _G),
    "codegen": ("CodeGen", {**_OLD, "rotary_dim": 4}),
    "gpt-bigcode": ("GPTBigCode", _OLD),
    "gpt-neo": ("GPTNeo", {
        "vocab_size": 200, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "max_position_embeddings": 128, "window_size": 5,
        "attention_types": [[["global", "local"], 1]],
    }),
    "mpt": ("Mpt", {"vocab_size": 200, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 128}),
    "gpt-neox-sequential": ("GPTNeoX", {**_C, "intermediate_size": 48, "use_parallel_residual": False}),
    "mixtral-window": ("Mixtral", {**_G, "num_local_experts": 4, "sliding_window": 5}),
    "llama-rope": ("Llama", {**_G, "rope_parameters": {
        **_ROPE, "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    }}),
    "llama-yarn": ("Llama", {**_G, "rope_parameters": {**_ROPE, "rope_type": "yarn", "factor": 4.0}}),
    "llama-longrope": ("Llama", {**_G, "rope_parameters": {  # as plain up to 100 tokens
        "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 100, "factor": 1.0,
        "short_factor": [1.0] * 4, "long_factor": [2.0, 3.0, 4.0, 8.0],
    }}),
    "llama-bias": ("Llama", {**_G, "attention_bias": True, "mlp_bias": True}),
    "llama-wide": ("Llama", {**_G, "head_dim": 16}),
    "qwen2-window": ("Qwen2", {**_G, "use_sliding_window": True, "sliding_window": 100, "max_window_layers": 1}),
}  # fmt: skip
NOT_CONVERTED = {  # HookedTransformer 3.9 knows these only by the names of released models, or not at all
    "gemma", "gemma2", "gemma3", "phi", "olmo2", "qwen3-moe", "falcon", "smollm3", "granite", "cohere", "stablelm", "olmo",
    "starcoder2", "codegen", "gpt-bigcode", "mpt", "llama-yarn", "llama-longrope", "llama-bias", "llama-wide",
    "qwen2-window",
}  # fmt: skip
RUN_WHOLE = {"bloom", "mpt", "gpt-neo"}  # positions or windows that copies can't be lent


def build(name):
    if name in tiny.CONFIGS:
        return tiny.hf_model(name)
    family, settings = MORE[name]
    return tiny.randomize(
        getattr(transformers, f"{family}ForCausalLM")(getattr(transformers, f"{family}Config")(**settings))
    ).eval()


def adapted(name, **options):
    """With an adapter that does something, on peft's default targets where it has any for the architecture."""
    plain = build(name)
    known = (
        plain.config.model_type in TARGETS and plain.config.model_type != "mixtral"
    )  # peft fails on its default there
    where = {} if known else {"target_modules": ["qkv_proj"] if name == "phi3" else ["q_proj", "v_proj"]}
    model = get_peft_model(plain, LoraConfig(r=4, task_type="CAUSAL_LM", **{**where, **options})).eval()
    generator = torch.Generator().manual_seed(0)
    for n, weight in model.named_parameters():
        if "lora_" in n:
            weight.data = 0.3 * torch.randn(weight.shape, generator=generator)
    return model


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the adapter of")
@pytest.mark.parametrize("name", [*tiny.CONFIGS, *MORE])
def test_every_architecture_is_exact_with_an_adapter_and_replayed_as_run_whole(tokenizer, name, task):
    hf = adapted(name)
    with torch.no_grad():
        expected = hf(IDS).logits
    backend = "hooked" if tiny.HOOKED else "bridge"
    if tiny.HOOKED and name in NOT_CONVERTED:
        with pytest.raises(ValueError, match=r"HookedTransformer can't convert PeftModel\w* .*; use backend='bridge'"):
            ivl.load_model(hf, tokenizer=tokenizer, backend=backend)
        backend = "auto"  # goes on with the bridge
    if tiny.HOOKED and name == "cohere":  # its bridge leaves out the scale of the logits
        with pytest.raises(ValueError, match="gives other probabilities"):
            ivl.load_model(hf, tokenizer=tokenizer, backend=backend)
        return
    model = ivl.load_model(hf, tokenizer=tokenizer, backend=backend)
    torch.testing.assert_close(model(IDS).detach(), expected, atol=1e-3, rtol=1e-3)
    options = {"shots": 2, "n_prompts": 2, "n_mean": 3, "progress": False}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore" if name in RUN_WHOLE else "error", "exact replay can't serve")
        some = ivl.locate_heads(model, task, **options)
    full = ivl.locate_heads(model, task, method="full", **options)
    torch.testing.assert_close(some.values, full.values, atol=1e-5, rtol=1e-3)


_T5 = {"vocab_size": 200, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
_BART = {"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
_B = {**_C, "intermediate_size": 48}
REFUSED = {
    "bert": ("BertForMaskedLM", _B, "reads ahead"),
    "bert-lm": ("BertLMHeadModel", _B, "reads ahead"),
    "roberta": ("RobertaForMaskedLM", _B, "reads ahead"),
    "bart": ("BartForConditionalGeneration", {"vocab_size": 200, "d_model": 32, **_BART}, "reads ahead"),
    "t5": ("T5ForConditionalGeneration", _T5, "no logits for tokens alone"),
    "body": ("LlamaModel", _G, "no logits for tokens alone"),
    "classifier": ("LlamaForSequenceClassification", {**_G, "pad_token_id": 2}, "no logits for tokens alone"),
    "mamba": ("MambaForCausalLM", {**_C, "state_size": 4}, "no attention output hook"),
    "persimmon": ("PersimmonForCausalLM", _B, "transformer-lens can't hook"),
    "gpt": ("OpenAIGPTLMHeadModel", _OLD, "gives other probabilities"),
}


@pytest.mark.parametrize("backend", ["bridge", "hooked"] if tiny.HOOKED else ["bridge"])
@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_measured_is_refused_in_words(tokenizer, name, backend):
    kind, settings, why = REFUSED[name]
    kind = getattr(transformers, kind)
    hf = tiny.randomize(kind(kind.config_class(**settings))).eval()
    with pytest.raises(ValueError, match=why if backend == "bridge" else f"{why}|HookedTransformer can't convert") as e:
        ivl.load_model(hf, tokenizer=tokenizer, backend=backend)
    assert kind.__name__ in str(e.value) and len(str(e.value)) < 500


@bridge_only
def test_an_adapter_on_a_fused_projection_is_merged_and_said(tokenizer):
    hf = adapted("gpt2")
    with torch.no_grad():
        expected = hf(IDS).logits
    with pytest.warns(UserWarning, match="is merged: it is on c_attn"):
        model = ivl.load_model(hf, tokenizer=tokenizer, backend="bridge")
    torch.testing.assert_close(model(IDS).detach(), expected, atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        assert torch.equal(hf(IDS).logits, expected), "the caller's model keeps its adapter apart"


@bridge_only
def test_an_adapter_on_a_fused_projection_that_is_switched_off_is_left_out(tokenizer):
    hf = adapted("gpt2")
    with torch.no_grad(), hf.disable_adapter():
        expected = hf(IDS).logits
        with pytest.warns(UserWarning, match="is left out, being switched off: it is on c_attn"):
            model = ivl.load_model(hf, tokenizer=tokenizer, backend="bridge")
    torch.testing.assert_close(model(IDS).detach(), expected, atol=1e-4, rtol=1e-4)


def test_what_goes_before_the_prompt_is_refused(tokenizer, base, tmp_path):
    hf = get_peft_model(tiny.hf_model("llama"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    hf.save_pretrained(tmp_path / "prompt")
    with pytest.raises(ValueError, match=r"goes before the prompt .PROMPT_TUNING."):
        ivl.load_model(hf, tokenizer=tokenizer)
    with pytest.raises(ValueError, match=r"goes before the prompt .PROMPT_TUNING."):
        open_checkpoints(base, [tmp_path / "prompt"])


def test_an_adapter_that_comes_out_anew_at_every_loading_is_refused(tokenizer, base, tmp_path, task):
    """peft's fast PiSSA takes a random part off the base's weights; the exact one takes the same off again."""
    for init in ("pissa_niter_4", "pissa"):
        config = LoraConfig(r=2, init_lora_weights=init, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        hf = get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(base), config)
        with torch.no_grad():
            for name, weight in hf.named_parameters():
                if ".lora_B." in name:
                    weight.mul_(1.5)
            expected = hf.eval()(IDS).logits
        hf.save_pretrained(tmp_path / init)
        if init == "pissa":
            found = ivl.load_model(str(base), adapter=tmp_path / init)(IDS).detach()
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
        else:
            with pytest.raises(ValueError, match=r"a random approximation, another one at every loading; use 'pissa'"):
                ivl.load_model(str(base), adapter=tmp_path / init)
            with pytest.raises(ValueError, match=r"lora has init_lora_weights='pissa_niter_4'"):
                ivl.fine_tune(str(base), task, folder=tmp_path / "run", lora=config, steps=1)


@bridge_only
def test_an_architecture_that_transformer_lens_fails_on_is_refused_in_words(tokenizer):
    config = transformers.FalconConfig(
        **{k: v for k, v in _C.items() if k != "max_position_embeddings"}, new_decoder_architecture=True, num_kv_heads=2
    )
    with pytest.raises(ValueError, match=r"transformer-lens can't hook FalconForCausalLM .*; use another model"):
        ivl.load_model(tiny.randomize(transformers.FalconForCausalLM(config)).eval(), tokenizer=tokenizer)


def whole(folder, adapter=None):
    hf = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    return hf if adapter is None else PeftModel.from_pretrained(hf, adapter).merge_and_unload()


KINDS = {
    "lora": ("llama", {"target_modules": ["q_proj"]}),
    "fused": ("gpt2", {}),
    "dora": ("llama", {"use_dora": True}),
    "head": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "embedding": ("llama", {"target_modules": ["embed_tokens", "q_proj"]}),
    "bias": ("phi", {"bias": "all", "target_modules": ["q_proj"]}),
    "ia3": ("gpt2", None),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_checkpoints_are_each_as_loaded_alone_and_as_far_as_their_weights(tokenizer, tmp_path, kind):
    name, options = KINDS[kind]
    base, generator, folders = tmp_path / "base", torch.Generator().manual_seed(0), []
    tiny.hf_model(name).save_pretrained(base)
    tokenizer.save_pretrained(base)
    for i in range(2):
        config = IA3Config(task_type="CAUSAL_LM") if options is None else LoraConfig(task_type="CAUSAL_LM", **options)
        hf = get_peft_model(whole(base), config)
        for weight in hf.parameters():
            if weight.requires_grad:
                weight.data += 0.3 * torch.randn(weight.shape, generator=generator)
        folders.append(tmp_path / f"checkpoint-{i}")
        hf.save_pretrained(folders[-1])
    opened, broken = open_checkpoints(base, folders)
    assert not broken
    for checkpoint, folder in zip(opened, [None, *folders], strict=True):
        alone = whole(base, folder)
        changes = [(a - b).double().square().sum() for a, b in zip(alone.parameters(), whole(base).parameters())]
        with torch.no_grad(), checkpoint.use() as model:
            torch.testing.assert_close(model(IDS), alone(IDS).logits, atol=1e-3, rtol=1e-3)
            assert checkpoint.distance(model) == pytest.approx(sum(changes).sqrt().item(), rel=1e-3)


@bridge_only
def test_a_hooked_model_with_other_logits_is_refused(tokenizer, monkeypatch):
    from ivlens.models import hooking

    real = hooking.to_bridge

    def broken(*args):
        bridge = real(*args)
        with torch.no_grad():
            next(bridge.original_model.parameters()).mul_(1.5)
        return bridge

    monkeypatch.setattr(hooking, "to_bridge", broken)
    with pytest.raises(ValueError, match="gives other probabilities than the Hugging Face model, by up to"):
        ivl.load_model(tiny.hf_model("llama"), tokenizer=tokenizer, backend="bridge")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("init", ["pissa", "olora", True])
def test_the_base_under_an_adapter_is_the_base_on_disk(base, task, tmp_path, init):
    lora = LoraConfig(r=4, init_lora_weights=init, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    options = {"steps": 4, "batch_size": 2, "save_every": 2, "learning_rate": 1e-2, "progress": False}
    run = ivl.fine_tune(base, task, folder=tmp_path, lora=lora, **options)
    (start, *later), _ = open_checkpoints(base, [run.folder])

    def plain():
        return transformers.AutoModelForCausalLM.from_pretrained(base)

    with torch.no_grad():
        with start.use() as model:
            torch.testing.assert_close(model(IDS), plain()(IDS).logits, atol=1e-4, rtol=1e-4)
        for checkpoint in later:
            with checkpoint.use() as model:
                alone = PeftModel.from_pretrained(plain(), run.folder / checkpoint.label).eval()
                torch.testing.assert_close(model(IDS), alone(IDS).logits, atol=1e-4, rtol=1e-4)


def test_what_cannot_be_stacked_is_refused_before_the_first_stage(base, task, tmp_path):
    for extra in (
        {"use_dora": True},
        {"rank_pattern": {"v_proj": 2}},
        {"modules_to_save": ["lm_head"]},
        {"bias": "lora_only"},
    ):
        lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **extra)
        with pytest.raises(ValueError, match=f"{next(iter(extra))}=.*can't be put together"):
            ivl.fine_tune(base, task, folder=tmp_path, lora=lora, method="fresh_lora", steps=1, progress=False)
    assert not list(tmp_path.rglob("final*"))


def test_a_model_in_training_mode_is_measured_without_dropout_and_put_back(tokenizer, task):
    model = ivl.load_model(tiny.hf_model("gpt2"), tokenizer=tokenizer)
    options = {"metrics": ["probability"], "n_prompts": 4, "progress": False}
    expected = ivl.evaluate(model, task, **options).scores
    model.train()
    assert ivl.evaluate(model, task, **options).scores.equals(expected)
    heads = [ivl.locate_heads(model, task, shots=2, n_prompts=2, n_mean=2, progress=False).values for _ in range(2)]
    assert torch.equal(*heads) and model.training
    model.eval()
    part = next(m for m in model.modules() if isinstance(m, torch.nn.Dropout) or not list(m.children()))
    part.training = True
    with evaluating(model):
        assert not part.training
    assert part.training and not model.training, "each module is in the mode that it was in"


@bridge_only
def test_the_text_part_of_a_wrapper_is_loaded_and_nothing_is_installed(tokenizer, monkeypatch):
    def refused(*args, **kwargs):
        raise AssertionError(args)

    monkeypatch.setattr(subprocess, "check_call", refused)
    text = {**_G, "head_dim": 16, "sliding_window": 5}
    vision = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    config = transformers.Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=199
    )
    hf = tiny.randomize(transformers.Gemma3ForConditionalGeneration(config)).eval()
    with torch.no_grad():
        expected = hf(input_ids=IDS).logits
    model = ivl.load_model(hf, tokenizer=tokenizer)
    torch.testing.assert_close(model(IDS).detach(), expected, atol=1e-5, rtol=1e-5)
    assert backend_of(model).n_layers == 2


@bridge_only
def test_a_folder_that_holds_a_wrapper_gives_its_text_part(tokenizer, tmp_path):
    vision = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**_G),
        vision_config=transformers.CLIPVisionConfig(**vision),
        image_token_index=199,
    )
    hf = tiny.randomize(transformers.LlavaForConditionalGeneration(config)).eval()
    hf.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = hf(input_ids=IDS).logits
    torch.testing.assert_close(ivl.load_model(tmp_path)(IDS).detach(), expected, atol=1e-4, rtol=1e-4)
    transformers.CLIPConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is no model that continues text"):
        ivl.load_model(tmp_path)


def head_widths(name):
    """Values wider than keys (DeepSeek), and layers of two widths (Gemma 4)."""
    sizes = {**_G, "num_hidden_layers": 4}
    if name == "gemma4":
        types = ["sliding_attention", "full_attention"] * 2
        config = transformers.Gemma4TextConfig(
            **sizes,
            head_dim=16,
            global_head_dim=32,
            layer_types=types,
            sliding_window=8,
            vocab_size_per_layer_input=200,
        )
        return tiny.randomize(transformers.Gemma4ForCausalLM(config)).eval()
    config = transformers.DeepseekV3Config(
        **{**sizes, "num_key_value_heads": 4}, v_head_dim=12, qk_nope_head_dim=8, qk_rope_head_dim=4, q_lora_rank=16,
        kv_lora_rank=16, n_routed_experts=4, n_group=1, topk_group=1, num_experts_per_tok=2, moe_intermediate_size=16,
        first_k_dense_replace=1, n_shared_experts=1,
    )  # fmt: skip
    return tiny.randomize(transformers.DeepseekV3ForCausalLM(config)).eval()


@bridge_only
@pytest.mark.filterwarnings("ignore:exact replay can't serve")
@pytest.mark.parametrize(("name", "widths"), [("deepseek", [12] * 4), ("gemma4", [16, 32] * 2)])
def test_heads_as_wide_as_their_values_are_read_and_replaced(tokenizer, name, widths):
    model = ivl.load_model(head_widths(name), tokenizer=tokenizer)
    backend = backend_of(model)
    read, projections = [], [block.attn.o.original_component for block in model.blocks]
    handles = [p.register_forward_pre_hook(lambda _, args: read.append(args[0][0, -1].clone())) for p in projections]
    means = ivl.patching.mean_head_outputs(model, [IDS[0]])
    for handle in handles:
        handle.remove()
    assert backend.d_head == max(widths) == means.shape[-1]
    for layer, (width, z) in enumerate(zip(widths, read)):
        torch.testing.assert_close(means[layer, :, :width], z.view(4, width))
        assert not means[layer, :, width:].any()
        shares = [projections[layer](torch.eye(4)[h].repeat_interleave(width) * z) for h in range(4)]
        if backend.post_norm(layer) is None:
            torch.testing.assert_close(backend.head_shares(layer, means[layer]), torch.stack(shares).detach())
    replacement = torch.randn(means.shape, generator=torch.Generator().manual_seed(1))
    effects = ivl.patching.head_effects(model, [IDS[0]], ["a"], replacement)[0]
    answer = tokenizer.encode("a", add_special_tokens=False)[0]
    for layer, head in [(0, 1), (1, 3), (3, 2)]:
        width = widths[layer]

        def replace(_, args, layer=layer, head=head, width=width):
            x = args[0].clone()
            x[:, -1, head * width : (head + 1) * width] = replacement[layer, head, :width]
            return (x,)

        with torch.no_grad():
            before = model(IDS)[0, -1].softmax(-1)[answer]
            handle = projections[layer].register_forward_pre_hook(replace)
            after = model(IDS)[0, -1].softmax(-1)[answer]
            handle.remove()
        assert (after - before).abs() > 1e-5
        torch.testing.assert_close(effects[layer, head], after - before, atol=1e-6, rtol=1e-3)


@bridge_only
def test_an_offloaded_model_is_taken_as_it_is(tokenizer, task, tmp_path):
    import accelerate

    options = {"shots": 2, "n_prompts": 2, "n_mean": 2, "progress": False}
    expected = ivl.locate_heads(ivl.load_model(tiny.hf_model("llama"), tokenizer=tokenizer), task, **options).values
    model = ivl.load_model(accelerate.cpu_offload(tiny.hf_model("llama")), tokenizer=tokenizer)
    torch.testing.assert_close(ivl.locate_heads(model, task, folder=tmp_path, **options).values, expected)
    assert ivl.extract_vector(model, task, [ivl.Head(0, 1)], shots=2, n_prompts=2).norm() > 0.1
    with pytest.raises(ValueError, match=r"aren't in memory .meta device.*can't be trained"):
        ivl.fine_tune(
            accelerate.cpu_offload(tiny.hf_model("llama")), task, folder=tmp_path / "run", tokenizer=tokenizer
        )
    with torch.device("meta"):
        empty = transformers.LlamaForCausalLM(tiny.hf_model("llama").config)
    with pytest.raises(ValueError, match=r"aren't in memory .meta device.*can't be measured"):
        ivl.load_model(empty, tokenizer=tokenizer)
    with pytest.raises(ValueError, match="can't be given for a model that is quantised or placed"):
        ivl.load_model(accelerate.cpu_offload(tiny.hf_model("llama")), tokenizer=tokenizer, dtype=torch.float64)
    with pytest.raises(ValueError, match="device=cpu can't be given for a model that is quantised or placed"):
        ivl.load_model(accelerate.cpu_offload(tiny.hf_model("llama")), tokenizer=tokenizer, device="cpu")


def test_numbers_that_are_none_stop_the_work_and_name_the_dtype(tokenizer, task, tmp_path):
    hf = tiny.hf_model("llama")
    with torch.no_grad():
        hf.model.norm.weight.mul_(3e38)
    with pytest.warns(UserWarning, match="aren't finite in torch.float32"):
        model = ivl.load_model(hf, tokenizer=tokenizer, backend="auto" if not tiny.HOOKED else "bridge")
    with pytest.raises(ValueError, match="NaN or infinite numbers in float32"):
        ivl.locate_heads(model, task, shots=2, n_prompts=2, n_mean=2, progress=False, folder=tmp_path)
    with pytest.raises(ValueError, match="NaN or infinite numbers in float32"):
        ivl.generate(model, "Q: walk\nA:")
    assert not [path for path in tmp_path.rglob("*.safetensors") if not path.name.startswith("mean-")]


def test_options_that_cannot_be_honoured_are_refused(model, tokenizer, task, tmp_path):
    for option in ({"adapter": "nowhere"}, {"dtype": torch.float64}, {"device": "cpu"}):
        with pytest.raises(
            ValueError, match=f"{next(iter(option))}=.*can't be given for a model that is hooked already"
        ):
            ivl.load_model(model, **option)
    with pytest.raises(ValueError, match="hooked already"):
        ivl.fine_tune(model, task, folder=tmp_path, steps=1, progress=False)


def test_the_tokenizer_given_is_the_one_used(base):
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = "NEW{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer.add_tokens(["Zyx"])
    hf = tiny.hf_model("llama")
    hf.resize_token_embeddings(len(tokenizer))
    used = backend_of(ivl.load_model(hf, tokenizer=tokenizer)).tokenizer
    assert used.chat_template == tokenizer.chat_template
    assert used.encode("Zyx", add_special_tokens=False) == tokenizer.encode("Zyx", add_special_tokens=False) == [200]

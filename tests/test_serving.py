"""Vectors written for programs that serve models do there what `inject` does here, number by number, or are refused."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial

import pytest
import torch
from gguf import GGUFReader
from transformers import AutoModelForCausalLM

import ivlens as ivl
from ivlens.models.head import Head
from ivlens.steering.gate import Gate
from ivlens.vectors.vector import InstructionVector
from tests import tiny

PROMPT, GENERATED = [5, 9, 17, 33, 4, 60, 7], [11, 3, 8]
ALL = torch.tensor([[*PROMPT, *GENERATED]])
EXACT = {"atol": 1e-5, "rtol": 1e-6}
pytestmark = pytest.mark.model


def vector(layer=1, scale=1.5, seed=0, **about):
    values = torch.randn(32, generator=torch.Generator().manual_seed(seed))
    return InstructionVector(values, layer=layer, scale=scale, metadata={"task": "past", **about})


def everywhere(*layers):
    return [vector(layer, 0.5 + i, seed=i, positions="all") for i, layer in enumerate(layers)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tokenizer):
    """`folders("gpt2")`: that tiny model, as `from_pretrained` reads it."""
    made = {}

    def folder(name):
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            tiny.hf_model(name).save_pretrained(made[name])
            tokenizer.save_pretrained(made[name])
        return str(made[name])

    return folder


def hooked(folder, **options):
    """A hooked model of our own, as the bridge has it on both versions of transformer-lens."""
    return ivl.load_model(folder, backend="bridge", **options)


@torch.no_grad()
def steered(model, vectors):
    """Logits [token d_vocab] of the prompt, and of what was generated after it, one token at a time."""
    hf, cache = model.original_model, None
    found = []
    with ivl.inject(model, vectors):
        for piece in ([PROMPT], *([[token]] for token in GENERATED)):
            out = hf(input_ids=torch.tensor(piece), past_key_values=cache, use_cache=True)
            found, cache = [*found, out.logits[0]], out.past_key_values
    return torch.cat(found)


def layers_of(hf_model):
    return next(x for x in hf_model.modules() if isinstance(x, torch.nn.ModuleList))


@torch.no_grad()
def served(hf_model, changes):
    """Logits [token d_vocab] of a plain Hugging Face model whose layers' outputs [token d_model] go through functions."""
    handles = []
    for module, change in changes:

        def hook(module, args, out, change=change):
            x = out[0] if isinstance(out, tuple) else out
            changed = torch.stack([change(row) for row in x])
            return (changed, *out[1:]) if isinstance(out, tuple) else changed

        handles.append(module.register_forward_hook(hook))
    logits = hf_model(ALL).logits[0]
    for handle in handles:
        handle.remove()
    return logits


# -- llama.cpp ----------------------------------------------------------------------------------------------------------


def directions(path):
    return {int(x.name.removeprefix("direction.")): torch.tensor(x.data) for x in GGUFReader(path).tensors}


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "phi"])
def test_a_control_vector_is_added_after_the_block_of_its_number(folders, tmp_path, name):
    model, vectors = hooked(folders(name)), everywhere(1, 2, 2)
    path = ivl.export_vector(vectors, tmp_path / "past.gguf", model=model)
    fields = {key: field.contents() for key, field in GGUFReader(path).fields.items()}
    assert fields["general.architecture"] == "controlvector" and fields["controlvector.layer_count"] == 2
    assert fields["controlvector.model_hint"] == model.original_model.config.model_type
    plain, found = tiny.hf_model(name), directions(path)
    assert set(found) == {1, 2} and all(x.dtype == torch.float32 and x.shape == (32,) for x in found.values())
    got = served(plain, [(layers_of(plain)[n], lambda x, v=v: x + v) for n, v in found.items()])
    torch.testing.assert_close(got, steered(model, vectors), **EXACT)
    assert (got - served(plain, [])).abs().max() > 0.5, "or this would test little"


def test_layers_from_the_end_are_counted_from_the_start(model, tmp_path):
    path = ivl.export_vector(vector(-1, positions="all"), tmp_path / "x.gguf", model=model, architecture="llama")
    assert list(directions(path)) == [2]
    made_for = {"n_layers": 3, "n_heads": 4, "d_model": 32, "d_vocab": 200}
    own = vector(-2, positions="all", signature=made_for)
    assert list(directions(ivl.export_vector(own, tmp_path / "y.gguf", architecture="llama"))) == [1]


# -- vLLM, by transformer_lens ------------------------------------------------------------------------------------------


def intervened(path, name):
    """As transformer_lens's own code has it: names and places of hooks, the check of the specification, and the change."""
    vllm = pytest.importorskip("transformer_lens.model_bridge.sources.vllm.intervention_specs")
    from transformer_lens.model_bridge.sources.vllm.overlays import get_overlay
    from transformer_lens.model_bridge.sources.vllm.worker_extension import _apply_op

    plain, changes = tiny.hf_model(name), []
    places = get_overlay(type(plain).__name__).capture_specs(plain.config)

    def change(x, spec):
        rows = [spec["pos"]] if "pos" in spec else range(len(x))
        x = x.clone()
        x[rows] = _apply_op(x[rows], spec)
        return x

    for hook, spec in json.loads(path.read_text()).items():
        where, width = places[hook]
        spec = vllm.validate_spec(hook, spec, width=width)
        changes.append((plain.get_submodule(where), partial(change, spec=spec)))
    return served(plain, changes)


@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen2"])
def test_interventions_are_added_after_their_layers(folders, tmp_path, name):
    model, vectors = hooked(folders(name)), everywhere(0, 2, 2)
    path = ivl.export_vector(vectors, tmp_path / "past.json", model=model)
    torch.testing.assert_close(intervened(path, name), steered(model, vectors), **EXACT)


def test_interventions_at_the_last_prompt_token_name_its_number(folders, tmp_path):
    model, vectors = hooked(folders("llama")), [vector(0), vector(2, -0.5, seed=1)]
    path = ivl.export_vector(vectors, tmp_path / "past.json", positions=len(PROMPT) - 1)
    torch.testing.assert_close(intervened(path, "llama"), steered(model, vectors), **EXACT)


# -- EasySteer ----------------------------------------------------------------------------------------------------------


def easysteered(folder, name):
    """EasySteer's `direct` and `erase`, one after another, at the prompt and generated tokens that the specification names."""
    plain, changes = tiny.hf_model(name), []
    asked = json.loads((folder / "steering.json").read_text())
    assert asked.keys() == {"vectors", "conflict"} and asked["conflict"] == "sequential"

    def change(x, algorithm, apply, v):
        here = torch.zeros(len(x), dtype=torch.bool)
        for phase, rows in (("prompt", slice(0, len(PROMPT))), ("generation", slice(len(PROMPT), None))):
            here[rows] |= apply.get(phase) == "all"
        for position in apply.get("prompt_positions", []):
            here[len(PROMPT) + position if position < 0 else position] = True
        changed = x + v if algorithm == "direct" else x - (x @ v)[:, None] * v / (v.square().sum() + 1e-8)
        return torch.where(here[:, None], changed, x)

    for one in asked["vectors"]:
        assert (one.keys(), one["scale"]) == ({"source", "algorithm", "scale", "layers", "apply"}, 1.0)
        found = directions(one["source"])
        assert one["layers"] == sorted(found)
        for n, v in found.items():
            options = {"algorithm": one["algorithm"], "apply": one["apply"], "v": v}
            changes.append((layers_of(plain)[n], partial(change, **options)))
    return served(plain, changes), asked["vectors"]


@pytest.mark.parametrize("positions", ["last", "generated", "all"])
def test_easysteer_steers_at_the_same_tokens(folders, tmp_path, positions):
    model = hooked(folders("llama"))
    vectors = [replace(v, metadata={"positions": positions}) for v in everywhere(0, 2, 2)]
    got, asked = easysteered(ivl.export_vector(vectors, tmp_path / "x", format="easysteer", model=model), "llama")
    torch.testing.assert_close(got, steered(model, vectors), **EXACT)
    assert len(asked) == 1, "one vector with all layers keeps its CUDA graphs"


def test_easysteer_sets_a_projection_between_other_vectors(folders, tmp_path):
    model = hooked(folders("llama"))
    setting = vector(1, 2.0, seed=7, how="set", projections=[0.0, 3.0, 0.0], positions="generated")
    vectors = [vector(1, seed=3), setting, vector(1, seed=4, positions="all"), vector(2, seed=5, positions="all")]
    got, asked = easysteered(
        ivl.export_vector(vectors, tmp_path / "x", format="easysteer", architecture="llama"), "llama"
    )
    torch.testing.assert_close(got, steered(model, vectors), **EXACT)
    assert [x["algorithm"] for x in asked] == ["direct", "erase", "direct", "direct"]


# -- what can't be served -----------------------------------------------------------------------------------------------

ENDINGS = {"llama.cpp": "x.gguf", "vllm": "x.json", "transformers": "x", "peft": "x", "easysteer": "x"}


@pytest.mark.parametrize("format", ENDINGS)
def test_what_a_program_cannot_do_is_said(model, tmp_path, format):
    def export(v, **options):
        path = tmp_path / ENDINGS[format]
        ivl.export_vector(v, path, **{"format": format, "model": model, "architecture": "llama", **options})

    gate = Gate(torch.ones(32), torch.zeros(32), layer=0, threshold=0.1)
    with pytest.raises(ValueError, match=r"no such program looks at a prompt.*when\.on\(model, prompts\)"):
        export(everywhere(1), when=gate)
    with pytest.raises(ValueError, match="'past' has no layer"):
        export(replace(vector(positions="all"), layer=None))
    with pytest.raises(ValueError, match=r"layer=3 of 'past' is out of range: the model has layers 0 to 2"):
        export(vector(3, positions="all"))
    with pytest.raises(ValueError, match="has width 8"):
        export(InstructionVector(torch.ones(8), layer=1, metadata={"positions": "all"}))
    with pytest.raises(ValueError, match="0 vectors for"):
        export([])
    if format != "easysteer":
        for own in ({}, {"positions": "generated"}):
            with pytest.raises(ValueError, match=r"every token of prompt and answer.*positions='all'\)"):
                export([*everywhere(1), vector(**own)])
        with pytest.raises(ValueError, match=r"sets a projection.*can only add"):
            export(vector(how="set", positions="all"))
    assert not list(tmp_path.iterdir()), "nothing is written"


def test_what_only_one_program_cannot_do_is_said(model, tmp_path):
    with pytest.raises(ValueError, match=r"acts after layer 0, which llama.cpp doesn't steer"):
        ivl.export_vector(everywhere(0), tmp_path / "x.gguf", architecture="llama")
    with pytest.raises(ValueError, match="says whose it is: pass model=, or architecture="):
        ivl.export_vector(everywhere(1), tmp_path / "x.gguf")
    with pytest.raises(ValueError, match=r"counts from the end; pass model="):
        ivl.export_vector(everywhere(-1), tmp_path / "x.gguf", architecture="llama")
    with pytest.raises(ValueError, match=r"positions=len\(tokens\) - 1"):
        ivl.export_vector(vector(), tmp_path / "x.json")
    for wrong in (-1, True, 1.5, "first"):
        with pytest.raises(ValueError, match="has only 'all'"):
            ivl.export_vector(vector(), tmp_path / "x.json", positions=wrong)
    with pytest.raises(ValueError, match="has only 'last' or 'generated' or 'all'"):
        ivl.export_vector(vector(), tmp_path / "x", format="easysteer", positions=3, architecture="llama")
    with pytest.raises(ValueError, match="has only 'last'; pass positions="):
        ivl.export_vector(everywhere(1), tmp_path / "x.pt")
    with pytest.raises(ValueError, match="sets a projection"):
        ivl.export_vector(vector(how="set"), tmp_path / "x.pt")
    with pytest.raises(ValueError, match="2 vectors for"):
        ivl.export_vector([vector(1), vector(2)], tmp_path / "x.pt")
    with pytest.raises(ValueError, match="changes weights, so it needs them; pass model="):
        ivl.export_vector(everywhere(1), tmp_path / "x", format="peft")
    with pytest.raises(ValueError, match=r"must end in \.gguf for format='llama.cpp'"):
        ivl.export_vector(everywhere(1), tmp_path / "x.json", format="llama.cpp")
    with pytest.raises(ValueError, match=r"format='gguf' is unknown; choose one of pt, llama\.cpp"):
        ivl.export_vector(everywhere(1), tmp_path / "x.gguf", format="gguf")
    with pytest.raises(ValueError, match="doesn't tell the format"):
        ivl.export_vector(everywhere(1), tmp_path / "x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").touch()
    with pytest.raises(ValueError, match="isn't empty; give a new folder"):
        ivl.export_vector(everywhere(1), tmp_path / "full", format="easysteer", architecture="llama")


def test_positions_that_are_given_count(tmp_path):
    path = ivl.export_vector(vector(2), tmp_path / "x.gguf", positions="all", architecture="llama")
    torch.testing.assert_close(directions(path)[2], vector(2).vector * 1.5)


# -- in weights: transformers and peft ----------------------------------------------------------------------------------


@torch.no_grad()
def said(plain):
    return plain.eval()(ALL).logits[0]


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "gptj", "phi", "bloom"])
def test_plain_transformers_loads_the_steered_model(folders, tmp_path, name):
    model, vectors = hooked(folders(name)), everywhere(0, 2, 2)
    folder = ivl.export_vector(vectors, tmp_path / "steered", format="transformers", model=model)
    found = said(AutoModelForCausalLM.from_pretrained(folder))
    torch.testing.assert_close(found, steered(model, vectors), **EXACT)
    assert (found - said(tiny.hf_model(name))).abs().max() > 0.5, "or this would test little"
    torch.testing.assert_close(said(model.original_model), said(tiny.hf_model(name)), **EXACT)  # ours is as before
    assert "acts on every token" in (folder / "README.md").read_text()
    again = ivl.load_model(str(folder))  # with its tokenizer
    assert again.to_tokens("Q: walk").tolist() == model.to_tokens("Q: walk").tolist()


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2", "gemma", "mistral", "phi3", "gpt_neox", "bloom"])
def test_plain_peft_loads_the_vector_as_an_adapter(folders, tmp_path, name):
    from peft import PeftModel

    model, vectors = hooked(folders(name)), everywhere(0, 2, 2)
    folder = ivl.export_vector(vectors, tmp_path / "adapter", format="peft", model=model)
    wanted = steered(model, vectors)
    base = AutoModelForCausalLM.from_pretrained(folders(name))
    torch.testing.assert_close(said(PeftModel.from_pretrained(base, folder)), wanted, **EXACT)
    torch.testing.assert_close(said(AutoModelForCausalLM.from_pretrained(folder)), wanted, **EXACT)
    assert sum(x.stat().st_size for x in folder.iterdir()) < 6000


LORA = {
    "plain": ("llama", {"r": 2, "lora_alpha": 7, "target_modules": ["q_proj", "v_proj"]}),
    "on the steered projection too": ("qwen2", {"r": 3, "lora_alpha": 1, "target_modules": "all-linear"}),
    "rslora, some layers": (
        "gemma",
        {"r": 4, "use_rslora": True, "target_modules": ["o_proj", "down_proj"], "layers_to_transform": [1, 2]},
    ),
    "by a pattern": ("mistral", {"r": 2, "target_modules": r".*\.(q|down)_proj", "init_lora_weights": "gaussian"}),
    "Conv1D": ("gpt2", {"r": 2, "target_modules": ["c_proj"], "fan_in_fan_out": True}),
}


@pytest.mark.parametrize("kind", LORA)
def test_a_lora_adapter_and_its_old_vector_load_as_one(folders, tmp_path, kind):
    from peft import LoraConfig, PeftModel, get_peft_model

    name, settings = LORA[kind]
    trained = get_peft_model(AutoModelForCausalLM.from_pretrained(folders(name)), LoraConfig(**settings))
    with torch.no_grad():
        for i, (path, weight) in enumerate(trained.named_parameters()):
            if "lora_" in path:
                weight.copy_(0.3 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(i)))
    trained.save_pretrained(tmp_path / "trained")
    model, vectors = hooked(folders(name), adapter=tmp_path / "trained"), everywhere(0, 2, 2)
    torch.testing.assert_close(said(model.original_model), said(trained), **EXACT)
    folder = ivl.export_vector(vectors, tmp_path / "both", format="peft", model=model)
    wanted = steered(model, vectors)
    base = AutoModelForCausalLM.from_pretrained(folders(name))
    apart = said(base)
    assert min((wanted - x).abs().max() for x in (said(trained), apart)) > 0.1, "or this would test little"
    torch.testing.assert_close(said(PeftModel.from_pretrained(base, folder)), wanted, **EXACT)
    torch.testing.assert_close(said(AutoModelForCausalLM.from_pretrained(folder)), wanted, **EXACT)
    again = hooked(folders(name), adapter=folder)
    torch.testing.assert_close(said(again.original_model), wanted, **EXACT)
    with pytest.raises(ValueError, match="lora_bias=True"):
        ivl.export_vector(vectors, tmp_path / "twice", format="peft", model=again)
    with pytest.raises(ValueError, match=r"has an adapter on it.*write format='peft', or merge it"):
        ivl.export_vector(vectors, tmp_path / "whole", format="transformers", model=model)


def test_an_adapter_that_is_switched_off_is_left_out(folders, tokenizer, tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model

    settings = {"target_modules": ["q_proj", "down_proj"], "init_lora_weights": False}
    trained = get_peft_model(AutoModelForCausalLM.from_pretrained(folders("llama")), LoraConfig(**settings))
    model = ivl.load_model(trained, tokenizer=tokenizer, backend="bridge")
    assert (said(model.original_model) - said(tiny.hf_model("llama"))).abs().max() > 0.1
    trained.base_model.disable_adapter_layers()
    wanted = steered(model, everywhere(0, 2))
    whole = ivl.export_vector(everywhere(0, 2), tmp_path / "whole", format="transformers", model=model)
    torch.testing.assert_close(said(AutoModelForCausalLM.from_pretrained(whole)), wanted, **EXACT)
    adapter = ivl.export_vector(everywhere(0, 2), tmp_path / "adapter", format="peft", model=model)
    base = AutoModelForCausalLM.from_pretrained(folders("llama"))
    torch.testing.assert_close(said(PeftModel.from_pretrained(base, adapter)), wanted, **EXACT)


@pytest.mark.parametrize("name", ["qwen2", "mistral", "gemma", "phi3"])
def test_an_architecture_without_the_bias_is_refused_as_a_whole_model(folders, tmp_path, name):
    with pytest.raises(ValueError, match=r"has no bias in model.*\.mlp\.down_proj.*write format='peft'"):
        ivl.export_vector(everywhere(1), tmp_path / "x", format="transformers", model=hooked(folders(name)))


@pytest.mark.parametrize("format", ["transformers", "peft"])
@pytest.mark.parametrize("name", ["gemma2", "gemma3", "olmo2"])
def test_a_norm_after_the_feed_forward_is_refused(folders, tmp_path, name, format):
    with pytest.raises(ValueError, match=r"a norm may follow it.*serve it with format='llama\.cpp'"):
        ivl.export_vector(everywhere(1), tmp_path / "x", format=format, model=hooked(folders(name)))


def other(kind, tokenizer, **settings):
    import transformers

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    config = getattr(transformers, f"{kind}Config")(**sizes, vocab_size=200, num_key_value_heads=2, **settings)
    plain = tiny.randomize(getattr(transformers, f"{kind}ForCausalLM")(config)).eval()
    return plain, ivl.load_model(plain, tokenizer=tokenizer, backend="bridge")


def test_a_multiplied_residual_is_counted(tokenizer, tmp_path):
    _, model = other("Granite", tokenizer, residual_multiplier=0.5)
    folder = ivl.export_vector(everywhere(0, 1), tmp_path / "x", format="transformers", model=model)
    found = said(AutoModelForCausalLM.from_pretrained(folder))
    torch.testing.assert_close(found, steered(model, everywhere(0, 1)), **EXACT)


def test_experts_are_refused(tokenizer, tmp_path):
    _, model = other("Mixtral", tokenizer, num_local_experts=4)
    with pytest.raises(ValueError, match=r"has no one projection that its feed-forward ends with \(experts, say\)"):
        ivl.export_vector(everywhere(0), tmp_path / "x", format="peft", model=model)


def test_tied_embeddings_and_half_precision_are_kept(tokenizer, tmp_path):
    plain = tiny.hf_model("llama", tie_word_embeddings=True).to(torch.bfloat16)
    model = ivl.load_model(plain, tokenizer=tokenizer, backend="bridge", dtype=torch.bfloat16)
    folder = ivl.export_vector(everywhere(1), tmp_path / "x", format="transformers", model=model)
    whole = AutoModelForCausalLM.from_pretrained(folder)
    assert whole.dtype == torch.bfloat16 and whole.lm_head.weight is whole.model.embed_tokens.weight
    found = whole.state_dict()
    for name, weight in tiny.hf_model("llama", tie_word_embeddings=True).to(torch.bfloat16).state_dict().items():
        assert torch.equal(found.pop(name), weight), name
    (written,) = {name for name, bias in found.items() if bias.any()}
    assert written == "model.layers.1.mlp.down_proj.bias"
    torch.testing.assert_close(found[written].float(), everywhere(1)[0].vector * 0.5, atol=0, rtol=1e-2)


def test_other_adapters_than_plain_lora_are_refused(folders, tmp_path):
    from peft import LoraConfig, get_peft_model

    for name, settings, said_of_it in (
        ("llama", {"target_modules": ["q_proj"], "use_dora": True}, "use_dora=True, beside which"),
        ("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True}, "merged on loading, and would be missing"),
    ):
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(folders(name)), LoraConfig(**settings))
        model.save_pretrained(tmp_path / name)
        with pytest.warns(UserWarning) if name == "gpt2" else torch.no_grad():
            loaded = hooked(folders(name), adapter=tmp_path / name)
        with pytest.raises(ValueError, match=said_of_it):
            ivl.export_vector(everywhere(1), tmp_path / "x", format="peft", model=loaded)


def test_a_converted_model_is_refused(load, tmp_path):
    if not tiny.HOOKED:
        pytest.skip("transformer-lens 4 converts none")
    with pytest.raises(ValueError, match=r"load it with load_model\(\.\.\., backend='bridge'\)"):
        ivl.export_vector(everywhere(1), tmp_path / "x", format="peft", model=load("llama"))


def test_heads_and_their_shares_are_written_as_their_sum(tmp_path):
    shares = torch.randn(2, 32, generator=torch.Generator().manual_seed(0))
    own = InstructionVector(shares.sum(0), (Head(0, 1), Head(1, 2)), shares, layer=2, metadata={"positions": "all"})
    path = ivl.export_vector(own, tmp_path / "x.gguf", architecture="llama")
    torch.testing.assert_close(directions(path)[2], shares.sum(0))

"""Models larger than a device: offloaded to the main memory, to disk, or spread by a device map, they give the same numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from peft import LoraConfig, get_peft_model

import ivlens as ivl
from ivlens.patching import residual_effects
from tests import tiny

pytestmark = pytest.mark.filterwarnings("ignore")
HEADS = [ivl.Head(0, 1), ivl.Head(2, 3)]
ON_DISK = ("model.layers.1", "model.layers.2")
PARTS = ("model.embed_tokens", "model.layers.0", *ON_DISK, "model.norm", "model.rotary_emb", "lm_head")
MIXED = {part: "disk" if part in ON_DISK else "cpu" for part in PARTS}


@pytest.fixture(scope="module")
def whole(tokenizer):
    return ivl.load_model(tiny.hf_model("llama"), tokenizer=tokenizer, backend="bridge")


@pytest.fixture(scope="module")
def after(tmp_path_factory, tokenizer):
    """An adapter on the tiny Llama, and another model of its shape."""
    folder = tmp_path_factory.mktemp("after")
    model = get_peft_model(tiny.hf_model("llama"), LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "o_proj"]))
    generator = torch.Generator().manual_seed(0)
    for name, weight in model.named_parameters():
        if "lora_" in name:
            weight.data = 0.3 * torch.randn(weight.shape, generator=generator)
    model.save_pretrained(folder / "adapter")
    tiny.randomize(tiny.hf_model("llama"), seed=1).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return folder


def found(model: Any, task: ivl.Task, folder: Path) -> dict[str, Any]:
    """Numbers of the functions that take a hooked model."""
    look, some = {"shots": 2}, {"progress": False}
    vector = ivl.extract_vector(model, task, HEADS, **look, n_prompts=6)
    prompts = ivl.build_prompts(task, n=4, split="test")
    with vector.inject(model, layer=1, scale=3.0), torch.no_grad():
        logits = model(torch.tensor([[5, 6, 7, 8]]))
    scores = ivl.evaluate(model, task, vectors=vector, layer=1, scale=2.0, n_prompts=4, **some).scores
    gate = ivl.fit_gate(model, prompts[:2], prompts[2:], valid=(prompts[:2], prompts[2:]))
    return {
        "effects": ivl.locate_heads(model, task, **look, n_prompts=3, n_mean=4, folder=folder, **some).values,
        "full": ivl.locate_heads(model, task, **look, n_prompts=1, n_mean=4, method="full", **some).values,
        "vector": vector.vector,
        "residual": ivl.extract_vector(model, task, way="residual", layer=1, **look, n_prompts=6).vector,
        "patched": residual_effects(model, prompts[:1], prompts[1:2], positions=(-1,), **some).values,
        "injected": getattr(logits, "logits", logits),
        "gate": gate.direction,
        "tuned": ivl.tune_injection(model, task, vector, scales=(1.0, 2.0), n_prompts=3, **look).accuracy,
        "probability": torch.tensor(scores["probability"].to_numpy()),
        "texts": scores["text"].tolist(),
        "written": model.generate("Q: walk\nA:", max_new_tokens=3, do_sample=False, verbose=False),
    }


@pytest.mark.slow
@pytest.mark.parametrize("where", ["memory", "disk", "mixed", "auto"])
def test_every_function_gives_the_same_numbers_wherever_the_weights_are(where, whole, base, task, tokenizer, tmp_path):
    from transformers import AutoModelForCausalLM

    if where == "auto":
        model = ivl.load_model(base, device_map="auto", backend="bridge")
    elif where == "mixed":
        hf_model = AutoModelForCausalLM.from_pretrained(base, device_map=MIXED, offload_folder=str(tmp_path / "mixed"))
        model = ivl.load_model(hf_model, tokenizer=tokenizer)
    elif where == "disk":
        hf_model = accelerate.disk_offload(tiny.hf_model("llama"), str(tmp_path / "disk"))
        model = ivl.load_model(hf_model, tokenizer=tokenizer)
    else:
        model = ivl.load_model(accelerate.cpu_offload(tiny.hf_model("llama")), tokenizer=tokenizer)
    assert any(p.is_meta for p in model.parameters()) == (where != "auto")
    expected = found(whole, task, tmp_path / "expected")
    for name, value in found(model, task, tmp_path / "found").items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(value, expected[name], atol=1e-6, rtol=0, msg=name)
        else:
            assert value == expected[name], name


@pytest.mark.slow
@pytest.mark.parametrize("kind, device_map", [("adapter", "auto"), ("model", MIXED)])
def test_before_and_after_are_compared_over_several_devices(kind, device_map, after, base, task, other_task, tmp_path):
    tasks, vector = [task, other_task], ivl.InstructionVector(torch.ones(32), (), None)

    def both(at: Any) -> list[Any]:
        options = {"shots": 2, "n_prompts": 3, "device_map": at, "progress": False}
        change = ivl.track(
            [after / kind], task, HEADS, model=base, n_mean=3, folder=tmp_path / str(at is None), **options
        )
        back = ivl.recover(
            [after / kind], tasks, dict.fromkeys(("past", "plural"), vector), model=base, n_valid=2, **options
        )
        checked = ivl.checkup(base, after / kind, [task], **options)
        frames = [change.to_dataframe(), back.to_dataframe(), checked.to_dataframe()]
        assert change.to_dataframe()["weight_distance"].max() > 0.1
        return [frame.select_dtypes("number") for frame in frames]

    for one, two in zip(both(device_map), both(None), strict=True):
        torch.testing.assert_close(
            torch.tensor(one.to_numpy()), torch.tensor(two.to_numpy()), atol=1e-6, rtol=1e-6, equal_nan=True
        )


def test_an_adapter_that_peft_cannot_put_on_offloaded_weights_is_refused(after, base, task, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where peft leaves files before it fails
    with pytest.raises(ValueError, match=r"whose weights are offloaded .*; merge it where they fit"):
        ivl.track([after / "adapter"], task, HEADS, model=base, device_map=MIXED)

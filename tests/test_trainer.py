"""`IVTrainer` against the same loss computed by hand, a row at a time, with plain hooks and no padding."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import TrainingArguments

import ivlens as ivl
from ivlens.models.loading import tokenizing_backend
from ivlens.prompts import build_prompts
from ivlens.training import KL, Guidance
from ivlens.training.data import answer_dataset
from ivlens.vectors import Head, InstructionVector
from tests import tiny

pytestmark = [pytest.mark.model, pytest.mark.filterwarnings("ignore")]

HEADS = (Head(0, 1), Head(2, 3))


@pytest.fixture(scope="module")
def vectors():
    generator = torch.Generator().manual_seed(3)
    shares = [torch.randn(2, 32, generator=generator) for _ in range(2)]
    return {
        name: InstructionVector(x.sum(0), HEADS, x, layer=layer, scale=1.5)
        for name, x, layer in zip(("past", "plural"), shares, (1, 2))
    }


@pytest.fixture(scope="module")
def data(tokenizer, task, other_task):
    backend = tokenizing_backend(tiny.hf_model("llama"), tokenizer, "llama")
    prompts = [*build_prompts(task, n=3, instruction=True), *build_prompts(other_task, n=3)]
    return answer_dataset(backend, prompts)


def trainer_for(model, data, vectors, tokenizer, tmp_path, guidance, side="right", keep=None, **arguments):
    tokenizer.padding_side = side
    options = {"report_to": "none", "use_cpu": True, "remove_unused_columns": False, "disable_tqdm": True}
    options |= {
        "max_steps": 4,
        "per_device_train_batch_size": 6,
        "learning_rate": 1e-2,
        "save_strategy": "no",
        **arguments,
    }
    return ivl.IVTrainer(
        model,
        vectors=vectors,
        guidance=guidance,
        train_dataset=data,
        processing_class=tokenizer,
        keep_teacher=keep,
        args=TrainingArguments(output_dir=str(tmp_path), **options),
    )


def with_lora(hf_model, seed=0):
    model = get_peft_model(hf_model, LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"]))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.3)
    return model


def run_by_hand(hf_model, row, layer, addition):
    """Logits of one row, the addition after a layer at the last prompt token; and the inputs of o_proj there."""
    at = row["labels"].index(next(x for x in row["labels"] if x != -100)) - 1
    z = {}

    def add(module, args, output):
        x = (output[0] if isinstance(output, tuple) else output).clone()
        x[:, at] += addition
        return (x, *output[1:]) if isinstance(output, tuple) else x

    def keep(i):
        return lambda module, args: z.__setitem__(i, args[0][0, at].unflatten(-1, (4, 8)))

    layers = hf_model.model.layers
    handles = [layers[layer].register_forward_hook(add)]
    handles += [layers[i].self_attn.o_proj.register_forward_pre_hook(keep(i)) for i in range(3)]
    logits = hf_model(torch.tensor([row["input_ids"]])).logits[0]
    for handle in handles:
        handle.remove()
    return logits, torch.stack([z[h.layer][h.head] for h in HEADS])


def loss_by_hand(model, data, vectors, alpha, kl_weight, heads_weight):
    inner = model.get_base_model()
    nll, kl, squares = [], [], []
    for row in data:
        vector = vectors[row["task"]]
        theta = 1.5 * vector.vector
        with model.disable_adapter():
            teacher, teacher_z = run_by_hand(inner, row, vector.layer, theta)
        steered, _ = run_by_hand(inner, row, vector.layer, alpha * theta)
        plain, z = run_by_hand(inner, row, vector.layer, 0 * theta)
        for position, token in enumerate(row["labels"]):
            if token != -100:
                nll.append(-steered[position - 1].log_softmax(-1)[token])
                p, q = (x[position - 1].log_softmax(-1) for x in (teacher, plain))
                kl.append((p.exp() * (p - q)).sum())
        squares.append((z - teacher_z).square())
    heads = torch.stack(squares).mean(dim=(0, 2)).sum()
    return torch.stack(nll).mean() + kl_weight * torch.stack(kl).mean() + heads_weight * heads


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("step", [0, 1, 3])
def test_the_loss_is_that_computed_by_hand_a_row_at_a_time(data, vectors, tokenizer, tmp_path, side, step):
    model = with_lora(tiny.hf_model("llama")).eval()
    guidance = Guidance(kl=(KL(weight=0.7),), heads_weight=0.3)
    trainer = trainer_for(model, data, vectors, tokenizer, tmp_path, guidance, side)
    layers = set(trainer._layers.tolist())
    trainer._hooks.attach(model, tokenizer, layers)
    trainer._teacher_hooks = trainer._hooks
    trainer.state.global_step, trainer.state.max_steps = step, 4
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(len(data))])
    loss = trainer.compute_loss(model, dict(batch))
    grads = torch.autograd.grad(loss, [w for w in model.parameters() if w.requires_grad])
    trainer._hooks.detach()
    expected = loss_by_hand(model, data, vectors, {0: 1.0, 1: 0.5, 3: 0.0}[step], 0.7, 0.3)
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    by_hand = torch.autograd.grad(expected, [w for w in model.parameters() if w.requires_grad])
    for one, two in zip(grads, by_hand, strict=True):
        torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-4)
    assert any(g.abs().max() > 1e-3 for g in grads)


def weights(model):
    """What is trained, in one row."""
    return torch.cat([w.detach().flatten() for w in model.parameters() if w.requires_grad])


@pytest.mark.parametrize("guidance", ["paper", "fvg-code"])
def test_training_runs_logs_its_terms_and_leaves_no_hooks(data, vectors, tokenizer, tmp_path, guidance):
    model = with_lora(tiny.hf_model("llama"))
    before = weights(model)
    trainer = trainer_for(model, data, vectors, tokenizer, tmp_path, guidance, logging_steps=1)
    trainer.train()
    assert not torch.equal(before, weights(model))
    expected = {"lm_loss", "kl_loss", *(["heads_loss"] if guidance == "fvg-code" else [])}
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) == 4 and expected <= logged[0].keys()
    assert logged[0]["loss"] == pytest.approx(sum(logged[0][name] for name in expected), rel=1e-3)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_the_teacher_of_full_fine_tuning_is_the_model_before(data, vectors, tokenizer, tmp_path):
    model = tiny.hf_model("llama")
    trainer = trainer_for(model, data, vectors, tokenizer, tmp_path, Guidance(progressive=False))
    start = {name: w.clone() for name, w in trainer._frozen.named_parameters()}
    trainer.train()
    assert all(torch.equal(start[name], w) for name, w in trainer._frozen.named_parameters())
    assert not torch.equal(start["lm_head.weight"], model.lm_head.weight)


@pytest.mark.parametrize("change", ["accumulation", "checkpointing"])
def test_accumulated_and_recomputed_gradients_are_those_of_one_plain_batch(data, vectors, tokenizer, tmp_path, change):
    options = {"max_steps": 1, "optim": "sgd", "max_grad_norm": 0.0, "lr_scheduler_type": "constant"}
    found = []
    for more in ({}, {"accumulation": {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 2},
                      "checkpointing": {"gradient_checkpointing": True}}[change]):  # fmt: skip
        model = with_lora(tiny.hf_model("llama"))
        if more.get("gradient_checkpointing"):
            model.enable_input_require_grads()
        trainer_for(model, data, vectors, tokenizer, tmp_path, "paper", **options, **more).train()
        found.append(weights(model))
    assert not torch.equal(found[0], weights(with_lora(tiny.hf_model("llama"))))
    torch.testing.assert_close(*found, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("guidance", ["paper", "fvg-code", Guidance(kl=(KL(),), heads_weight=0.3)])
@pytest.mark.parametrize("full", [True, False])
def test_a_teacher_kept_whole_trains_like_one_asked_in_every_step(data, vectors, tokenizer, tmp_path, guidance, full):
    losses = []
    for keep in (None, 200):
        model = tiny.hf_model("llama") if full else with_lora(tiny.hf_model("llama"))
        options = {"max_steps": 3, "logging_steps": 1, "optim": "sgd", "per_device_train_batch_size": 4}
        trainer = trainer_for(model, data, vectors, tokenizer, tmp_path / f"{keep}", guidance, keep=keep, **options)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0] == pytest.approx(losses[1], abs=1e-4) and losses[0][0] != pytest.approx(losses[0][-1], abs=1e-3)
    kept = list((tmp_path / "200").glob("teacher-*.safetensors"))
    assert len(kept) == 1 and not list((tmp_path / "None").glob("teacher-*"))


def test_kept_outputs_are_read_again_and_not_for_other_vectors(data, vectors, tokenizer, tmp_path, monkeypatch):
    def train(vectors):
        trainer_for(with_lora(tiny.hf_model("llama")), data, vectors, tokenizer, tmp_path, "paper", keep=20).train()
        return len(list(tmp_path.glob("teacher-*.safetensors")))

    assert train(vectors) == 1
    asked = []
    original = ivl.IVTrainer._teach
    monkeypatch.setattr(ivl.IVTrainer, "_teach", lambda self, *a: asked.append(1) or original(self, *a))
    assert train(vectors) == 1 and not asked
    assert train({name: 2 * vector for name, vector in vectors.items()}) == 2 and len(asked) == 1


def test_a_full_disk_costs_the_file_only(data, vectors, tokenizer, tmp_path, monkeypatch):
    from ivlens.training import teacher

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(teacher, "write_tensors", full)
    trainer = trainer_for(with_lora(tiny.hf_model("llama")), data, vectors, tokenizer, tmp_path, "paper", keep=20)
    with pytest.warns(UserWarning, match="aren't kept on disk .*No space left.* training goes on"):
        trainer.train()
    assert trainer.state.global_step == 4


def test_bad_arguments_are_named(data, vectors, tokenizer, tmp_path):
    model = tiny.hf_model("llama")
    with pytest.raises(ValueError, match="guidance='papr' is unknown; choose one of paper, fvg-code"):
        trainer_for(model, data, vectors, tokenizer, tmp_path, "papr")
    with pytest.raises(ValueError, match=r"no vector for task\(s\) plural"):
        trainer_for(model, data, {"past": vectors["past"]}, tokenizer, tmp_path, "paper")
    wide = {name: InstructionVector(torch.ones(8)) for name in vectors}
    with pytest.raises(ValueError, match="has width 8, but the model has 32"):
        trainer_for(model, data, wide, tokenizer, tmp_path, "paper")
    with pytest.raises(ValueError, match="layer=3 is out of range"):
        trainer_for(model, data, vectors, tokenizer, tmp_path, Guidance(layer=3))

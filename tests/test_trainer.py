"""`IVTrainer` against the same loss computed by hand, a row at a time, with plain hooks and no padding."""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import TrainingArguments

import ivlens as ivl
from ivlens.models.adapters import freeze_adapter
from ivlens.models.head import Head
from ivlens.models.hooking import tokenizing_backend
from ivlens.tasks.prompts import build_prompts
from ivlens.training import KL, Guidance, branches
from ivlens.training import trainer as module
from ivlens.training.batch import Batch, Collator, as_teacher
from ivlens.training.data import answer_dataset
from ivlens.training.guidance import SplitKL
from ivlens.vectors.vector import InstructionVector
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


def trainer_for(model, data, vectors, tokenizer, tmp_path, guidance, side="left", keep=None, budget=2.0, **arguments):
    options = {"report_to": "none", "use_cpu": True, "disable_tqdm": True}
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
        teacher_budget=budget,
        data_collator=Collator(tokenizer, list(dict.fromkeys(data["task"])), side),
        args=TrainingArguments(output_dir=str(tmp_path), **options),
    )


CONFIG = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"])


@torch.no_grad()
def moved(model, seed=0):
    """With random weights for the adapter in training."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        if "lora_" in name and weight.requires_grad:
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.3)
    return model


def with_lora(hf_model, seed=0):
    return moved(get_peft_model(hf_model, CONFIG), seed)


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


def loss_by_hand(model, teacher, data, vectors, alpha, kl_weight, heads_weight):
    inner, taught = model.get_base_model(), teacher.get_base_model()
    nll, kl, squares = [], [], []
    for row in data:
        vector = vectors[row["task"]]
        theta = 1.5 * vector.vector
        with torch.no_grad():
            target, target_z = run_by_hand(taught, row, vector.layer, theta)
        steered, _ = run_by_hand(inner, row, vector.layer, alpha * theta)
        plain, z = run_by_hand(inner, row, vector.layer, 0 * theta)
        for position, token in enumerate(row["labels"]):
            if token != -100:
                nll.append(-steered[position - 1].log_softmax(-1)[token])
                p, q = (x[position - 1].log_softmax(-1) for x in (target, plain))
                kl.append((p.exp() * (p - q)).sum())
        squares.append((z - target_z).square())
    heads = torch.stack(squares).mean(dim=(0, 2)).sum()
    loss = torch.stack(nll).mean() + kl_weight * torch.stack(kl).mean() + heads_weight * heads
    return loss.detach(), torch.autograd.grad(loss, [w for w in model.parameters() if w.requires_grad])


def compute(trainer, data, step=0):
    """Loss and gradients of all rows in one batch, at a step of four, once training has moved the adapter."""
    trainer.state.global_step, trainer.state.max_steps = step, 4
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(len(data))])
    with trainer.prepared():
        moved(trainer.model, seed=5)
        loss = trainer.compute_loss(trainer.model, batch)
        return loss.detach(), torch.autograd.grad(loss, [w for w in trainer.model.parameters() if w.requires_grad])


def assert_same(one, two, atol=5e-5):
    torch.testing.assert_close(one[0], two[0], atol=atol, rtol=1e-5)
    for a, b in zip(one[1], two[1], strict=True):
        torch.testing.assert_close(a, b, atol=atol, rtol=1e-4)
    assert any(g.abs().max() > 1e-3 for g in one[1])


@pytest.fixture(params=["packed", "doubled"])
def layout(request, monkeypatch):
    if request.param == "doubled":
        monkeypatch.setattr(ivl.IVTrainer, "_packing_works", lambda *_: False)
    return request.param


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("step", [0, 1, 3])
def test_the_loss_is_that_computed_by_hand_a_row_at_a_time(
    data, vectors, tokenizer, tmp_path, side, step, layout, attention
):
    model = with_lora(tiny.hf_model("llama", attn_implementation=attention)).eval()
    teacher = copy.deepcopy(model)
    guidance = Guidance(kl=(KL(weight=0.7),), heads_weight=0.3)
    trainer = trainer_for(model, data, vectors, tokenizer, tmp_path, guidance, side)
    shapes = []
    model.get_base_model().lm_head.register_forward_hook(lambda m, a, output: shapes.append(output.shape))
    found = compute(trainer, data, step)
    rows, columns, _ = shapes[-1]
    assert rows == (12 if layout == "doubled" and step < 3 else 6)
    assert columns < max(map(len, data["input_ids"]))
    assert_same(found, loss_by_hand(model, teacher, data, vectors, {0: 1.0, 1: 0.5, 3: 0.0}[step], 0.7, 0.3))


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
    assert [entry.get("alpha") for entry in logged] == ([1.0, 0.5, 0.0, 0.0] if guidance == "paper" else [None] * 4)
    assert len(logged) == 4 and expected <= logged[0].keys()
    assert logged[0]["loss"] == pytest.approx(sum(logged[0][name] for name in expected), rel=1e-3)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def second_stage(kind):
    """A model whose stage before trained an adapter: that one goes on, or is frozen beside a fresh one."""
    model = with_lora(tiny.hf_model("llama"))
    if kind == "fresh":
        model.add_adapter("new", CONFIG)
        model.base_model.set_adapter(["default", "new"])
        freeze_adapter(model, "default")
    return model.eval()


@pytest.mark.parametrize("kind", ["same", "fresh"])
def test_the_teacher_of_a_second_stage_is_the_first_ones_outcome(data, vectors, tokenizer, tmp_path, kind):
    guidance = Guidance(kl=(KL(weight=0.7),), heads_weight=0.3)
    model = second_stage(kind)
    teacher = copy.deepcopy(model)
    for keep in (None, "full"):
        trainer = trainer_for(second_stage(kind), data, vectors, tokenizer, tmp_path, guidance, keep=keep)
        found = compute(trainer, data, step=1)
        assert_same(found, loss_by_hand(moved(model, seed=5), teacher, data, vectors, 0.5, 0.7, 0.3))
    assert trainer.teacher_seconds > 0


def test_only_a_teacher_that_cannot_be_had_otherwise_is_a_copy(data, vectors, tokenizer, tmp_path):
    expected = {"fresh": False, "same": True, "full": True}
    for kind, copied in expected.items():
        model = tiny.hf_model("llama") if kind == "full" else second_stage(kind)
        trainer = trainer_for(model, data, vectors, tokenizer, tmp_path, "paper")
        with trainer.prepared():
            assert (trainer._frozen is not None) == copied and trainer._off == ({"new"} if kind == "fresh" else set())


@pytest.mark.parametrize("keep", [None, 20])
def test_resumed_training_has_the_same_teacher(data, vectors, tokenizer, tmp_path, keep):
    options = {"save_strategy": "steps", "save_steps": 2, "per_device_train_batch_size": 4, "keep": keep}

    def train(folder, **more):
        model = second_stage("same")
        trainer_for(model, data, vectors, tokenizer, folder, "paper", **options).train(**more)
        return weights(model)

    whole = train(tmp_path)
    resumed = train(tmp_path, resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    torch.testing.assert_close(resumed, whole, atol=1e-6, rtol=1e-5)


# -- what a model is fed ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "packs"), [("gpt2", True), ("gpt_neox", True), ("qwen3", True), ("mistral", False), ("bloom", False)]
)
def test_a_model_that_cannot_be_packed_is_fed_every_row_twice(data, vectors, tokenizer, tmp_path, name, packs):
    found = []
    for rows in (data, *(data.select([i]) for i in range(len(data)))):
        model = tiny.hf_model(name)
        trainer = trainer_for(model, rows, vectors, tokenizer, tmp_path, "paper", side="right")
        trainer.state.max_steps = 4
        with trainer.prepared():
            assert trainer._packs == packs
            batch = trainer.data_collator([trainer.train_dataset[i] for i in range(len(rows))])
            found.append(trainer.compute_loss(model, batch).item())
    counts = [sum(label != -100 for label in labels) for labels in data["labels"]]
    alone = sum(loss * count for loss, count in zip(found[1:], counts)) / sum(counts)
    assert found[0] == pytest.approx(alone, rel=1e-5) and found[0] > 1


def test_the_try_before_training_finds_a_mask_that_is_not_heeded(data, vectors, tokenizer, tmp_path, monkeypatch):
    def unmasked(inputs, last, dtype):
        fed = branches.packed(inputs, last, dtype)
        seen = fed.inputs["attention_mask"]
        return dataclasses.replace(fed, inputs={**fed.inputs, "attention_mask": torch.full_like(seen, 0).tril()})

    def refused(inputs, last, dtype):
        fed = branches.packed(inputs, last, dtype)
        return dataclasses.replace(fed, inputs={**fed.inputs, "attention_mask": fed.inputs["attention_mask"][..., 1:]})

    trainer = trainer_for(with_lora(tiny.hf_model("llama")), data, vectors, tokenizer, tmp_path, "paper")
    for instead, packs in ((branches.packed, True), (unmasked, False), (refused, False)):
        monkeypatch.setattr(module, "packed", instead)
        with trainer.prepared():
            assert trainer._packs == packs


def test_a_packed_row_is_longer_by_its_answer_and_the_last_prompt_token_only(data, tokenizer):
    batch = Batch.of(
        Collator(tokenizer, ["past", "plural"], "left")([{**row, "example": 0} for row in data]),
        Guidance(),
        positioned=True,
    )
    fed = branches.packed(batch.inputs, batch.last, torch.float32)
    longest = max(sum(label != -100 for label in labels) for labels in data["labels"])
    assert fed.inputs["input_ids"].shape[1] == batch.labels.shape[1] + longest + 1
    ids = fed.inputs["input_ids"]
    for branch in (fed.steered, fed.plain):
        assert torch.equal(
            ids.gather(1, branch.columns)[batch.where["all"]], batch.inputs["input_ids"][batch.where["all"]]
        )


# -- the whole of training ----------------------------------------------------------------------------------------------


EVERYTHING = Guidance(
    kl=(KL("last", 2.0, "student_teacher", 2.0), KL("all", 0.5, "student_teacher", 2.0)), heads_weight=0.3
)


@pytest.mark.parametrize("guidance", ["paper", EVERYTHING])
@pytest.mark.parametrize("change", ["accumulation", "checkpointing"])
def test_accumulated_and_recomputed_gradients_are_those_of_one_plain_batch(
    data, vectors, tokenizer, tmp_path, change, guidance, layout
):
    options = {
        "max_steps": 1,
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
    }
    found, logs = [], []
    for more in ({}, {"accumulation": {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 2},
                      "checkpointing": {"gradient_checkpointing": True}}[change]):  # fmt: skip
        model = with_lora(tiny.hf_model("llama"))
        if more.get("gradient_checkpointing"):
            model.enable_input_require_grads()
        trainer = trainer_for(model, data, vectors, tokenizer, tmp_path, guidance, **options, **more)
        trainer.train()
        found.append(weights(model))
        logs.append({k: v for k, v in trainer.state.log_history[0].items() if k.endswith("loss") or k == "alpha"})
    assert not torch.equal(found[0], weights(with_lora(tiny.hf_model("llama"))))
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-4)
    assert logs[0] == pytest.approx(logs[1], rel=1e-4) and logs[0]["alpha"] == 1.0


def test_without_vectors_the_teacher_is_the_plain_model_before(data, vectors, tokenizer, tmp_path):
    guidance = Guidance(progressive=False, kl=(KL(weight=0.7),))
    model = second_stage("same")
    teacher = copy.deepcopy(model)
    found = compute(trainer_for(model, data, None, tokenizer, tmp_path, guidance), data)
    nothing = {name: 0.0 * vector for name, vector in vectors.items()}
    nothing = {name: dataclasses.replace(x, layer=1, scale=1.0) for name, x in nothing.items()}
    assert_same(found, loss_by_hand(model, teacher, data, nothing, 0.0, 0.7, 0.0))


def test_in_bfloat16_the_losses_are_near_those_in_float32(data, vectors, tokenizer, tmp_path, monkeypatch):
    logs, dtypes = [], set()
    original = ivl.IVTrainer._note
    monkeypatch.setattr(
        ivl.IVTrainer, "_note", lambda self, terms: dtypes.add(terms["kl_loss"].dtype) or original(self, terms)
    )
    for bf16 in (False, True):
        model = with_lora(tiny.hf_model("llama"))
        options = {"logging_steps": 1, "learning_rate": 1e-3, "bf16": bf16, "keep": 100}
        trainer = trainer_for(model, data, vectors, tokenizer, tmp_path / str(bf16), EVERYTHING, **options)
        trainer.train()
        logs.append([entry for entry in trainer.state.log_history if "loss" in entry])
    assert dtypes == {torch.float32} and len(logs[1]) == 4
    for plain, half in zip(*logs):
        for name in ("lm_loss", "kl_loss", "heads_loss"):
            assert half[name] == pytest.approx(plain[name], rel=0.05, abs=0.03)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom"])
def test_evaluated_is_the_model_alone_on_the_labels(data, vectors, tokenizer, tmp_path, name):
    model, where = tiny.hf_model(name), {"llama": None, "gpt2": ["c_attn"], "bloom": ["query_key_value"]}[name]
    model = get_peft_model(model, LoraConfig(r=2, target_modules=where or ["q_proj", "v_proj"]))
    options = {"eval_strategy": "steps", "eval_steps": 1, "learning_rate": 0.0, "per_device_eval_batch_size": 4}
    args = TrainingArguments(
        str(tmp_path), max_steps=2, report_to="none", use_cpu=True, disable_tqdm=True, save_strategy="no", **options
    )
    rows = data.remove_columns("task").add_column("note", ["text"] * len(data))
    common = {"train_dataset": data, "eval_dataset": rows, "processing_class": tokenizer, "args": args}
    trainer = ivl.IVTrainer(model, vectors=vectors, guidance=EVERYTHING if name == "llama" else "paper", **common)
    trainer.train()
    batches = [data.select(range(i, min(i + 4, len(data)))) for i in range(0, len(data), 4)]
    total, count = 0.0, 0
    model.eval()
    for batch in batches:
        losses, tokens = 0.0, 0
        for row in batch:
            with torch.no_grad():
                chances = model(torch.tensor([row["input_ids"]])).logits[0].log_softmax(-1)
            answer = [(i, t) for i, t in enumerate(row["labels"]) if t != -100]
            losses, tokens = losses - sum(chances[i - 1, t].item() for i, t in answer), tokens + len(answer)
        total, count = total + losses / tokens * len(batch), count + len(batch)
    logged = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert logged == pytest.approx([total / count] * 2, rel=1e-4)
    assert trainer.evaluate(trainer.train_dataset)["eval_loss"] == pytest.approx(total / count, rel=1e-4)
    assert len(trainer.predict(rows.remove_columns("labels")).predictions) == len(rows)


# -- the teacher kept ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steered", [True, False])
def test_a_teacher_may_be_shown_demonstrations_and_the_vector_or_not(
    task, other_task, vectors, tokenizer, tmp_path, steered
):
    backend = tokenizing_backend(tiny.hf_model("llama"), tokenizer, "llama")
    prompts = [*build_prompts(task, n=3, instruction=True), *build_prompts(other_task, n=3)]
    shown = [*build_prompts(task, n=3, shots=2), *build_prompts(other_task, n=3, shots=1)]
    teacher = [replace(p, demonstrations=more.demonstrations) for p, more in zip(prompts, shown)]
    data = answer_dataset(backend, prompts, teacher=teacher)
    model = with_lora(tiny.hf_model("llama")).eval()
    before = copy.deepcopy(model)
    guidance = Guidance(progressive=False, kl=(KL(),), shots=2, steered=steered)
    trainer = trainer_for(
        model, data, vectors, tokenizer, tmp_path, guidance, keep="full", max_steps=1, logging_steps=1
    )
    divergences = []
    for row, prompt, told in zip(data, prompts, teacher):
        asked = as_teacher(row)
        text = tokenizer.decode(asked["input_ids"])
        assert all(example.output in text for example in told.demonstrations) and len(told.demonstrations)
        assert [x for x in asked["labels"] if x != -100] == [x for x in row["labels"] if x != -100]
        vector = vectors[prompt.task]
        addition = vector.scale * vector.vector * steered
        with torch.no_grad():
            ends = []
            for inner, one, change in ((before, asked, addition), (model, row, 0 * addition)):
                logits, _ = run_by_hand(inner.get_base_model(), one, vector.layer, change)
                at = [i - 1 for i, x in enumerate(one["labels"]) if x != -100]
                ends.append(logits[at].log_softmax(-1))
        divergences += (ends[0].exp() * (ends[0] - ends[1])).sum(-1).tolist()
    trainer.train()
    logged = next(entry["kl_loss"] for entry in trainer.state.log_history if "kl_loss" in entry)
    assert logged == pytest.approx(sum(divergences) / len(divergences), rel=1e-3) and logged > 0.01
    small = trainer_for(model, data, vectors, tokenizer, tmp_path, guidance, keep="full", budget=1e-9)
    with (
        pytest.raises(ValueError, match="too small to ask a teacher with demonstrations once"),
        pytest.warns(UserWarning),
    ):
        small.train()
    with pytest.raises(ValueError, match="the data hold no prompts for the teacher"):
        plain = data.remove_columns("teacher_ids")
        trainer_for(model, plain, vectors, tokenizer, tmp_path, guidance, keep="full")
    idle = Guidance(progressive=False, kl=(), shots=2)  # nothing to teach: its budget doesn't matter
    with trainer_for(model, data, vectors, tokenizer, tmp_path, idle, keep="full", budget=1e-9).prepared():
        pass
    with pytest.raises(ValueError, match="shots=2 needs keep_teacher"):
        trainer_for(model, data, vectors, tokenizer, tmp_path, guidance)
    with pytest.raises(ValueError, match="use positions 'answer' or 'last'"):
        Guidance(kl=(KL("all"),), shots=1)


SPLIT = Guidance(kl=(SplitKL(0.5, 2.0), KL("all", 0.1)))


@pytest.mark.parametrize("guidance", ["paper", "fvg-code", Guidance(kl=(KL(),), heads_weight=0.3), SPLIT])
@pytest.mark.parametrize("full", [True, False])
def test_a_teacher_kept_whole_trains_like_one_asked_in_every_step(data, vectors, tokenizer, tmp_path, guidance, full):
    losses = []
    for keep in (None, "full"):
        model = tiny.hf_model("llama") if full else with_lora(tiny.hf_model("llama"))
        options = {"max_steps": 3, "logging_steps": 1, "optim": "sgd", "per_device_train_batch_size": 4}
        trainer = trainer_for(model, data, vectors, tokenizer, tmp_path / f"{keep}", guidance, keep=keep, **options)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and losses[0][0] != pytest.approx(losses[0][-1], abs=1e-3)
    kept = list((tmp_path / "full").glob("teacher-*.safetensors"))
    assert len(kept) == 1 and not list((tmp_path / "None").glob("teacher-*"))


@pytest.mark.parametrize("more", [(), (KL("all", 0.0),)])
def test_the_right_token_is_kept_however_few_are(data, vectors, tokenizer, tmp_path, more):
    """With a gate that is always open, all of the divergence's part at the right token is there with two tokens kept."""
    losses = []
    for keep in (2, None):
        model = with_lora(tiny.hf_model("llama"))
        guidance = Guidance(progressive=False, kl=(SplitKL(0.0, 1.0, "none"), *more))
        trainer = trainer_for(
            model, data, vectors, tokenizer, tmp_path / f"{keep}", guidance, keep=keep, max_steps=3, logging_steps=1
        )
        trainer.train()
        losses.append([entry["kl_loss"] for entry in trainer.state.log_history if "kl_loss" in entry])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4, abs=1e-6) and losses[0][-1] > 0
    with pytest.raises(ValueError, match="no token beside the right one"):
        trainer_for(model, data, vectors, tokenizer, tmp_path / "x", guidance, keep=1)


@pytest.mark.slow
def test_kept_outputs_are_read_again_and_not_for_other_vectors(data, vectors, tokenizer, tmp_path, monkeypatch):
    def train(vectors, data=data):
        trainer_for(with_lora(tiny.hf_model("llama")), data, vectors, tokenizer, tmp_path, "paper", keep=20).train()
        return len(list(tmp_path.glob("teacher-*.safetensors")))

    assert train(vectors) == 1
    asked = []
    original = ivl.IVTrainer._teach
    monkeypatch.setattr(ivl.IVTrainer, "_teach", lambda self, *a: asked.append(1) or original(self, *a))
    assert train(vectors) == 1 and not asked
    assert train({name: 2 * vector for name, vector in vectors.items()}) == 2 and len(asked) == 1
    assert train(vectors, data.map(lambda row: {"labels": [-100, *row["labels"][:-1]]})) == 3 and len(asked) == 2


def test_a_full_disk_costs_the_file_only(data, vectors, tokenizer, tmp_path, monkeypatch):
    from ivlens.training import teacher

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(teacher, "write_tensors", full)
    trainer = trainer_for(with_lora(tiny.hf_model("llama")), data, vectors, tokenizer, tmp_path, "paper", keep=20)
    with pytest.warns(UserWarning, match="aren't kept on disk .*No space left.* training goes on"):
        trainer.train()
    assert trainer.state.global_step == 4


def test_the_budget_bounds_what_is_kept(data, vectors, tokenizer, tmp_path):
    positions = sum(label != -100 for labels in data["labels"] for label in labels)

    def kept(keep, tokens):
        model = with_lora(tiny.hf_model("llama"))
        options = {"keep": keep, "budget": positions * 8 * tokens / 1e9 * 1.001}
        trainer = trainer_for(model, data, vectors, tokenizer, tmp_path, "paper", **options)
        with trainer.prepared():
            return None if trainer._kept is None else trainer._kept.top.values.shape

    assert kept("full", 200) == (positions, 200) and kept(20, 20) == (positions, 20)
    with pytest.warns(UserWarning, match="100 tokens .* the 40 likeliest are kept"):
        assert kept(100, 40) == (positions, 40)
    with pytest.warns(UserWarning, match="too small for 16: the teacher runs in every step"):
        assert kept("full", 15) is None


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
    with pytest.raises(ValueError, match=r"vectors=None leaves nothing to inject .*progressive=False"):
        trainer_for(model, data, None, tokenizer, tmp_path, "paper")
    for keep in (0, "all", True):
        with pytest.raises(
            ValueError, match=f"keep_teacher={keep!r} must be a number of tokens above 0, 'full', or None"
        ):
            trainer_for(model, data, vectors, tokenizer, tmp_path, "paper", keep=keep)

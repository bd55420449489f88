"""Methods against forgetting: penalties and data by hand, memories kept, stages stacked exactly, interrupted and resumed."""

from __future__ import annotations

import itertools
import json
import random
import shutil
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

import ivlens as ivl
from ivlens.common.storage import read_json, read_tensors
from ivlens.models.adapters import adapter_weights
from ivlens.models.backends import backend_of
from ivlens.models.hooking import tokenizing_backend
from ivlens.models.loading import load_hf
from ivlens.tasks.prompts import Prompt, build_prompts
from ivlens.tasks.task import Example
from ivlens.training import METHODS, fine_tune
from ivlens.training.data import answer_dataset
from ivlens.training.guidance import Guidance
from ivlens.training.methods import (
    EWC,
    Averaging,
    FreshLoRA,
    Guided,
    GuidedAveraging,
    LwF,
    OLoRA,
    Rehearsal,
    Replay,
    Stage,
    TextRehearsal,
    as_method,
)
from ivlens.training.methods.replay import reservoir
from ivlens.training.methods.stage import sample_rows
from ivlens.vectors.vector import InstructionVector

pytestmark = pytest.mark.filterwarnings("ignore")

OPTIONS = {"steps": 3, "batch_size": 2, "learning_rate": 1e-2, "progress": False, "logging_steps": 1}
TOKENS = torch.tensor([[5, 9, 30, 41, 7]])


@pytest.fixture(scope="module")
def first(base, task, tmp_path_factory):
    """A first stage by every method, trained once."""
    done = {}

    def of(name):
        if name not in done:
            folder = tmp_path_factory.mktemp(name)
            done[name] = fine_tune(base, task, folder=folder, method=name, vectors=vectors_of(task), **OPTIONS)
        return done[name]

    return of


def vectors_of(*tasks, accuracy=0.9):
    generator = torch.Generator().manual_seed(0)
    made = {}
    for task in tasks:
        shares = torch.randn(2, 32, generator=generator)
        heads = (ivl.Head(0, 1), ivl.Head(2, 3))
        made[task.name] = InstructionVector(
            shares.sum(0), layer=1, heads=heads, shares=shares, metadata={"accuracy": accuracy}
        )
    return made


@contextmanager
def stopped_after(step):
    """Any Trainer is interrupted after this step."""
    from transformers import Trainer, TrainerCallback

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == step:
                raise KeyboardInterrupt

    original = Trainer.__init__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            Trainer,
            "__init__",
            lambda self, *a, callbacks=(), **k: original(self, *a, callbacks=[*callbacks, Stop()], **k),
        )
        yield


def together(*names):
    """Their sum as a text, if they go together."""
    try:
        as_method(" + ".join(names))
    except ValueError:
        return None
    return " + ".join(names)


@torch.inference_mode()
def logits(base, adapter=None):
    return backend_of(ivl.load_model(base, adapter=adapter, backend="bridge")).forward(
        TOKENS, torch.ones_like(TOKENS), keep=5
    )


@pytest.mark.parametrize("name", METHODS)
def test_a_second_stage_goes_on_from_the_first(base, task, other_task, first, tmp_path, name):
    one = first(name)
    two = fine_tune(
        base, other_task, folder=tmp_path, method=name, vectors=vectors_of(other_task), previous=one, **OPTIONS
    )
    assert not torch.allclose(logits(base, two.final), logits(base, one.final), atol=1e-4)
    rank = json.loads((two.final / "adapter_config.json").read_text())["r"]
    assert rank == (16 if METHODS[name].fresh else 8)
    assert (two.folder / "memory").is_dir() == METHODS[name].keeps
    assert two.cost["trainable"] > 0 and (two.cost["kept_mb"] > 0) == METHODS[name].keeps


@pytest.mark.parametrize("name", ["fresh_lora", "o_lora"])
def test_a_fresh_adapter_that_learned_nothing_leaves_the_earlier_stages_as_they_were(
    base, other_task, first, tmp_path, name
):
    one = first(name)
    still = {**OPTIONS, "learning_rate": 0.0}
    two = fine_tune(base, other_task, folder=tmp_path, method=name, previous=one, **still)
    torch.testing.assert_close(logits(base, two.final), logits(base, one.final), atol=1e-5, rtol=0)
    assert not torch.allclose(logits(base, two.final), logits(base), atol=1e-4)


def test_stages_stack_to_the_sum_of_their_changes(base, other_task, first, tmp_path):
    from peft import PeftModel

    two = fine_tune(base, other_task, folder=tmp_path, method="fresh_lora", previous=first("fresh_lora"), **OPTIONS)
    hf_model, _, _ = load_hf(base, dtype=torch.float32)
    name = next(k for k, _ in hf_model.named_modules() if k.endswith("q_proj"))
    before = hf_model.get_submodule(name).weight.detach().clone()
    merged = PeftModel.from_pretrained(hf_model, str(two.final)).merge_and_unload()
    change = merged.get_submodule(name).weight.detach() - before
    a, b = (adapter_weights(two.final)[f"base_model.model.{name}.lora_{x}.weight"] for x in "AB")
    one = adapter_weights(first("fresh_lora").final)
    earlier = 2 * one[f"base_model.model.{name}.lora_B.weight"] @ one[f"base_model.model.{name}.lora_A.weight"]
    torch.testing.assert_close(change, earlier + b[:, 8:] @ a[8:], atol=1e-6, rtol=1e-4)


def test_averaging_is_the_mean_of_the_models_before_and_after(base, task, first, tmp_path):
    half = fine_tune(base, task, folder=tmp_path, method=Averaging(0.5), **OPTIONS)
    whole = first("fresh_lora")  # the same run but for the averaging
    one, two = adapter_weights(half.final), adapter_weights(whole.final)
    assert all(torch.equal(value * (0.5 if "lora_B" in key else 1), one[key]) for key, value in two.items())


def test_averaging_by_layer_grows_evenly_from_the_first_to_the_last(base, task, first, tmp_path):
    run = fine_tune(base, task, folder=tmp_path, method=Averaging(0.2, last=0.8), **OPTIONS)
    one, two = adapter_weights(run.final), adapter_weights(first("fresh_lora").final)
    layers = {int(key.split(".layers.")[1].split(".")[0]) for key in one}
    assert layers == {0, 1, 2}
    for key, value in two.items():
        share = {0: 0.2, 1: 0.5, 2: 0.8}[int(key.split(".layers.")[1].split(".")[0])]
        torch.testing.assert_close(one[key], value * (share if "lora_B" in key else 1))
    with pytest.raises(ValueError, match="is in none; leave last out"):
        Averaging(last=0.5).shares(["head.lora_B.default.weight"], 3)


def test_averaging_along_the_way_counts_each_time(base, task, tmp_path):
    """At half the steps the change so far is halved, in the checkpoint too, and training goes on from there; again at the end."""
    options = {**OPTIONS, "steps": 4, "save_every": 2}
    run = fine_tune(base, task, folder=tmp_path / "way", method=Averaging(0.5, every=0.5), **options)
    plain = fine_tune(base, task, folder=tmp_path / "plain", method="fresh_lora", **options)
    at = [adapter_weights(r.folder / f"checkpoint-{step}") for r, step in ((run, 2), (plain, 2), (run, 4))]
    ends = adapter_weights(run.final)
    for key in ends:
        half = 0.5 if "lora_B" in key else 1
        assert torch.equal(at[0][key], at[1][key] * half) and torch.equal(ends[key], at[2][key] * half)
    assert any(not torch.equal(at[2][key], adapter_weights(plain.final)[key]) for key in ends)
    shutil.copytree(tmp_path / "way", tmp_path / "again")
    (tmp_path / "again" / "log.json").unlink()
    shutil.rmtree(tmp_path / "again" / "checkpoint-4")
    again = adapter_weights(
        fine_tune(base, task, folder=tmp_path / "again", method=Averaging(0.5, every=0.5), **options).final
    )
    assert all(torch.equal(again[key], ends[key]) for key in ends)


@pytest.mark.parametrize("lora", [True, False])
def test_frozen_heads_keep_their_queries_and_values(base, task, tmp_path, lora):
    run = fine_tune(base, task, folder=tmp_path, method="frozen_heads", lora=lora, vectors=vectors_of(task), **OPTIONS)
    config = load_hf(base)[0].config
    d, shared = config.head_dim, config.num_attention_heads // config.num_key_value_heads
    assert shared == 2
    before, after = (load_hf(base)[0].state_dict(), load_file(next(run.final.glob("*.safetensors"))))
    for layer, head in ((0, 1), (2, 3)):
        for name, number in (("q", head), ("v", head // shared)):
            place = f"model.layers.{layer}.self_attn.{name}_proj"
            added = f"base_model.model.{place}.lora_B.weight"
            change = after[added] if lora else after[f"{place}.weight"] - before[f"{place}.weight"]
            rows = torch.arange(len(change)) // d == number
            assert (change[rows] == 0).all() and (change[~rows] != 0).any()


def test_fisher_information_is_the_mean_squared_gradient_of_each_answer(base, task, first):
    run = first("ewc")
    kept, _ = read_tensors(run.folder / "memory" / "fisher.safetensors", kind="fisher information")
    from peft import PeftModel

    hf_model, tokenizer, _ = load_hf(base, dtype=torch.float32)
    backend = tokenizing_backend(hf_model, tokenizer, "x")
    model = PeftModel.from_pretrained(hf_model, str(run.final), is_trainable=True).eval()
    rows = answer_dataset(backend, build_prompts(task, n=6, instruction=True))
    weights = {k: v for k, v in model.named_parameters() if v.requires_grad}
    total = {k: torch.zeros_like(v) for k, v in weights.items()}
    for row in rows:
        model.zero_grad()
        chances = model(torch.tensor([row["input_ids"]])).logits[0].log_softmax(-1)
        answer = [(i, t) for i, t in enumerate(row["labels"]) if t != -100]
        sum(chances[i - 1, t] for i, t in answer).backward()
        for key, weight in weights.items():
            total[key] += weight.grad.square() / len(rows)
    for key, weight in weights.items():
        torch.testing.assert_close(kept[f"fisher/{key}"], total[key], rtol=1e-3, atol=1e-9)
        assert torch.equal(kept[f"weight/{key}"], weight)


def test_ewc_adds_its_penalty_once_and_holds_the_weights(base, other_task, first, tmp_path):
    one = first("ewc")
    kept, _ = read_tensors(one.folder / "memory" / "fisher.safetensors")

    def moved(run):
        now = adapter_weights(run.final)
        return sum(
            (kept[f"fisher/{k}"] * (now[k.replace(".default", "")] - kept[f"weight/{k}"]).square()).sum().item()
            for k in (key.removeprefix("fisher/") for key in kept if key.startswith("fisher/"))
        )

    runs = {}
    for name, strength in {"none": 0.0, "some": 1e2, "much": 1e8}.items():
        options = {**OPTIONS, "method": EWC(strength, 6), "previous": one}
        runs[name] = fine_tune(base, other_task, folder=tmp_path / name, **options)
    assert moved(runs["much"]) < 0.5 * moved(runs["none"])
    log = runs["some"].log
    assert log[0]["penalty"] == 0 and log[1]["penalty"] > 0
    again, _ = read_tensors(runs["some"].folder / "memory" / "fisher.safetensors")
    assert all((again[k] >= kept[k]).all() for k in kept if k.startswith("fisher/"))  # summed over stages


@pytest.mark.parametrize("name", ["o_lora", "ewc"])
def test_a_penalty_counts_once_whatever_is_accumulated(base, task, other_task, tmp_path, name):
    from peft import LoraConfig

    lora = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], task_type="CAUSAL_LM")  # no dropout
    method = OLoRA(5.0) if name == "o_lora" else EWC(1e3)
    one = fine_tune(base, task, folder=tmp_path / "one", method=method, lora=lora, **OPTIONS)
    ends = []
    for parts in (1, 2):
        options = {**OPTIONS, "batch_size": 4 // parts, "gradient_accumulation_steps": parts, "previous": one}
        run = fine_tune(base, other_task, folder=tmp_path / f"{parts}", method=method, lora=lora, **options)
        ends.append(adapter_weights(run.final))
        assert run.log[-1]["penalty"] > 0.01 * run.log[-1]["loss"]
    assert all(torch.allclose(ends[0][k], ends[1][k], atol=1e-4) for k in ends[0])


def test_o_lora_turns_away_from_the_earlier_directions(base, other_task, first, tmp_path):
    overlaps = {}
    for strength in (0.0, 100.0):
        method = OLoRA(strength)
        options = {**OPTIONS, "steps": 12, "previous": first("o_lora")}
        run = fine_tune(base, other_task, folder=tmp_path / str(strength), method=method, **options)
        parts = [a for k, a in adapter_weights(run.final).items() if "lora_A" in k]
        overlaps[strength] = sum((a[:8] @ a[8:].T).square().sum().item() for a in parts)
    assert overlaps[100.0] < 0.3 * overlaps[0.0]


def test_replay_mixes_earlier_examples_in_and_keeps_a_reservoir(base, task, other_task, first, tmp_path):
    one = first("replay")
    buffer = read_json(one.folder / "memory" / "buffer.json", "replay buffer")
    assert buffer["seen"] == len(buffer["rows"]) == 6 and {row["task"] for row in buffer["rows"]} == {task.name}
    two = fine_tune(base, other_task, folder=tmp_path, method=Replay(share=0.5, size=8), previous=one, **OPTIONS)
    after = read_json(two.folder / "memory" / "buffer.json", "replay buffer")
    assert after["seen"] == 12 and len(after["rows"]) == 8
    assert {row["task"] for row in after["rows"]} == {task.name, other_task.name}


def test_replayed_rows_take_the_place_of_new_ones(base, other_task, first, tokenizer, tmp_path):
    from ivlens.training.methods import Stage

    hf_model, tokenizer, _ = load_hf(base, dtype=torch.float32)
    rows = answer_dataset(
        tokenizing_backend(hf_model, tokenizer, "x"), build_prompts(other_task, n=8, instruction=True)
    )
    stage = Stage(hf_model, tokenizer, rows, None, first("replay").folder, tmp_path, seed=0)
    mixed = Replay(share=0.25).data(stage)
    names = [row["task"] for row in mixed]
    assert len(mixed) == 8 and names.count(other_task.name) == 6


def test_rehearsed_rows_are_written_by_the_model_before_under_the_old_instruction(
    base, task, other_task, first, tmp_path
):
    from peft import PeftModel

    one = first("rehearsal")
    known = read_json(one.folder / "memory" / "rehearsal.json", "rehearsed tasks")["tasks"]
    assert known == {"past": {"instructions": list(task.instructions), "style": "qa"}}
    made, before = {}, ivl.load_model(base, adapter=one.final, backend="bridge")
    hf_model, tokenizer, _ = load_hf(base, dtype=torch.float32)
    model = PeftModel.from_pretrained(hf_model, str(one.final))
    backend = tokenizing_backend(hf_model, tokenizer, "x")
    rows = answer_dataset(backend, build_prompts(other_task, n=16, instruction=True))
    ways = {"vector": Rehearsal(0.5), "none": Rehearsal(0.5, steered=False), "random": Rehearsal(0.5, random=True)}
    for name, method in ways.items():
        stage = Stage(model, tokenizer, rows, vectors_of(other_task), one.folder, tmp_path, 0)
        mixed = method.data(stage)
        made[name] = [row for row in mixed if row["task"] == "past"]
        assert len(mixed) == 16 and 0 < len(made[name]) <= 8
        assert [row["task"] for row in mixed].count("plural") == 16 - len(made[name])
    vector, asked = InstructionVector.load(one.folder / "memory" / "past"), set()
    for row in made["vector"]:
        given = [t for t, label in zip(row["input_ids"], row["labels"]) if label == -100]
        text, answer = (tokenizer.decode(x, skip_special_tokens=True) for x in (given, row["input_ids"][len(given) :]))
        told = next(told for told in task.instructions if text.startswith(f"{told}\n\nQ: "))
        prompt = Prompt(Example(text[len(told) + 5 :].rstrip(" ").removesuffix("\nA:"), ""), (), told)
        by_hand = ivl.generate(before, [prompt], vector=vector, max_new_tokens=40)["+ vector"]
        assert by_hand[0].split("\n")[0].strip() == answer.strip() and answer.strip()
        asked.add(text)
    assert len(asked) == len(made["vector"]) and len({str(rows) for rows in made.values()}) == 3
    with pytest.raises(ValueError, match="asked without an instruction, under which it could be rehearsed"):
        plain = {**OPTIONS, "vectors": vectors_of(task), "instruction": False}
        fine_tune(base, task, folder=tmp_path / "y", method="rehearsal", **plain)
    with pytest.raises(ValueError, match="rehearsal puts vectors in, and there is none for task"):
        fine_tune(base, task, folder=tmp_path / "x", method="rehearsal", **OPTIONS)
    options = {**OPTIONS, "previous": one, "vectors": vectors_of(other_task)}
    two = fine_tune(base, other_task, folder=tmp_path / "two", method="rehearsal", **options)
    assert {p.name for p in (two.folder / "memory").iterdir()} == {"rehearsal.json", "past", "plural"}


def test_rehearsed_text_is_the_base_models_whatever_was_trained(base, task, first, tmp_path):
    from peft import PeftModel

    hf_model, tokenizer, _ = load_hf(base, dtype=torch.float32)
    backend = tokenizing_backend(hf_model, tokenizer, "x")
    rows = answer_dataset(backend, build_prompts(task, n=16, instruction=True))
    texts = []
    for model in (hf_model, PeftModel.from_pretrained(load_hf(base)[0], str(first("lora").final))):
        mixed = TextRehearsal(0.25, n_tokens=6).data(Stage(model, tokenizer, rows, None, None, tmp_path, 0))
        assert len(mixed) == 16
        texts.append(sorted(row["input_ids"] for row in mixed if row["task"] != "past"))
    assert texts[0] == texts[1] and 0 < len(texts[0]) <= 4
    for row in (row for row in mixed if row["task"] != "past"):
        assert row["labels"] == [-100, *row["input_ids"][1:]] and row["input_ids"][0] == tokenizer.bos_token_id


def test_a_reservoir_is_a_uniform_sample():
    counts = [0] * 20
    for seed in range(2000):
        rows, seen = reservoir([], 0, list(range(12)), 5, seed)
        rows, seen = reservoir(rows, seen, list(range(12, 20)), 5, seed)
        assert seen == 20 and len(set(rows)) == 5
        for row in rows:
            counts[row] += 1
    assert all(abs(count / 2000 - 0.25) < 0.045 for count in counts)  # 4.6 standard errors


@pytest.mark.parametrize("name", ["ewc", "replay", "o_lora", "iv", "lwf"])
@pytest.mark.slow
def test_an_interrupted_second_stage_goes_on_to_the_same_weights(base, other_task, first, tmp_path, name):
    options = {**OPTIONS, "steps": 4, "save_every": 2, "method": name, "previous": first(name)}
    options["vectors"] = vectors_of(other_task)
    whole = fine_tune(base, other_task, folder=tmp_path / "whole", **options)
    with stopped_after(3), pytest.raises(KeyboardInterrupt):
        fine_tune(base, other_task, folder=tmp_path / "cut", **options)
    half = tmp_path / "cut" / "checkpoint-4"  # one that was being written when the machine went off
    shutil.copytree(tmp_path / "cut" / "checkpoint-2", half)
    (half / "saved").unlink()
    again = fine_tune(base, other_task, folder=tmp_path / "cut", **options)
    one, two = (load_file(r.final / "adapter_model.safetensors") for r in (whole, again))
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


def test_bad_input(base, task, other_task, first, tmp_path):
    with pytest.raises(ValueError, match="method='ewcc' is unknown; did you mean 'ewc'"):
        as_method("ewcc")
    with pytest.raises(ValueError, match="kept nothing for EWC"):
        fine_tune(base, other_task, folder=tmp_path, method="ewc", previous=first("lora"), **OPTIONS)
    with pytest.raises(ValueError, match="goes neither with previous"):
        fine_tune(base, task, folder=tmp_path, method="o_lora", lora=False, **OPTIONS)
    with pytest.raises(ValueError, match="guided training needs vectors"):
        fine_tune(base, task, folder=tmp_path, method="iv", **OPTIONS)
    with pytest.raises(FileNotFoundError, match="holds no finished training run"):
        fine_tune(base, task, folder=tmp_path / "x", previous=tmp_path / "nothing", **OPTIONS)
    for make in (
        lambda: EWC(-1.0),
        lambda: Replay(1.5),
        lambda: OLoRA(-1.0),
        lambda: Averaging(0.0),
        lambda: Averaging(every=2),
        lambda: Rehearsal(0.0),
        lambda: TextRehearsal(n_tokens=0),
        lambda: Averaging(last=0.0),
        lambda: LwF(-1.0),
    ):
        with pytest.raises(ValueError):
            make()
    with pytest.raises(ValueError, match="guidance='papr' is unknown"):
        Guided("papr")


GUIDED = Guided(keep_teacher=None)
PAIRS = [sum_ for a, b in itertools.combinations(METHODS, 2) if (sum_ := together(a, b)) is not None]


@pytest.mark.slow
@pytest.mark.parametrize("method", PAIRS)
def test_two_methods_do_together_what_each_does(base, task, other_task, tmp_path, method):
    """Two stages, the second one of two tasks and accumulated, and interrupted: nothing of either part is lost."""
    chosen, options = as_method(method), {**OPTIONS, "method": method, "vectors": vectors_of(task, other_task)}
    one = fine_tune(base, task, folder=tmp_path / "one", **options)
    options |= {"previous": one, "steps": 4, "save_every": 2, "batch_size": 1, "gradient_accumulation_steps": 2}
    whole = fine_tune(base, [task, other_task], folder=tmp_path / "whole", **options)
    with stopped_after(3), pytest.raises(KeyboardInterrupt):
        fine_tune(base, [task, other_task], folder=tmp_path / "cut", **options)
    again = fine_tune(base, [task, other_task], folder=tmp_path / "cut", **options)
    ends = [adapter_weights(run.final) for run in (whole, again)]
    assert ends[0].keys() == ends[1].keys() and all(torch.equal(ends[0][k], ends[1][k]) for k in ends[0])
    assert json.loads((whole.final / "adapter_config.json").read_text())["r"] == (16 if chosen.fresh else 8)
    assert (whole.folder / "memory").is_dir() == chosen.keeps
    logged = set(whole.log[-1])
    assert ("penalty" in logged) == ("penalty" in chosen.changes)
    assert ("kl_loss" in logged) == any(isinstance(part, (Guided, LwF)) for part in chosen.parts)
    assert whole.settings["method"] == repr(chosen) and all(repr(part) in repr(chosen) for part in chosen.parts)


@pytest.mark.parametrize(("accuracy", "same"), [
    (0.8, Guided(ivl.Guidance(kl=())) + Averaging(0.85)),
    (0.7, Averaging(0.5)),
], ids=["strong", "weak"])  # fmt: skip
def test_guided_averaging_is_guided_as_far_as_the_vector_does_the_task(base, task, tmp_path, accuracy, same):
    vectors = vectors_of(task, accuracy=accuracy)
    options = {**OPTIONS, "vectors": vectors if same.needs_vectors else None}
    one = fine_tune(base, task, folder=tmp_path / "parts", method=same, **options)
    two = fine_tune(base, task, folder=tmp_path / "whole", method=GuidedAveraging(), **{**OPTIONS, "vectors": vectors})
    ends = [adapter_weights(run.final) for run in (one, two)]
    assert all(torch.equal(ends[0][k], ends[1][k]) for k in ends[0])


def test_guided_averaging_must_know_what_the_vector_does(base, task, tmp_path):
    vectors = {name: replace(vector, metadata={}) for name, vector in vectors_of(task).items()}
    with pytest.raises(ValueError, match="tune_injection"):
        fine_tune(base, task, folder=tmp_path, method="iv_averaging", vectors=vectors, **OPTIONS)


def test_a_sum_is_its_parts(base, task, first, tmp_path):
    both = Averaging(0.5) + FreshLoRA()
    half = fine_tune(base, task, folder=tmp_path / "half", method=both, **OPTIONS)
    alone, whole = adapter_weights(half.final), adapter_weights(first("fresh_lora").final)
    assert all(torch.equal(value * (0.5 if "lora_B" in key else 1), alone[key]) for key, value in whole.items())
    assert both == FreshLoRA() + Averaging(0.5) == as_method("averaging + fresh_lora") and both.parts == both.parts
    assert GUIDED + Replay() + Averaging() == Replay() + (Averaging() + GUIDED)


def test_penalties_add_up_beside_a_guided_loss(base, task, other_task, first, tmp_path):
    one = first("o_lora")
    guided = fine_tune(base, task, folder=tmp_path / "iv", method=GUIDED, vectors=vectors_of(task), **OPTIONS)
    options = {**OPTIONS, "steps": 1, "previous": one, "vectors": vectors_of(other_task)}
    logs = {}
    for name, method in {"both": GUIDED + OLoRA(5.0), "none": GUIDED + OLoRA(0.0), "plain": OLoRA(5.0)}.items():
        logs[name] = fine_tune(base, other_task, folder=tmp_path / name, method=method, **options).log[0]
    assert logs["both"]["penalty"] == pytest.approx(logs["plain"]["penalty"]) and logs["both"]["penalty"] > 0
    assert logs["both"]["loss"] == pytest.approx(logs["none"]["loss"] + logs["both"]["penalty"], rel=1e-4)
    assert logs["both"]["kl_loss"] == pytest.approx(logs["none"]["kl_loss"]) and "penalty" not in guided.log[0]


def test_what_cannot_go_together_is_refused_at_once():
    for make, said in {
        "iv + fvg": "two parts of a kind",
        "iv + lwf": "both have a loss of their own",
        "averaging + iv_averaging": "both change the weights after a stage",
        "ewc + averaging": r"EWC\(.*holds on to the adapter of the stage before, and Averaging\(.*trains a fresh one",
        "lora + o_lora": "choose one of them",
        "averaging(part=0.7)": "'averaging' has no option 'part'; choose from share, every, last",
        "averging + iv": "method='averging' is unknown; did you mean 'averaging'",
        "iv and averaging": "method='iv and averaging' is unknown",
        "averaging(0.7)": "is unknown",
        "averaging(share=7)": "outside",
    }.items():
        with pytest.raises(ValueError, match=said):
            as_method(make)
    with pytest.raises(ValueError, match="no method given"):
        as_method([])


def test_parts_that_keep_something_need_it_of_the_stage_before(base, task, other_task, first, tmp_path):
    options = {**OPTIONS, "previous": first("replay"), "vectors": vectors_of(task, other_task)}
    run = fine_tune(base, other_task, folder=tmp_path / "more", method=GUIDED + Replay(), **options)
    assert (run.folder / "memory" / "buffer.json").is_file()
    with pytest.raises(ValueError, match="kept nothing for EWC"):
        fine_tune(base, other_task, folder=tmp_path / "x", method=GUIDED + EWC(), **options)
    with pytest.raises(ValueError, match="no vector for task"):  # of the rows that are replayed
        options["vectors"] = vectors_of(other_task)
        fine_tune(base, other_task, folder=tmp_path / "y", method=GUIDED + Replay(), **options)


def test_a_teacher_with_demonstrations_goes_with_replay(base, task, other_task, tmp_path):
    """Rows have their own demonstrations, those replayed too; of stages that had none, the teacher is asked as the student is."""
    method = Guided(Guidance(shots=2, steered=False)) + Replay(share=0.5)
    options = {**OPTIONS, "vectors": vectors_of(task, other_task)}
    one = fine_tune(base, task, folder=tmp_path / "one", method=method, **options)
    rows = read_json(one.folder / "memory" / "buffer.json", "replay buffer")["rows"]
    assert all(len(row["teacher_ids"]) > len(row["input_ids"]) for row in rows)
    again = fine_tune(base, other_task, folder=tmp_path / "two", method=method, previous=one, **options)
    alone = fine_tune(base, task, folder=tmp_path / "alone", method=Replay(share=0.5), **OPTIONS)
    mixed = fine_tune(base, other_task, folder=tmp_path / "mixed", method=method, previous=alone, **options)
    assert all(run.log[-1]["kl_loss"] > 0 for run in (one, again, mixed))
    student = fine_tune(base, task, folder=tmp_path / "student", method=Guided(Guidance(steered=False)), **options)
    assert student.log[-1]["kl_loss"] != pytest.approx(one.log[-1]["kl_loss"], rel=1e-3)
    taught = [fine_tune(base, task, folder=tmp_path / f"{n}", method=f"lwf(shots={n})", **OPTIONS) for n in (0, 2)]
    assert taught[0].log[-1]["kl_loss"] != pytest.approx(taught[1].log[-1]["kl_loss"], rel=1e-3)


def test_training_does_not_depend_on_global_random_state(base, task, first, tmp_path):
    random.seed(5)
    torch.manual_seed(77)
    again = fine_tune(base, task, folder=tmp_path, method="ewc", **OPTIONS)
    one, two = (load_file(r.final / "adapter_model.safetensors") for r in (first("ewc"), again))
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_a_stage_of_several_tasks_leaves_rows_of_all_of_them(base, task, other_task, first, tmp_path):
    from collections import Counter

    one = first("replay")
    suite = [replace(task, name="a"), replace(other_task, name="b")]
    two = fine_tune(
        base, suite, folder=tmp_path, method=Replay(share=0.5, size=6), previous=one, **{**OPTIONS, "steps": 8}
    )
    buffer = read_json(two.folder / "memory" / "buffer.json", "replay buffer")["rows"]
    assert len(buffer) == 6 and {"a", "b"} <= {row["task"] for row in buffer}
    backend = tokenizing_backend(*load_hf(base))
    dataset = answer_dataset(backend, [p for t in suite for p in build_prompts(t, n=10)])
    stage = Stage(None, backend.tokenizer, dataset, None, one.folder, tmp_path, 0)
    assert Counter(Replay(share=0.5).data(stage)["task"]) == {"past": 10, "a": 5, "b": 5}
    uneven = dataset.select([*range(12), 19])  # ten of a, three of b
    assert Counter(sample_rows(uneven, 7, 0)["task"]) == {"a": 5, "b": 2}
    assert sample_rows(dataset, 99, 0).to_dict() == dataset.to_dict()


def test_fisher_information_is_of_every_task_of_the_stage(base, task, other_task, tmp_path, monkeypatch):
    from ivlens.training.methods import ewc

    seen = []
    original = ewc.fisher_information
    monkeypatch.setattr(
        ewc, "fisher_information", lambda model, rows: seen.extend(rows["task"]) or original(model, rows)
    )
    fine_tune(base, [task, other_task], folder=tmp_path, method=EWC(n_examples=4), **OPTIONS)
    assert sorted(seen) == ["past", "past", "plural", "plural"]

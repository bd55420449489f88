"""Fine-tuning: loss on the answer only, nothing cut, the same weights after an interruption, exact when loaded back."""

from __future__ import annotations

import json
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
import transformers

import ivlens as ivl
from ivlens.common.keys import weights_fingerprint
from ivlens.models.backends import backend_of
from ivlens.models.hooking import tokenizing_backend
from ivlens.running.tokens import tokenize
from ivlens.tasks.prompts import build_prompts
from ivlens.training import TrainingRun, fine_tune
from ivlens.training.data import answer_dataset
from ivlens.vectors.vector import InstructionVector
from tests import tiny

pytestmark = [pytest.mark.model, pytest.mark.filterwarnings("ignore")]


OPTIONS = {"steps": 4, "batch_size": 3, "learning_rate": 1e-2, "progress": False}


@pytest.fixture(scope="module")
def run(base, task, tmp_path_factory):
    return fine_tune(base, task, folder=tmp_path_factory.mktemp("run"), save_every=2, **OPTIONS)


@pytest.fixture(scope="module")
def guided(task):
    vector = InstructionVector(torch.randn(32, generator=torch.Generator().manual_seed(0)), layer=1)
    return {"vectors": {task.name: vector}}


@torch.inference_mode()
def logits_of(model):
    return backend_of(model).forward(torch.tensor([[5, 9, 30, 41, 7]]), torch.ones(1, 5, dtype=torch.long), keep=5)


def test_the_dataset_is_prompt_answer_and_end_with_labels_on_the_answer_only(load, task):
    backend = backend_of(load("llama"))
    prompts = build_prompts(task, n=4, instruction=True)
    for row, tokens in zip(answer_dataset(backend, prompts), tokenize(backend, prompts)):
        end = backend.tokenizer.eos_token_id
        assert row["input_ids"] == [*tokens.prompt, *tokens.answer, end]
        assert row["labels"] == [-100] * len(tokens.prompt) + [*tokens.answer, end]


def test_a_model_without_weights_tokenizes_like_the_hooked_one(tokenizer, task):
    prompts = build_prompts(task, n=3, shots=2)
    for name in tiny.CONFIGS:
        empty = tokenizing_backend(tiny.hf_model(name), tokenizer, name)
        hooked = ivl.load_model(tiny.hf_model(name), tokenizer=tokenizer, backend="bridge")
        assert tokenize(empty, prompts) == tokenize(backend_of(hooked), prompts)


def test_the_logged_loss_is_the_mean_over_answer_tokens_whatever_the_padding(base, task, tmp_path, tokenizer):
    steps = {"steps": 1, "batch_size": 6, "learning_rate": 0.0, "progress": False, "logging_steps": 1}
    log = fine_tune(base, task, folder=tmp_path, lora=False, **steps).log
    hf_model = tiny.hf_model("llama")
    total, count = 0.0, 0
    for row in answer_dataset(tokenizing_backend(hf_model, tokenizer, "x"), build_prompts(task, n=6, instruction=True)):
        with torch.inference_mode():
            chances = hf_model(torch.tensor([row["input_ids"]])).logits[0].log_softmax(-1)
        for i, token in enumerate(row["labels"]):
            if token != -100:
                total, count = total - chances[i - 1, token].item(), count + 1
    assert log[0]["loss"] == pytest.approx(total / count, rel=1e-4)


@pytest.mark.parametrize("name", ["gpt2", "opt", "bloom", "llama"])
@pytest.mark.parametrize("kind", ["plain", "guided"])
def test_the_loss_does_not_depend_on_the_side_of_padding(task, tokenizer_folder, tmp_path, guided, name, kind):
    from peft import LoraConfig
    from transformers import AutoTokenizer, OPTConfig, OPTForCausalLM

    uneven = [{"input": verb * (1 + i % 4), "output": verb} for i, verb in enumerate(tiny.VERBS)]
    uneven = ivl.Task.from_records(uneven, name=task.name, instruction="x")
    where = {"gpt2": ["c_attn"], "bloom": ["query_key_value"]}.get(name, ["q_proj", "v_proj"])
    losses = []
    for side in ("left", "right"):
        if name == "opt":
            sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "ffn_dim": 48}
            config = OPTConfig(
                vocab_size=200, max_position_embeddings=128, word_embed_proj_dim=32, dropout=0.0, **sizes
            )
            model = tiny.randomize(OPTForCausalLM(config))
        else:
            off = {"gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}}.get(name, {})
            model = tiny.hf_model(name, **off)
        padding = AutoTokenizer.from_pretrained(tokenizer_folder, padding_side=side)
        more = {"lora": LoraConfig(r=2, target_modules=where, task_type="CAUSAL_LM"), "tokenizer": padding, "steps": 1}
        options = {**OPTIONS, **more, **(guided if kind == "guided" else {}), "batch_size": 8, "learning_rate": 0.0}
        losses.append(fine_tune(model, uneven, folder=tmp_path / side, **options).log[0]["loss"])
        assert padding.padding_side == side
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_training_changes_the_model_and_lowers_the_loss(base, task, tmp_path):
    run = fine_tune(base, task, folder=tmp_path, lora=False, **{**OPTIONS, "steps": 30, "logging_steps": 1})
    assert run.log[-1]["loss"] < 0.8 * run.log[0]["loss"]
    assert run.final.is_dir() and "loss" in repr(run)
    assert not torch.equal(logits_of(ivl.load_model(run.final)), logits_of(ivl.load_model(base)))


@pytest.mark.slow
def test_the_adapter_loads_back_with_the_same_logits_in_a_new_process(base, run, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    trained = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(run.final)).eval()
    with torch.inference_mode():
        expected = trained(torch.tensor([[5, 9, 30, 41, 7]])).logits
    script = (
        "import sys, torch, ivlens as ivl\nfrom safetensors.torch import save_file\nfrom ivlens.models import backend_of\n"
        "model = ivl.load_model(sys.argv[1], adapter=sys.argv[2])\n"
        "with torch.inference_mode():\n"
        "    x = backend_of(model).forward(torch.tensor([[5, 9, 30, 41, 7]]), torch.ones(1, 5, dtype=torch.long), keep=5)\n"
        "save_file({'x': x.contiguous()}, sys.argv[3])\n"
    )
    subprocess.run([sys.executable, "-c", script, base, str(run.final), str(tmp_path / "x.safetensors")], check=True)
    from safetensors.torch import load_file

    torch.testing.assert_close(load_file(tmp_path / "x.safetensors")["x"], expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(expected, logits_of(ivl.load_model(base)), atol=1e-3)


def test_guided_training_logs_its_terms_and_trains_another_adapter(base, task, run, guided, tmp_path):
    from safetensors.torch import load_file

    mine = fine_tune(base, task, folder=tmp_path, save_every=2, **guided, **OPTIONS)
    assert {"lm_loss", "kl_loss"} <= mine.log[0].keys() and "kl_loss" not in run.log[0]
    one, two = (load_file(r.final / "adapter_model.safetensors") for r in (run, mine))
    assert any(not torch.equal(one[key], two[key]) for key in one)
    with pytest.raises(ValueError, match=r"holds another training run .*method"):
        fine_tune(base, task, folder=tmp_path, save_every=2, **OPTIONS)


@pytest.mark.parametrize("kind", ["plain", "guided"])
@pytest.mark.slow
def test_an_interrupted_run_goes_on_to_the_same_weights(base, task, run, guided, tmp_path, kind):
    from safetensors.torch import load_file
    from transformers import TrainerCallback

    more = guided if kind == "guided" else {}

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3:
                raise KeyboardInterrupt

    from transformers import Trainer

    original = Trainer.__init__

    def with_stop(self, *args, callbacks=(), **kwargs):
        original(self, *args, callbacks=[*callbacks, Stop()], **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "__init__", with_stop)
        with pytest.raises(KeyboardInterrupt):
            fine_tune(base, task, folder=tmp_path / "cut", save_every=2, **more, **OPTIONS)
    again = fine_tune(base, task, folder=tmp_path / "cut", save_every=2, **more, **OPTIONS)
    if kind == "guided":
        run = fine_tune(base, task, folder=tmp_path / "whole", save_every=2, **more, **OPTIONS)
    one, two = (load_file(r.final / "adapter_model.safetensors") for r in (run, again))
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
    assert any(value.abs().sum() > 0 for key, value in one.items() if "lora_B" in key)


def test_a_finished_run_is_returned_and_not_trained_again(base, task, run, monkeypatch):
    from transformers import Trainer

    monkeypatch.setattr(Trainer, "train", lambda *a, **k: pytest.fail("trained again"))
    assert fine_tune(base, task, folder=run.folder, save_every=2, **OPTIONS) == run == TrainingRun.load(run.folder)
    assert [p.name for p in run.checkpoints] == ["checkpoint-2", "checkpoint-4", "final"]


def test_a_folder_of_another_run_is_refused(base, task, run):
    with pytest.raises(ValueError, match=r"holds another training run \(seed: 0 there, 5 now\)"):
        fine_tune(base, task, folder=run.folder, save_every=2, seed=5, **OPTIONS)


def test_files_that_ivlens_did_not_write_are_left_alone(base, task, tmp_path):
    for name in ("checkpoint-500/model.safetensors", "final/notes.txt", "memory/mine"):
        folder = tmp_path / name.split("/")[0] / "run"
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_text("mine")
        with pytest.raises(ValueError, match=f"holds {name.split('/')[0]}, which ivlens didn't write there"):
            fine_tune(base, task, folder=folder, **OPTIONS)
        assert [p.name for p in folder.iterdir()] == [name.split("/")[0]] and (folder / name).read_text() == "mine"
    (tmp_path / "settings.json").write_text('{"editor": "vim"}')
    with pytest.raises(ValueError, match="isn't a run's of this version of ivlens"):
        fine_tune(base, task, folder=tmp_path, **OPTIONS)


def test_a_checkpoint_without_our_mark_is_neither_used_nor_removed(base, task, tmp_path):
    whole = fine_tune(base, task, folder=tmp_path, save_every=2, **OPTIONS)
    (tmp_path / "checkpoint-3").mkdir()
    (tmp_path / "checkpoint-3" / "mine").touch()
    (tmp_path / "log.json").unlink()
    again = fine_tune(base, task, folder=tmp_path, save_every=2, **OPTIONS)
    assert again.checkpoints == whole.checkpoints and (tmp_path / "checkpoint-3" / "mine").is_file()


@pytest.mark.slow
def test_a_lora_config_is_not_changed_and_goes_on_only_as_it_was(base, task, tmp_path):
    from peft import LoraConfig

    config = LoraConfig(r=2, task_type="CAUSAL_LM")
    one = fine_tune(base, task, folder=tmp_path / "1", lora=config, **OPTIONS)
    assert config.target_modules is None and fine_tune(base, task, folder=tmp_path / "1", lora=config, **OPTIONS) == one
    fine_tune(base, task, folder=tmp_path / "2", lora=config, previous=one, **OPTIONS)
    with pytest.raises(ValueError, match="has an adapter of other settings"):
        fine_tune(base, task, folder=tmp_path / "3", lora=LoraConfig(r=4), previous=one, **OPTIONS)
    full = fine_tune(base, task, folder=tmp_path / "4", lora=False, **OPTIONS)
    with pytest.raises(ValueError, match="trained every weight and has no adapter to go on with"):
        fine_tune(base, task, folder=tmp_path / "5", previous=full, **OPTIONS)
    with pytest.raises(ValueError, match=r"guided training needs vectors, .* task\(s\) past"):
        fine_tune(base, task, folder=tmp_path / "6", method="iv", **OPTIONS)
    assert not (tmp_path / "5").exists() and not (tmp_path / "6").exists()


def test_a_run_finishes_where_the_system_does_not_tell_its_memory(base, task, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "resource", None)  # as on Windows
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    run = fine_tune(base, task, folder=tmp_path, **OPTIONS)
    assert np.isnan(run.cost["peak_mb"]) and fine_tune(base, task, folder=tmp_path, **OPTIONS).log == run.log


def test_nothing_is_cut_off_a_prompt_too_long_is_an_error(base, tmp_path):
    record = {"input": "walk " * 400, "output": "x", "split": "train"}
    long = ivl.Task.from_records([record], name="long", instruction="Copy.")
    with pytest.raises(ValueError, match=r"\(long, train example 0: 'walk .*nothing is ever cut off"):
        fine_tune(base, long, folder=tmp_path, **OPTIONS)


def test_global_random_state_stays(base, task, tmp_path):
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    fine_tune(base, task, folder=tmp_path, **{**OPTIONS, "steps": 1})
    assert random.getstate() == states[0] and np.random.get_state()[1].tolist() == states[1]
    assert torch.equal(torch.get_rng_state(), states[2])


def test_an_adapter_of_another_base_is_refused(run, tmp_path, tokenizer):
    other = tiny.hf_model("llama")
    with torch.no_grad():
        for weight in other.parameters():
            weight.add_(0.01)
    with pytest.raises(ValueError, match="was trained on another base model"):
        ivl.load_model(other, tokenizer=tokenizer, adapter=run.final)
    (run.final / "ivlens.json").rename(tmp_path / "ivlens.json")
    try:
        with pytest.raises(ValueError, match="doesn't fit"):
            ivl.load_model(tiny.hf_model("gpt2"), tokenizer=tokenizer, adapter=run.final)
    finally:
        (tmp_path / "ivlens.json").rename(run.final / "ivlens.json")


def test_an_adapter_folder_with_a_missing_or_truncated_file_is_named(run, base, tmp_path):
    (tmp_path / "adapter_config.json").write_text((run.final / "adapter_config.json").read_text())
    with pytest.raises(FileNotFoundError, match=r"has no adapter_model\.safetensors"):
        ivl.load_model(base, adapter=tmp_path)
    whole = (run.final / "adapter_model.safetensors").read_bytes()
    (tmp_path / "adapter_model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="is truncated"):
        ivl.load_model(base, adapter=tmp_path)


def test_the_fingerprint_tells_models_apart_but_not_dtypes():
    model = tiny.hf_model("llama").to(torch.bfloat16)
    assert weights_fingerprint(model) == weights_fingerprint(model.float())
    assert weights_fingerprint(model) != weights_fingerprint(tiny.hf_model("qwen2"))


def test_a_run_has_a_picture(run):
    assert json.dumps(run.settings) and run.plot().data


@pytest.mark.model
def test_rows_longer_than_the_context_are_named_or_left_out_and_counted(model):
    rows = [{"input": "walk " * 200 if i == 7 else f"q{i}", "output": "a", "split": "train"} for i in range(20)]
    task = ivl.Task.from_records(rows, name="long", instruction="x")
    prompts, backend = ivl.build_prompts(task), backend_of(model)
    with pytest.raises(ValueError, match=r"\(long, train example \d+: 'walk"):
        answer_dataset(backend, prompts)
    with pytest.warns(UserWarning, match="1 of 16 rows are longer than the context and left out"):
        assert len(answer_dataset(backend, prompts, on_too_long="skip")) == 15
    with pytest.raises(ValueError, match="on_too_long='cut' is unknown"):
        answer_dataset(backend, prompts, on_too_long="cut")


def test_half_precision_on_a_cpu_is_trained_with_plain_attention(base, task, tmp_path, monkeypatch):
    used, original = [], transformers.Trainer.training_step

    def watched(self, model, *args, **options):
        used.append(model.config._attn_implementation)
        return original(self, model, *args, **options)

    monkeypatch.setattr(transformers.Trainer, "training_step", watched)
    for dtype in ("bfloat16", "float32"):
        ivl.fine_tune(base, task, folder=tmp_path / dtype, steps=1, dtype=dtype, progress=False)
    assert used == ["eager", "sdpa"]

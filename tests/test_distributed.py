"""Guided training under `accelerate launch`: two processes do together what one does alone. Run as a module, this is the training."""

from __future__ import annotations

import gc
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, TrainingArguments

import ivlens as ivl
from ivlens.models.head import Head
from ivlens.training import KL, Guidance
from ivlens.vectors.vector import InstructionVector
from tests import tiny

ROOT = Path(__file__).parents[1]
TERMS = ("loss", "lm_loss", "kl_loss", "heads_loss", "alpha")


def rows(n: int = 8):
    """Prompts and answers of several lengths, so that means over positions differ between parts of a batch."""
    import datasets

    found = []
    for i, prompt in enumerate(tiny.tokens(*range(4, 4 + n))):
        answer = tiny.tokens(1 + i % 3, seed=i)[0].tolist()
        ids = [*prompt.tolist(), *answer]
        labels = [-100] * len(prompt) + answer
        found.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels, "task": "past"})
    return datasets.Dataset.from_list(found)


def train(folder: Path, tokenizer_folder: str, batch_size: int, accumulated: int, keep: int | None) -> None:
    model = get_peft_model(tiny.hf_model("llama"), LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"]))
    generator = torch.Generator().manual_seed(0)
    for name, weight in model.named_parameters():
        if "lora_" in name:
            weight.data = torch.randn(weight.shape, generator=generator) * 0.3
    theta = torch.randn(2, 32, generator=generator)
    vector = InstructionVector(theta.sum(0), (Head(0, 1), Head(2, 3)), theta, layer=1, scale=1.5)
    trainer = ivl.IVTrainer(
        model,
        vectors={"past": vector},
        guidance=Guidance(kl=(KL("answer", 0.7), KL("all", 0.5), KL("last", 0.5)), heads_weight=0.3, until=0.75),
        train_dataset=rows(),
        processing_class=AutoTokenizer.from_pretrained(tokenizer_folder),
        keep_teacher=keep,
        args=TrainingArguments(
            str(folder),
            max_steps=4,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulated,
            learning_rate=0.03,
            optim="sgd",
            logging_steps=2,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
        ),
    )
    asked = []
    original = trainer._teach
    trainer._teach = lambda *args: asked.append(1) or original(*args)
    trainer.train()
    (folder / f"asked-{trainer.args.process_index}.json").write_text(json.dumps(len(asked)))
    if trainer.is_world_process_zero():
        save_file(
            {name: w.detach() for name, w in model.named_parameters() if "lora_" in name},
            folder / "weights.safetensors",
        )
        log = [{name: entry[name] for name in TERMS} for entry in trainer.state.log_history if "loss" in entry]
        (folder / "log.json").write_text(json.dumps(log))
    trainer.accelerator.end_training()


def tune(folder: Path, base: str, batch_size: int) -> None:
    """`fine_tune` on two tasks, interrupted once after a checkpoint, by a method that keeps a memory."""
    from transformers import TrainerCallback

    from ivlens.training.methods import EWC, method

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 3

    made = [
        ivl.Task.from_records([{"input": w, "output": w + e} for w in tiny.VERBS], name=e, instruction=e)
        for e in ("ed", "s")
    ]
    config = LoraConfig(r=2, lora_dropout=0.0, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    options = {"method": EWC(n_examples=4), "steps": 4, "batch_size": batch_size, "learning_rate": 0.03, "optim": "sgd"}
    options |= {"lora": config, "save_every": 2, "progress": False, "folder": folder / "run", "logging_steps": 1}
    original = method.Trainer.train

    def cut(self, *args, **kwargs):
        self.add_callback(Stop())
        original(self, *args, **kwargs)
        raise KeyboardInterrupt

    method.Trainer.train = cut
    with pytest.raises(KeyboardInterrupt):
        ivl.fine_tune(base, made, **options)
    method.Trainer.train = original
    run = ivl.fine_tune(base, made, **options)
    assert [p.name for p in run.checkpoints] == ["checkpoint-2", "checkpoint-4", "final"]
    assert ivl.fine_tune(base, made, **options).log == run.log


def launch(folder: Path, tokenizer_folder: Path, processes: int, *settings: object) -> None:
    folder.mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # `--cpu` starts several processes under mpirun only; the launcher for GPUs does so anywhere, and training says `use_cpu`.
    several = ["--multi_gpu", "--main_process_port", str(port)] if processes > 1 else ["--cpu"]
    command = [sys.executable, "-m", "accelerate.commands.launch", *several, "--num_processes", str(processes)]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    command += ["--module", "tests.test_distributed", str(folder), str(tokenizer_folder), *map(str, settings)]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize(("keep", "batch_size", "accumulated"), [(20, 2, 1), (None, 1, 2)])
def test_two_processes_train_as_one_does(tokenizer_folder, tmp_path, keep, batch_size, accumulated):
    launch(tmp_path / "two", tokenizer_folder, 2, batch_size, accumulated, keep)
    launch(tmp_path / "one", tokenizer_folder, 1, 4, 1, keep)
    one, two = (load_file(tmp_path / name / "weights.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(two[name], one[name], atol=1e-5, rtol=1e-4)
    logs = [json.loads((tmp_path / name / "log.json").read_text()) for name in ("one", "two")]
    assert len(logs[0]) == 2
    for a, b in zip(*logs, strict=True):
        assert b == pytest.approx(a, rel=1e-4) and a["alpha"] > 0
        assert a["loss"] == pytest.approx(a["lm_loss"] + a["kl_loss"] + a["heads_loss"], rel=1e-4)
    asked = [json.loads((tmp_path / "two" / f"asked-{i}.json").read_text()) for i in (0, 1)]
    files = list((tmp_path / "two").glob("teacher-*"))
    assert asked == ([8 // batch_size, 0] if keep else [8, 8]) and len(files) == (1 if keep else 0)


@pytest.mark.slow
def test_fine_tune_in_two_processes_is_as_in_one(base, tmp_path):
    launch(tmp_path / "two", base, 2, 2)
    launch(tmp_path / "one", base, 1, 4)
    for file in ("final/adapter_model.safetensors", "memory/fisher.safetensors"):
        one, two = (load_file(tmp_path / name / "run" / file) for name in ("one", "two"))
        assert one.keys() == two.keys() and any(value.abs().max() > 1e-4 for value in one.values())
        for name in one:
            torch.testing.assert_close(two[name], one[name], atol=1e-5, rtol=1e-3)
    losses = [
        [entry["loss"] for entry in json.loads((tmp_path / name / "run" / "log.json").read_text())["log"]]
        for name in ("one", "two")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and len(losses[0]) == 4


if __name__ == "__main__":
    folder, source, batch_size, *more = sys.argv[1:]
    if more:
        train(Path(folder), source, int(batch_size), int(more[0]), None if more[1] == "None" else int(more[1]))
    else:
        tune(Path(folder), source, int(batch_size))
    gc.collect()  # gloo's threads abort a process at whose end a model still holds its process group

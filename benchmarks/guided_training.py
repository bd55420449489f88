"""What guidance costs while training: a step of `IVTrainer` against one of the plain `Trainer`, same rows, in turns.

python benchmarks/guided_training.py
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from contextlib import ExitStack
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

import ivlens as ivl
from ivlens.models.hooking import tokenizing_backend
from ivlens.models.loading import load_hf
from ivlens.training import KL, Guidance
from ivlens.training.data import IGNORED, answer_dataset

STEPS = 100
HEADS = tuple(ivl.Head(layer, head) for layer, head in ((20, 5), (18, 6), (14, 1), (24, 4), (20, 6)))
OFF = Guidance(progressive=False, kl=())
SIDES = {  # what is timed: the guidance, None for the plain Trainer, and the step that it is timed at
    "plain `Trainer`": (None, 0),
    "plain loss, logits at answers only": (OFF, 0),
    "`paper`, while the injection fades": ("paper", STEPS // 4),
    "`paper`, after it": ("paper", STEPS - 1),
    "`fvg-code`": ("fvg-code", STEPS // 4),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="english_french")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--batches", type=int, default=15, help="steps of each kind, after one to warm up")
    options = parser.parse_args()
    size, batches = options.batch_size, options.batches
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        trainers = {
            guidance: trainer_of(guidance, options.task, size * batches, size, folder)
            for guidance in dict.fromkeys(guidance for guidance, _ in SIDES.values())
        }
        for guidance, trainer in trainers.items():
            if guidance is not None:
                stack.enter_context(trainer.prepared())
        seconds: dict[str, list[float]] = {side: [] for side in SIDES}
        for at in (0, *range(batches)):  # the first round is warm-up
            for side, (guidance, step) in SIDES.items():
                seconds[side].append(timed_step(trainers[guidance], range(at * size, (at + 1) * size), step))
        print_steps({side: found[1:] for side, found in seconds.items()}, size)
        for guidance in ("paper", "fvg-code"):
            taken = trainers[guidance].teacher_seconds
            print(f"teacher of `{guidance}` for {size * batches} examples: {taken:.1f} s")
    with tempfile.TemporaryDirectory() as folder:
        print_differences(options.task, size, folder)


def trainer_of(
    guidance: str | Guidance | None, task: str, n: int, batch_size: int, folder: str, **more: Any
) -> Trainer:
    hf_model, tokenizer, label = load_hf("smollm2", dtype=torch.float32)
    prompts = ivl.build_prompts(ivl.load_tasks([task])[task], n=n, instruction=True)
    rows = answer_dataset(tokenizing_backend(hf_model, tokenizer, label), prompts)
    model = get_peft_model(hf_model, LoraConfig(r=8, lora_alpha=16, lora_dropout=0.1, task_type="CAUSAL_LM"))
    common = {
        "processing_class": tokenizer,
        "args": TrainingArguments(
            folder,
            max_steps=STEPS,
            per_device_train_batch_size=batch_size,
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
            save_strategy="no",
        ),
    }
    if guidance is None:
        collator = DataCollatorForSeq2Seq(tokenizer, padding=True, label_pad_token_id=IGNORED)
        trainer = Trainer(model, train_dataset=rows.remove_columns("task"), data_collator=collator, **common)
    else:
        shares = torch.randn(len(HEADS), hf_model.config.hidden_size, generator=torch.Generator().manual_seed(0))
        vector = ivl.InstructionVector(shares.sum(0), HEADS, shares, layer=14)
        vectors = None if guidance is OFF else {task: vector}
        trainer = ivl.IVTrainer(model, vectors=vectors, guidance=guidance, train_dataset=rows, **common, **more)
    trainer.create_optimizer()
    return trainer


def batch_of(trainer: Trainer, examples: range) -> tuple[dict[str, torch.Tensor], Any]:
    """A batch and how many answer tokens it has, as the Trainer draws them."""
    rows = [trainer.train_dataset[i % len(trainer.train_dataset)] for i in examples]
    samples, count = trainer.get_batch_samples(iter([trainer.data_collator(rows)]), 1, trainer.args.device)
    return samples[0], count


def timed_step(trainer: Trainer, examples: range, step: int) -> float:
    trainer.state.global_step, trainer.state.max_steps = step, STEPS
    trainer.current_gradient_accumulation_steps = 1
    start = time.perf_counter()
    batch, count = batch_of(trainer, examples)
    trainer.training_step(trainer.model, batch, count)
    trainer.optimizer.step()
    trainer.optimizer.zero_grad()
    return time.perf_counter() - start


def print_steps(seconds: dict[str, list[float]], batch_size: int) -> None:
    plain = next(iter(seconds))
    print(f"| a step of {batch_size} rows | seconds, median | ratio, median of pairs | pairs |\n|---|---:|---:|---:|")
    for side, found in seconds.items():
        ratios = [a / b for a, b in zip(found, seconds[plain])]
        spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
        print(
            f"| {side} | {statistics.median(found):.2f} | {statistics.median(ratios):.2f} ({spread}) | {len(found)} |"
        )


@torch.no_grad()
def print_differences(task: str, size: int, folder: str) -> None:
    """Losses with a teacher kept whole, or in 256 tokens, against one that runs in every step; the adapter moved a little."""
    guidance, losses = Guidance(kl=(KL(),)), {}
    for keep in (None, "full", 256):
        trainer = trainer_of(guidance, task, 4 * size, size, folder, keep_teacher=keep)
        with trainer.prepared():
            generator = torch.Generator().manual_seed(0)
            for name, weight in trainer.model.named_parameters():
                if "lora_" in name:
                    weight.copy_(0.03 * torch.randn(weight.shape, generator=generator))
            trainer.model.eval()
            found = []
            for at in range(4):
                batch, count = batch_of(trainer, range(at * size, (at + 1) * size))
                for trainer.state.global_step in (0, STEPS - 1):
                    trainer.state.max_steps = STEPS
                    found.append(trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=count).item())
        losses[keep] = found
    for keep in ("full", 256):
        away = max(abs(a - b) for a, b in zip(losses[keep], losses[None]))
        print(
            f"largest difference in the loss, keep_teacher={keep!r} against None: {away:.1e} (of {max(losses[None]):.2f})"
        )


if __name__ == "__main__":
    main()

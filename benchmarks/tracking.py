"""What `track` costs beyond its forward passes: ten adapters × eight tasks, against the same batches run plainly.

python benchmarks/tracking.py
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch

import ivlens as ivl
from ivlens.models import backend_of
from ivlens.models.checkpoints import open_checkpoints
from ivlens.models.loading import load_hf
from ivlens.running.tokens import pad_left, tokenize
from ivlens.tasks.prompts import build_prompts

TASKS = ("present_past", "singular_plural", "first_of_list", "last_of_list", "capitalize", "lowercase", "sentiment")
HEADS = [ivl.Head(layer, head) for layer, head in ((20, 5), (18, 6), (14, 1), (24, 4), (20, 6))]
BATCH = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", type=int, default=10)
    parser.add_argument("--prompts", type=int, default=16)
    options = parser.parse_args()
    tasks = ivl.load_tasks([*TASKS, "country_continent"])
    with tempfile.TemporaryDirectory() as folder:
        adapters = random_adapters(Path(folder), options.adapters)
        start = time.perf_counter()
        opened, _ = open_checkpoints("smollm2", adapters)
        loading = time.perf_counter() - start
        plain = sum(forward_only(checkpoint, tasks, options.prompts) for checkpoint in opened)
        start = time.perf_counter()
        ivl.track(adapters, tasks, HEADS, n_prompts=options.prompts, n_mean=options.prompts, progress=False)
        tracked = time.perf_counter() - start
    print(
        f"{options.adapters} adapters and the base × {len(tasks)} tasks × {2 * options.prompts} prompts: track {tracked:.1f} s, of "
        f"that loading {loading:.1f} s; forward passes alone {plain:.1f} s; ratio {tracked / plain:.2f}"
    )


def random_adapters(folder: Path, n: int) -> list[Path]:
    from peft import LoraConfig, get_peft_model

    hf_model, _, _ = load_hf("smollm2", dtype=torch.float32)
    model = get_peft_model(hf_model, LoraConfig(r=8, lora_alpha=16, task_type="CAUSAL_LM"))
    paths = []
    for i in range(n):
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if "lora_B" in name:
                    weight.normal_(0, 0.01, generator=torch.Generator().manual_seed(i))
        model.save_pretrained(folder / f"checkpoint-{i + 1}")
        paths.append(folder / f"checkpoint-{i + 1}")
    return paths


@torch.inference_mode()
def forward_only(checkpoint, tasks: ivl.TaskSuite, n: int) -> float:
    """Seconds of the forward passes of the same prompts in the same batches; nothing hooked, nothing scored."""
    with checkpoint.use() as model:
        backend, total = backend_of(model), 0.0
        for task in tasks.values():
            for split, with_answers in (("train", False), ("test", True)):
                rows = tokenize(backend, build_prompts(task, n=n, shots=5, split=split))
                rows = sorted((r.prompt + (r.answer[:-1] if with_answers else ()) for r in rows), key=len)
                for start in range(0, n, BATCH):
                    tokens, mask = pad_left(rows[start : start + BATCH], rows[0][0], backend.device)
                    begin = time.perf_counter()
                    backend.forward(tokens, mask)
                    total += time.perf_counter() - begin
        return total


if __name__ == "__main__":
    main()

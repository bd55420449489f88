"""What every method costs: a second stage of a sequence, each in a process of its own, so that its peak of memory is its own.

python benchmarks/costs.py
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

import ivlens as ivl
from ivlens.training.methods import METHODS

TASKS = ("antonym", "singular_plural")
HEADS = tuple(ivl.Head(layer, head) for layer, head in ((20, 5), (18, 6), (14, 1), (24, 4), (20, 6)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=80, help="of the second stage, of 8 rows each")
    parser.add_argument("--method", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.method:
        train(options.method, options.folder, options.steps)
        return
    print(
        "| method | seconds, two stages' second | of it before the first step | × `lora` | peak of memory, GB | kept, MB |"
    )
    print("|---|---:|---:|---:|---:|---:|")
    with tempfile.TemporaryDirectory() as folder:
        costs = {name: measured(name, Path(folder) / name, options.steps) for name in METHODS}
    for name, cost in costs.items():
        ratio = cost["seconds"] / costs["lora"]["seconds"]
        print(
            f"| `{name}` | {cost['seconds']:.0f} | {cost['teacher_seconds']:.0f} | {ratio:.2f} | {cost['peak_mb'] / 1e3:.2f} "
            f"| {cost['kept_mb']:.1f} |"
        )


def measured(method: str, folder: Path, steps: int) -> dict[str, float]:
    """Cost of the second stage; the teacher's outputs, which lie beside the checkpoints, count as kept."""
    command = [sys.executable, __file__, "--method", method, "--folder", str(folder), "--steps", str(steps)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    cost = dict(ivl.TrainingRun.load(folder / "second").cost)
    teacher = sum(path.stat().st_size for path in (folder / "second").glob("teacher-*"))
    return {**cost, "kept_mb": cost["kept_mb"] + teacher / 1e6}


def train(method: str, folder: Path, steps: int) -> None:
    tasks = ivl.load_tasks(TASKS)
    shares = torch.randn(len(HEADS), 576, generator=torch.Generator().manual_seed(0))  # the cost is that of any vector
    vector = ivl.InstructionVector(shares.sum(0), HEADS, shares, layer=14)
    previous = None
    for name, task, n in (("first", tasks[TASKS[0]], 2), ("second", tasks[TASKS[1]], steps)):
        previous = ivl.fine_tune(
            "smollm2",
            task,
            folder=folder / name,
            method=method,
            vectors={task.name: vector} if METHODS[method].needs_vectors else None,
            previous=previous,
            steps=n,
            dtype="bfloat16",
            progress=False,
        )


if __name__ == "__main__":
    main()

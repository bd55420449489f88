"""Is the work of several processes done in as much less time, and is it the same? Each process has one thread.

python benchmarks/processes.py --processes 2
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import ivlens as ivl
from ivlens.common.processes import gathered, is_main, joined

HEADS = [(20, 5), (18, 6), (14, 1)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--tasks", nargs="+", default=["present_past", "antonym"])
    parser.add_argument("--n-prompts", type=int, default=40, help="per task; 2 for a trial")
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.out:
        with joined():
            once(args)
        return
    with tempfile.TemporaryDirectory() as folder:
        one, several = (measured(n, Path(folder) / f"{n}.json", sys.argv[1:]) for n in (1, args.processes))
    print(
        f"| seconds | one process | {args.processes} | times as fast | largest difference |\n|---|---:|---:|---:|---:|"
    )
    for name, (seconds, numbers) in one.items():
        less, again = several[name]
        away = (torch.tensor(numbers) - torch.tensor(again)).abs().max().item()
        print(f"| `{name}` | {seconds:.1f} | {less:.1f} | {seconds / less:.2f} | {away:.0e} |")


def measured(n: int, out: Path, given: list[str]) -> dict[str, Any]:
    """Seconds and numbers of every call; loading isn't counted."""
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n), __file__]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run([*start, *given, "--out", str(out)], check=True, env=environment, stderr=subprocess.DEVNULL)
    return json.loads(out.read_text())


def once(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    model, tasks, n, found = ivl.load_model(), ivl.load_tasks(args.tasks), args.n_prompts, {}
    vector = ivl.extract_vector(model, tasks[args.tasks[0]], HEADS, n_prompts=10)
    calls = {
        "locate_heads": lambda: ivl.locate_heads(model, tasks, n_prompts=n, n_mean=n, progress=False).values,
        "evaluate": lambda: scores(ivl.evaluate(model, tasks, vectors=vector, layer=9, n_prompts=n, progress=False)),
        "tune_injection": lambda: ivl.tune_injection(model, tasks[args.tasks[0]], vector, n_prompts=n).accuracy,
    }
    for name, call in calls.items():
        gathered(name, "the next call")  # all begin together
        start = time.perf_counter()
        numbers = torch.as_tensor(call())
        gathered(name, "this call")
        found[name] = time.perf_counter() - start, numbers.flatten().tolist()
    if is_main():
        args.out.write_text(json.dumps(found))


def scores(evaluation: ivl.Evaluation) -> Any:
    return evaluation.scores["probability"].to_numpy()


if __name__ == "__main__":
    main()

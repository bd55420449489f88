"""A continual-learning run killed with SIGKILL at random moments and started again: the same numbers, nothing trained twice.

python benchmarks/killed.py --out killed --kills 10
"""

from __future__ import annotations

import argparse
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import ivlens as ivl
from ivlens.continual import ContinualResults, run

TASKS = ("antonym", "singular_plural")
OPTIONS: dict[str, Any] = {
    "methods": ("ewc", "replay", "iv"),
    "general": ("present_past",),
    "steps": 8,
    "save_every": 2,
    "n_prompts": 10,
    "learning_rate": 5e-4,
    "dtype": "bfloat16",
    "progress": False,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=Path, help="just run in this folder (what is killed)")
    parser.add_argument("--out", type=Path, default=Path("killed"))
    args = parser.parse_args()
    if args.only:
        once(args.only)
        return
    start = time.perf_counter()
    whole = once(args.out / "whole")
    seconds = time.perf_counter() - start
    kills, finished = 0, {}
    rng = random.Random(args.seed)
    while kills < args.kills:
        process = subprocess.Popen([sys.executable, __file__, "--only", str(args.out / "killed")])
        try:
            process.wait(timeout=rng.uniform(6, 6 + 1.5 * seconds / args.kills))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
        else:
            print("over before it was killed; the rest of the kills has nothing left to hit")
            break
        now = {p: p.stat().st_mtime_ns for p in (args.out / "killed").rglob("log.json")}
        again = [p for p, written in finished.items() if now.get(p) != written]
        assert not again, f"trained twice: {again}"
        finished = now
        print(f"kill {kills}: {len(now)} of {2 * len(OPTIONS['methods'])} stages trained", flush=True)
    found = once(args.out / "killed")
    same = {name: getattr(found, name).equals(getattr(whole, name)) for name in ("scores", "similarity")}
    print(f"\n{kills} kills; the same as undisturbed: {same}\n{found!r}")
    if not all(same.values()):
        sys.exit("the numbers differ")


def once(folder: Path) -> ContinualResults:
    return run(ivl.load_tasks(TASKS), folder=folder, **OPTIONS)


if __name__ == "__main__":
    main()

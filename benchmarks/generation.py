"""What an injected vector costs while generating: the model's own `generate`, steered against plain, same lengths, in turns.

python benchmarks/generation.py
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

import ivlens as ivl
from ivlens.models import backend_of
from ivlens.steering.controls import random_vector


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--tokens", type=int, default=40)
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    model = ivl.load_model(options.model)
    width = backend_of(model).d_model
    like = ivl.InstructionVector(torch.full((width,), width**-0.5), layer=backend_of(model).n_layers // 2)
    vector = random_vector(like)
    prompt = "Q: What does a clock show?\nA:"

    def generate() -> float:
        start = time.perf_counter()
        model.generate(prompt, max_new_tokens=options.tokens, do_sample=False, stop_at_eos=False, verbose=False)
        return time.perf_counter() - start

    generate()  # warm-up
    seconds: dict[str, list[float]] = {"plain": [], "last": [], "generated": []}
    for _ in range(options.repeats):
        seconds["plain"].append(generate())
        for positions in ("last", "generated"):
            with vector.inject(model, positions=positions):
                seconds[positions].append(generate())
    plain = statistics.median(seconds["plain"])
    print(f"{options.tokens} tokens, median of {options.repeats}: plain {plain:.2f} s")
    for positions in ("last", "generated"):
        ratios = [a / b for a, b in zip(seconds[positions], seconds["plain"])]
        print(
            f"injected at {positions!r}: {statistics.median(seconds[positions]):.2f} s, "
            f"{statistics.median(ratios):.3f} × plain (pairwise {min(ratios):.3f} to {max(ratios):.3f})"
        )


if __name__ == "__main__":
    main()

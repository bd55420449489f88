"""Does the vector switch a skill on and off? Two tables, each gain beside its controls, on test splits that chose nothing.

    python benchmarks/steering.py

1. Tasks that the model does at 80 % or better with ten demonstrations (validation split).
2. Universal heads and vectors (training splits), layer and scale (validation splits).
3. In: zero-shot prompts, nothing asked. Out: the vector subtracted from prompts with ten demonstrations.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd

import ivlens as ivl


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--heads", type=int, default=10)
    parser.add_argument("--prompts", type=int, default=10, help="per task, for locating")
    parser.add_argument("--out", type=Path, default=Path("steering"))
    options = parser.parse_args()
    model, tasks = ivl.load_model(options.model, backend=options.backend), ivl.load_tasks()

    capable = tasks.subset(able(model, tasks, options.out))
    effects = ivl.locate_heads(model, capable, n_prompts=options.prompts, n_mean=30, folder=options.out / "partial")
    effects.save(options.out / "effects.safetensors")
    heads = effects.top(options.heads)
    print(effects, "\nheads:", heads)
    vectors = {name: ivl.extract_vector(model, capable[name], heads) for name in capable}
    for goal, shots in (("induce", 0), ("suppress", 10)):
        searches = {
            name: ivl.tune_injection(
                model, capable[name], vector, goal=goal, shots=shots, layers=range(0, 30, 2), n_prompts=25
            )
            for name, vector in vectors.items()
        }
        for search in searches.values():
            print(search)
        tuned = {name: search.best for name, search in searches.items()}
        scores = ivl.evaluate(model, capable, vectors=tuned, shots=shots, reference_shots=None if shots else 10)
        scores.save(options.out / f"{goal}.json")
        show(scores, f"{goal}: {shots} demonstrations, {options.heads} heads")


def able(model, tasks, out: Path) -> list[str]:
    """Names of the tasks done at 80 % or better with ten demonstrations, on the validation split."""
    scores = ivl.evaluate(model, tasks, shots=10, split="valid", metrics=["first_token", "exact_match"])
    scores.save(out / "ten_shot.json")
    table = scores.to_dataframe().query("metric == 'exact_match'").set_index("task")["mean"]
    print("exact match with ten demonstrations, validation split\n" + table.map("{:.0%}".format).to_string())
    return [name for name in tasks if table[name] >= 0.8]


def show(scores: ivl.Evaluation, title: str) -> None:
    for metric in ("first_token", "exact_match"):
        means = scores.to_dataframe().query("metric == @metric").pivot(index="task", columns="condition", values="mean")
        print(f"\n{title}: {metric}\n{means[scores.conditions].map('{:.1%}'.format).to_string()}")
        gains = scores.gains(metric)
        gains = gains[gains["task"] == "average"]
        with pd.option_context("display.float_format", "{:+.3f}".format):
            print(gains.to_string(index=False))


if __name__ == "__main__":
    main()

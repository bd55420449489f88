"""Forgetting along sequences of tasks: guided training beside the methods people would otherwise use.

    python benchmarks/continual.py --out continual                # everything; goes on where it was stopped
    python benchmarks/continual.py --out continual --part main --method iv lora
    python benchmarks/continual.py --out continual --tables       # only print the tables of what is there
    python benchmarks/continual.py --out continual --data a.jsonl b.jsonl c.jsonl   # a further sequence of your own files

1. tune: every method with an option, three tries, seed 0, on the validation split. What wins has the highest sum of plasticity
   and stability.
2. main: one sequence × three seeds × every method, on the test split.
3. ablation: the parts of guided training alone and together; a random vector and no vector in the teacher.
4. further: two more sequences × three seeds × plain LoRA, guided, and the best other method of the first sequence.
5. teachers: what guidance costs each new task, beside what its teacher can do; from runs of main and further.

Every stage is kept, so that several processes can share the work: --part and --method.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

import ivlens as ivl
from ivlens.common.statistics import bootstrap_mean
from ivlens.continual import ContinualResults, collect, load_general, run
from ivlens.continual.metrics import resampled
from ivlens.training.guidance import KL, Guidance
from ivlens.training.methods import EWC, METHODS, Averaging, Guided, LwF, Method, OLoRA, Replay

SEQUENCES = {
    "main": ("antonym", "object_counting", "singular_plural"),
    "second": ("comparative", "word_length", "sentiment"),
}
GENERAL = ("present_past", "capitalize", "last_of_list", "country_continent", "lowercase")
BENCHMARKS = ("lambada", "arc_easy")  # in --general-data, or from the hub
SEEDS = (0, 1, 2)
OPTIONS: dict[str, Any] = {"steps": 80, "batch_size": 8, "learning_rate": 5e-4, "dtype": "bfloat16"}


def guided(weight: float = 1.0, *, random: bool = False, **options: Any) -> Guided:
    return Guided(Guidance(kl=(KL(weight=weight),), **options), random=random)


# The middle one of each is what was chosen before anything was tried.
TRIES: dict[str, dict[str, Method]] = {
    "ewc": {f"ewc {x:g}": EWC(strength=x) for x in (1e2, 1e4, 1e6)},
    "replay": {f"replay {x:g}": Replay(share=x) for x in (0.1, 0.25, 0.5)},
    "o_lora": {f"o_lora {x:g}": OLoRA(strength=x) for x in (0.05, 0.5, 5.0)},
    "averaging": {f"averaging {x:g}": Averaging(share=x) for x in (0.3, 0.5, 0.7)},
    "lwf": {f"lwf {x:g}": LwF(weight=x) for x in (0.3, 1.0, 3.0)},
    "iv": {f"iv {x:g}": guided(x) for x in (0.3, 1.0, 3.0)},
}
FIXED = ("lora", "fresh_lora", "fvg")  # nothing to try


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", default=["tune", "main", "ablation", "further", "teachers"])
    parser.add_argument("--method", nargs="+", help="only these: names in TRIES and FIXED, or labels of the ablation")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--data", type=Path, nargs="+", help=".jsonl files, in order a third sequence")
    parser.add_argument("--general-data", type=Path, help=f"folder with {', '.join(BENCHMARKS)}; default: the hub")
    parser.add_argument("--tables", action="store_true", help="only print the tables")
    parser.add_argument("--out", type=Path, default=Path("continual"))
    args = parser.parse_args()
    work = Work(args)
    for part in args.part:
        if not args.tables:
            getattr(work, part)()
        getattr(work, f"print_{part}")()


class Work:
    def __init__(self, args: argparse.Namespace):
        self.args = args
        benchmarks = load_general(BENCHMARKS, args.general_data)
        self.general = [*ivl.load_tasks(GENERAL).values(), *benchmarks.values()]
        self.sequences = {name: list(ivl.load_tasks(tasks).values()) for name, tasks in SEQUENCES.items()}
        if args.data:
            self.sequences["data"] = [ivl.Task.from_file(path) for path in args.data]

    def wanted(self, name: str) -> bool:
        return self.args.method is None or name in self.args.method

    def run(self, sequence: str, methods: dict[str, Method], seeds: list[int], **more: Any) -> ContinualResults:
        options = {**OPTIONS, "general": self.general, "methods": methods, "seeds": seeds, **more}
        do = collect if self.args.tables else run
        return do(self.sequences[sequence], folder=self.args.out / sequence, **options)

    # -- options, on the validation split -------------------------------------------------------------------------------

    def tune(self) -> None:
        for name, tries in TRIES.items():
            if self.wanted(name):
                self.run("main", tries, [0], split="valid")

    def tried(self, name: str) -> pd.DataFrame:
        found = self.run("main", TRIES[name], [0], split="valid").to_dataframe()
        table = found.pivot(index="method", columns="metric", values="mean").loc[list(TRIES[name])]
        return table.assign(sum=table["plasticity"] + table["stability"])[["plasticity", "stability", "sum"]]

    def chosen(self, name: str) -> tuple[str, Method]:
        """Label and method that won on the validation split."""
        if name in FIXED:
            return name, METHODS[name]
        label = self.tried(name)["sum"].idxmax()
        return label, TRIES[name][label]

    def print_tune(self) -> None:
        for name in filter(self.wanted, TRIES):
            print(f"\n{markdown((100 * self.tried(name)).round(1).reset_index())}")

    # -- every method on one sequence -----------------------------------------------------------------------------------

    def main(self) -> ContinualResults:
        names = [name for name in (*FIXED, *TRIES) if self.wanted(name)]
        return self.run("main", dict(self.chosen(name) for name in names), self.args.seeds)

    def print_main(self) -> None:
        show(self.main(), self.args.out / "main" / "figures")

    # -- parts of guided training, and what the vector is for -------------------------------------------------------------

    def ablation(self) -> ContinualResults:
        label, method = self.chosen("iv")
        weight = method.guidance.kl[0].weight
        heads = {"kl": (), "heads_weight": 1.0}
        methods: dict[str, Method] = {
            "lora": METHODS["lora"],
            "progressive": Guided(Guidance(kl=())),
            "kl": guided(weight, progressive=False),
            "heads": Guided(Guidance(progressive=False, **heads)),
            label: method,
            "progressive + kl + heads": guided(weight, heads_weight=1.0),
            "kl, random vector": guided(weight, random=True, progressive=False),
            "kl, no vector": LwF(weight=weight, temperature=1.0),
            "progressive + kl, random vector": guided(weight, random=True),
        }
        methods = {name: method for name, method in methods.items() if self.wanted(name)}
        return self.run("main", methods, self.args.seeds)

    def print_ablation(self) -> None:
        show(self.ablation(), self.args.out / "main" / "figures-ablation")

    # -- other sequences ------------------------------------------------------------------------------------------------

    def compared(self) -> dict[str, Method]:
        """Plain LoRA, guided, and the best other method of the first sequence, all with the options chosen there."""
        best = max((name for name in TRIES if name != "iv"), key=lambda name: self.tried(name)["sum"].max())
        return dict(self.chosen(name) for name in ("lora", "iv", best) if self.wanted(name))

    def further(self) -> dict[str, ContinualResults]:
        return {name: self.run(name, self.compared(), self.args.seeds) for name in self.sequences if name != "main"}

    def print_further(self) -> None:
        found = self.further()
        for name, each in found.items():
            show(each, self.args.out / name / "figures")
        found["main"] = self.run("main", self.compared(), self.args.seeds)
        draws = [resampled(each.scores, each.metadata["sequence"]) for each in found.values()]
        for method in [name for name in self.compared() if name != "lora"]:
            # Every sequence draws the same prompts of the general tasks.
            pairs = [(each[method]["forgetting"].mean(1), each["lora"]["forgetting"].mean(1)) for each in draws]
            cuts = np.mean([1 - mine / plain for mine, plain in pairs], axis=0)
            low, high = np.quantile(cuts[1:], [0.025, 0.975])
            print(f"{method}: forgetting cut by {cuts[0]:.0%} [{low:.0%}, {high:.0%}], mean of {len(draws)} sequences")

    # -- teachers -------------------------------------------------------------------------------------------------------

    def teachers(self) -> pd.DataFrame:
        """Points: the steered teacher on validation prompts; each new task after its stage; difference and its interval."""
        methods = dict(self.chosen(name) for name in ("lora", "iv"))
        rows = []
        for name in self.sequences:
            scores = self.run(name, methods, self.args.seeds).scores
            for stage, task in enumerate(self.sequences[name], 1):
                vector = ivl.InstructionVector.load(self.args.out / name / "vectors" / task.name)
                here = scores[(scores["stage"] == stage) & (scores["task"] == task.name)]
                lora, iv = (100 * here[here["method"] == m].groupby("prompt")["score"].mean() for m in methods)
                low, high = bootstrap_mean([(iv - lora).to_numpy()])
                rows.append((task.name, 100 * vector.metadata["accuracy"], lora.mean(), iv.mean(), low, high))
        found = pd.DataFrame(rows, columns=["task", "teacher", *methods, "low", "high"])
        found.insert(4, "difference", found.iloc[:, 3] - found.iloc[:, 2])
        return found.sort_values("teacher", ascending=False).round(1)

    def print_teachers(self) -> None:
        found = self.teachers()
        print(f"\n{markdown(found)}\n")
        print("rank correlation:", round(found[["teacher", "difference"]].corr("spearman").iloc[0, 1], 2))


def show(found: ContinualResults, figures: Path) -> None:
    print(f"\n{' → '.join(found.metadata['sequence'])}\n\n{markdown(found.table().reset_index())}\n")
    print(markdown(found.versus("lora").round(3)), "\n")
    print(markdown(found.costs.groupby("method", sort=False).mean(numeric_only=True).round(1).reset_index()))
    print("Pareto front:", ", ".join(found.pareto()))
    figures.mkdir(parents=True, exist_ok=True)
    for kind in ("scatter", "matrix", "similarity", "general"):
        found.plot(kind).write_html(figures / f"{kind}.html", include_plotlyjs="cdn")


def markdown(frame: pd.DataFrame) -> str:
    rows = [list(frame.columns), ["---"] * len(frame.columns), *frame.itertuples(index=False)]
    return "\n".join(f"| {' | '.join(str(value) for value in row)} |" for row in rows)


if __name__ == "__main__":
    main()

"""Instruction following lost and brought back: told compliance before and after fine-tuning on short answers.

    python benchmarks/formats_forgetting.py --formats runs/formats --out runs/formats-forgetting

Needs what `benchmarks/formats.py` keeps. Three new tasks × three seeds × plain LoRA, guided training and averaging; every adapter
and evaluation is kept, so that an interrupted run goes on. With --tables it prints what is there.
"""

from __future__ import annotations

import argparse
import itertools
import warnings
from pathlib import Path

import pandas as pd
from formats import LOOK, TOKENS, Study

import ivlens as ivl
from ivlens.common.keys import key
from ivlens.common.statistics import bootstrap_mean
from ivlens.steering.evaluation import Evaluation

NEW = ("english_french", "object_counting", "alphabetically_first")
METHODS = ("lora", "iv", "averaging")
N_OWN = 60  # told questions behind similarity and probabilities


class Forgetting:
    def __init__(self, given: argparse.Namespace):
        self.given, self.out = given, given.out
        self.study = Study(given.formats)
        self.words = ivl.load_tasks(NEW)
        self.vectors = self.study.chosen()
        self.tasks = {name: self.study.tasks[name] for name in self.vectors}

    # -- training ---------------------------------------------------------------------------------------------------
    def run(self, new: str, seed: int, method: str) -> ivl.TrainingRun:
        options = {"steps": 100, "learning_rate": 5e-4, "seed": seed, "progress": False}
        if method == "iv":
            options["vectors"] = {new: self._new_vector(new)}
        folder = self.out / f"{new}-{method}-{seed}"
        return ivl.fine_tune("smollm2", self.words[new], method=method, folder=folder, **options)

    def _new_vector(self, new: str) -> ivl.InstructionVector:
        path = self.out / f"vector-{new}"
        if not path.exists():
            model, task = self.study.model, self.words[new]
            effects = ivl.locate_heads(model, task, shots=5, n_prompts=10, n_mean=30, progress=False)
            vector = ivl.extract_vector(model, task, effects, shots=5, n_prompts=30)
            ivl.tune_injection(model, task, vector, n_prompts=20).best.save(path)
        return ivl.InstructionVector.load(path)

    # -- measuring --------------------------------------------------------------------------------------------------
    def evaluations(self, label: str, model: object, controls: bool) -> dict[str, Evaluation]:
        """Told and untold, with the base model's vectors and their controls (or without), scored by the base model."""
        found = {}
        for name, task in self.tasks.items():
            vectors = {"vectors": self.vectors, "controls": ("random vector",), "draws": 1} if controls else {}
            options = {"style": "chat", "max_new_tokens": TOKENS, "progress": False, **vectors}
            path = self.out / f"evaluation-{label}-{name}-{key(model, task, options, TOKENS)[:16]}.json"
            if not path.exists():
                ivl.evaluate(model, task, reference=self.study.model, **options).save(path)
            found[name] = Evaluation.load(path)
        return found

    def scores(self) -> pd.DataFrame:
        """One row per method, new task, seed, constraint, condition and question."""
        parts = [self._frame(self.evaluations("base", self.study.model, True), "base", "", 0)]
        for method, new, seed in itertools.product(self.given.methods, self.given.new, self.given.seeds):
            run = self.run(new, seed, method)
            label = f"{new}-{method}-{seed}"
            model = ivl.load_model("smollm2", adapter=run.final)
            parts.append(self._frame(self.evaluations(label, model, method == "lora"), method, new, seed))
            print("done", label, flush=True)
        return pd.concat(parts, ignore_index=True)

    @staticmethod
    def _frame(found: dict[str, Evaluation], method: str, new: str, seed: int) -> pd.DataFrame:
        return pd.concat([e.scores for e in found.values()]).assign(method=method, new=new, seed=seed)

    def change(self, new: str) -> ivl.Change:
        """Vectors' similarity and what becomes of the base model's own answers, plain LoRA."""
        folder, own = self.out / "own", {}
        for name, task in self.tasks.items():
            own[name] = ivl.with_own_answers(self.study.model, task, splits=("train", "test"), folder=folder)
        heads = sorted({head for name in self.tasks for head in self.study.effects(name).top(6)})
        adapters = [self.run(new, seed, "lora").final for seed in self.given.seeds]
        look = {**LOOK, "n_prompts": N_OWN, "n_mean": 24, "folder": self.out / f"change-{new}"}
        return ivl.track(adapters, own, heads, model="smollm2", progress=False, **look)


def summary(scores: pd.DataFrame) -> pd.DataFrame:
    """Per method and condition: constraint met before and after, the mean over constraints, runs and questions."""
    base = scores[scores["method"] == "base"].set_index(["task", "condition", "prompt"])["met"]
    rows = []
    for (method, condition), part in scores[scores["method"] != "base"].groupby(["method", "condition"], sort=False):
        before = base.reindex(pd.MultiIndex.from_frame(part[["task", "condition", "prompt"]])).to_numpy()
        part = part.assign(lost=before - part["met"].to_numpy())
        groups = [g["lost"].to_numpy() for _, g in part.groupby(["task", "new", "seed"])]
        low, high = bootstrap_mean(groups)
        row = {"method": method, "condition": condition, "before": before.mean(), "after": part["met"].mean()}
        rows.append({**row, "lost": part["lost"].mean(), "low": low, "high": high, "n": len(part)})
    return pd.DataFrame(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--formats", type=Path, default=Path("runs/formats"))
    parser.add_argument("--out", type=Path, default=Path("runs/formats-forgetting"))
    parser.add_argument("--new", nargs="+", default=NEW)
    parser.add_argument("--seeds", nargs="+", type=int, default=(0, 1, 2))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    given = parser.parse_args()
    warnings.simplefilter("ignore", UserWarning)
    pd.set_option("display.width", 200, "display.max_columns", 30, "display.max_rows", 500)
    work = Forgetting(given)
    scores = work.scores()
    print(f"== constraint met, before and after\n{summary(scores).round(3).to_string()}")
    told = scores[scores["condition"] == "told"].groupby(["task", "method", "new"], sort=False)["met"].mean()
    print(f"== told, by constraint\n{told.unstack('task').round(3)}")
    for new in given.new:
        points = work.change(new).points()
        print(f"== vectors and the base model's own answers after {new}\n{points.round(3).to_string()}")


if __name__ == "__main__":
    main()

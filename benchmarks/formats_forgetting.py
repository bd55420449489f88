"""Instruction following lost and brought back: told compliance before and after fine-tuning on short answers.

    python benchmarks/formats_forgetting.py --formats runs/formats --out runs/formats-forgetting

Needs what `benchmarks/formats.py` keeps. Three new tasks × three seeds × plain LoRA, guided training and averaging; every adapter
and answer is kept, so that an interrupted run goes on. Two processes can share the work (`OMP_NUM_THREADS=1`): first both with
`--prepare --share 0 2` and `1 2`, then both without `--prepare`; one without `--share` prints the tables.
"""

from __future__ import annotations

import argparse
import itertools
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from formats import LOOK, N_HEADS, TOKENS, Study, show

import ivlens as ivl
from ivlens.common.keys import key
from ivlens.common.statistics import bootstrap_mean, resampled_means
from ivlens.common.storage import read_json, write_json
from ivlens.models.backends import backend_of
from ivlens.running.decoding import complete
from ivlens.running.injection import Injection
from ivlens.running.tokens import tokenize
from ivlens.steering.compliance import written
from ivlens.steering.controls import random_vector
from ivlens.tasks.checks import passes

NEW = ("english_french", "object_counting", "alphabetically_first")
METHODS = ("lora", "iv", "averaging")
N_TEST = 24  # test questions per constraint and run
N_OWN = 24  # told training questions behind similarity


class Forgetting:
    def __init__(self, given: argparse.Namespace):
        self.given, self.out = given, given.out
        self.study = Study(given.formats)
        self.words = ivl.load_tasks(NEW)
        self.vectors = self.study.chosen()
        torch.set_float32_matmul_precision("highest")
        self.tasks = {name: self.study.tasks[name] for name in given.task or self.study.followed()}

    # -- training ---------------------------------------------------------------------------------------------------
    def run(self, new: str, seed: int, method: str) -> ivl.TrainingRun:
        options = {"steps": 100, "learning_rate": 5e-4, "dtype": "bfloat16", "seed": seed, "progress": False}
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
    def answers(self, label: str, model: object, name: str, vectors: bool) -> pd.DataFrame:
        """What is written to told and untold test questions, with the base model's vector and a random one in both; or to told ones
        alone."""
        task, backend = self.tasks[name], backend_of(model)
        looks = {"untold": {"style": "chat"}, "told": LOOK} if vectors else {"told": LOOK}
        asked = {kind: ivl.build_prompts(task, split="test", n=N_TEST, **look) for kind, look in looks.items()}
        tries: dict[str, Injection | None] = {"": None}
        if vectors and name in self.vectors:
            some = {" + old vector": self.vectors[name], " + random vector": random_vector(self.vectors[name])}
            tries |= {added: Injection.of(backend, v) for added, v in some.items()}
        path = self.out / f"answers-{label}-{name}-{key(model, asked, tries, TOKENS)[:16]}.json"
        if not path.exists():
            rows = []
            for kind, prompts in asked.items():
                for added, texts in written(backend, prompts, tries, max_new_tokens=TOKENS).items():
                    met = [float(passes(task.check, text)) for text in texts]
                    about = {"task": name, "condition": kind + added, "prompt": range(len(texts))}
                    rows.append(pd.DataFrame({**about, "met": met, "text": texts}))
            write_json(path, "answers", {"rows": pd.concat(rows).to_dict("records")})
        return pd.DataFrame(read_json(path, "answers")["rows"])

    def likelihood(self, label: str, model: object, name: str) -> pd.DataFrame:
        """Nats per token of the base model's answers: knowledge, to the bare question; instruction, to the told one where it passes."""
        base, backend = self.answers("base", self.study.model, name, True), backend_of(model)
        rows = []
        for kind, what, look in (("untold", "knowledge", {"style": "chat"}), ("told", "instruction", LOOK)):
            prompts = ivl.build_prompts(self.tasks[name], split="test", n=N_TEST, **look)
            some = base[base["condition"] == kind]
            if kind == "told":
                some = some[some["met"] > 0]
            asked = [prompts[i] for i in some["prompt"]]
            asked = [replace(p, query=replace(p.query, output=text)) for p, text in zip(asked, some["text"])]
            path = self.out / f"likelihood-{label}-{name}-{what}-{key(model, asked)[:16]}.json"
            if not path.exists():
                tokens = tokenize(backend, asked)
                done = complete(backend, tokens, {0: None})[0].log_probability
                values = [value / len(row.answer) for value, row in zip(done, tokens)]
                write_json(path, "likelihood", {"prompt": some["prompt"].tolist(), "value": values})
            rows.append(pd.DataFrame(read_json(path, "likelihood")).assign(task=name, what=what))
        return pd.concat(rows)

    def prepare(self) -> None:
        """What several runs need: the base model's answers, and the new tasks' vectors."""
        for name in self.mine(list(self.tasks)):
            self.likelihood("base", self.study.model, name)
        for new in self.mine(list(self.given.new)):
            self._new_vector(new)

    def mine(self, work: list) -> list:
        share, shares = self.given.share
        return work[share::shares]

    def scores(self) -> tuple[pd.DataFrame, pd.DataFrame]:
        """Answers: one row per method, new task, seed, constraint, condition and question; and likelihoods of the base model's."""
        parts = [self.answers("base", self.study.model, name, True).assign(method="base") for name in self.tasks]
        likelihoods = [self.likelihood("base", self.study.model, name).assign(method="base") for name in self.tasks]
        for method, new, seed in self.mine([*itertools.product(self.given.methods, self.given.new, self.given.seeds)]):
            label, about = f"{new}-{method}-{seed}", {"method": method, "new": new, "seed": seed}
            model = ivl.load_model("smollm2", adapter=self.run(new, seed, method).final)
            for name in self.tasks:
                parts.append(self.answers(label, model, name, method == "lora").assign(**about))
                likelihoods.append(self.likelihood(label, model, name).assign(**about))
            print("done", label, flush=True)
        return pd.concat(parts, ignore_index=True), pd.concat(likelihoods, ignore_index=True)

    def similarity(self) -> pd.DataFrame:
        """Cosine of each constraint's vector (its heads' mean outputs on told training questions) with the base model's, as a whole and of
        its least similar head."""
        look, rows = {**LOOK, "n_prompts": N_OWN}, []
        heads = {name: self.study.effects(name).top(N_HEADS) for name in self.tasks}

        def vectors(model: object, label: str) -> dict[str, ivl.InstructionVector]:
            found = {}
            for name, task in self.tasks.items():
                path = self.out / f"similarity-{label}-{name}-{key(model, task, heads[name], look)[:16]}"
                if not path.exists():
                    ivl.extract_vector(model, task, heads[name], **look).save(path)
                found[name] = ivl.InstructionVector.load(path)
            return found

        base = vectors(self.study.model, "base")
        for new, seed in itertools.product(self.given.new, self.given.seeds):
            label = f"{new}-lora-{seed}"
            after = vectors(ivl.load_model("smollm2", adapter=self.run(new, seed, "lora").final), label)
            for name, vector in after.items():
                each = torch.cosine_similarity(vector.shares, base[name].shares, dim=1)
                least = {"least head": str(heads[name][int(each.argmin())]), "its cosine": each.min().item()}
                rows.append({"task": name, "new": new, "seed": seed, "cosine": vector.cosine(base[name]), **least})
        return pd.DataFrame(rows)


def summary(scores: pd.DataFrame) -> pd.DataFrame:
    """Per method and condition: constraint met by the base and after, the mean over constraints, runs and questions; intervals over
    questions. `returned`: which share of the told answers' loss is gone with the vector added."""
    table = scores.pivot_table(
        index=["task", "prompt"], columns=["method", "condition"], values="met"
    )  # mean over runs
    base, rows = table["base"], []
    for method in table.columns.unique("method").drop("base"):
        for condition in table[method].columns:
            pairs = pd.DataFrame({"fallen": base[condition] - table[method][condition]})
            pairs["lost"] = base["told"] - table[method]["told"]
            pairs["back"] = table[method][condition] - table[method]["told"]
            draws = resampled_means([group.to_numpy() for _, group in pairs.groupby("task")])
            row = {
                "method": method,
                "condition": condition,
                "before": base[condition].mean(),
                "after": table[method][condition].mean(),
            }
            row |= dict(
                zip(("change", "low", "high"), (-pairs["fallen"].mean(), *np.quantile(-draws[:, 0], [0.025, 0.975])))
            )
            if condition.startswith("told +"):
                low, high = np.quantile(draws[:, 2] / draws[:, 1], [0.025, 0.975])
                row |= {
                    "returned": pairs["back"].mean() / pairs["lost"].mean(),
                    "returned_low": low,
                    "returned_high": high,
                }
            rows.append({**row, "questions": len(pairs)})
    return pd.DataFrame(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--formats", type=Path, default=Path("runs/formats"))
    parser.add_argument("--out", type=Path, default=Path("runs/formats-forgetting"))
    parser.add_argument("--new", nargs="+", default=NEW)
    parser.add_argument("--seeds", nargs="+", type=int, default=(0, 1, 2))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--task", nargs="+", help="constraints; default: those followed")
    parser.add_argument(
        "--share", nargs=2, type=int, default=(0, 1), help="this process's number, from 0, and how many there are"
    )
    parser.add_argument("--prepare", action="store_true")
    given = parser.parse_args()
    warnings.simplefilter("ignore", UserWarning)
    pd.set_option("display.width", 200, "display.max_columns", 30, "display.max_rows", 500)
    work = Forgetting(given)
    if given.prepare:
        work.prepare()
        return
    scores, likelihoods = work.scores()
    if given.share[1] > 1:
        return
    show("constraint met, before and after", summary(scores))
    told = scores[scores["condition"].isin(["told", "told + old vector"])]
    by = ["task", "method", "new", "condition"]
    show("told, by constraint", told.fillna({"new": ""}).groupby(by, sort=False)["met"].mean().unstack("task"))
    seeds = told[told["method"] != "base"].groupby(["method", "condition", "new", "seed"], sort=False)["met"].mean()
    show("told, by seed", seeds.unstack("seed"))
    show("likelihood of the base model's answers", fall(likelihoods))
    show("the vectors' similarity to the base model's, plain LoRA", work.similarity())


def fall(likelihoods: pd.DataFrame) -> pd.DataFrame:
    """Nats per token by which the base model's answers are less likely, the mean over constraints, runs and questions."""
    base = likelihoods[likelihoods["method"] == "base"].set_index(["task", "what", "prompt"])["value"]
    after = likelihoods[likelihoods["method"] != "base"]
    after = after.assign(
        fall=base.loc[pd.MultiIndex.from_frame(after[["task", "what", "prompt"]])].to_numpy() - after["value"]
    )
    rows = []
    for (method, new, what), part in after.groupby(["method", "new", "what"], sort=False):
        means = part.groupby(["task", "prompt"])["fall"].mean()  # over seeds
        low, high = bootstrap_mean([group.to_numpy() for _, group in means.groupby("task")])
        row = {"method": method, "new": new, "what": what, "fall": means.groupby("task").mean().mean()}
        rows.append({**row, "low": low, "high": high, "n": len(means)})
    return pd.DataFrame(rows)


if __name__ == "__main__":
    main()

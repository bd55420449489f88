"""Format instructions on SmolLM2: which it follows, the heads that carry them, and what vectors do, beside their controls.

    python benchmarks/formats.py [--out runs/formats] [--part compliance locate vectors steer ways gate pairs] [--task spanish ...]

Every piece is kept under a key of all it depends on, so that an interrupted run goes on. Processes with tasks of their own
(`OMP_NUM_THREADS=1`) share the work; one without `--task` then prints all tables. Matrix products are rounded to bfloat16 where
the machine is faster at that, except where heads are located.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import warnings
from pathlib import Path

import pandas as pd
import torch

import ivlens as ivl
from ivlens.common.keys import key
from ivlens.common.statistics import wilson
from ivlens.common.storage import read_json, write_json
from ivlens.models.backends import backend_of
from ivlens.patching.effects import HeadEffects
from ivlens.running.injection import Injection
from ivlens.steering.compliance import Unsteered, balance_table, written
from ivlens.steering.controls import random_vector
from ivlens.steering.evaluation import Evaluation
from ivlens.steering.gate import Gate, fit_gate
from ivlens.tasks.checks import check_source, passes
from ivlens.tasks.prompts import Prompt
from ivlens.vectors.vector import InstructionVector

PARTS = ("compliance", "locate", "vectors", "steer", "ways", "gate", "pairs")
LOOK = {"style": "chat", "shots": 0, "instruction": True}
PRECISION = "medium"  # of torch.set_float32_matmul_precision
LAYERS, SCALES = (12, 15, 18, 21), (0.5, 0.75, 1.0, 1.5)
AT_LAST = (15, 18, 22, 26), (1.0, 2.0, 4.0)  # the same, where the vector is added at the last prompt token only
WAYS = (("heads", "add", "generated"), ("difference", "add", "generated"), ("residual", "add", "generated"))
WAYS += (("residual", "set", "generated"), ("difference", "add", "last"), ("residual", "add", "last"))
N_HEADS, N_PROMPTS, N_MEAN, N_VALID, TOKENS = 6, 12, 24, 12, 40
LORA = {"steps": 60, "learning_rate": 5e-4, "dtype": "bfloat16", "progress": False}
FOLLOWED, UNASKED = 0.6, 0.1  # told and untold compliance on the validation split of what counts as followed


class Study:
    def __init__(self, out: Path, only: list[str] | None = None):
        self.out, self.model = out, ivl.load_model()
        self.tasks = ivl.load_tasks(group="formats")
        self.only = only or self.tasks.names
        self.backend = backend_of(self.model)
        torch.set_float32_matmul_precision(PRECISION)  # after the model has been compared

    def mine(self, names: list[str]) -> list[str]:
        return [name for name in names if name in self.only]

    def kept(self, name: str, parts: list, work, load, save):
        """What `work` gives, from its file if it was done before."""
        stem, suffix = name.rsplit(".", 1)
        path = self.out / f"{stem}-{key(self.model, 'medium', *parts)[:16]}.{suffix}"
        if not path.exists():
            save(work(), path)
        return load(path)

    def frame(self, name: str, parts: list, work) -> pd.DataFrame:
        save = lambda x, path: write_json(path, name, {"rows": x.to_dict("records")})  # noqa: E731
        return self.kept(f"{name}.json", parts, work, lambda path: pd.DataFrame(read_json(path, name)["rows"]), save)

    # -- which are followed -----------------------------------------------------------------------------------------
    def compliance(self, split: str, names: list[str]) -> pd.DataFrame:
        """Told and untold, strict and loose, with the answers."""
        rows = []
        bare = ivl.build_prompts(self.tasks["bullets"], style="chat", split=split)
        untold = self._answers("untold", bare)
        for task in self.tasks.subset(names).values():
            told = self._answers(task.name, ivl.build_prompts(task, split=split, **LOOK))
            for prompt, a, b in zip(bare, untold, told):
                texts = {"untold": a, "told": b}
                met = {f"{w}_strict": float(passes(task.check, x)) for w, x in texts.items()}
                met |= {f"{w}_loose": float(passes(task.check, x, loose=True)) for w, x in texts.items()}
                rows.append({"task": task.name, "input": prompt.query.input, **met, "text": b})
        return pd.DataFrame(rows)

    def _answers(self, name: str, prompts: list) -> list[str]:
        work = lambda: pd.DataFrame({"text": written(self.backend, prompts, {0: None}, max_new_tokens=TOKENS)[0]})  # noqa: E731
        return self.frame(f"answers-{name}", [prompts, TOKENS], work)["text"].tolist()

    def followed(self) -> list[str]:
        """By the validation split, which chooses; the test split reports."""
        scores = self.compliance("valid", self.tasks.names)
        means = scores.groupby("task", sort=False)[["told_strict", "untold_strict"]].mean()
        return means.index[(means["told_strict"] >= FOLLOWED) & (means["untold_strict"] <= UNASKED)].tolist()

    # -- heads and vectors ------------------------------------------------------------------------------------------
    def effects(self, name: str) -> HeadEffects:
        task = self.tasks[name]
        options = {**LOOK, "n_prompts": N_PROMPTS, "n_mean": N_MEAN}

        def work() -> HeadEffects:
            torch.set_float32_matmul_precision("highest")
            effects = ivl.locate_heads(self.model, task, progress=False, folder=self.out / "partial", **options)
            torch.set_float32_matmul_precision(PRECISION)
            return effects

        parts = [task, options, check_source(task.check)]
        return self.kept(f"effects-{name}.safetensors", parts, work, HeadEffects.load, lambda x, path: x.save(path))

    def search(self, name: str, way: str, how: str, positions: str) -> dict:
        """Layer and scale on the validation split, and the vector with them."""
        task, heads = self.tasks[name], self.effects(name).top(N_HEADS)
        layers, these = (LAYERS, SCALES) if positions == "generated" else AT_LAST
        parts = [task, check_source(task.check), heads, way, how, layers, these, N_MEAN, N_VALID, TOKENS]
        parts += [] if positions == "generated" else [positions]
        label = f"{name}-{way}-{how}" + f"-{positions}" * (positions != "generated")

        def work() -> dict:
            options = {**LOOK, "n_prompts": N_MEAN, "way": way}
            if way == "residual":
                vector = [ivl.extract_vector(self.model, task, layer=layer, **options) for layer in layers]
            else:
                vector = ivl.extract_vector(self.model, task, heads, **options)
            scales = these if how == "add" else (0.75, 1.0, 1.5)
            about = {
                "layers": layers,
                "scales": scales,
                "style": "chat",
                "n_prompts": N_VALID,
                "how": how,
                "positions": positions,
            }
            search = ivl.tune_injection(self.model, task, vector, max_new_tokens=TOKENS, **about)
            best = search.best
            best.metadata["how"] = how
            folder = self.out / f"vector-{label}"
            best.save(folder)
            return {
                "balance": search.accuracy.max().item(),
                "layer": best.layer,
                "scale": best.scale,
                "folder": folder.name,
            }

        load = lambda path: read_json(path, "search")  # noqa: E731
        found = self.kept(f"search-{label}.json", parts, work, load, lambda x, path: write_json(path, "search", x))
        return {"task": name, "way": way, "how": how, "positions": positions, **found}

    def searches(self, names: list[str]) -> pd.DataFrame:
        rows = []
        for name, way in itertools.product(names, WAYS):
            rows.append(self.search(name, *way))
            print(rows[-1], flush=True)
        return pd.DataFrame(rows)

    def vector(self, row) -> InstructionVector:
        return InstructionVector.load(self.out / row["folder"])

    def chosen(self) -> dict[str, InstructionVector]:
        """Per constraint the way that is best on the validation split; none where nothing tried was better than nothing."""
        table = self.searches(self.followed()).query("balance > 0")
        table = table.sort_values("balance", ascending=False, kind="stable").drop_duplicates("task")
        return {row["task"]: self.vector(row) for _, row in table.iterrows()}

    # -- what they do -----------------------------------------------------------------------------------------------
    def evaluation(
        self, label: str, name: str, vectors: dict[str, InstructionVector], controls: tuple[str, ...]
    ) -> Evaluation:
        """Test questions and held-out wordings."""
        task = self.tasks[name]
        options = {"style": "chat", "controls": controls, "draws": 1, "max_new_tokens": TOKENS}
        work = lambda: ivl.evaluate(self.model, task, vectors=vectors, progress=False, **options)  # noqa: E731
        parts = [task, check_source(task.check), vectors, options]
        path = f"evaluation-{label}-{name}.json"
        return self.kept(path, parts, work, Evaluation.load, lambda x, path: x.save(path))

    def ways(self, name: str) -> pd.DataFrame:
        """What the best vector of every way does to bare test questions, beside told answers to them."""
        bare, told = (tuple(ivl.build_prompts(self.tasks[name], split="test", **x)) for x in ({"style": "chat"}, LOOK))

        def scored(texts: list[str]) -> pd.DataFrame:
            return pd.DataFrame(self.unsteered(name, bare).scores(texts)[0]).assign(text=texts)

        parts = [bare, TOKENS]
        rows = [
            self.frame(f"test-{name}-told", [*parts, told], lambda: scored(self._answers(name, told))).assign(
                condition="told"
            )
        ]
        for _, row in self.searches([name]).iterrows():

            def steered(row: pd.Series = row) -> pd.DataFrame:
                injection = Injection.of(self.backend, self.vector(row))
                return scored(written(self.backend, bare, {0: injection}, max_new_tokens=TOKENS)[0])

            label = f"{row['way']}-{row['how']}-{row['positions']}"
            rows.append(self.frame(f"test-{name}-{label}", [*parts, self.vector(row)], steered).assign(condition=label))
        trained = lambda: scored(self.written_by_lora(name, bare))  # noqa: E731
        rows.append(self.frame(f"test-{name}-lora", [*parts, self.tasks[name], LORA], trained).assign(condition="lora"))
        return pd.concat(rows).assign(task=name, prompt=lambda x: x.index, query=lambda x: x.index)

    def written_by_lora(self, name: str, bare: tuple[Prompt, ...]) -> list[str]:
        """Trained to answer bare training questions as the told model does where it keeps to the instruction."""
        torch.set_float32_matmul_precision("highest")  # in which a loaded model is compared
        task = ivl.with_own_answers(self.model, self.tasks[name], splits=("train",), folder=self.out / "partial")
        run = ivl.fine_tune("smollm2", task, folder=self.out / f"lora-{name}", style="chat", instruction=False, **LORA)
        backend = backend_of(ivl.load_model("smollm2", adapter=run.final))
        torch.set_float32_matmul_precision(PRECISION)
        return written(backend, bare, {0: None}, max_new_tokens=TOKENS)[0]

    @functools.cache  # noqa: B019
    def unsteered(self, name: str, bare: tuple[Prompt, ...]) -> Unsteered:
        return Unsteered(self.backend, bare, max_new_tokens=TOKENS)

    def asked(self, name: str, split: str) -> tuple[list[Prompt], dict[str, list[Prompt]]]:
        """Questions told of this constraint, and what its gate should stay shut on: untold ones ("") and those told of every other one."""
        yes = ivl.build_prompts(self.tasks[name], split=split, **LOOK)
        others = [x for x in self.tasks if x != name]
        told = {x: ivl.build_prompts(self.tasks[x], split=split, **LOOK)[i % 12 :: 12] for i, x in enumerate(others)}
        return yes, {"": ivl.build_prompts(self.tasks[name], split=split, style="chat"), **told}

    def gates(self) -> pd.DataFrame:
        """A gate per constraint against questions untold and told of every other one."""
        rows = []
        for name in self.mine(self.followed()):
            sets = {}
            for split in ("train", "valid", "test"):
                yes, others = self.asked(name, split)
                sets[split] = yes, [prompt for some in others.values() for prompt in some]

            def work(sets=sets, name=name) -> pd.DataFrame:
                gate = fit_gate(self.model, *sets["train"], valid=sets["valid"], layers=range(LAYERS[-1] + 1))
                opened = [gate.on(self.model, prompts) for prompts in sets["test"]]
                gate.save(self.out / f"gate-{name}.safetensors")
                hits, false, n_yes, n_no = sum(opened[0]), sum(opened[1]), *map(len, opened)
                row = {
                    "task": name,
                    "layer": gate.layer,
                    "threshold": gate.threshold,
                    "opens": hits / n_yes,
                    "stays_shut": 1 - false / n_no,
                }
                low, high = wilson([*map(float, opened[0]), *(float(not x) for x in opened[1])])
                right = (hits + n_no - false) / (n_yes + n_no)
                f1 = 2 * hits / (2 * hits + false + n_yes - hits)
                return pd.DataFrame([{**row, "f1": f1, "right": right, "low": low, "high": high, "n": n_yes + n_no}])

            rows.append(self.frame(f"gate-{name}", [sets], work))
        return pd.concat(rows)

    def damage(self) -> pd.DataFrame:
        """Where a gate opens wrongly on test questions: is the constraint that was told kept with the vector, and is the gate's own met?"""
        rows, vectors = [], self.chosen()
        for name in self.mine(list(vectors)):
            gate, (_, others) = Gate.load(self.out / f"gate-{name}.safetensors"), self.asked(name, "test")

            def work(name=name, gate=gate, others=others) -> pd.DataFrame:
                opened = [(x, p) for x, some in others.items() for p, on in zip(some, gate.on(self.model, some)) if on]
                if not opened:
                    return pd.DataFrame(columns=["task", "told", "before", "after", "own", "text"])
                injections = {0: None, 1: Injection.of(self.backend, vectors[name])}
                before, after = written(
                    self.backend, [p for _, p in opened], injections, max_new_tokens=TOKENS
                ).values()
                met = lambda x, text: bool(x) and passes(self.tasks[x].check, text)  # noqa: E731
                frame = pd.DataFrame({"told": [x for x, _ in opened], "text": after}).assign(task=name)
                frame["before"] = [met(x, text) for (x, _), text in zip(opened, before)]
                frame["after"] = [met(x, text) for (x, _), text in zip(opened, after)]
                return frame.assign(own=[met(name, text) for text in after])

            rows.append(self.frame(f"damage-{name}", [gate.direction, gate.threshold, others, vectors[name]], work))
        return pd.concat(rows)

    def pairs(self) -> pd.DataFrame:
        """Two vectors at once, beside told answers of both instructions."""
        vectors, rows = self.chosen(), []
        added = {name: v for name, v in vectors.items() if v.metadata.get("how", "add") == "add"}
        for a, b in list(itertools.combinations(added, 2)):
            if all(self.tasks[x].check.startswith("language") for x in (a, b)):
                continue
            bare = ivl.build_prompts(self.tasks[a], style="chat", split="test")
            both = f"{self.tasks[a].held_out[0]} {self.tasks[b].held_out[0]}"
            told = ivl.build_prompts(self.tasks[a], style="chat", split="test", instruction=both)

            def work(a=a, b=b, bare=bare, told=told) -> pd.DataFrame:
                injection = Injection.of(self.backend, [added[a], added[b]])
                texts = [
                    written(self.backend, bare, {0: injection}, max_new_tokens=TOKENS)[0],
                    self._answers(f"{a}+{b}", told),
                ]
                met = [[all(passes(self.tasks[x].check, text) for x in (a, b)) for text in some] for some in texts]
                return pd.DataFrame({"pair": f"{a} + {b}", "vectors": met[0], "told": met[1], "text": texts[0]})

            def control(a=a, b=b, bare=bare) -> pd.DataFrame:
                injection = Injection.of(self.backend, [random_vector(added[x]) for x in (a, b)])
                texts = written(self.backend, bare, {0: injection}, max_new_tokens=TOKENS)[0]
                met = [all(passes(self.tasks[x].check, text) for x in (a, b)) for text in texts]
                return pd.DataFrame({"random": met, "random_text": texts})

            frame = self.frame(f"pair-{a}-{b}", [bare, told, added[a], added[b]], work)
            rows.append(frame.join(self.frame(f"pair-random-{a}-{b}", [bare, added[a], added[b]], control)))
        return pd.concat(rows) if rows else pd.DataFrame(columns=["pair", "vectors", "told", "random"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/formats"))
    parser.add_argument("--part", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--task", nargs="+", help="the work on these only")
    given = parser.parse_args()
    warnings.simplefilter("ignore", UserWarning)
    pd.set_option("display.width", 200, "display.max_columns", 30, "display.max_rows", 500)
    study = Study(given.out, given.task)
    if "compliance" in given.part:
        columns = ["untold_strict", "untold_loose", "told_strict", "told_loose"]
        for split in ("valid", "test"):
            means = study.compliance(split, study.only).groupby("task", sort=False)[columns].mean()
            show(f"compliance, {split} split", means)
    if set(given.part) == {"compliance"}:
        return
    names = study.mine(study.followed())
    if "locate" in given.part:
        for name in names:
            show(f"{study.effects(name)} {json.dumps(study.effects(name).metadata['own_answers'])}")
    if "vectors" in given.part:
        table = study.searches(names)
        show("balance on the validation split", table.pivot_table("balance", "task", ["positions", "way", "how"]))
    if "steer" in given.part:
        vectors = study.chosen()
        for name in (name for name in names if name in vectors):
            found = study.evaluation("all", name, vectors, ivl.steering.CONTROLS)
            show(f"{name}: {vectors[name]}\n{found}", found.balance())
    if "ways" in given.part:
        for name in names:
            show(f"{name} by every way, test split", balance_table(study.ways(name)))
    if "gate" in given.part:
        show("gates, test split", study.gates())
        damage = study.damage()
        show(
            "where they open wrongly: untold questions",
            damage[damage["told"] == ""].groupby("task")["own"].agg(["count", "mean"]),
        )
        told = damage[damage["told"] != ""].groupby("task")[["before", "after", "own"]]
        show("where they open wrongly: told of another", told.mean().assign(n=told.size()))
    if "pairs" in given.part:
        show("two at once, test split", study.pairs().groupby("pair")[["vectors", "random", "told"]].mean())


def show(title: str, table: pd.DataFrame | None = None) -> None:
    print(f"== {title}", *([] if table is None else [table.round(3)]), sep="\n", flush=True)


if __name__ == "__main__":
    main()

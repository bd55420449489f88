"""Which parts of guided training pay, together: options by one sequence's validation split, then five sequences on the test split.

    python benchmarks/guidance.py --data FOLDER --out guidance                    # everything; goes on where it was stopped
    python benchmarks/guidance.py --data FOLDER --out guidance --part tune --method averaging iv+averaging
    python benchmarks/guidance.py --data FOLDER --out guidance --tables

1. tune: every method three tries, seed 0, on the validation split of the main sequence. What wins has the highest sum of plasticity and
   stability.
2. main: the winners × five sequences × three seeds, on the test split. Nothing is chosen on `func` and `trace`, which are looked at once.
3. vector: the best method with a vector, with a random one, without, and its other parts alone; the same sequences and seeds.
4. baselines: what peft has against forgetting (orthogonal subspaces, minor components), three learning rates each, likewise.

`--data` holds `superni/` (tasks 363, 875, 1510), `trace/` (FOMC, ScienceQA, NumGLUE-cm) and `general/` (lambada, arc_easy), each file JSON
lines with `instruction`, `input`, `output`, `split`. Every stage is kept, so that processes can share the work (`OMP_NUM_THREADS=1`); the
scores of finished chains on the test split stand in `results/guidance/` and aren't made again (`--results`: another folder).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from chains import chains
from continual import markdown
from peft import LoraConfig, OSFConfig

import ivlens as ivl
from ivlens.common.keys import key
from ivlens.continual import ContinualResults, collect, load_general, load_sequence, run
from ivlens.continual.metrics import resampled
from ivlens.training.guidance import Guidance, SplitKL
from ivlens.training.methods import (
    METHODS,
    Averaging,
    Guided,
    GuidedAveraging,
    LwF,
    Method,
    Rehearsal,
    Replay,
    TextRehearsal,
)

BUILT_IN = {
    "main": ("antonym", "object_counting", "singular_plural"),
    "second": ("comparative", "word_length", "sentiment"),
}
FILES = {
    "superni": (
        "task363_sst2_polarity_classification",
        "task875_emotion_classification",
        "task1510_evalution_relation_extraction",
    ),
    "trace": ("FOMC", "ScienceQA", "NumGLUE-cm"),
}
GENERAL = ("present_past", "capitalize", "last_of_list", "country_continent", "lowercase", "spanish", "one_sentence")
BENCHMARKS = ("lambada", "arc_easy")
SEEDS = (0, 1, 2)
OPTIONS: dict[str, Any] = {
    "steps": 80,
    "batch_size": 8,
    "learning_rate": 5e-4,
    "dtype": "bfloat16",
    "general_after": "last",
}
OPTIONS |= {"similarity": False}

PROGRESSIVE, KEPT_ON = Guided(Guidance(kl=())), Guided(Guidance(kl=(), schedule="constant"))


def split(weight: float, **options: Any) -> Guided:
    return Guided(Guidance(kl=(SplitKL(weight, weight),), **options))


# Each as many tries; the middle one is what was chosen before anything was tried.
TRIES: dict[str, tuple[Method, ...]] = {
    "averaging": tuple(Averaging(x) for x in (0.5, 0.7, 0.85)),
    "averaging, on the way": tuple(Averaging(x, every=0.25) for x in (0.7, 0.85, 0.95)),
    "replay": tuple(Replay(x) for x in (0.1, 0.25, 0.5)),
    "self-distillation": tuple(LwF(x, temperature=1.0, shots=5) for x in (0.3, 1.0, 3.0)),
    "iv+averaging": tuple(PROGRESSIVE + Averaging(x) for x in (0.5, 0.7, 0.85)),
    "kept on+averaging": tuple(KEPT_ON + Averaging(x) for x in (0.5, 0.7, 0.85)),
    "split+averaging": tuple(split(x) + Averaging(0.85) for x in (0.3, 1.0, 3.0)),
    "demonstrations+averaging": tuple(split(x, shots=5) + Averaging(0.85) for x in (0.3, 1.0, 3.0)),
    "rehearsal+averaging": tuple(Rehearsal(x) + Averaging(0.85) for x in (0.1, 0.25, 0.4)),
    "iv+rehearsal+averaging": tuple(PROGRESSIVE + Rehearsal(x) + Averaging(0.85) for x in (0.1, 0.25, 0.4)),
    "text+averaging": tuple(TextRehearsal(x) + Averaging(0.85) for x in (0.1, 0.25, 0.4)),
}

# Of each, the try that won by `--part tune`, frozen before anything was run on a test split. The last one puts the two winners together
# and has nothing left to choose: the first where a task's vector is weak, else the second.
CHOSEN: dict[str, Method] = {
    "averaging": TRIES["averaging"][0],
    "iv+averaging": TRIES["iv+averaging"][2],
    "guided averaging": GuidedAveraging(strong=0.85, weak=0.5),
}
BEST = "iv+averaging"  # with a vector, of those that were tuned

# In the place of plain LoRA; learning rates, since that is what they leave to choose.
RATES = (2e-4, 5e-4, 1e-3)
BASELINES = {
    "orthogonal subspaces": OSFConfig(target_modules=["q_proj", "v_proj"], effective_rank=8),
    "minor components": LoraConfig(
        r=8, lora_alpha=16, init_lora_weights="mica", target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"
    ),
}


class Work:
    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.sequences = {name: list(ivl.load_tasks(tasks).values()) for name, tasks in BUILT_IN.items()}
        for name, files in FILES.items() if args.data else ():
            self.sequences[name] = [from_file(args.data / name / f"{file}.jsonl") for file in files]
        self.sequences["func"] = list(load_sequence("func").values())
        general = [
            *ivl.load_tasks(GENERAL).values(),
            *load_general(BENCHMARKS, args.data and args.data / "general").values(),
        ]
        trained = {name: {task.name for task in tasks} for name, tasks in self.sequences.items()}
        self.general = {name: [task for task in general if task.name not in trained[name]] for name in self.sequences}

    def run(
        self,
        sequence: str,
        methods: dict[str, Method],
        seeds: Sequence[int],
        kept: bool = False,
        folder: str = "",
        **more: Any,
    ) -> ContinualResults:
        options = {**OPTIONS, "general": self.general[sequence], "methods": methods, "seeds": seeds, **more}
        do = collect if self.args.tables or kept else run
        place = self.args.out / folder / sequence
        return do(self.sequences[sequence], folder=place, **options)

    # -- options, on the validation split -------------------------------------------------------------------------------

    def tries(self, name: str) -> dict[str, Method]:
        return {f"{name} {i}": method for i, method in enumerate(TRIES[name])}

    def tune(self) -> None:
        for name in self.args.method or TRIES:
            self.run("main", self.tries(name), (0,), split="valid")

    def tried(self, name: str) -> pd.DataFrame:
        found = self.run("main", self.tries(name), (0,), kept=True, split="valid").to_dataframe()
        table = found.pivot(index="method", columns="metric", values="mean").loc[list(self.tries(name))]
        table = table.assign(sum=table["plasticity"] + table["stability"], what=list(map(repr, TRIES[name])))
        return table[["plasticity", "forgetting", "BWT", "GP", "IP", "sum", "what"]]

    def print_tune(self) -> None:
        show(pd.concat([self.tried(name) for name in TRIES]))

    def chosen(self, name: str) -> Method:
        return METHODS["lora"] if name == "lora" else CHOSEN[name]

    # -- five sequences, on the test split --------------------------------------------------------------------------------

    def tested(self, methods: dict[str, Method]) -> dict[str, ContinualResults]:
        """Chains that are in --results aren't run again."""
        found = {}
        for name in self.args.sequences or self.sequences:
            do = None if self.args.tables else partial(self.run, name)
            sequence, asked = self.sequences[name], key(OPTIONS, self.sequences[name], self.general[name])[:8]
            path = self.args.results / f"{name}-{asked}.parquet"
            if self.args.tables and not path.exists():
                continue
            found[name] = chains(path, [task.name for task in sequence], methods, self.args.seeds, do)
        return found

    def main(self) -> dict[str, ContinualResults]:
        return self.tested({name: self.chosen(name) for name in ("lora", *(self.args.method or CHOSEN))})

    def print_main(self) -> None:
        self.compare(self.main())

    def vector(self) -> dict[str, ContinualResults]:
        """The best method with a vector beside what it is without one."""
        parts, methods = self.chosen(BEST).parts, {"lora": METHODS["lora"], BEST: self.chosen(BEST)}
        methods["random vector"] = total(replaced(part, random=True) for part in parts)
        methods["no vector"] = total(part for part in (without(part) for part in parts) if part is not None)
        return self.tested(methods)

    def print_vector(self) -> None:
        self.compare(self.vector())

    def baseline(self, name: str, rate: float, sequence: str, seeds: Sequence[int], **more: Any) -> ContinualResults:
        more |= {"lora": BASELINES[name], "learning_rate": rate, "folder": f"{name} {rate:g}"}
        return self.run(sequence, {name: METHODS["lora"]}, seeds, **more)

    def baselines(self) -> dict[str, ContinualResults]:
        """All of them with plain LoRA, at the rate that wins on the validation split of the main sequence."""
        found = {
            x: [self.run(x, {"lora": METHODS["lora"]}, self.args.seeds)] for x in self.args.sequences or self.sequences
        }
        for name in BASELINES:
            tried = {rate: self.baseline(name, rate, "main", (0,), split="valid") for rate in RATES}
            sums = {rate: each.to_dataframe().set_index("metric")["mean"] for rate, each in tried.items()}
            rate = max(RATES, key=lambda x: sums[x]["plasticity"] + sums[x]["stability"])
            print(name, {rate: each[["plasticity", "stability"]].round(3).to_dict() for rate, each in sums.items()})
            for sequence, several in found.items():
                several.append(self.baseline(name, rate, sequence, self.args.seeds))
        return {sequence: joined(several) for sequence, several in found.items()}

    def print_baselines(self) -> None:
        self.compare(self.baselines())

    def compare(self, found: dict[str, ContinualResults]) -> None:
        """Each sequence, and the mean of all: paired intervals over prompts."""
        draws = {name: resampled(each.scores, each.metadata["sequence"]) for name, each in found.items()}
        for name, each in found.items():
            print(f"\n== {name}: {' → '.join(each.metadata['sequence'])}\n\n{markdown(each.table().reset_index())}\n")
            print(markdown(each.versus("lora").round(3)), "\n\nfront:", ", ".join(each.pareto()))
        rows = []
        first, *others = found.values()
        for method in [name for name in first.methods if all(name in each.methods for each in others)]:
            pairs = [(each[method], each["lora"]) for each in draws.values()]
            cut = np.mean([1 - a["forgetting"].mean(1) / b["forgetting"].mean(1) for a, b in pairs], axis=0)
            gain = np.mean([a["plasticity"].mean(1) - b["plasticity"].mean(1) for a, b in pairs], axis=0)
            row = {"method": method}
            for what, values in (("cut in forgetting", cut), ("plasticity", 100 * gain)):
                low, high = np.quantile(values[1:], [0.025, 0.975])
                row |= {what: values[0], f"{what} low": low, f"{what} high": high}
            rows.append(row)
        print(f"\n== mean of {len(found)} sequences, beside plain LoRA\n")
        show(pd.DataFrame(rows).set_index("method"))


def joined(several: list[ContinualResults]) -> ContinualResults:
    """Of the same sequence and prompts: one result with all methods; the base model's scores stand in each."""
    first, *others = several
    frames = {name: [getattr(first, name)] for name in ("scores", "similarity", "costs")}
    for each in others:
        for name, frame in frames.items():
            more = getattr(each, name)
            frame.append(more[more["method"] != "base"] if len(more) else more)
    return replace(first, **{name: pd.concat(frame, ignore_index=True) for name, frame in frames.items()})


def from_file(path: Path) -> ivl.Task:
    """All splits of a file; options that aren't the answers' own words (as in TRACE, which answers by letter) are left out."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    spoken = all(row["output"] in row.get("choices", ()) for row in rows)
    return ivl.Task.from_records(
        [{k: x for k, x in row.items() if spoken or k != "choices"} for row in rows], name=path.stem
    )


def total(parts: Any) -> Method:
    first, *others = parts
    for part in others:
        first = first + part
    return first


def replaced(part: Method, **options: Any) -> Method:
    return replace(part, **options) if part.needs_vectors else part


def without(part: Method) -> Method | None:
    """This part without a vector, if anything is left of it."""
    if isinstance(part, Rehearsal):
        return replaced(part, steered=False)
    if isinstance(part, Guided):
        return (
            None
            if part.guidance.progressive and not part.guidance.kl
            else replaced(part, guidance=unsteered(part.guidance))
        )
    return part


def unsteered(guidance: Guidance) -> Guidance:
    return replace(guidance, progressive=False, steered=False)


def show(table: pd.DataFrame) -> None:
    print(table.round(3).to_string(), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", default=["tune", "main", "vector"])
    parser.add_argument("--method", nargs="+", choices={**TRIES, **CHOSEN}, help="only these")
    parser.add_argument("--sequences", nargs="+", choices=(*BUILT_IN, *FILES, "func"))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--data", type=Path, help="default: none of these sequences, and the hub for general tasks")
    parser.add_argument("--tables", action="store_true", help="only print the tables")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results" / "guidance")
    parser.add_argument("--out", type=Path, default=Path("guidance"))
    work = Work(args := parser.parse_args())
    for part in args.part:
        if not args.tables:
            getattr(work, part)()
        if args.method is None and args.sequences is None:
            getattr(work, f"print_{part}")()


if __name__ == "__main__":
    main()

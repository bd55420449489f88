"""What fine-tuning does to instruction vectors, and what putting them back returns: three new tasks × three seeds.

    python benchmarks/forgetting.py --out forgetting                  # everything; goes on where it was stopped
    python benchmarks/forgetting.py --out forgetting --new word_length --seeds 0
    python benchmarks/forgetting.py --out forgetting --tables         # only print the tables of what is there

1. Universal heads and the vectors of eight tasks on the base model (training splits, five demonstrations).
2. LoRA on each new task and seed; every result is kept beside the adapter.
3. `track`: accuracy with five demonstrations (test split), similarities, head sets.
4. `recover`: the old vectors put back, with nothing asked, with an instruction, and with five demonstrations.
5. Knowledge and instruction probability on the multiple-choice tasks.

The new tasks are studied apart, so several processes can share the work: --new one each.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pandas as pd

import ivlens as ivl
from ivlens.common.statistics import bootstrap_mean, correlation
from ivlens.dynamics.probabilities import AnswerProbabilities, compare_probabilities
from ivlens.models.checkpoints import open_checkpoints

# Those of the built-in tasks that the model does at 70 % or better with ten demonstrations (validation split), one a kind.
TASKS = (
    "present_past",
    "singular_plural",
    "first_of_list",
    "last_of_list",
    "capitalize",
    "lowercase",
    "sentiment",
    "country_continent",
)
# Old vectors are put back on those that lost most in a first try (another learning rate, validation split).
RECOVERED = TASKS[:3] + TASKS[4:6] + TASKS[7:]
CHOICES = ("general_choice", "synonym_choice")
NEW = ("english_french", "object_counting", "alphabetically_first")
SETTINGS: dict[str, dict[str, Any]] = {
    "nothing asked": {"shots": 0},
    "instruction": {"shots": 0, "instruction": True},
    "five demonstrations": {"shots": 5},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--new", nargs="+", default=list(NEW), help="tasks to fine-tune on")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--prompts", type=int, default=100, help="test prompts per task")
    parser.add_argument("--tables", action="store_true", help="only print the tables")
    parser.add_argument("--out", type=Path, default=Path("forgetting"))
    options = parser.parse_args()
    if not options.tables:
        for new in options.new:
            study(new, options)
    print_tables([new for new in options.new if (options.out / new / "done").exists()], options.out)


def study(new: str, options: argparse.Namespace) -> None:
    """One new task: trained with every seed, tracked, recovered, probed. What is in the folder already isn't done again."""
    folder, suite = options.out / new, ivl.load_tasks()
    runs = [
        ivl.fine_tune(
            options.model,
            suite[new],
            folder=folder / f"seed-{seed}",
            steps=options.steps,
            learning_rate=options.lr,
            seed=seed,
        )
        for seed in options.seeds
    ]
    adapters, tasks = [run.final for run in runs], suite.subset(TASKS)
    heads, vectors = base_vectors(options.model, tasks, folder)
    common: dict[str, Any] = {"model": options.model, "n_prompts": options.prompts}
    ivl.track(adapters, tasks, heads, n_effects=4, folder=folder / "change", **common)
    common |= {"layers": (7, 10, 13, 16, 19, 22), "scales": (0.5, 1.0, 2.0), "n_valid": 20}
    for name, look in SETTINGS.items():
        more = {"subtract": new_vectors(options.model, adapters, suite[new], heads, folder)} if look["shots"] else {}
        place = folder / name.replace(" ", "_")
        ivl.recover(adapters, suite.subset(RECOVERED), vectors, folder=place, **look, **more, **common)
    probe(options.model, adapters, suite.subset(CHOICES), folder)
    (folder / "done").touch()


def base_vectors(model: str, tasks: ivl.TaskSuite, folder: Path) -> tuple[list, dict]:
    """Universal heads, and the tasks' vectors over them."""
    if (folder / "effects.safetensors").exists():
        effects = ivl.HeadEffects.load(folder / "effects.safetensors")
    hooked = ivl.load_model(model, backend="bridge")
    if not (folder / "effects.safetensors").exists():
        effects = ivl.locate_heads(hooked, tasks, shots=5, n_prompts=10, n_mean=30, folder=folder / "partial")
        effects.save(folder / "effects.safetensors")
    heads = effects.top(10)
    look = {"shots": 5, "n_prompts": 30}
    return heads, {name: ivl.extract_vector(hooked, task, heads, **look) for name, task in tasks.items()}


def new_vectors(model: str, adapters: list[Path], task: ivl.Task, heads: list, folder: Path) -> dict:
    """The new task's vector in each fine-tuned model, by the checkpoint's label; in the form it was trained in."""
    found = {}
    for checkpoint in open_checkpoints(model, adapters)[0][1:]:
        path = folder / "new_vectors" / checkpoint.label.replace("/", "-")
        if not path.exists():
            with checkpoint.use() as hooked:
                ivl.extract_vector(hooked, task, heads, shots=0, instruction=True, n_prompts=30).save(path)
        found[checkpoint.label] = ivl.InstructionVector.load(path)
    return found


def probe(model: str, adapters: list[Path], tasks: ivl.TaskSuite, folder: Path) -> None:
    """Knowledge and instruction probabilities, kept one file per checkpoint."""
    for checkpoint in open_checkpoints(model, adapters)[0]:
        path = folder / "probabilities" / f"{checkpoint.label.replace('/', '-')}.safetensors"
        if not path.exists():
            with checkpoint.use() as hooked:
                ivl.answer_probabilities(hooked, tasks).save(path)


# -- tables ---------------------------------------------------------------------------------------------------------------


def print_tables(studies: list[str], out: Path) -> None:
    changes = {new: ivl.Change.load(out / new / "change") for new in studies}
    points = pd.concat([change.points().assign(new=new) for new, change in changes.items()], ignore_index=True)
    forgetting(points)
    shares = {}
    for name in SETTINGS:
        place = name.replace(" ", "_")
        shares[name] = [ivl.Recovery.load(out / new / place / "recovery.json") for new in studies]
        restored(name, shares[name], studies)
    probabilities(studies, out)
    show("R² and Spearman's ρ of each similarity with the change in accuracy, over all tasks and checkpoints", [
        {"predictor": p, **correlation(points[p], points["accuracy_change"], groups=points["task"])}
        for p in ("iv_similarity", "hidden_similarity", "head_overlap", "effects_spearman", "weight_distance")
    ])  # fmt: skip


def forgetting(points: pd.DataFrame) -> None:
    rows = []
    for new, part in [*points.groupby("new", sort=False), ("all", points)]:
        losses = [
            -group["accuracy_change"].to_numpy() for _, group in part.groupby("checkpoint" if new != "all" else "new")
        ]
        low, high = bootstrap_mean(losses)
        row = {
            "new task": new,
            "points lost": -100 * part["accuracy_change"].mean(),
            "low": 100 * low,
            "high": 100 * high,
        }
        rows.append({**row, "cosine of the vectors": part["iv_similarity"].mean(), "pairs": len(part)})
    show("accuracy lost on the eight tasks, five demonstrations, test split (interval over tasks)", rows)
    table = points.pivot_table(index="task", columns="new", values="accuracy_change")
    print("\nby task, points\n" + (100 * table).round(1).to_string())


def restored(name: str, recoveries: list[ivl.Recovery], studies: list[str]) -> None:
    together = ivl.Recovery(
        pd.concat(
            [r.scores.assign(checkpoint=new + "/" + r.scores["checkpoint"]) for new, r in zip(studies, recoveries)]
        ),
        pd.concat(
            [r.choices.assign(checkpoint=new + "/" + r.choices["checkpoint"]) for new, r in zip(studies, recoveries)]
        ),
    )
    show(f"{name}: share of the lost accuracy returned", together.shares().to_dict("records"))
    means = together.to_dataframe().pivot_table(index="task", columns="condition", values="accuracy")
    print(f"\n{name}: accuracy, mean of checkpoints\n" + (100 * means[together.conditions]).round(1).to_string())
    show(
        f"{name}: accuracy of the fine-tuned models over the base model's with the vector",
        together.kept().to_dict("records"),
    )


def probabilities(studies: list[str], out: Path) -> None:
    rows = []
    for new in studies:
        before = AnswerProbabilities.load(out / new / "probabilities" / "base.safetensors")
        for path in sorted((out / new / "probabilities").glob("*.safetensors")):
            if path.stem != "base":
                table = compare_probabilities(before, AnswerProbabilities.load(path))
                rows.append({"new task": new, "checkpoint": path.stem, **table.iloc[-1].drop("task").to_dict()})
    show("falls of knowledge and instruction probability (nats per token), multiple choice", rows)


def show(title: str, rows: list[dict[str, Any]]) -> None:
    with pd.option_context("display.float_format", "{:.3f}".format, "display.width", 250, "display.max_columns", None):
        print(f"\n{title}\n{pd.DataFrame(rows).to_string(index=False)}")


if __name__ == "__main__":
    main()

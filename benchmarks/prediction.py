"""What tells beforehand, or without looking, which skills a fine-tune takes away, and which prompts?

    python benchmarks/prediction.py --out forgetting      # beside benchmarks/forgetting.py, whose runs and folder it shares

Over the same pairs of a fine-tuned model and an old task: KL(base ‖ tuned) of the next token on the new task's prompts (arXiv 2509.04259)
and on the old task's own, beside the similarity of the vectors and the distance of the weights. Of single prompts that the base model
gets right: how well KL there, and the base model's own sureness, tell those that are lost (area under the ROC curve, 0.5 is chance).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from forgetting import NEW, TASKS, base_vectors, show
from torch import Tensor

import ivlens as ivl
from ivlens.common.keys import key
from ivlens.common.statistics import bootstrap_mean, correlation
from ivlens.common.storage import read_json, write_json
from ivlens.models.backends import backend_of
from ivlens.models.checkpoints import open_checkpoints
from ivlens.running.tokens import pad_left, tokenize
from ivlens.tasks.task import same_input

OLD, ASKED = (
    {"shots": 5},
    {"shots": 0, "instruction": True},
)  # old tasks as they are scored, the new one as it is trained


def next_token(model: object, prompts: list[ivl.Prompt], batch_size: int = 16) -> Tensor:
    """Log-probabilities after each prompt, [prompt d_vocab]."""
    backend, rows = backend_of(model), [row.prompt for row in tokenize(backend_of(model), prompts)]
    parts = []
    with torch.inference_mode():
        for i in range(0, len(rows), batch_size):
            tokens, mask = pad_left(rows[i : i + batch_size], 0, backend.device)
            parts.append(backend.forward(tokens, mask, keep=1)[:, -1].float().log_softmax(-1).cpu())
    return torch.cat(parts)


def divergences(new: str, options: argparse.Namespace) -> pd.DataFrame:
    """One row per checkpoint, task and prompt, in the order of `track`: `kl`, and `sure`, the base model's highest probability there."""
    suite, seeds = ivl.load_tasks(), options.seeds
    settings = {"steps": options.steps, "learning_rate": options.lr}
    folder, runs = options.out / new, []
    for seed in seeds:
        runs.append(ivl.fine_tune("smollm2", suite[new], folder=folder / f"seed-{seed}", seed=seed, **settings))
    asked = {new: ivl.build_prompts(suite[new], split="test", n=options.prompts, **ASKED)}
    asked |= {name: ivl.build_prompts(suite[name], split="test", n=options.prompts, **OLD) for name in TASKS}
    base, rows = {}, []
    for checkpoint in open_checkpoints("smollm2", [run.final for run in runs])[0]:
        with checkpoint.use() as model:
            path = folder / f"divergence-{key(model, asked)[:16]}.json"
            if not base:
                base = {name: next_token(model, prompts) for name, prompts in asked.items()}
                continue
            if not path.exists():
                found = []
                for name, prompts in asked.items():
                    kl = (base[name].exp() * (base[name] - next_token(model, prompts))).sum(-1)
                    sure = base[name].max(-1).values.exp()
                    about = {"task": name, "query": [same_input(p.query) for p in prompts]}
                    found.append(pd.DataFrame({**about, "kl": kl.tolist(), "sure": sure.tolist()}))
                write_json(path, "divergence", {"rows": pd.concat(found).to_dict("records")})
        rows.append(pd.DataFrame(read_json(path, "divergence")["rows"]).assign(checkpoint=checkpoint.label))
    return pd.concat(rows).assign(new=new)


def tracked(new: str, options: argparse.Namespace) -> ivl.Change:
    """As benchmarks/forgetting.py tracks it."""
    folder, tasks = options.out / new, ivl.load_tasks(TASKS)
    adapters = [ivl.TrainingRun.load(folder / f"seed-{seed}").final for seed in options.seeds]
    heads, _ = base_vectors("smollm2", tasks, folder)
    place = {"folder": folder / "change", "model": "smollm2", "n_prompts": options.prompts}
    return ivl.track(adapters, tasks, heads, n_effects=4, **place)


def area(score: np.ndarray, lost: np.ndarray) -> float:
    """Under the ROC curve: how often a lost prompt scores higher than a kept one."""
    pairs = score[lost][:, None] - score[~lost][None]
    return float(((pairs > 0) + 0.5 * (pairs == 0)).mean())


def single_prompts(divergence: pd.DataFrame, changes: dict[str, ivl.Change]) -> list[dict]:
    """Areas per checkpoint and task with five lost and five kept prompts or more; interval over tasks."""
    rows = []
    for (new, label, task), part in divergence[divergence["task"].isin(TASKS)].groupby(["new", "checkpoint", "task"]):
        snapshots = {s.label: s for s in changes[new].snapshots}
        before, after = (np.asarray(snapshots[name].accuracy[task]) > 0.5 for name in (changes[new].base.label, label))
        if part["query"].tolist() != list(changes[new].asked(task)):
            raise ValueError(f"{new}/change was tracked on other prompts of {task!r}; remove it, or pass its --prompts")
        right, lost = before, before & ~after
        if min(lost.sum(), (right & ~lost).sum()) >= 5:
            kl, unsure = part["kl"].to_numpy()[right], -part["sure"].to_numpy()[right]
            rows.append({"task": task, "kl": area(kl, lost[right]), "unsure": area(unsure, lost[right])})
    table, found = pd.DataFrame(rows, columns=["task", "kl", "unsure"]), []
    for name, what in (("kl", "KL(base ‖ tuned) at the prompt"), ("unsure", "the base model's unsureness")):
        means = table.groupby("task")[name].mean().to_numpy()
        low, high = bootstrap_mean([means])
        about = {"tasks": len(means), "pairs": len(table)}
        found.append({"predictor": what, "area": means.mean(), "low": low, "high": high, **about})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--new", nargs="+", default=list(NEW))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--out", type=Path, default=Path("forgetting"))
    options = parser.parse_args()
    divergence = pd.concat([divergences(new, options) for new in options.new], ignore_index=True)
    changes = {new: tracked(new, options) for new in options.new}
    points = pd.concat([change.points().assign(new=new) for new, change in changes.items()], ignore_index=True)
    means = divergence.groupby(["new", "checkpoint", "task"])["kl"].mean()
    points["kl_new"] = [means[new, at, new] for new, at in zip(points["new"], points["checkpoint"])]
    points["kl_old"] = [means[x] for x in zip(points["new"], points["checkpoint"], points["task"])]
    predictors = ("kl_new", "kl_old", "iv_similarity", "weight_distance")
    show("R² and Spearman's ρ with the change in accuracy, over all tasks and checkpoints", [
        {"predictor": p, **correlation(points[p], points["accuracy_change"], groups=points["task"])} for p in predictors
    ])  # fmt: skip
    show("which prompts are lost, of those the base model gets right", single_prompts(divergence, changes))


if __name__ == "__main__":
    main()

"""Instruction vectors before and after training (`compare`), or along it (`track`)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from ivlens.common.keys import key
from ivlens.common.processes import hidden
from ivlens.common.storage import kept
from ivlens.dynamics.change import Change
from ivlens.dynamics.snapshot import Snapshot, TaskPrompts, take_snapshot
from ivlens.models.backends import backend_of
from ivlens.models.checkpoints import Checkpoint, open_checkpoints
from ivlens.models.head import Head
from ivlens.patching.effects import HeadEffects
from ivlens.patching.locating import locate_heads
from ivlens.running.tokens import TokenizedPrompt, tokenize
from ivlens.tasks.prompts import build_prompts
from ivlens.tasks.suite import as_suite
from ivlens.tasks.task import Task, same_input

__all__ = ["compare", "track"]


def compare(
    before: Any,
    after: Any,
    tasks: Task | Iterable[Task] | Mapping[str, Task],
    heads: Sequence[Head | tuple[int, int]] | HeadEffects,
    *,
    shots: int = 5,
    instruction: bool | str | int = False,
    style: str = "qa",
    split: str = "test",
    n_prompts: int | None = 100,
    n_mean: int = 30,
    n_effects: int = 8,
    batch_size: int | None = None,
    device_map: Any = None,
    folder: str | Path | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Change:
    """Instruction vectors before and after training (IV §5): `track` with one checkpoint, effects located on both.

    Parameters
    ----------
    before
        A model's name or folder, or a hooked model.
    after
        An adapter folder, a model's name or folder, or a hooked model.
    tasks, heads, shots, instruction, style, split, n_prompts, n_mean, n_effects, batch_size, device_map, folder, seed, progress
        As in `track`.
    """
    look = {"shots": shots, "instruction": instruction, "style": style, "split": split, "seed": seed}
    amounts = {"n_prompts": n_prompts, "n_mean": n_mean, "n_effects": n_effects, "batch_size": batch_size}
    kept_at = {"device_map": device_map, "folder": folder}
    return track([after], tasks, heads, model=before, **look, **amounts, **kept_at, progress=progress)


def track(
    checkpoints: Sequence[Any] | str | Path,
    tasks: Task | Iterable[Task] | Mapping[str, Task],
    heads: Sequence[Head | tuple[int, int]] | HeadEffects,
    *,
    model: Any = "smollm2",
    shots: int = 5,
    instruction: bool | str | int = False,
    style: str = "qa",
    split: str = "test",
    n_prompts: int | None = 100,
    n_mean: int = 30,
    n_effects: int = 0,
    batch_size: int | None = None,
    device_map: Any = None,
    folder: str | Path | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Change:
    """Instruction vectors and accuracy at every checkpoint, on the same prompts (IV §5).

    Every prompt is run once per checkpoint; vectors, similarities and scores are read off that pass. Adapters are switched on
    one base model in memory.

    Parameters
    ----------
    checkpoints
        A folder of `fine_tune` (all its checkpoints), or a list of adapter folders, model names or folders, hooked models.
    tasks
        A task, a list of tasks, or tasks by name, such as `load_tasks` gives.
    heads
        The instruction heads S, kept fixed; located on the base model. Of `HeadEffects`, the ten best.
    model
        The base: a name or folder, or a hooked model (not with adapters).
    shots, instruction, style
        How the prompts look; see `build_prompts`.
    split
        `train`, `valid` or `test`: where the prompts' queries come from. Those behind the vectors are of `train`.
    n_prompts
        Prompts per task to answer; None for the whole split.
    n_mean
        Prompts per task behind each vector.
    n_effects
        Prompts per task on which all heads are swept too, for the overlap of head sets; 0 for not.
    batch_size
        Prompts per forward pass; None for as many as there is room for. Halved where memory runs out.
    device_map
        Of models given by name: over which devices, as for `load_model`.
    folder
        Where to keep every snapshot, so that an interrupted run goes on there.
    seed
        Of all that is drawn at random; global random states are left alone.
    progress
        Show a progress bar.

    Raises
    ------
    ValueError
        If a checkpoint has another architecture or vocabulary, or an adapter another base. One with a missing or truncated
        file is left out with a warning, and named in `skipped`.
    """
    suite = as_suite(tasks, answered=[split])
    heads = heads.top(10) if isinstance(heads, HeadEffects) else [Head(*h) for h in heads]
    single = isinstance(checkpoints, (str, Path))
    opened, skipped = open_checkpoints(model, [checkpoints] if single else checkpoints, device_map=device_map)
    look = {"shots": shots, "instruction": instruction, "style": style, "seed": seed}
    with opened[0].use() as hooked:
        backend = backend_of(hooked)
        base = None if folder is None else key(hooked)
        answered = {name: build_prompts(task, n=n_prompts, split=split, **look) for name, task in suite.items()}
        means = {n: build_prompts(task, n=n_mean, split="train", repeat=True, **look) for n, task in suite.items()}
        bare = {n: [TokenizedPrompt(row.prompt) for row in tokenize(backend, each)] for n, each in means.items()}
        prompts = {name: TaskPrompts(bare[name], tokenize(backend, answered[name])) for name in suite}
    kind = "shuffled_labels" if shots >= 2 else "no_instruction"
    sweep = {"n_mean": 20, "counterfactual": kind, "progress": False, **look}
    queries = {name: [same_input(prompt.query) for prompt in each] for name, each in answered.items()}
    snapshots: list[Snapshot] = []
    total = len(opened) * sum(len(p.mean) + len(p.answered) for p in prompts.values())
    with tqdm(total=total, desc="tracking", disable=hidden(progress)) as bar:
        for checkpoint in opened:
            bar.set_postfix_str(checkpoint.label)
            with checkpoint.use() as hooked:
                path = None
                if folder is not None:
                    swept = [n_effects, look, list(suite.values())] if n_effects else []
                    found = key(base, hooked, checkpoint.label, checkpoint.step, prompts, heads, swept)
                    path = Path(folder) / "partial" / f"{found}.safetensors"

                def make(checkpoint: Checkpoint = checkpoint, hooked: Any = hooked) -> Snapshot:
                    effects = locate_heads(hooked, suite, n_prompts=n_effects, **sweep) if n_effects else None
                    about = {"label": checkpoint.label, "step": checkpoint.step, "effects": effects}
                    about |= {"distance": checkpoint.distance(hooked), "base": snapshots[0] if snapshots else None}
                    return take_snapshot(hooked, prompts, heads, batch_size=batch_size, bar=bar, **about)

                snapshots.append(kept(path, make, Snapshot.load, lambda at, snapshot: snapshot.save(at)))
                bar.update(len(snapshots) * total // len(opened) - bar.n)
    about = {"model": backend.name, "split": split, "n_mean": n_mean, **look, "queries": queries}
    change = Change(tuple(snapshots), skipped, about)
    if folder is not None:
        change.save(folder)
    return change

"""`recover`: put the base model's vectors back into fine-tuned models."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
from torch import Tensor
from tqdm.auto import tqdm

from ivlens.common.keys import key
from ivlens.common.processes import hidden
from ivlens.common.storage import kept, read_tensors, write_tensors
from ivlens.dynamics.recovery import AFTER, BEFORE, BEFORE_STEERED, HEADS, MINUS, OLD, OTHER, RANDOM, STATE, Recovery
from ivlens.models.backend import Backend
from ivlens.models.backends import backend_of
from ivlens.models.checkpoints import Checkpoint, open_checkpoints
from ivlens.patching.residual import Edit, edit_effects
from ivlens.running.injection import Injection
from ivlens.running.reading import read_prompts
from ivlens.running.tokens import TokenizedPrompt, tokenize
from ivlens.steering.controls import random_vector
from ivlens.tasks.prompts import Prompt, build_prompts
from ivlens.tasks.suite import TaskSuite, as_suite
from ivlens.tasks.task import Task, same_input
from ivlens.vectors.vector import InstructionVector

__all__ = ["recover"]

SCALES = (0.25, 0.5, 1.0, 2.0, 4.0)
Choice = tuple[int | None, float, Edit]  # layer (None where each head's share has its own), scale, and what is done
Rows = Mapping[str, Sequence[TokenizedPrompt]]  # prompts of the validation and the test split
Found = dict[str, Any]  # what one model gave for one task: hits per condition, choices, and the base model's states


def recover(
    checkpoints: Sequence[Any] | str | Path,
    tasks: Task | Iterable[Task] | Mapping[str, Task],
    vectors: Mapping[str, InstructionVector],
    *,
    model: Any = "smollm2",
    subtract: InstructionVector | Mapping[str, InstructionVector] | None = None,
    alternatives: Mapping[str, Mapping[str, InstructionVector]] | None = None,
    shots: int = 5,
    instruction: bool | str | int = False,
    style: str = "qa",
    layers: Sequence[int] | None = None,
    scales: Sequence[float] = SCALES,
    n_valid: int = 25,
    n_prompts: int | None = 100,
    device_map: Any = None,
    folder: str | Path | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Recovery:
    """Put the base model's vectors back into fine-tuned models (IV §5).

    Layer and scale are chosen per checkpoint and task on the validation split, accuracy is measured on the test split. Beside
    the old vector: a random vector of its norm and another task's vector at the same place, each head's share at its own
    layer, and, as the upper bound, the base model's residual stream put in place of the fine-tuned model's, at the last
    prompt token, after the best layer.

    Parameters
    ----------
    checkpoints, model
        As in `track`.
    tasks
        A task, a list of tasks, or tasks by name, such as `load_tasks` gives.
    vectors
        The base model's, by task.
    subtract
        The new task's vector, taken away together with putting the old one back; one, or one per checkpoint's label.
    alternatives
        More vectors to try, by name: `{"per-task heads": {task: vector}}`.
    shots, instruction, style
        How the prompts look; see `build_prompts`.
    layers, scales
        Those to try; by default every third layer. Scale 1 is as much as the heads write.
    n_valid
        Prompts per task that choose layer and scale; fewer where the split has fewer.
    n_prompts
        Prompts per task that are scored; None for the whole split.
    device_map
        Of models given by name: over which devices, as for `load_model`.
    folder
        Where to keep what is done, so that an interrupted run goes on there.
    seed
        Of all that is drawn at random; global random states are left alone.
    progress
        Show a progress bar.
    """
    suite = as_suite(tasks, answered=["valid", "test"])
    if missing := [name for name in suite if name not in vectors]:
        raise ValueError(f"no vector for task(s) {', '.join(missing)}; extract one each with ivl.extract_vector")
    single = isinstance(checkpoints, (str, Path))
    opened, skipped = open_checkpoints(model, [checkpoints] if single else checkpoints, device_map=device_map)
    look = {"shots": shots, "instruction": instruction, "style": style, "seed": seed}
    with opened[0].use() as hooked:
        backend, base = backend_of(hooked), None if folder is None else key(hooked)
        for vector in vectors.values():
            vector.check_model(hooked)
        layers = [backend.check_layer(x) for x in (range(1, backend.n_layers, 3) if layers is None else layers)]
        built: dict[str, dict[str, list[Prompt]]] = {name: {} for name in suite}
        for name, task in suite.items():
            for split, n in (("valid", min(n_valid, len(task.valid))), ("test", n_prompts)):
                built[name][split] = build_prompts(task, n=n, split=split, **look)
        prompts = {name: {k: tokenize(backend, each) for k, each in parts.items()} for name, parts in built.items()}
    asked = {name: [same_input(prompt.query) for prompt in parts["test"]] for name, parts in built.items()}
    tries = _Tries(suite, vectors, subtract, alternatives or {}, layers, tuple(scales), seed)
    rows: list[dict[str, Any]] = []
    choices: list[dict[str, Any]] = []
    kept = (base, prompts, list(suite), vectors, subtract, alternatives, layers, scales, seed)
    store = _Store(folder, None if folder is None else key(kept))
    with tqdm(total=len(opened) * len(suite), desc="recovering", disable=hidden(progress)) as bar:
        for task in suite:
            bar.set_postfix_str(task)
            before = store.get(opened[0], task, _before, prompts[task], tries)
            bar.update()
            for checkpoint in opened[1:]:
                found = store.get(checkpoint, task, _after, prompts[task], tries, before.get("states"))
                for source in (before, found):
                    rows += _told_hits(source, checkpoint.label, task, asked[task])
                    choices += _told_choices(source, checkpoint.label, task)
                bar.update()
    metadata = {"model": backend.name, "skipped": skipped, "layers": list(layers), "scales": list(scales), **look}
    result = Recovery(pd.DataFrame(rows), pd.DataFrame(choices), metadata)
    if folder is not None:
        result.save(Path(folder) / "recovery.json")
    return result


@dataclass(frozen=True)
class _Tries:
    """Everything that may be put back, and where."""

    suite: TaskSuite
    vectors: Mapping[str, InstructionVector]
    subtract: InstructionVector | Mapping[str, InstructionVector] | None
    alternatives: Mapping[str, Mapping[str, InstructionVector]]
    layers: Sequence[int]
    scales: tuple[float, ...]
    seed: int

    def of(self, backend: Backend, task: str, label: str) -> dict[str, list[Choice]]:
        """By condition: the (layer, scale, edit) to choose from; layer None where each head's share has its own."""
        old = self.vectors[task]
        found = {OLD: self._everywhere(old)}
        new = self.subtract.get(label) if isinstance(self.subtract, Mapping) else self.subtract
        found |= {} if new is None else {MINUS: self._everywhere(old - new)}
        found |= {name: self._everywhere(more[task]) for name, more in self.alternatives.items() if task in more}
        if old.shares is not None:
            by_heads = [Injection.of(backend, old, scale=scale, mode="heads").additions for scale in self.scales]
            found[HEADS] = [(None, scale, Edit(values)) for scale, values in zip(self.scales, by_heads)]
        return found

    def controls(self, task: str, layer: int, scale: float) -> dict[str, Edit]:
        """The random and the other task's vector, where the old one goes."""
        names = list(self.suite)
        other = self.vectors[names[(names.index(task) + 1) % len(names)]]
        random = random_vector(self.vectors[task], seed=self.seed)
        found = {RANDOM: Edit({layer: scale * random.vector})}
        return found if other is self.vectors[task] else {**found, OTHER: Edit({layer: scale * other.vector})}

    def _everywhere(self, vector: InstructionVector) -> list[Choice]:
        return [(layer, s, Edit({layer: s * vector.vector})) for layer in self.layers for s in self.scales]


def _before(backend: Backend, label: str, task: str, prompts: Rows, tries: _Tries) -> Found:
    """The base model: plain, with the vector where it works best, and its residual streams."""
    chosen, plain = _choose(backend, prompts["valid"], {OLD: tries.of(backend, task, label)[OLD]})
    values, baseline = edit_effects(backend, prompts["test"], [chosen[OLD][2]], metric="accuracy")
    states = {}
    for split, rows in prompts.items():
        bare = [TokenizedPrompt(row.prompt) for row in rows]
        states[split] = read_prompts(backend, bare, resid=True).resid[:, list(tries.layers)]
    layer, scale, _, accuracy = chosen[OLD]
    hits = {BEFORE: baseline, BEFORE_STEERED: values[:, 0]}
    choices = {BEFORE: (None, None, plain), BEFORE_STEERED: (layer, scale, accuracy)}
    return {"hits": hits, "choices": choices, "states": states}


def _after(
    backend: Backend, label: str, task: str, prompts: Rows, tries: _Tries, states: Mapping[str, Tensor]
) -> Found:
    """A fine-tuned model: plain, with everything that is put back where it works best, and the controls."""
    at = list(enumerate(tries.layers))
    restored = {k: {layer: Edit({layer: x[:, i]}, replace=True) for i, layer in at} for k, x in states.items()}
    options = tries.of(backend, task, label)
    options[STATE] = [(layer, 1.0, edit) for layer, edit in restored["valid"].items()]
    chosen, plain = _choose(backend, prompts["valid"], options)
    layer, scale, _, _ = chosen[OLD]
    edits = {name: chosen[name][2] for name in options if name != STATE}
    edits |= tries.controls(task, layer, scale)
    edits[STATE] = restored["test"][chosen[STATE][0]]
    values, baseline = edit_effects(backend, prompts["test"], list(edits.values()), metric="accuracy")
    hits = {AFTER: baseline, **{name: values[:, i] for i, name in enumerate(edits)}}
    choices = {AFTER: (None, None, plain), **{name: (c[0], c[1], c[3]) for name, c in chosen.items()}}
    return {"hits": hits, "choices": choices}


def _choose(
    backend: Backend, rows: Sequence[TokenizedPrompt], options: Mapping[str, list[Choice]]
) -> tuple[dict[str, tuple[int | None, float, Edit, float]], float]:
    """Of each condition the layer and scale with the highest accuracy on validation prompts (ties go to the smaller scale,
    then the lower layer), all in one replay; and the accuracy with nothing injected."""
    flat = [(name, choice) for name, choices in options.items() for choice in choices]
    values, baseline = edit_effects(backend, rows, [choice[2] for _, choice in flat], metric="accuracy")
    accuracy = values.mean(0).tolist()
    chosen: dict[str, tuple[int | None, float, Edit, float]] = {}
    for (name, (layer, scale, edit)), value in zip(flat, accuracy):
        best = chosen.get(name)
        if best is None or (value, -abs(scale), -(layer or 0)) > (best[3], -abs(best[1]), -(best[0] or 0)):
            chosen[name] = (layer, scale, edit, value)
    return chosen, baseline.mean().item()


def _told_hits(found: Found, label: str, task: str, asked: Sequence[str]) -> list[dict[str, Any]]:
    return [
        {"checkpoint": label, "task": task, "condition": condition, "prompt": i, "query": query, "hit": hit}
        for condition, hits in found["hits"].items()
        for i, (query, hit) in enumerate(zip(asked, hits.tolist()))
    ]


def _told_choices(found: Found, label: str, task: str) -> list[dict[str, Any]]:
    return [
        {"checkpoint": label, "task": task, "condition": name, "layer": layer, "scale": scale, "accuracy": accuracy}
        for name, (layer, scale, accuracy) in found["choices"].items()
    ]


class _Store:
    """Keeps what is found in a folder, one file per checkpoint and task."""

    def __init__(self, folder: str | Path | None, settings: str | None):
        self.folder = None if folder is None else Path(folder) / "partial"
        self.settings = settings

    def get(self, checkpoint: Checkpoint, task: str, make: Callable[..., Found], *given: Any) -> Found:
        """What was kept for a checkpoint and task, or else what `make` finds, kept from now on."""
        with checkpoint.use() as model:
            name = None if self.folder is None else key(self.settings, checkpoint.label, model, task)
            path = None if self.folder is None else self.folder / f"{name}.safetensors"
            return kept(path, partial(make, backend_of(model), checkpoint.label, task, *given), self._read, self._keep)

    def _read(self, path: Path) -> Found:
        tensors, about = read_tensors(path)
        groups: Found = {"hits": {}, "states": {}, "choices": about["choices"]}
        for name in about["order"]:  # that of the conditions; the file sorts them
            group, condition = name.split("/", 1)
            groups[group][condition] = tensors[name]
        return groups

    def _keep(self, path: Path, found: Found) -> None:
        tensors = {f"{g}/{k}": t for g in ("hits", "states") for k, t in found.get(g, {}).items()}
        write_tensors(path, tensors, {"choices": found["choices"], "order": list(tensors)})

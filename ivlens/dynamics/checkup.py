"""`checkup`: one look at what a fine-tune cost, and a second one at what fell."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
from tqdm.auto import tqdm

from ivlens.common.keys import key
from ivlens.common.processes import hidden
from ivlens.common.storage import kept, read_json, safe_name, write_json
from ivlens.dynamics.diagnosis import Checkup
from ivlens.dynamics.recovery import AFTER, BEFORE, OLD, RANDOM
from ivlens.dynamics.second_look import find_heads, find_vector, hits, put_back, shares, still_written
from ivlens.dynamics.skills import FAST, FULL, Sizes, as_skills, asked_prompts, look_of, skill_about, why_not
from ivlens.models.adapters import hub_adapter, is_adapter
from ivlens.models.backends import backend_of
from ivlens.models.checkpoints import FINAL, SETTINGS, Checkpoint, open_checkpoints
from ivlens.models.head import Head
from ivlens.steering.controls import random_vector
from ivlens.tasks.checks import check_source
from ivlens.tasks.examples import same_input
from ivlens.tasks.prompts import Prompt, build_prompts
from ivlens.tasks.suite import TaskSuite
from ivlens.tasks.task import Task
from ivlens.vectors.files import FILE
from ivlens.vectors.vector import InstructionVector

__all__ = ["checkup"]

HEADS, KEPT = ["skill", "head", "written"], "part of a checkup"


def checkup(
    base: Any,
    after: Any,
    skills: Task | Iterable[Task] | Mapping[str, Task] | None = None,
    *,
    fast: bool = False,
    tolerance: float = 0.05,
    shots: int = 5,
    instruction: bool | str | int = False,
    style: str | None = None,
    n_prompts: int | None = None,
    max_new_tokens: int = 40,
    device_map: Any = None,
    folder: str | Path | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Checkup:
    """What a fine-tune cost: each skill before and after, and of what fell, whether it is overlaid or gone.

    First look: greedy answers to the same test prompts, right or wrong, in both models. Second look, at skills that fell: the vector of
    the base model (heads and vector from the training split, layer and scale from the validation split), added to prompts that
    ask for nothing at the same place in both models, beside a random vector of its norm; then added to prompts that ask, at the
    place that the fine-tuned model's validation prompts choose. `Checkup` says by which rules that is judged.

    Parameters
    ----------
    base
        A model's name or folder, or a hooked model (not with adapters).
    after
        An adapter's folder or hub id, a folder of `fine_tune`, a model's name or folder, or a hooked model.
    skills
        Tasks; None for built-in ones: words, lists, continents, general knowledge (the likeliest of the options, so that it is known and
        not only said as asked), and three instructions on the form of an answer.
    fast
        Fewer skills and prompts, and no second look at free answers.
    tolerance
        By how much accuracy may fall, 0.05 for five points.
    shots, instruction, style
        How prompts ask; see `build_prompts`. Where answers are free: told, in style `chat`, without demonstrations.
    n_prompts
        Prompts per task, of the test split; default 100, of free answers 48 (`fast`: 50 and 20), or as many as there are.
    max_new_tokens
        How long free answers may be.
    device_map
        Of models given by name: over which devices, as for `load_model`.
    folder
        Where to keep what is done, so that an interrupted run goes on there, the old vectors, and the result in `checkup.json`.
    seed
        Of all that is drawn at random; global random states are left alone.
    progress
        Show a progress bar.

    Raises
    ------
    ValueError
        If the models can't be compared, the adapter is damaged or belongs to another base, prompts ask for nothing, or a skill lacks
        test, validation or training examples. All that is checked before anything is measured.
    """
    if not 0 <= tolerance < 1:
        raise ValueError(f"tolerance={tolerance!r} must be from 0 to below 1, such as 0.05 for five points of accuracy")
    sizes = replace(FAST if fast else FULL, length=max_new_tokens)
    if n_prompts is not None:
        sizes = replace(sizes, prompts=n_prompts, free=n_prompts)
    suite = as_skills(skills, fast)
    looks = {name: look_of(task, shots, instruction, style, seed) for name, task in suite.items()}
    asked = {name: asked_prompts(task, sizes, looks[name]) for name, task in suite.items()}
    models, names = _opened(base, after, device_map)
    about: dict[str, Any] = {"tolerance": tolerance, "fast": fast, "shots": shots, "instruction": instruction}
    about |= {"seed": seed, **names, "skills": {name: skill_about(task, fast) for name, task in suite.items()}}
    work = _Work(suite, looks, asked, sizes, None if folder is None else Path(folder))
    with tqdm(total=2 * len(suite), desc="checkup", disable=hidden(progress)) as bar:
        # What may not load comes first.
        rows = [row for when in (AFTER, BEFORE) for row in work.first_look(when, models[when], bar)]
        result = Checkup(pd.DataFrame(rows), pd.DataFrame(columns=HEADS), about)
        if not result.counting:
            said = f"the base model does none of {', '.join(suite.names)} as asked, so none can fall, and this says nothing"
            warnings.warn(f"{said}; give skills that it does, or more n_prompts or shots", stacklevel=2)
        if fallen := [name for name in result.fell if not about["skills"][name]["not_looked_at"]]:
            more, heads = work.second_look(models, fallen, result.counting, about["skills"], bar)
            result = Checkup(pd.DataFrame(rows + more), pd.DataFrame(heads, columns=HEADS), about)
    if folder is not None:
        result.save(Path(folder) / "checkup.json")
    return result


@dataclass(frozen=True)
class _Work:
    """What is asked of both models, and what was answered already."""

    suite: TaskSuite
    looks: Mapping[str, dict[str, Any]]
    asked: Mapping[str, list[Prompt]]
    sizes: Sizes
    folder: Path | None

    def first_look(self, when: str, checkpoint: Checkpoint, bar: tqdm) -> list[dict[str, Any]]:
        """Answers to what asks for the skills."""
        rows = []
        with checkpoint.use() as model:
            mine = self._key(model)
            for name, prompts in self.asked.items():
                bar.set_postfix_str(f"{when}: {name}")
                rows += self._answers(model, mine, name, when, True, prompts, {"": None})
                bar.update()
        return rows

    def second_look(
        self, models: Mapping[str, Checkpoint], fallen: list[str], counting: list[str], about: dict[str, Any], bar: tqdm
    ) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Answers with the old vector and a random one, and what the heads behind it still write; where vectors are, into `about`."""
        rows, heads, found = [], [], {}
        bar.total += 2 * len(fallen)
        with models[BEFORE].use() as model:
            mine, carriers = self._key(model), self._heads(model, fallen, counting)
            for name in fallen:
                bar.set_postfix_str(f"second look, before: {name}")
                task, look = self.suite[name], self.looks[name]
                make = partial(find_vector, model, task, carriers, look, self.sizes)
                vector = self._vector(make, name, mine, carriers)
                found[name] = vector, *shares(model, task, vector, look, self.sizes, own=True)
                rows += self._answers(model, mine, name, BEFORE, False, self._untold(name), self._tries(name, vector))
                bar.update()
        with models[AFTER].use() as model:
            mine = self._key(model)
            for name, (vector, its_heads, before) in found.items():
                bar.set_postfix_str(f"second look, after: {name}")
                task, look = self.suite[name], self.looks[name]
                _, now = shares(model, task, vector, look, self.sizes)
                heads += [{"skill": name, **x} for x in still_written(vector, its_heads, before, now)]
                rows += self._answers(model, mine, name, AFTER, False, self._untold(name), self._tries(name, vector))
                back = self._vector(partial(put_back, model, task, vector, look, self.sizes), name, mine, vector)
                rows += self._answers(model, mine, name, AFTER, True, self.asked[name], self._tries(name, back))
                if self.folder is not None:
                    about[name]["vector"] = str(back.save(self.folder / "vectors" / safe_name(name)))
                bar.update()
        return rows, heads

    def _tries(self, name: str, vector: InstructionVector) -> dict[str, InstructionVector | None]:
        return {OLD: vector, RANDOM: random_vector(vector, seed=self.looks[name]["seed"])}

    def _untold(self, name: str) -> list[Prompt]:
        """Its prompts that ask for nothing."""
        return asked_prompts(self.suite[name], self.sizes, {**self.looks[name], "shots": 0, "instruction": False})

    def _heads(self, model: Any, fallen: list[str], counting: list[str]) -> list[Head]:
        """Located on all skills that count, so that they are the same whatever fell; none where none is needed."""
        answered = [name for name in counting if not self.suite[name].is_checked and not why_not(self.suite[name])]
        if not set(fallen) & set(answered):
            return []
        folder = None if self.folder is None else self.folder / "partial"
        return find_heads(model, self.suite.subset(answered), self.looks[answered[0]], self.sizes, folder)

    # -- what is kept -----------------------------------------------------------------------------------------------
    def _key(self, model: Any) -> str:
        return "" if self.folder is None else key(model)

    def _path(self, *about: Any, ending: str = "") -> Path | None:
        return None if self.folder is None else self.folder / "partial" / f"{key(*about)}{ending}"

    def _answers(
        self,
        model: Any,
        mine: str,
        name: str,
        when: str,
        asked: bool,
        prompts: list[Prompt],
        tries: Mapping[str, InstructionVector | None],
    ) -> list[dict[str, Any]]:
        path = self._path(mine, prompts, tries, self.sizes.length, _checks(prompts), ending=".json")
        make = partial(hits, model, prompts, tries, self.sizes.length)
        found = kept(path, make, lambda at: read_json(at, KEPT), lambda at, x: write_json(at, KEPT, x))
        about = {"skill": name, "model": when, "asked": asked}
        return [
            {**about, "added": added, "prompt": i, "query": same_input(p.query), "hit": hit, "text": text}
            for added in tries
            for i, (p, hit, text) in enumerate(zip(prompts, found[added]["hit"], found[added]["text"]))
        ]

    def _vector(self, make: Callable[[], InstructionVector], name: str, *about: Any) -> InstructionVector:
        checks = _checks(build_prompts(self.suite[name], split="valid"))
        path = self._path(*about, self.suite[name], self.looks[name], self.sizes, checks)
        file = None if path is None else path / FILE
        return kept(file, make, InstructionVector.load, lambda at, vector: vector.save(at.parent))


def _checks(prompts: Sequence[Prompt]) -> list[str]:
    """Their code, so that what an edited check let pass isn't taken for what it lets pass now."""
    return [check_source(check) for check in sorted({p.query.check for p in prompts if p.query.check})]


def _opened(base: Any, after: Any, device_map: Any) -> tuple[dict[str, Checkpoint], dict[str, Any]]:
    """Both models, and what to call them."""
    if isinstance(after, (str, Path)):
        run = Path(after)
        after = str(run / FINAL) if (run / SETTINGS).is_file() else hub_adapter(str(after))
    (start, *others), broken = open_checkpoints(base, [after], device_map=device_map)
    if broken:
        raise ValueError("; ".join(broken.values()))
    names = {BEFORE: base, AFTER: after}
    told = {when: str(x) if isinstance(x, (str, Path)) else backend_of(x).name for when, x in names.items()}
    return {BEFORE: start, AFTER: others[-1]}, {**told, "adapter": is_adapter(after)}

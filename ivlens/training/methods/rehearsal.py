"""Rehearsal without stored examples: rows that the model before the stage writes itself."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from ivlens.common.storage import read_json, safe_name, write_json
from ivlens.models.backend import Backend
from ivlens.models.backends import backend_of
from ivlens.models.loading import load_model
from ivlens.running.decoding import complete
from ivlens.running.injection import Injection
from ivlens.running.tokens import TokenizedPrompt, tokenize
from ivlens.steering.controls import random_vector
from ivlens.tasks.prompts import Prompt
from ivlens.tasks.task import Example, Task
from ivlens.training.data import IGNORED, answer_dataset
from ivlens.training.methods.method import Method
from ivlens.training.methods.stage import Stage, sample_rows
from ivlens.vectors.vector import InstructionVector

if TYPE_CHECKING:
    import datasets

__all__ = ["TEXT", "Rehearsal", "TextRehearsal"]

KIND, FILE = "rehearsed tasks", "rehearsal.json"
MARK = "\x00"
TEXT = "(text by the base model)"  # in place of a task's name


@dataclass(frozen=True)
class TextRehearsal(Method):
    """A share of the rows is text that the base model writes from nothing, all of it trained on (arXiv 2505.13811).

    Attributes
    ----------
    share
        Fraction of the rows.
    n_tokens
        Of each text.
    """

    changes: ClassVar[frozenset[str]] = frozenset({"rows"})
    share: float = 0.1
    n_tokens: int = 64

    def __post_init__(self) -> None:
        _check_share(self.share)
        if self.n_tokens < 1:
            raise ValueError(f"n_tokens={self.n_tokens} must be at least 1")

    def data(self, stage: Stage) -> datasets.Dataset:
        backend = _before(stage, base=True)
        first = backend.tokenizer.bos_token_id
        first = backend.end_tokens[0] if first is None else first
        n = round(self.share * len(stage.dataset))
        start = TokenizedPrompt((first,))
        sampling = {"max_new_tokens": self.n_tokens, "stop": None, "temperature": 1.0, "seed": stage.seed}
        texts = complete(backend, [start] * n, {0: None}, **sampling)[0].texts
        rows = [backend.tokenizer.encode(text, add_special_tokens=False) for text in texts]
        labels = [{"input_ids": [first, *ids], "labels": [IGNORED, *ids]} for ids in rows if ids]
        about = {"task": TEXT}
        return _mixed(stage, [{**x, "attention_mask": [1] * len(x["labels"]), **about} for x in labels])


@dataclass(frozen=True)
class Rehearsal(Method):
    """A share of the rows is made up of earlier tasks: under an old instruction the model before the stage writes questions (generative
    replay, arXiv 1909.03329), and answers them with the old task's vector put in (ours). Kept are instructions and vectors only.

    Attributes
    ----------
    share
        Fraction of the rows, from the second stage on.
    steered
        With the vector; False: the model's own answers, the baseline.
    random
        With a random vector of the same norm instead: the control.
    """

    changes: ClassVar[frozenset[str]] = frozenset({"rows"})
    keeps: ClassVar[bool] = True
    share: float = 0.1
    steered: bool = True
    random: bool = False

    def __post_init__(self) -> None:
        _check_share(self.share)

    @property
    def needs_vectors(self) -> bool:
        return self.steered

    def check(self, tasks: Sequence[str], vectors: Mapping[str, InstructionVector] | None) -> None:
        if self.steered and (missing := [task for task in tasks if task not in (vectors or {})]):
            there = f"rehearsal puts vectors in, and there is none for task(s) {', '.join(missing)}"
            raise ValueError(f"{there}; extract one each with ivl.extract_vector, or take steered=False")

    def data(self, stage: Stage) -> datasets.Dataset:
        for name, task in stage.tasks.items():
            if not _instructions(task, stage.look["instruction"]):
                there = f"task {name!r} is asked without an instruction, under which it could be rehearsed later"
                raise ValueError(f"{there}; train with instruction=True")
        path = stage.remembered(FILE)
        if path is None:
            return stage.dataset
        known, backend = read_json(path, KIND)["tasks"], _before(stage)
        each = max(1, round(self.share * len(stage.dataset) / len(known)))
        return _mixed(stage, [row for name in known for row in self._rows(stage, backend, name, known[name], each)])

    def finish(self, stage: Stage) -> None:
        path = stage.remembered(FILE)
        known = {} if path is None else read_json(path, KIND)["tasks"]
        for name in known if self.steered else ():
            InstructionVector.load(stage.remembered(safe_name(name))).save(stage.memory(safe_name(name)))
        for name, task in stage.tasks.items():
            told = _instructions(task, stage.look["instruction"])
            known[name] = {"instructions": told, "style": stage.look["style"]}
            if self.steered:
                stage.vectors[name].save(stage.memory(safe_name(name)))
        write_json(stage.memory(FILE), KIND, {"tasks": known})

    def _rows(
        self, stage: Stage, backend: Backend, name: str, known: Mapping[str, Any], n: int
    ) -> Iterator[dict[str, Any]]:
        """So many of one task, or as many as there are different questions."""
        rng, injection = random.Random(f"{stage.seed}/{name}"), None
        if self.steered:
            vector = InstructionVector.load(stage.remembered(safe_name(name)))
            injection = Injection.of(backend, random_vector(vector, seed=stage.seed) if self.random else vector)
        told = [rng.choice(known["instructions"]) for _ in range(2 * n)]
        prompts = [Prompt(Example(MARK, ""), (), text, known["style"], name) for text in told]
        begun = [prompt.render(backend.tokenizer).split(MARK)[0].rstrip(" ") for prompt in prompts]
        sampling = {"max_new_tokens": 40, "temperature": 1.0, "seed": stage.seed}
        written = complete(backend, tokenize(backend, begun), {0: None}, **sampling)[0].texts
        asked = {x.strip(): replace(p, query=Example(x.strip(), "")) for p, x in zip(prompts, written) if x.strip()}
        asked = list(asked.values())[:n]
        answers = complete(backend, tokenize(backend, asked), {0: injection}, max_new_tokens=40)[0].texts
        told = [replace(p, query=replace(p.query, output=y.strip())) for p, y in zip(asked, answers) if y.strip()]
        yield from answer_dataset(backend, told) if told else ()


def _instructions(task: Task, given: bool | str | int) -> list[str]:
    """What its training prompts may say: the task's wordings, or those of its examples."""
    if isinstance(given, str) or given is False or given is None:
        return [given] if given else []
    own = list(dict.fromkeys(x.instruction for x in task.train if x.instruction))[:20]
    wordings = own or list(task.instructions)
    return wordings if given is True or own else [(*task.instructions, *task.held_out)[given]]


def _check_share(share: float) -> None:
    if not 0 < share < 1:
        raise ValueError(f"share={share} must be between 0 and 1")


def _before(stage: Stage, base: bool = False) -> Backend:
    """A hooked copy of the model before the stage, or of the base."""
    model = copy.deepcopy(stage.model)
    if base and hasattr(model, "unload"):
        model = model.unload()
    return backend_of(load_model(model, tokenizer=stage.tokenizer, backend="bridge"))


def _mixed(stage: Stage, made: Sequence[dict[str, Any]]) -> datasets.Dataset:
    """The stage's rows with these in the place of some."""
    import datasets

    rows = [*sample_rows(stage.dataset, len(stage.dataset) - len(made), stage.seed), *made]
    random.Random(stage.seed).shuffle(rows)
    return datasets.Dataset.from_list(rows)

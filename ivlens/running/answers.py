"""A model's own answers that pass their check, where no gold answer exists: greedy ones, and samples where these fail."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ivlens.common.keys import key
from ivlens.common.storage import kept, read_json, write_json
from ivlens.models.backend import Backend
from ivlens.models.backends import backend_of
from ivlens.running.decoding import complete
from ivlens.running.tokens import tokenize
from ivlens.tasks.checks import check_source, passes
from ivlens.tasks.examples import SPLITS, Example
from ivlens.tasks.prompts import Prompt, build_prompts, common_stop
from ivlens.tasks.task import Task

__all__ = ["OwnAnswers", "own_answers", "with_own_answers"]


@dataclass(frozen=True)
class OwnAnswers:
    """Prompts whose answer is the model's own, and how many answers it took: of `asked` prompts, `tried` in all."""

    prompts: list[Prompt]
    asked: int
    tried: int

    def __repr__(self) -> str:
        return f"OwnAnswers({len(self.prompts)} of {self.asked} prompts, {self.tried} answers tried)"


def own_answers(
    backend: Backend,
    prompts: Sequence[Prompt],
    *,
    tries: int = 4,
    temperature: float = 0.7,
    max_new_tokens: int = 40,
    batch_size: int | None = None,
    seed: int = 0,
    folder: str | Path | None = None,
) -> OwnAnswers:
    """The model's first answer to each prompt that passes its check (rejection sampling; our choice).

    In style `qa`, whose answers begin with a space of their own, without the white space that it begins with.

    Parameters
    ----------
    tries
        Answers per prompt: the greedy one, then samples.
    folder
        Where to keep them.

    Raises
    ------
    ValueError
        If no answer passes, or a prompt has no check.
    RuntimeError
        If a check raises.
    """
    if tries < 1 or max_new_tokens < 1 or not (temperature > 0 or tries == 1):
        given = f"tries={tries}, max_new_tokens={max_new_tokens} and temperature={temperature}"
        raise ValueError(f"{given}: the first two must be 1 or more, the last above 0")
    if unchecked := [prompt for prompt in prompts if not prompt.query.check]:
        said = f"{len(unchecked)} of {len(prompts)} prompts of task {unchecked[0].task!r} have no check"
        raise ValueError(f"{said} that a model's own answers could pass; give every example one, or an output")
    checks = sorted({prompt.query.check for prompt in prompts})
    sampling = (tries, temperature, max_new_tokens, seed)
    about = key(backend.model, prompts, [check_source(x) for x in checks], *sampling)
    path = None if folder is None else Path(folder) / f"answers-{about}.json"

    def made() -> dict[str, Any]:
        texts, tried = _sampled(backend, prompts, *sampling, batch_size)
        return {"texts": texts, "tried": tried}

    found = kept(path, made, lambda at: read_json(at, "own answers"), lambda at, x: write_json(at, "own answers", x))
    texts, tried = found["texts"], found["tried"]
    answered = [
        replace(p, query=replace(p.query, output=text.strip() if p.style == "qa" else text))
        for p, text in zip(prompts, texts, strict=True)
        if text is not None
    ]
    if not answered:
        raise ValueError(
            f"none of {tried} answers to {len(prompts)} prompts of task {prompts[0].task!r} meets its check ({', '.join(checks)}): word "
            "the instruction otherwise, or raise tries= or max_new_tokens="
        )
    return OwnAnswers(answered, len(prompts), tried)


def with_own_answers(
    model: Any,
    task: Task,
    *,
    style: str = "chat",
    shots: int = 0,
    instruction: bool | str | int = True,
    template: Mapping[str, Any] | None = None,
    splits: Sequence[str] = ("train", "valid", "test"),
    tries: int = 4,
    max_new_tokens: int = 40,
    seed: int = 0,
    folder: str | Path | None = None,
) -> Task:
    """A task with a check whose outputs are the model's own answers that pass it, so that it can be tracked, probed, trained on.

    Parameters
    ----------
    model
        A hooked model, such as `load_model` gives.
    task
        Its examples need a check; their outputs are replaced.
    style, shots, instruction, template
        How the prompts look; see `build_prompts`.
    splits
        Which to answer; examples without an answer that passes are left out, and all of the other splits.
    tries
        Answers per prompt, until one passes: the greedy one, then samples.
    max_new_tokens
        How long answers may be, in tokens.
    seed
        Of all that is drawn at random; global random states are left alone.
    folder
        Where to keep the answers; None for nowhere.

    Raises
    ------
    ValueError
        If none of a split's answers passes.
    """
    look = {"style": style, "shots": shots, "instruction": instruction, "template": template, "seed": seed}
    sampling = {"tries": tries, "max_new_tokens": max_new_tokens, "seed": seed, "folder": folder}
    found: dict[str, tuple[Example, ...]] = dict.fromkeys(SPLITS, ())
    for split in splits:
        answered = own_answers(backend_of(model), build_prompts(task, split=split, **look), **sampling)
        found[split] = tuple(prompt.query for prompt in answered.prompts)
    return replace(task, **found)


def _sampled(
    backend: Backend,
    prompts: Sequence[Prompt],
    tries: int,
    temperature: float,
    max_new_tokens: int,
    seed: int,
    batch_size: int | None,
) -> tuple[list[str | None], int]:
    rows = tokenize(backend, [replace(p, query=replace(p.query, output="")) for p in prompts])
    stop = common_stop(prompts)
    texts: list[str | None] = [None] * len(prompts)
    tried = 0
    for attempt in range(tries):
        left = [i for i, text in enumerate(texts) if text is None]
        if not left:
            break
        options = {"max_new_tokens": max_new_tokens, "stop": stop, "batch_size": batch_size, "seed": seed + attempt}
        some = [rows[i] for i in left]
        written = complete(backend, some, {0: None}, temperature=temperature if attempt else 0.0, **options)[0].texts
        tried += len(left)
        for i, text in zip(left, written):
            if passes(prompts[i].query.check, text):
                texts[i] = text.rstrip()
    return texts, tried

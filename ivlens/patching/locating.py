"""Locating the heads that carry an instruction."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from ivlens.common.keys import key
from ivlens.common.processes import hidden
from ivlens.common.storage import kept, read_tensors, write_tensors
from ivlens.models.backend import Backend
from ivlens.models.backends import backend_of
from ivlens.patching.effects import HeadEffects
from ivlens.patching.heads import collect_effects, mean_head_outputs, sweep_heads
from ivlens.running.answers import own_answers
from ivlens.running.scores import check_metric
from ivlens.running.tokens import tokenize
from ivlens.tasks.counterfactuals import counterfactual
from ivlens.tasks.prompts import Prompt, build_prompts
from ivlens.tasks.suite import as_suite
from ivlens.tasks.task import Task, same_input

__all__ = ["locate_heads"]


def locate_heads(
    model: Any,
    tasks: Task | Iterable[Task] | Mapping[str, Task],
    *,
    shots: int = 10,
    instruction: bool | str | int = False,
    style: str = "qa",
    template: Mapping[str, Any] | None = None,
    counterfactual: str | None = None,
    metric: str | None = None,
    n_prompts: int = 25,
    n_mean: int = 50,
    only_correct: bool = False,
    tries: int = 4,
    max_new_tokens: int = 40,
    answer_tokens: int = 8,
    method: str = "auto",
    max_rows: int | None = None,
    folder: str | Path | None = None,
    seed: int = 0,
    progress: bool = True,
) -> HeadEffects:
    """Find the heads that carry an instruction, by activation patching (IV §3; FV §2.2).

    For each task: the mean head outputs of prompts that state the task (demonstrations and/or instruction) replace, one head
    at a time, the head's output in counterfactual prompts that don't; the effect is the answer's gain. Training split only.

    Parameters
    ----------
    model
        A hooked model, such as `load_model` gives.
    tasks
        A task, a list of tasks, or tasks by name, such as `load_tasks` gives.
    shots, instruction, style, template
        How the prompts look; see `build_prompts`. These are the stating ones.
    counterfactual
        How the instruction is destroyed: `shuffled_labels` (default with demonstrations), `no_instruction` (default without),
        `other_instruction`, `random_text`.
    metric
        See `head_effects`; default `probability`, and `log_probability` where answers are free. `logit_difference` takes another
        example's answer as the distractor.
    n_prompts
        Prompts per task, counterfactual ones. Those that come out like their original are left out, with a warning.
    n_mean
        Prompts per task behind the mean head outputs (the code of the Function Vectors paper uses 100).
    only_correct
        Of these, count only those whose answer's first token the model ranks first.
    tries, max_new_tokens, answer_tokens
        Of tasks with a check, whose answers are the model's own: how many answers to try per prompt (one greedy, the others
        sampled) until one passes, how long they are, and how many of their first tokens effects are measured on.
    method, max_rows
        How heads are patched, and in how much memory; see `head_effects`.
    folder
        Where to keep what is done, so that an interrupted run goes on there.
    seed
        Of all that is drawn at random; global random states are left alone.
    progress
        Show a progress bar.

    Returns
    -------
    HeadEffects
        Effects per prompt, layer and head; `.top(10)` are the instruction heads.

    Raises
    ------
    ValueError
        If no prompt states its task, a counterfactual changes none of a task's prompts, `logit_difference` finds no answer
        that differs in its first token, or none of the model's own answers passes its check.
    """
    suite = as_suite(tasks)
    backend = backend_of(model)
    free = {task.is_checked for task in suite.values()}
    if len(free) > 1 and metric is None:
        raise ValueError(
            "some of the tasks have free answers, some one right answer: locate them apart, or give a metric"
        )
    metric = metric or ("log_probability" if True in free else "probability")
    counterfactual = counterfactual or ("shuffled_labels" if shots else "no_instruction")
    check_metric(metric)
    if n_prompts < 1 or n_mean < 1:
        raise ValueError(f"n_prompts={n_prompts} and n_mean={n_mean} must be 1 or more")
    if True in free and (only_correct or answer_tokens < 1):
        given = (
            "only_correct=True counts right answers" if only_correct else f"answer_tokens={answer_tokens} is below 1"
        )
        raise ValueError(f"{given}, but some tasks have free answers: leave it out, or give a number from 1 on")
    if shots == 0 and (instruction is False or instruction is None):
        said = "with shots=0 and instruction=False no prompt states its task"
        raise ValueError(f"{said}: there is nothing to locate; pass shots=10 or instruction=True")
    about = None if folder is None else key(backend.model, method)
    look = {"shots": shots, "instruction": instruction, "style": style, "template": template, "split": "train"}
    values, baselines, queries, names, own, checked = [], [], [], [], {}, False
    with tqdm(total=len(suite), desc="locating heads", disable=hidden(progress)) as bar:
        for task in suite.values():
            bar.set_postfix_str(task.name)
            clean = build_prompts(task, n=n_prompts, seed=seed + 1, **look)
            if task.is_checked:
                sampling = {"tries": tries, "max_new_tokens": max_new_tokens, "folder": folder, "seed": seed}
                answers = own_answers(backend, clean, **sampling)
                clean = answers.prompts
                own[task.name] = {"asked": answers.asked, "tried": answers.tried, "kept": len(clean)}
            broken = _changed(backend, clean, counterfactual, list(suite.values()), seed)
            wrong = _distractors(backend, broken, task) if metric == "logit_difference" else None
            stating = build_prompts(task, n=n_mean, seed=seed, repeat=True, **look)
            mean = _mean(model, stating, only_correct, folder, about)
            options = {"metric": metric, "distractors": wrong, "method": method, "max_rows": max_rows}
            options["answer_tokens"] = answer_tokens if task.is_checked else None
            sweep = sweep_heads(model, broken, None, mean, **options)
            asked = [same_input(prompt.query) for prompt in broken]
            if len(set(asked)) > 1 and len(set(sweep.scored)) == 1:
                seen = f"metric={metric!r}, which sees {backend.tokenizer.decode(sweep.scored[0])!r}"
                said = f"the {len(asked)} answers of task {task.name!r} are all the same to {seen}"
                warnings.warn(f"{said}: heads that raise it are found; give examples with other answers", stacklevel=2)
            sweep.checked = checked
            scores, baseline = collect_effects(sweep, folder, about, progress and len(suite) == 1)
            values.append((scores - baseline[:, None]).unflatten(1, mean.shape[:2]))
            baselines.append(baseline)
            queries += asked
            names += [task.name] * len(asked)
            method, checked = sweep.method, sweep.checked  # self-checked once for all tasks
            bar.update()
    settings = {"shots": shots, "instruction": instruction, "style": style, "counterfactual": counterfactual}
    settings |= {"model": backend.name, "method": method, "n_mean": n_mean, "seed": seed}
    settings |= {"own_answers": own, "answer_tokens": answer_tokens} if own else {}
    return HeadEffects(torch.cat(values), torch.cat(baselines), tuple(names), metric, settings, tuple(queries))


def _mean(
    model: Any, prompts: Sequence[Prompt], only_correct: bool, folder: str | Path | None, about: str | None
) -> Float[Tensor, "layer head d_head"]:
    """Kept to the last digit, which other batches would change, and effects are kept by it."""
    path = None if folder is None else Path(folder) / f"mean-{key(about, prompts, only_correct)}.safetensors"
    make = partial(mean_head_outputs, model, prompts, only_correct=only_correct)
    kind = "mean head outputs"
    return kept(
        path,
        make,
        lambda at: read_tensors(at, kind=kind)[0]["z"],
        lambda at, z: write_tensors(at, {"z": z}, {"kind": kind}),
    )


def _changed(backend: Backend, clean: list[Prompt], kind: str, tasks: list[Task], seed: int) -> list[Prompt]:
    """The counterfactuals that differ from their original: effects of the others would be noise."""
    broken = counterfactual(clean, kind, tasks=tasks, tokenizer=backend.tokenizer, seed=seed)
    pairs = zip(tokenize(backend, clean), tokenize(backend, broken))
    changed = [prompt for prompt, (a, b) in zip(broken, pairs) if a.prompt != b.prompt]
    if len(changed) == len(broken):
        return broken
    known = {"shuffled_labels": "one answer can't be shuffled", "no_instruction": "they state no task"}
    same = f"{len(broken) - len(changed)} of {len(broken)} prompts of task {broken[0].task!r}"
    said = f"counterfactual={kind!r} leaves {same} as they are ({known.get(kind, 'the text is the same')})"
    if not changed:
        raise ValueError(f"{said}: there is nothing to locate; choose another, more shots or other examples")
    warnings.warn(f"{said}; these are left out", stacklevel=3)
    return changed


def _distractors(backend: Backend, prompts: Sequence[Prompt], task: Task) -> list[str]:
    """Another example's answer for each prompt, differing from its own in the first token."""
    wrong = []
    for prompt in prompts:
        (own,) = tokenize(backend, [prompt])
        examples = (x for x in prompt.demonstrations + task.train if x.output not in ("", prompt.query.output))
        others = dict.fromkeys(Prompt(x, style=prompt.style).answer for x in examples)
        other = next((x for x in others if tokenize(backend, [prompt], [x])[0].answer[0] != own.answer[0]), None)
        if other is None:
            needed = f"two answers in task {task.name!r} that differ in their first token"
            raise ValueError(f"metric='logit_difference' needs {needed}; take metric='log_probability'")
        wrong.append(other)
    return wrong

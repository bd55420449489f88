"""Mean head outputs, indirect effects of single heads, and the heads that carry an instruction."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from ivlens.common.keys import key
from ivlens.common.storage import read_tensors, write_tensors
from ivlens.models.backends import backend_of
from ivlens.patching.effects import HeadEffects
from ivlens.running.reading import read_prompts
from ivlens.running.replay import Sites, Sweep
from ivlens.running.scores import check_metric
from ivlens.running.tokens import TokenizedPrompt, tokenize
from ivlens.tasks.counterfactuals import counterfactual
from ivlens.tasks.prompts import Prompt, build_prompts
from ivlens.tasks.suite import as_suite
from ivlens.tasks.task import Task

__all__ = ["head_effects", "head_outputs", "locate_heads", "mean_head_outputs"]


def mean_head_outputs(
    model: Any,
    prompts: Sequence[Prompt | str | Tensor],
    *,
    only_correct: bool = False,
    batch_size: int = 8,
    progress: bool = False,
) -> Float[Tensor, "layer head d_head"]:
    """Mean output of every head (`hook_z`) at the last prompt token: z̄ of the paper (IV §3; FV §2.2); see `head_outputs`."""
    read = head_outputs(model, prompts, only_correct=only_correct, batch_size=batch_size, progress=progress)
    return read.double().mean(0).float()


@torch.inference_mode()
def head_outputs(
    model: Any,
    prompts: Sequence[Prompt | str | Tensor],
    *,
    only_correct: bool = False,
    batch_size: int = 8,
    progress: bool = False,
) -> Float[Tensor, "prompt layer head d_head"]:
    """Output of every head at every prompt's last token.

    Parameters
    ----------
    only_correct
        Count only prompts (`Prompt` objects) whose answer's first token the model ranks first.

    Raises
    ------
    ValueError
        If no prompt counts, because none is answered correctly.
    """
    backend = backend_of(model)
    backend.check_hooks()
    rows = tokenize(backend, prompts)
    # Scored by the first token of the answer, which needs no answer tokens in the input.
    rows = [TokenizedPrompt(r.prompt, r.answer[:1] if only_correct else ()) for r in rows]
    with tqdm(total=len(rows), desc="mean head outputs", disable=not progress) as bar:
        read = read_prompts(backend, rows, z=True, batch_size=batch_size, bar=bar)
    z = read.z[read.scores["accuracy"] == 1] if only_correct else read.z
    if not len(z):
        raise ValueError(
            "the model answers none of the prompts correctly; use more shots, other prompts, or only_correct=False"
        )
    return z


def head_effects(
    model: Any,
    prompts: Sequence[Prompt | str | Tensor],
    answers: Sequence[str] | None,
    replacement: Float[Tensor, "layer head d_head"],
    *,
    metric: str = "probability",
    position: int = -1,
    distractors: Sequence[str] | None = None,
    method: str = "auto",
    max_rows: int | None = None,
    folder: str | Path | None = None,
    progress: bool = False,
) -> Float[Tensor, "prompt layer head"]:
    """Causal indirect effect of replacing one head's output, for every head and prompt (IV §3; FV §2.2).

    CIE[n, l, h] = m(answer_n | do(z[l, h] := replacement[l, h])) − m(answer_n), where "replace" is assignment at one position.

    Parameters
    ----------
    prompts
        Counterfactual prompts: `Prompt` objects, texts, or 1-D token tensors.
    answers
        What continues each prompt, exactly as given; None takes the `Prompt` objects' own.
    metric
        `probability` or `logit` of the answer's first token, `log_probability` of the whole answer (nats),
        `logit_difference` against `distractors`.
    position
        Where to patch: -1 is the last prompt token; from 0 on counts from the beginning.
    method
        `auto` takes exact suffix replay if it passes its self-check, else one forward pass per head (with a warning).
    max_rows
        Bound on the packed sequence, halved when memory runs out (default 1,536 rows on a CPU, 16,384 on a GPU).
    folder
        Where to keep what is done, so that an interrupted sweep goes on there.
    """
    sweep = _sweep_heads(model, prompts, answers, replacement, metric, position, distractors, method, max_rows)
    about = None if folder is None else key(sweep.backend.model, method)
    values, baseline = _collect(sweep, folder, about, progress)
    return (values - baseline[:, None]).unflatten(1, replacement.shape[:2])


def _sweep_heads(
    model: Any,
    prompts: Sequence[Prompt | str | Tensor],
    answers: Sequence[str] | None,
    replacement: Tensor,
    metric: str,
    position: int,
    distractors: Sequence[str] | None,
    method: str,
    max_rows: int | None,
) -> Sweep:
    check_metric(metric)
    backend = backend_of(model)
    backend.check_hooks()
    expected = (backend.n_layers, backend.n_heads, backend.d_head)
    if tuple(replacement.shape) != expected:
        raise ValueError(
            f"replacement has shape {tuple(replacement.shape)}, but {backend.name} needs [layer head d_head] = {expected}"
        )
    if not torch.isfinite(replacement).all():
        raise ValueError("replacement holds NaN or infinite values; compute it again with mean_head_outputs")
    tokenized = tokenize(backend, prompts, answers)
    if not all(t.answer for t in tokenized):
        raise ValueError("answers are needed to measure an effect; pass one text per prompt")
    if metric == "logit_difference" and distractors is None:
        raise ValueError("metric='logit_difference' needs distractors: one wrong answer per prompt")
    wrong = None if distractors is None else [t.answer[0] for t in tokenize(backend, prompts, distractors)]
    heads = [(layer, head) for layer in range(backend.n_layers) for head in range(backend.n_heads)]
    replacement = replacement.to(backend.device)

    def write(layer: int, sites: list[int], rows: list[int], x: Tensor) -> None:
        for i, site in enumerate(sites):
            x[:, i, heads[site][1]] = replacement[layer, heads[site][1]].to(x)

    sites = Sites([[layer] for layer, _ in heads], backend.z_hook, write)
    return Sweep(
        backend, tokenized, sites, metric=metric, position=position, method=method, max_rows=max_rows, distractors=wrong
    )


def _collect(sweep: Sweep, folder: str | Path | None, about: str | None, progress: bool) -> tuple[Tensor, Tensor]:
    """Run a sweep to its end, keeping what is done in `folder` after every batch; `about` is the key of model and method."""
    values = torch.full((len(sweep.prompts), len(sweep.sites.layers)), torch.nan)
    baseline = torch.full((len(sweep.prompts),), torch.nan)
    path = None if folder is None else Path(folder) / f"sweep-{_key(sweep, about)}.safetensors"
    if path is not None and path.exists():
        kept, _ = read_tensors(path)
        values, baseline = kept["values"].clone(), kept["baseline"].clone()
    todo = torch.nonzero(baseline.isnan())[:, 0].tolist()
    with tqdm(total=len(values), initial=len(values) - len(todo), desc="patching heads", disable=not progress) as bar:
        for swept in sweep.run(todo):
            values[swept.index], baseline[swept.index] = swept.values, swept.baseline
            bar.update(len(swept.index))
            if path is not None:
                write_tensors(path, {"values": values, "baseline": baseline}, {"kind": "sweep", "metric": sweep.metric})
    return values, baseline


def _key(sweep: Sweep, about: str | None) -> str:
    """What must be the same for kept results to count: model, prompts, patches, metric."""
    backend = sweep.backend
    probe = torch.zeros(1, len(sweep.sites.layers), backend.n_heads, backend.d_head, device=backend.device)
    for site, (layer,) in enumerate(sweep.sites.layers):
        sweep.sites.write(layer, [site], [0], probe[:, site : site + 1])
    return key(about, sweep.prompts, sweep.metric, sweep.from_end, sweep.distractors, probe)


def locate_heads(
    model: Any,
    tasks: Task | Iterable[Task] | Mapping[str, Task],
    *,
    shots: int = 10,
    instruction: bool | str | int = False,
    style: str = "qa",
    counterfactual: str = "shuffled_labels",
    metric: str = "probability",
    n_prompts: int = 25,
    n_mean: int = 50,
    only_correct: bool = False,
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
    shots, instruction, style
        How the stating prompts look; see `build_prompts`.
    counterfactual
        How the instruction is destroyed: `shuffled_labels`, `no_instruction`, `other_instruction`, `random_text`.
    metric
        See `head_effects`. `logit_difference` takes another example's answer as the distractor.
    n_prompts
        Counterfactual prompts per task.
    n_mean
        Prompts per task behind the mean head outputs (the code of the Function Vectors paper uses 100).
    folder
        Where to keep what is done, so that an interrupted run goes on there.

    Returns
    -------
    HeadEffects
        Effects per prompt, layer and head; `.top(10)` are the instruction heads.
    """
    suite = as_suite(tasks)
    backend = backend_of(model)
    check_metric(metric)
    about = None if folder is None else key(backend.model, method)
    values, baselines, names, checked = [], [], [], False
    with tqdm(total=len(suite), desc="locating heads", disable=not progress) as bar:
        for task in suite.values():
            bar.set_postfix_str(task.name)
            options: dict[str, Any] = {"shots": shots, "instruction": instruction, "style": style, "split": "train"}
            mean = mean_head_outputs(
                model, build_prompts(task, n=n_mean, seed=seed, repeat=True, **options), only_correct=only_correct
            )
            clean = build_prompts(task, n=n_prompts, seed=seed + 1, **options)
            broken = _counterfactual(
                clean, counterfactual, tasks=list(suite.values()), tokenizer=backend.tokenizer, seed=seed
            )
            wrong = _distractors(broken, task) if metric == "logit_difference" else None
            sweep = _sweep_heads(model, broken, None, mean, metric, -1, wrong, method, max_rows)
            sweep.checked = checked
            scores, baseline = _collect(sweep, folder, about, progress and len(suite) == 1)
            values.append((scores - baseline[:, None]).unflatten(1, mean.shape[:2]))
            baselines.append(baseline)
            names += [task.name] * n_prompts
            method, checked = sweep.method, sweep.checked  # self-checked once for all tasks
            bar.update()
    settings = {
        "shots": shots,
        "instruction": instruction,
        "style": style,
        "counterfactual": counterfactual,
        "seed": seed,
    }
    return HeadEffects(
        torch.cat(values),
        torch.cat(baselines),
        tuple(names),
        metric=metric,
        metadata={"model": backend.name, "method": method, "n_mean": n_mean, **settings},
    )


_counterfactual = counterfactual  # locate_heads has an argument of the same name


def _distractors(prompts: Sequence[Prompt], task: Task) -> list[str]:
    """Another example's answer for each prompt, differing from its own."""
    wrong = []
    for prompt in prompts:
        other = next((x for x in prompt.demonstrations + task.train if x.output != prompt.query.output), None)
        if other is None:
            raise ValueError(f"metric='logit_difference' needs two different answers in task {task.name!r}")
        wrong.append(Prompt(other, style=prompt.style).answer)
    return wrong

"""Mean outputs of heads, and what replacing a single head's output does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from ivlens.common.keys import key
from ivlens.common.processes import hidden, on_main
from ivlens.common.storage import read_tensors, write_tensors
from ivlens.models.backend import Backend
from ivlens.models.backends import backend_of
from ivlens.models.precision import in_float32
from ivlens.running.reading import read_batches
from ivlens.running.replay import Sweep
from ivlens.running.scores import check_finite
from ivlens.running.sites import Sites
from ivlens.running.tokens import TokenizedPrompt, tokenize
from ivlens.tasks.prompts import Prompt

__all__ = ["HeadMeans", "head_effects", "head_means", "mean_head_outputs", "read_heads"]


@dataclass(frozen=True)
class HeadMeans:
    """Over prompts, at their last token: the heads' mean outputs, the mean scale of the norm after each layer's attention (see
    `Backend.norm_scales`), the mean residual stream after each layer where it was asked for, and `which` prompts counted."""

    z: Float[Tensor, "layer head d_head"]
    norm_scales: Float[Tensor, " layer"]
    resid: Float[Tensor, "layer d_model"] | None
    which: list[int]


def mean_head_outputs(
    model: Any,
    prompts: Sequence[Prompt | str | Tensor],
    *,
    only_correct: bool = False,
    batch_size: int | None = None,
    progress: bool = False,
) -> Float[Tensor, "layer head d_head"]:
    """Mean output of every head (`hook_z`) at the last prompt token: z̄ of the paper (IV §3; FV §2.2).

    Parameters
    ----------
    only_correct
        Count only prompts (`Prompt` objects) whose answer's first token the model ranks first.

    Raises
    ------
    ValueError
        If no prompt counts, because none is answered correctly.
    """
    return read_heads(model, prompts, only_correct=only_correct, batch_size=batch_size, progress=progress).z


def read_heads(
    model: Any,
    prompts: Sequence[Prompt | str | Tensor],
    *,
    resid: bool = False,
    only_correct: bool = False,
    batch_size: int | None = None,
    progress: bool = False,
) -> HeadMeans:
    """`mean_head_outputs`, and with `resid` the mean residual streams of the same prompts."""
    backend = backend_of(model)
    backend.check_hooks()
    rows = tokenize(backend, prompts)
    if only_correct and not all(row.answer for row in rows):
        raise ValueError("only_correct=True needs prompts with a right answer, and some have none; leave it out")
    # Scored by the first token of the answer, which needs no answer tokens in the input.
    rows = [TokenizedPrompt(r.prompt, r.answer[:1] if only_correct else ()) for r in rows]
    with tqdm(total=len(rows), desc="mean head outputs", disable=hidden(progress)) as bar, in_float32(backend.model):
        return head_means(backend, rows, resid=resid, only_correct=only_correct, batch_size=batch_size, bar=bar)


def head_means(
    backend: Backend,
    rows: Sequence[TokenizedPrompt],
    *,
    resid: bool = False,
    only_correct: bool = False,
    batch_size: int | None = None,
    bar: tqdm | None = None,
) -> HeadMeans:
    """`read_heads` of tokenized prompts: running sums, so that a hundred thousand take no more memory than a few."""

    def summed(read: dict[str, Tensor]) -> tuple[list[int], list[Tensor]]:
        right = read["accuracy"] == 1 if only_correct else torch.ones(len(read["z"]), dtype=torch.bool)
        z = read["z"][right]
        scales = torch.stack([backend.norm_scales(layer, z[:, layer]) for layer in range(backend.n_layers)], dim=1)
        sums = [x.double().sum(0) for x in (z, scales, *([read["resid"][right]] if resid else []))]
        return right.nonzero()[:, 0].tolist(), sums

    which: list[int] = []
    total: list[Tensor] = []
    for index, (counted, sums) in read_batches(
        backend, rows, summed, z=True, resid=resid, batch_size=batch_size, bar=bar
    ):
        which += [index[i] for i in counted]
        total = [a + b for a, b in zip(total, sums)] or sums
    if not which:
        raise ValueError("the model answers none of the prompts correctly; use more shots or only_correct=False")
    check_finite(total[0], next(backend.model.parameters()).dtype)
    means = [(x / len(which)).float() for x in total]
    return HeadMeans(means[0], means[1], means[2] if resid else None, sorted(which))


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
        Bound on the packed sequence (default 1,536 rows on a CPU, 16,384 on a GPU); fewer where less memory is free, and halved when
        it runs out.
    folder
        Where to keep what is done, so that an interrupted sweep goes on there.
    """
    options: dict[str, Any] = {"position": position, "method": method, "max_rows": max_rows}
    sweep = sweep_heads(model, prompts, answers, replacement, metric=metric, distractors=distractors, **options)
    about = None if folder is None else key(sweep.backend.model, method)
    values, baseline = collect_effects(sweep, folder, about, progress)
    return (values - baseline[:, None]).unflatten(1, replacement.shape[:2])


def sweep_heads(
    model: Any,
    prompts: Sequence[Prompt | str | Tensor],
    answers: Sequence[str] | None,
    replacement: Tensor,
    *,
    metric: str,
    distractors: Sequence[str] | None,
    answer_tokens: int | None = None,
    **options: Any,
) -> Sweep:
    """All heads on all prompts, scored by the first `answer_tokens` of the answers (None: all); options as in `Sweep`."""
    backend = backend_of(model)
    backend.check_hooks()
    expected = (backend.n_layers, backend.n_heads, backend.d_head)
    if tuple(replacement.shape) != expected:
        needed = f"{backend.name} needs [layer head d_head] = {expected}"
        raise ValueError(f"replacement has shape {tuple(replacement.shape)}, but {needed}")
    if not torch.isfinite(replacement).all():
        raise ValueError("replacement holds NaN or infinite values; compute it again with mean_head_outputs")
    tokenized = [replace(t, answer=t.answer[:answer_tokens]) for t in tokenize(backend, prompts, answers)]
    wrong = None if distractors is None else [t.answer[0] for t in tokenize(backend, prompts, distractors)]
    if alike := sum(row.answer[:1] == (first,) for row, first in zip(tokenized, wrong or ())):
        said = f"{alike} of {len(tokenized)} distractors begin with their answer's own first token"
        raise ValueError(f"{said}: their effect is always 0; give others, or take metric='log_probability'")
    heads = [(layer, head) for layer in range(backend.n_layers) for head in range(backend.n_heads)]
    replacement = replacement.to(backend.device)

    def write(layer: int, sites: list[int], rows: list[int], x: Tensor) -> None:
        x = backend.by_head(x)
        for i, site in enumerate(sites):
            x[:, i, heads[site][1]] = replacement[layer, heads[site][1], : x.shape[-1]].to(x)

    sites = Sites([[layer] for layer, _ in heads], backend.z_hook, write, replacement)
    return Sweep(backend, tokenized, sites, metric=metric, distractors=wrong, **options)


def collect_effects(
    sweep: Sweep, folder: str | Path | None, about: str | None, progress: bool
) -> tuple[Tensor, Tensor]:
    """Run a sweep to its end, keeping what is done in `folder` after every batch; `about` is the key of model and method."""
    values = torch.full((len(sweep.prompts), len(sweep.sites.layers)), torch.nan)
    baseline = torch.full((len(sweep.prompts),), torch.nan)
    path = None if folder is None else Path(folder) / f"sweep-{_key(sweep, about)}.safetensors"
    if path is not None:
        done = on_main(lambda: read_tensors(path)[0] if path.exists() else None, f"what is kept at {path}")
        values, baseline = (values, baseline) if done is None else (done["values"].clone(), done["baseline"].clone())
    todo = torch.nonzero(baseline.isnan())[:, 0].tolist()
    options = {"total": len(values), "initial": len(values) - len(todo), "desc": "patching heads"}
    with tqdm(**options, disable=hidden(progress)) as bar:
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

"""What a model does on prompts, read at their last token in one forward pass each; what it would say of a direction alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from ivlens.models.backend import Backend
from ivlens.models.comparison import evaluating, without_training
from ivlens.running.batches import in_batches
from ivlens.running.scores import measure
from ivlens.running.tokens import TokenizedPrompt, fed_with_answers

__all__ = ["SCORES", "Reading", "in_order", "read_batches", "read_prompts", "unembedded"]

T = TypeVar("T")
MOST = 16, 128  # prompts together on a CPU, which more make no faster, and elsewhere
SCORES = ("accuracy", "log_probability")


@dataclass
class Reading:
    """Heads' outputs and residual streams after each layer at one position, on the CPU; None where not asked for.

    `scores` are `accuracy` and `log_probability` of the whole answer, teacher-forced (see `scores.measure`); empty without answers.
    """

    z: Float[Tensor, "prompt layer head d_head"] | None = None
    resid: Float[Tensor, "prompt layer d_model"] | None = None
    scores: dict[str, Float[Tensor, " prompt"]] = field(default_factory=dict)


def read_prompts(
    backend: Backend,
    rows: Sequence[TokenizedPrompt],
    *,
    z: bool = False,
    resid: bool = False,
    position: int = -1,
    batch_size: int | None = None,
    bar: tqdm | None = None,
) -> Reading:
    """Run every prompt, with its answer where it has one, and keep what was asked for at `position` (-1 is its last token)."""
    options = {"z": z, "resid": resid, "position": position, "batch_size": batch_size, "bar": bar}
    found = in_order(read_batches(backend, rows, dict, **options), len(rows))
    return Reading(found.pop("z", None), found.pop("resid", None), found)


def read_batches(
    backend: Backend,
    rows: Sequence[TokenizedPrompt],
    of: Callable[[dict[str, Tensor]], T],
    *,
    z: bool = False,
    resid: bool = False,
    position: int = -1,
    batch_size: int | None = None,
    bar: tqdm | None = None,
) -> Iterator[tuple[list[int], T]]:
    """Batch by batch, which prompts they are and what `of` makes of what `read_prompts` keeps of them, by name: `z`, `resid` and
    the scores. Nothing else is kept of them."""

    def work(index: list[int]) -> T:
        return of(_read_batch(backend, [rows[i] for i in index], z, resid, position))

    with evaluating(backend.model, getattr(backend.model, "original_model", backend.model)):
        for index, read in in_batches(backend, rows, batch_size, work, "reading", z, resid, position, most=MOST):
            if bar is not None:
                bar.update(len(index))
            yield index, read


def in_order(batches: Iterator[tuple[list[int], dict[str, Tensor]]], n: int) -> dict[str, Tensor]:
    """What was read of n prompts, batch by batch, in the prompts' order."""
    found: dict[str, Tensor] = {}
    for index, read in batches:
        for name, values in read.items():
            if name not in found:
                found[name] = values.new_empty(n, *values.shape[1:])
            found[name][index] = values
    return found


@torch.inference_mode()
def _read_batch(
    backend: Backend, batch: Sequence[TokenizedPrompt], z: bool, resid: bool, position: int
) -> dict[str, Tensor]:
    tokens, mask, answers, counted = fed_with_answers([(r.prompt, r.answer) for r in batch], backend.device)
    keep = max(answers.shape[1], 1)
    found: dict[str, list[Tensor]] = {"z": [], "resid": []}

    def keep_in(name: str) -> Callable:
        def see(x: Tensor, hook: Any) -> None:
            x = x[:, position - keep + 1]
            found[name].append((backend.padded(backend.by_head(x)) if name == "z" else x).float().cpu())

        return see

    layers = range(backend.n_layers)
    hooks: list[tuple[str, Any]] = [(backend.z_hook(layer), keep_in("z")) for layer in layers if z]
    hooks += [(backend.resid_hook(layer), keep_in("resid")) for layer in layers if resid]
    with backend.model.hooks(fwd_hooks=hooks):
        logits = backend.forward(tokens, mask, keep=keep)
    for name, wanted in (("z", z), ("resid", resid)):
        if wanted and len(found[name]) != backend.n_layers:
            there = f"{len(found[name])} of {backend.n_layers}"
            raise RuntimeError(f"only {there} {name} hooks fired; the model can't be read")
    read = {name: torch.stack(parts, dim=1) for name, parts in found.items() if parts}
    if answers.shape[1]:
        for name in SCORES:
            read[name] = measure(name, logits[:, None], answers, counted)[:, 0].cpu()
    return read


@without_training
@torch.inference_mode()
def unembedded(backend: Backend, directions: Float[Tensor, "row d_model"]) -> Float[Tensor, "row d_vocab"]:
    """Logits where the residual stream after the last layer is nothing but a direction, at its final norm's usual length.

    Less those of an empty residual stream, which are biases, and centred: a token at 0 gains as much as the average one.
    """
    given = torch.cat([directions, torch.zeros_like(directions[:1])])
    given = given * backend.d_model**0.5 / given.norm(dim=-1, keepdim=True).clamp(min=1e-12)
    fired: list[bool] = []

    def put(x: Tensor, hook: Any) -> Tensor:
        fired.append(True)
        return given.to(x)[:, None]

    tokens = torch.zeros(len(given), 1, dtype=torch.long, device=backend.device)
    with backend.model.hooks(fwd_hooks=[(backend.resid_hook(backend.n_layers - 1), put)]):
        logits = backend.forward(tokens, torch.ones_like(tokens))[:, 0].float()
    if not fired:
        raise RuntimeError(f"nothing was put after layer {backend.n_layers - 1}: did its hook move?")
    logits = logits[:-1] - logits[-1]
    return logits - logits.mean(-1, keepdim=True)

"""Exact suffix replay: every patch of a sweep in one forward pass of the tokens it can change.

A patch at position p leaves everything before p as it was. So the prompt is run once and its keys and values kept; then
the tokens from p on are run again, once per patch, as copies packed along the sequence axis over that one cache, each
copy seeing the prefix and itself only. Copies patched at layer l come into being at layer l (below it they would equal the
unpatched copy). The result is the full forward pass's, to rounding; a self-check makes sure of it on every sweep.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import islice, takewhile
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ivlens.common.processes import everyones
from ivlens.models.backend import Backend, Prefix
from ivlens.models.comparison import evaluating
from ivlens.models.precision import in_float32
from ivlens.running.batches import described, in_parts, out_of_memory
from ivlens.running.masks import copy_masks
from ivlens.running.memory import free_memory, rows_at_once
from ivlens.running.scores import WHOLE_ANSWER, check_metric, measure
from ivlens.running.sites import Sites, SweepBatch, Swept
from ivlens.running.tokens import TokenizedPrompt, common_beginning

__all__ = ["Sweep"]

SHARED_AT_LEAST = 16  # tokens; below this, running a common prefix separately costs more than it saves


class Sweep:
    """All patches of `sites` on all prompts.

    Parameters
    ----------
    position
        Patched position: from the prompt's end (-1 is its last token) or, from 0 on, from its beginning.
    method
        `replay`, `full` (one forward pass per patch), or `auto`: replay if it passes the self-check, else full, with a
        warning that says why. `method` afterwards holds what was used.
    checked
        Whether a sweep like this one has passed the self-check already.
    max_rows
        Bound on the packed sequence: batch × copies × tokens per copy. It begins with less where the device has too little free for as
        much (of which its attention mask takes a sixteenth at most), and is halved when memory runs out all the same.
    """

    def __init__(
        self,
        backend: Backend,
        prompts: Sequence[TokenizedPrompt],
        sites: Sites,
        *,
        metric: str,
        position: int = -1,
        method: str = "auto",
        max_rows: int | None = None,
        distractors: Sequence[int] | None = None,
        checked: bool = False,
    ):
        if method not in ("auto", "replay", "full"):
            raise ValueError(f"method={method!r} is unknown; choose 'auto', 'replay' or 'full'")
        check_metric(metric)
        if not all(prompt.answer for prompt in prompts):
            raise ValueError("answers are needed to measure an effect; pass one text per prompt")
        if metric == "logit_difference" and distractors is None:
            raise ValueError("metric='logit_difference' needs distractors: one wrong answer per prompt")
        first = [layers[0] for layers in sites.layers]
        if first != sorted(first):
            raise ValueError("the first layers of the sites must be ascending")
        self.backend, self.prompts, self.sites, self.metric = backend, prompts, sites, metric
        self.method = "replay" if checked and method == "auto" else method
        self.distractors, self.checked = distractors, checked
        self.shared: Prefix | None = None
        self.max_rows = max_rows or (1536 if backend.device.type == "cpu" else 16_384)
        # A first answer token needs no answer tokens in the input.
        self.scored = [p.answer if metric in WHOLE_ANSWER else p.answer[:1] for p in prompts]
        self.from_end = [_from_end(p.prompt, position, i) for i, p in enumerate(prompts)]

    def run(self, todo: Sequence[int] | None = None) -> Iterator[Swept]:
        """Yields batches of prompts as they are done, in any order."""
        model = self.backend.model
        with evaluating(model, getattr(model, "original_model", model)), in_float32(model):
            yield from self._batches(todo)

    def _batches(self, todo: Sequence[int] | None) -> Iterator[Swept]:
        todo = range(len(self.prompts)) if todo is None else todo
        # Neighbours in length share a batch, so that little is spent on padding.
        order = sorted(todo, key=lambda i: (self.from_end[i], len(self.prompts[i].prompt), len(self.scored[i])))
        if order:
            longest = max(len(self.prompts[i].prompt) for i in order)
            self.max_rows = min(self.max_rows, rows_at_once(self.backend, free_memory(self.backend), longest))
            if self.checked or self.method == "full":
                self.shared = self._shared(order)
            elif (swept := self._check(order)) is not None:  # which has run what all prompts share
                yield swept
                order = order[len(swept.index) :]

        def work(index: list[int]) -> Swept:
            return (self._full if self.method == "full" else self._replay)(self._batch(index))

        for _, swept in in_parts(order, self._batch_size, work, self._make_room, self._described("patching", order)):
            yield swept

    def _described(self, what: str, order: Sequence[int]) -> str:
        options = (self.scored, self.metric, self.from_end, self.distractors, self.sites.layers, self.sites.about)
        return described(what, self.backend, [self.prompts[i] for i in order], order, *options)

    def _make_room(self, error: RuntimeError, index: list[int]) -> None:
        """Halve the rows after running out of memory; raise any other error, and where no less is possible."""
        if self.max_rows <= 2 * self._block(index[0]):
            raise error
        self.max_rows //= 2
        warnings.warn(f"out of memory; going on with max_rows={self.max_rows}", stacklevel=6)

    # -- the two ways -----------------------------------------------------------------------------------------------
    @torch.inference_mode()
    def _replay(self, batch: SweepBatch) -> Swept:
        backend, n_sites = self.backend, len(self.sites.layers)
        shared = self.shared if batch.mask.all() else None  # padding would come before the shared beginning
        tokens = batch.tokens if shared is None else batch.tokens[:, shared.n_prefix :]
        prefix = backend.read_prefix(tokens, batch.mask, block=batch.block, keep=batch.keep, shared=shared)
        baseline = self._score(prefix.logits[:, None], batch)[:, 0]
        values = torch.empty(len(batch.index), n_sites)
        per_pass = max(self.max_rows // (len(batch.index) * batch.block) - 1, 1)
        for start in range(0, n_sites, per_pass):
            sites = list(range(start, min(start + per_pass, n_sites)))
            logits = self._run_copies(prefix, sites, batch)
            values[:, sites] = self._score(logits, batch).cpu()
            if not self.checked and self._probe in sites:
                self._probed = logits[0, sites.index(self._probe)].clone()
        return Swept(batch.index, values, baseline.cpu())

    def _run_copies(self, prefix: Prefix, sites: list[int], batch: SweepBatch) -> Tensor:
        new = [0] * self.backend.n_layers
        places: dict[int, list[int]] = {}  # which of these sites act at a layer; copy 0 is the unpatched one
        for place, site in enumerate(sites):
            new[self.sites.layers[site][0]] += 1
            for layer in self.sites.layers[site]:
                places.setdefault(layer, []).append(place)
        fired: list[int] = []

        def edit(x: Tensor, hook: Any, layer: int) -> Tensor:
            here, copies = places[layer], x.unflatten(1, (-1, prefix.block))[:, 1:, 0]
            some = copies[:, here]
            self.sites.write(layer, [sites[place] for place in here], batch.index, some)
            copies[:, here] = some
            fired.append(layer)
            return x

        hooks = [(self.sites.hook(layer), partial(edit, layer=layer)) for layer in places]
        masks = copy_masks(prefix.visible, prefix.n_prefix, 1 + len(sites))
        logits = self.backend.run_copies(prefix, masks, new, hooks, batch.keep)
        if sorted(fired) != sorted(places):
            raise ReplayError(f"hooks fired at layers {sorted(fired)} instead of {sorted(places)}")
        # Copy 0 went the whole way unpatched, so every pass checks mask, positions and cache against the plain forward.
        difference = _probability_difference(logits[:, 0], prefix.logits)
        if not difference <= self._tolerance:
            said = f"the unpatched copy differs from the forward pass by {difference:.1e} in probability"
            raise ReplayError(f"{said}; pass method='full'")
        return logits[:, 1:]

    @torch.inference_mode()
    def _full(self, batch: SweepBatch) -> Swept:
        passes = (self._forward(batch, site)[:, None] for site in (None, *range(len(self.sites.layers))))
        baseline, *values = (self._score(logits, batch)[:, 0].cpu() for logits in passes)
        return Swept(batch.index, torch.stack(values, dim=1), baseline)

    def _forward(self, batch: SweepBatch, site: int | None = None) -> Float[Tensor, "batch answer d_vocab"]:
        if site is None:
            return self.backend.forward(batch.tokens, batch.mask, keep=batch.keep)
        layers, fired = self.sites.layers[site], []

        def edit(x: Tensor, hook: Any, layer: int) -> Tensor:
            self.sites.write(layer, [site], batch.index, x[:, -batch.block].unsqueeze(1))
            fired.append(layer)
            return x

        hooks = [(self.sites.hook(layer), partial(edit, layer=layer)) for layer in layers]
        with self.backend.model.hooks(fwd_hooks=hooks):
            logits = self.backend.forward(batch.tokens, batch.mask, keep=batch.keep)
        if missing := set(layers) - set(fired):
            raise RuntimeError(f"the hook {self.sites.hook(min(missing))} didn't fire; this model can't be patched")
        return logits

    # -- the choice between them ------------------------------------------------------------------------------------
    @property
    def _tolerance(self) -> float:
        # In half precision one step of a logit of 16 is 0.06 or 0.12; hooked models are compared as closely when loaded.
        return 1e-4 if next(self.backend.model.parameters()).dtype == torch.float32 else 0.1

    @property
    def _probe(self) -> int:
        """The patch that is compared: low enough to pass through most layers, with many copies before it."""
        return len(self.sites.layers) // 3

    def _check(self, order: Sequence[int]) -> Swept | None:
        """The first batch, one patch compared with a full forward pass: decides how the sweep goes on, in every process alike."""
        found = list(everyones((self._compared(order) for _ in range(1)), self._described("checking", order)))
        reason = next((reason for _, reason in found if reason is not None), None)
        if reason is not None and self.method == "replay":
            raise ReplayError(f"exact replay can't serve this model ({reason}); pass method='full' or 'auto'")
        self.checked, self.method = True, "replay" if reason is None else "full"
        if reason is None:
            return found[0][0]
        said = f"exact replay can't serve this model ({reason})"
        warnings.warn(f"{said}; one forward pass per patch instead", stacklevel=4)
        return None

    def _compared(self, order: Sequence[int]) -> tuple[Swept | None, str | None]:
        """The first batch replayed, and in what that differs from a full forward pass, if it does."""
        index = list(order[: self._batch_size(order, 0)])
        try:
            self.shared = self._shared(order)
            swept, alone = self._replay(self._batch(index)), self._batch(index[:1])
            with torch.inference_mode():
                plain = self._forward(alone, self._probe)[0]
        except ReplayError as error:
            return None, str(error)
        except (RuntimeError, TypeError, ValueError, AttributeError, IndexError, KeyError) as error:
            if "didn't fire" in str(error):
                raise
            if not out_of_memory(error):
                return None, f"{type(error).__name__}: {error}".splitlines()[0]
            self._make_room(error, index)
        else:
            difference = _probability_difference(self._probed[: alone.keep], plain)
            close = difference <= self._tolerance
            return swept, None if close else f"a replayed patch differs by {difference:.1e} in probability"
        return self._compared(order)

    # -- batches ----------------------------------------------------------------------------------------------------
    def _block(self, i: int) -> int:
        """Tokens of a copy of this prompt's end."""
        return self.from_end[i] + len(self.scored[i]) - 1

    def _batch_size(self, order: Sequence[int], start: int) -> int:
        """How many prompts from there on make a batch; they are patched as many tokens from the end."""
        first = order[start]
        block = self._block(first)
        if self.method == "full":
            most = self.max_rows // (len(self.prompts[first].prompt) + block)
        else:
            most = self.max_rows // ((1 + len(self.sites.layers)) * block)
        alike = takewhile(
            lambda i: self.from_end[i] == self.from_end[first], islice(order, start, start + max(most, 1))
        )
        return sum(1 for _ in alike)

    def _batch(self, index: list[int]) -> SweepBatch:
        rows = [(self.prompts[i].prompt, self.scored[i]) for i in index]
        wrong = None if self.distractors is None else [self.distractors[i] for i in index]
        return SweepBatch.of(index, rows, wrong, self.from_end[index[0]], self.backend.device)

    @torch.inference_mode()
    def _shared(self, index: Sequence[int]) -> Prefix | None:
        """The beginning all prompts have in common, run once."""
        if len(index) < 2 or self.method == "full":
            return None
        rows = [self.prompts[i].prompt[: len(self.prompts[i].prompt) - self.from_end[i]] for i in index]
        same = len(common_beginning(rows))
        if same < SHARED_AT_LEAST:
            return None
        tokens = torch.tensor([rows[0][:same]], device=self.backend.device)
        return self.backend.read_prefix(tokens, torch.ones_like(tokens), block=0, keep=1)

    def _score(self, logits: Tensor, batch: SweepBatch) -> Tensor:
        return measure(self.metric, logits, batch.answers, batch.answer_mask, batch.distractors)


class ReplayError(RuntimeError):
    """Replay gave another result than a forward pass."""


def _from_end(prompt: Sequence[int], position: int, i: int) -> int:
    """The patched position as a number of tokens from the prompt's end, that token included."""
    if not -len(prompt) <= position < len(prompt):
        raise ValueError(f"position={position} is outside prompt {i}, which has {len(prompt)} tokens")
    return -position if position < 0 else len(prompt) - position


def _probability_difference(a: Tensor, b: Tensor) -> float:
    return (a.float().softmax(-1) - b.float().softmax(-1)).abs().max().item()

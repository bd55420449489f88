"""At which positions of which forward pass an injection lands."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor

from ivlens.models.backend import Backend, backend_ends
from ivlens.models.backends import backend_of
from ivlens.running.injection import Injection

__all__ = ["injected"]


class _Place:
    """Where the forward passes of one model stand in their prompts, told by what the model is called with.

    A pass without keys and values of earlier ones begins a prompt, which ends with its last real token by the mask. One that has
    them goes on with it. Inside `generate` the prompt is what `generate` was given, in as many passes as it takes.
    """

    def __init__(self, backend: Backend):
        self.backend = backend
        self.thread = threading.get_ident()
        # Prompt lengths of the calls of `generate` under way; None until the first pass.
        self.generating: list[int | None] = []
        # Columns of the pass's first token, and of each row's last prompt token (None where the prompt lies behind).
        self.start = 0
        self.last: Tensor | None = None
        self.runs = 0

    @property
    def elsewhere(self) -> bool:
        """In another thread, whose passes are none of ours."""
        return threading.get_ident() != self.thread

    def see(self, given: Any, options: Mapping[str, Any]) -> None:
        """Before a forward pass: what it's called with."""
        if self.elsewhere:
            return
        named = [options[k] for k in ("input_ids", "input", "inputs_embeds") if options.get(k) is not None]
        tokens = given if given is not None else named[0]
        if not isinstance(tokens, Tensor):
            tokens = self.backend.model.to_tokens(tokens)
        rows, new = tokens.shape[:2] if tokens.dim() > 1 else (1, len(tokens))
        self.runs += 1
        self.start = _length(options.get("past_key_values", options.get("past_kv_cache")))
        if self.generating:
            if self.generating[-1] is None:
                self.generating[-1] = new
            self.last = torch.full((rows,), self.generating[-1] - 1)
        elif self.start:
            self.last = None
        else:
            ends, mask = backend_ends(), options.get("attention_mask")
            masked = ends is None and isinstance(mask, Tensor) and mask.dim() == 2
            self.last = _last_real(mask) if masked else torch.full((rows,), new - (ends or 1))

    def add(self, x: Tensor, vector: Tensor, positions: str | Tensor) -> Tensor:
        if self.elsewhere:
            return x
        if not self.runs:
            raise RuntimeError("can't tell where the prompt ends: run the model from its first layer inside inject")
        vector, own = _per_row(vector, len(x)), isinstance(positions, Tensor)
        if not own and positions == "all":
            return x + vector
        if self.last is None:  # the prompt lies behind
            return x + vector if not own and positions == "generated" else x
        columns = torch.arange(self.start, self.start + x.shape[1], device=x.device)
        at = (positions if own else self.last).to(x.device)[:, None]
        here = columns >= at if not own and positions == "generated" else columns == _per_row(at, len(x))
        return torch.where(here[..., None], x + vector, x) if here.any() else x

    def end(self) -> Tensor | None:
        """Columns of the rows' last prompt tokens in this pass; None where it holds none of them."""
        if self.elsewhere or self.last is None:
            return None
        return self.last - self.start if (self.last >= self.start).all() else None

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Inside, the model's passes and its `generate` are seen."""
        model, hf_model = self.backend.model, getattr(self.backend.model, "original_model", None)
        with ExitStack() as stack:
            if hf_model is None:  # its generate calls forward directly, past the hooks of modules
                stack.enter_context(_wrapped(model, "forward", self._forward))
            else:
                hook = hf_model.register_forward_pre_hook(
                    lambda module, args, options: self.see(args[0] if args else None, options), with_kwargs=True
                )
                stack.callback(hook.remove)
                stack.enter_context(_wrapped(hf_model, "generate", self._generate))
            stack.enter_context(_wrapped(model, "generate", self._generate_own))
            yield

    def _forward(self, forward: Callable, *args: Any, **options: Any) -> Any:
        if not options.get("start_at_layer"):
            self.see(args[0] if args else None, options)
        return forward(*args, **options)

    def _generate(self, generate: Callable, *args: Any, **options: Any) -> Any:
        """The Hugging Face model's, which is given tokens."""
        given = [args[0] if args else None, *(options.get(key) for key in ("inputs", "input_ids", "inputs_embeds"))]
        prompt = next((x for x in given if x is not None), None)
        mask = options.get("attention_mask")
        if isinstance(mask, Tensor) and mask.dim() == 2 and not mask[:, -1].all():
            raise ValueError("attention_mask: generate needs prompts padded on the left, their last token at the end")
        return self._inside(1 if prompt is None else prompt.shape[1], generate, args, options)

    def _generate_own(self, generate: Callable, *args: Any, **options: Any) -> Any:
        """The hooked model's, which is given texts too: its first pass is the prompt's."""
        return self._inside(None, generate, args, options)

    def _inside(self, length: int | None, generate: Callable, args: Any, options: Any) -> Any:
        if self.elsewhere:
            return generate(*args, **options)
        self.generating.append(length)
        try:
            return generate(*args, **options)
        finally:
            self.generating.pop()


@contextmanager
def _wrapped(owner: Any, name: str, around: Callable) -> Iterator[None]:
    """A method of one object, called through another function meanwhile."""
    if not hasattr(owner, name):
        yield
        return
    own, method = owner.__dict__.get(name), getattr(owner, name)
    owner.__dict__[name] = wraps(method)(partial(around, method))
    try:
        yield
    finally:
        if own is None:
            del owner.__dict__[name]
        else:
            owner.__dict__[name] = own


def _length(cache: Any) -> int:
    """Positions whose keys and values are kept."""
    if cache is None:
        return 0
    if hasattr(cache, "get_seq_length"):
        return int(cache.get_seq_length())
    return cache.entries[0].past_keys.shape[1] if hasattr(cache, "entries") else cache[0][0].shape[-2]


def _last_real(mask: Tensor) -> Tensor:
    """Column of the last token that isn't padding, in each row."""
    return mask.shape[1] - 1 - mask.bool().flip(1).int().argmax(1)


def _per_row(x: Tensor, rows: int) -> Tensor:
    """One for each row, also where `generate` runs each prompt several times (beams, several answers)."""
    if x.dim() < 2 or len(x) == rows or (x.dim() == 3 and len(x) == 1):
        return x
    if rows % len(x):
        raise ValueError(f"{len(x)} vectors or positions for {rows} rows; give one for each prompt, or one for all")
    return x.repeat_interleave(rows // len(x), dim=0)


@contextmanager
def injected(model: Any, injection: Injection) -> Iterator[Any]:
    """Inside, the injection acts on every forward pass of the model; see `steering.inject`."""
    backend, awaited = backend_of(model), set[int]()
    place = _Place(backend)
    hooks = injection.hooks(backend, lambda positions: partial(place.add, positions=positions), awaited, place.end)
    with place.watching(), model.hooks(fwd_hooks=hooks):
        yield model
        if place.runs and awaited:
            said = f"the model ran, but nothing was injected after layer(s) {sorted(awaited)}"
            raise RuntimeError(f"{said}: did it stop at an earlier layer?")

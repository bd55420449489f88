"""What is added to the residual stream, and at which positions of which forward pass it lands."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor

from ivlens.models.backend import Backend, backend_ends
from ivlens.models.backends import backend_of

__all__ = ["Injection", "injected"]

POSITIONS = ("last", "generated", "all")
MODES = ("sum", "heads")


@dataclass(frozen=True)
class Injection:
    """What is added to the residual stream after which layers, and at which positions.

    `additions` maps a layer to a tensor [d_model], or [batch d_model] for one vector per row, already scaled.
    """

    additions: dict[int, Tensor]
    positions: str | Tensor = "last"

    @classmethod
    def of(
        cls,
        backend: Backend,
        vector: Any,
        *,
        layer: int | None = None,
        scale: float | None = None,
        positions: str | Tensor = "last",
        mode: str = "sum",
    ) -> Injection:
        """Check the arguments of `inject` and turn them into additions."""
        if mode not in MODES:
            raise ValueError(f"mode={mode!r} is unknown; choose one of {', '.join(MODES)}")
        if not isinstance(positions, Tensor) and positions not in POSITIONS:
            known = ", ".join(POSITIONS)
            raise ValueError(f"positions={positions!r} is unknown; choose one of {known}, or a tensor with one per row")
        whole = not isinstance(vector, Tensor)
        if whole:
            vector.check_model(backend.model)
        elif vector.shape[-1] != backend.d_model or vector.dim() > 2:
            needed = f"{backend.name} needs [d_model] = ({backend.d_model},)"
            raise ValueError(f"the vector has shape {tuple(vector.shape)}, but {needed}")
        elif not torch.isfinite(vector).all():
            raise ValueError("the vector holds NaN or infinite values")
        scale = (vector.scale if whole else 1.0) if scale is None else scale
        if mode == "heads":
            if not whole or vector.shares is None:
                raise ValueError("mode='heads' needs an InstructionVector with heads; use mode='sum'")
            additions: dict[int, Tensor] = {}
            for head, share in zip(vector.heads, vector.shares):
                additions[head.layer] = additions.get(head.layer, 0) + scale * share
            return cls(additions, positions)
        layer = vector.layer if layer is None and whole else layer
        if layer is None:
            layer = f"layer= (a third of the depth, {backend.n_layers // 3}, is a fair first try)"
            raise ValueError(f"no layer given and the vector has none; pass {layer} or use ivl.tune_injection")
        return cls({backend.check_layer(layer): scale * (vector.vector if whole else vector)}, positions)

    @property
    def per_row(self) -> bool:
        return any(v.dim() == 2 for v in self.additions.values())

    def check_rows(self, n: int) -> None:
        """Raise where one vector per row doesn't fit this many prompts."""
        wrong = next((len(v) for v in self.additions.values() if v.dim() == 2 and len(v) != n), None)
        if wrong is not None:
            raise ValueError(f"the vector has {wrong} rows for {n} prompts; pass one per prompt, or a single [d_model]")
        if isinstance(self.positions, Tensor):
            known = ", ".join(POSITIONS)
            raise ValueError(f"positions is a tensor, but prompts are batched anew; choose {known}, or use ivl.inject")

    def of_rows(self, index: list[int]) -> Injection:
        """The same for these rows only."""
        return Injection({k: v[index] if v.dim() == 2 else v for k, v in self.additions.items()}, self.positions)

    def hooks(
        self, backend: Backend, add: Callable[[Tensor, Tensor], Tensor], fired: set[int]
    ) -> list[tuple[str, Callable]]:
        """One hook per layer; `add(x, vector)` says where the vector goes."""

        def hook_for(layer: int, vector: Tensor) -> Callable:
            def hook_fn(x: Tensor, hook: Any) -> Tensor:
                fired.add(layer)
                v = vector.to(x)
                return add(x, v[:, None] if v.dim() == 2 else v)

            return hook_fn

        return [(backend.resid_hook(layer), hook_for(layer, v)) for layer, v in self.additions.items()]


class _Place:
    """Where the forward passes of one model stand in their prompts, told by what the model is called with.

    A pass without keys and values of earlier ones begins a prompt, which ends with its last real token by the mask. One that has
    them goes on with it. Inside `generate` the prompt is what `generate` was given, in as many passes as it takes.
    """

    def __init__(self, backend: Backend, positions: str | Tensor):
        self.backend, self.positions = backend, positions
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

    def add(self, x: Tensor, vector: Tensor) -> Tensor:
        if self.elsewhere:
            return x
        if not self.runs:
            raise RuntimeError("can't tell where the prompt ends: run the model from its first layer inside inject")
        vector, own = _per_row(vector, len(x)), isinstance(self.positions, Tensor)
        if not own and self.positions == "all":
            return x + vector
        if self.last is None:  # the prompt lies behind
            return x + vector if not own and self.positions == "generated" else x
        columns = torch.arange(self.start, self.start + x.shape[1], device=x.device)
        at = (self.positions if own else self.last).to(x.device)[:, None]
        here = columns >= at if not own and self.positions == "generated" else columns == _per_row(at, len(x))
        return torch.where(here[..., None], x + vector, x) if here.any() else x

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
    backend = backend_of(model)
    place, fired = _Place(backend, injection.positions), set()
    hooks = injection.hooks(backend, place.add, fired)
    with place.watching(), model.hooks(fwd_hooks=hooks):
        yield model
        if place.runs and fired != set(injection.additions):
            missing = sorted(set(injection.additions) - fired)
            said = f"the model ran, but nothing was injected after layer(s) {missing}"
            raise RuntimeError(f"{said}: did it stop at an earlier layer?")

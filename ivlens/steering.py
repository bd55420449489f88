"""Injecting a vector into the residual stream while a context lasts, and generating with and without it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from ivlens.models.backends import Backend, backend_of
from ivlens.vectors import InstructionVector

if TYPE_CHECKING:
    import pandas as pd

    from ivlens.prompts import Prompt

__all__ = ["Generations", "Injection", "generate", "inject"]

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
        vector: InstructionVector | Float[Tensor, "*batch d_model"],
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
            raise ValueError(
                f"positions={positions!r} is unknown; choose one of {', '.join(POSITIONS)}, or a tensor with one per row"
            )
        whole = isinstance(vector, InstructionVector)
        if whole:
            vector.check_model(backend.model)
        elif vector.shape[-1] != backend.d_model or vector.dim() > 2:
            raise ValueError(
                f"the vector has shape {tuple(vector.shape)}, but {backend.name} needs [d_model] = ({backend.d_model},)"
            )
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
            raise ValueError(
                f"no layer given and the vector has none; pass layer= (a third of the depth, {backend.n_layers // 3}, is a fair "
                "first try) or choose one on validation data with ivl.tune_injection"
            )
        return cls({backend.check_layer(layer): scale * (vector.vector if whole else vector)}, positions)

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
    """Tells a new prompt from the continuation of the last one, by looking at what enters the first layer.

    (`hook_embed` won't do: `HookedTransformer.generate` embeds tokens without it.)

    With a cache, `generate` runs the prompt and then single tokens; without one, the same prompt with one token more each
    time. Both count as continuation, so that a vector lands in the same places either way.
    """

    def __init__(self, positions: str | Tensor):
        self.positions = positions
        self.seen: Tensor | None = None
        self.start = 0  # position of the last prompt token in the forward pass under way
        self.runs = 0

    def watch(self, entering: Tensor, hook: Any) -> None:
        self.runs += 1
        now, before = entering.detach(), self.seen
        if before is not None and now.shape[0] == before.shape[0]:
            if now.shape[1] == 1:
                self.start = -1  # a decoding step over a cache
                return
            n = before.shape[1]
            if now.shape[1] == n + 1 and torch.equal(now[:, :n], before):
                self.seen = now  # the same again and one token more: decoding without a cache
                return
        self.seen, self.start = now, now.shape[1] - 1

    def add(self, x: Tensor, vector: Tensor) -> Tensor:
        if not self.runs:
            raise RuntimeError("can't tell where the prompt ends: run the model from its first layer inside inject")
        if isinstance(self.positions, Tensor):
            if self.start < 0:
                return x
            rows = torch.arange(x.shape[0], device=x.device)
            here = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device)
            here[rows, self.positions.to(x.device)] = True
            return x + here[..., None] * vector
        if self.positions == "all":
            return x + vector
        start = max(self.start, 0)
        if self.positions == "last":
            if self.start < 0:
                return x
            return torch.cat([x[:, :start], x[:, start : start + 1] + vector, x[:, start + 1 :]], dim=1)
        return x + vector if start == 0 else torch.cat([x[:, :start], x[:, start:] + vector], dim=1)


@contextmanager
def inject(
    model: Any,
    vector: InstructionVector | Float[Tensor, "*batch d_model"],
    *,
    layer: int | None = None,
    scale: float | None = None,
    positions: str | Tensor = "last",
    mode: str = "sum",
) -> Iterator[Any]:
    """Add a vector to the residual stream after a layer while the context lasts: r ← r + scale · θ (IV §4).

    Works under plain forward passes, the model's own `generate` and `hf_generate` (with and without a cache), in left-padded
    batches, and inside another injection. Afterwards the model is as before, also after an exception.

    Parameters
    ----------
    vector
        An `InstructionVector`, or a tensor [d_model], or [batch d_model] for one vector per row.
    layer
        After which layer (negative ones count from the end); default: the vector's own.
    scale
        Strength; negative subtracts. Default: the vector's own, else 1.
    positions
        `last`: the last prompt token only (the papers' analysis; the answer then ends where it should); `generated`: that
        and every decoding step; `all`; or a tensor [batch] with one position per row, for right-padded batches.
    mode
        `sum`: the vector at one layer. `heads`: each head's share after its own layer (our choice of arXiv 2606.05079's idea).

    Raises
    ------
    ValueError
        If the vector belongs to a model of another shape, the layer is out of range, or an option is unknown.
    RuntimeError
        If the model ran but the hook didn't fire.
    """
    backend = backend_of(model)
    injection = Injection.of(backend, vector, layer=layer, scale=scale, positions=positions, mode=mode)
    place, fired = _Place(positions), set()
    hooks = [("blocks.0.hook_resid_pre", place.watch), *injection.hooks(backend, place.add, fired)]
    with model.hooks(fwd_hooks=hooks):
        yield model
        if place.runs and fired != set(injection.additions):
            missing = sorted(set(injection.additions) - fired)
            raise RuntimeError(
                f"the model ran, but nothing was injected after layer(s) {missing}: did it stop at an earlier layer?"
            )


@dataclass(frozen=True)
class Generations:
    """Greedy continuations side by side. Shows as a table in Jupyter.

    Attributes
    ----------
    prompts
        The prompts' texts.
    texts
        From a condition ("no vector", "+ vector", "− vector") to one continuation per prompt.
    """

    prompts: list[str]
    texts: dict[str, list[str]]

    def __getitem__(self, condition: str) -> list[str]:
        return self.texts[condition]

    def to_dataframe(self) -> pd.DataFrame:
        """One row per prompt, one column per condition."""
        import pandas as pd

        return pd.DataFrame({"prompt": self.prompts, **self.texts})

    def _repr_html_(self) -> str:
        frame = self.to_dataframe()
        return frame.to_html(index=False)  # escapes

    def __repr__(self) -> str:
        return self.to_dataframe().map(lambda text: repr(text)[1:-1]).to_string(index=False, max_colwidth=60)


def generate(
    model: Any,
    prompts: str | Prompt | Sequence[str | Prompt],
    *,
    vector: InstructionVector | Tensor | None = None,
    layer: int | None = None,
    scale: float | None = None,
    positions: str = "last",
    mode: str = "sum",
    max_new_tokens: int = 10,
    stop: str | None = "\n",
    batch_size: int = 64,
) -> Generations:
    """Greedy continuations without the vector, with it, and with it subtracted.

    Parameters
    ----------
    vector, layer, scale, positions, mode
        As in `inject`. Without a vector there is one column.
    stop
        Text that ends a continuation (after something has been said); None for none but the end-of-text token.

    Notes
    -----
    For sampling and everything else `generate` of the model can do, call that inside `inject`.
    """
    from ivlens.decoding import complete
    from ivlens.prompts import tokenize

    backend = backend_of(model)
    prompts = [prompts] if not isinstance(prompts, Sequence) or isinstance(prompts, str) else list(prompts)
    rows = tokenize(backend, prompts)
    injections: dict[str, Injection | None] = {"no vector": None}
    if vector is not None:
        options: dict[str, Any] = {"layer": layer, "positions": positions, "mode": mode}
        plus = Injection.of(backend, vector, scale=scale, **options)
        injections["+ vector"] = plus
        injections["− vector"] = Injection({k: -v for k, v in plus.additions.items()}, positions)
    done = complete(backend, rows, injections, max_new_tokens=max_new_tokens, stop=stop, batch_size=batch_size)
    shown = [p if isinstance(p, str) else p.render(backend.tokenizer) for p in prompts]
    return Generations(shown, {name: c.texts for name, c in done.items()})

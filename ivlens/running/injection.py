"""What is changed in the residual stream: a vector added, or the projection on it set, always or where a gate opens."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ivlens.models.backend import Backend

__all__ = ["POSITIONS", "Injection", "projection_target"]

POSITIONS = ("last", "generated", "all")
MODES = ("sum", "heads")
HOW = ("add", "set")


@dataclass(frozen=True)
class Injection:
    """What is changed in the residual stream after which layers, and at which positions.

    Attributes
    ----------
    additions
        From a layer to a tensor [d_model], or [batch d_model] for one vector per row, already scaled.
    targets
        Layers where nothing is added, but the projection on that vector's direction is set to this number.
    gate
        Acts only on rows that it opens for, by the residual stream at their last prompt token; None for all.
    also
        Further ones, each at its own positions.
    """

    additions: dict[int, Tensor]
    positions: str | Tensor = "last"
    targets: dict[int, float] = field(default_factory=dict)
    gate: Any = None
    also: tuple[Injection, ...] = ()

    @classmethod
    def of(
        cls,
        backend: Backend,
        vector: Any,
        *,
        layer: int | None = None,
        scale: float | None = None,
        positions: str | Tensor | None = None,
        mode: str = "sum",
        how: str | None = None,
        when: Any = None,
    ) -> Injection:
        """Check the arguments of `inject` and turn them into changes."""
        if isinstance(vector, (list, tuple)):
            return cls._of_several(backend, vector, layer, scale, positions, mode, how, when)
        whole = not isinstance(vector, Tensor)
        about = vector.metadata if whole else {}
        positions = about.get("positions", "last") if positions is None else positions
        how = about.get("how", "add") if how is None else how
        for name, given, known in (("mode", mode, MODES), ("how", how, HOW)):
            if given not in known:
                raise ValueError(f"{name}={given!r} is unknown; choose one of {', '.join(known)}")
        if not isinstance(positions, Tensor) and positions not in POSITIONS:
            raise ValueError(
                f"positions={positions!r} is unknown; choose one of {', '.join(POSITIONS)}, or a tensor with one per row"
            )
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
            if how == "set":
                raise ValueError("how='set' moves one direction at one layer; use mode='sum'")
            additions: dict[int, Tensor] = {}
            for head, share in zip(vector.heads, vector.shares):
                additions[head.layer] = additions.get(head.layer, 0) + scale * share
            return cls(additions, positions, gate=_checked(when, min(additions), positions))
        layer = vector.layer if layer is None and whole else layer
        if layer is None:
            raise ValueError(
                f"no layer given and the vector has none; pass layer= (a third of the depth, {backend.n_layers // 3}, is a fair "
                "first try) or choose one on validation data with ivl.tune_injection"
            )
        layer = backend.check_layer(layer)
        plain = vector.vector if whole else vector
        gate = _checked(when, layer, positions)
        if how == "set":
            return cls({layer: plain}, positions, {layer: scale * projection_target(plain, about, layer)}, gate)
        return cls({layer: scale * plain}, positions, gate=gate)

    @classmethod
    def _of_several(
        cls, backend: Backend, vectors: Any, layer: Any, scale: Any, positions: Any, *rest: Any
    ) -> Injection:
        if not vectors:
            raise ValueError("no vector given; pass at least one")
        names = ("layer", "scale", "positions", "mode", "how", "when")
        options = dict(zip(names, (layer, scale, positions, *rest)))
        each = [cls.of(backend, vector, **options) for vector in vectors]
        return replace(each[0], also=tuple(each[1:]))

    @property
    def everywhere(self) -> bool:
        """Whether any of it acts on prompt tokens before the last one."""
        return self.positions == "all" or any(x.everywhere for x in self.also)

    @property
    def per_row(self) -> bool:
        return any(v.dim() == 2 for v in self.additions.values()) or any(x.per_row for x in self.also)

    def __neg__(self) -> Injection:
        """The same, subtracted; what is set is set to the opposite."""
        return replace(
            self,
            additions={k: v if k in self.targets else -v for k, v in self.additions.items()},
            targets={k: -t for k, t in self.targets.items()},
            also=tuple(-x for x in self.also),
        )

    def check_rows(self, n: int) -> None:
        """Raise where one vector per row doesn't fit this many prompts."""
        wrong = next((len(v) for v in self.additions.values() if v.dim() == 2 and len(v) != n), None)
        if wrong is not None:
            raise ValueError(f"the vector has {wrong} rows for {n} prompts; pass one per prompt, or a single [d_model]")
        if isinstance(self.positions, Tensor):
            raise ValueError(
                f"positions is a tensor, but here prompts are batched anew; choose one of {', '.join(POSITIONS)}, or run the "
                "model inside ivl.inject"
            )
        for x in self.also:
            x.check_rows(n)

    def of_rows(self, index: list[int]) -> Injection:
        """The same for these rows only."""
        additions = {k: v[index] if v.dim() == 2 else v for k, v in self.additions.items()}
        return replace(self, additions=additions, also=tuple(x.of_rows(index) for x in self.also))

    def hooks(
        self,
        backend: Backend,
        adder: Callable[[str | Tensor], Callable[[Tensor, Tensor], Tensor] | None],
        awaited: set[int],
        end: int | Tensor | Callable[[], Tensor | None] | None = None,
        opened: dict[int, Tensor] | None = None,
    ) -> list[tuple[str, Callable]]:
        """Hooks for the gate and for each layer.

        Parameters
        ----------
        adder
            For positions, the function `add(x, change)` that says where the change goes; None where none of them is passed.
        awaited
            Layers whose hooks haven't fired yet.
        end, opened
            For gates: the column of the prompt's last token in this pass (None: not in it), and which rows are open, by injection,
            as an earlier pass found.
        """
        opened = {} if opened is None else opened

        def look(x: Tensor, hook: Any) -> None:
            given = end() if callable(end) else end
            columns = None if given is None else torch.as_tensor(given, device=x.device).expand(len(x))
            if columns is not None and (columns < x.shape[1]).all():
                opened[id(self)] = self.gate.opens(x[torch.arange(len(x), device=x.device), columns].detach())

        def hook_for(layer: int, vector: Tensor) -> Callable:
            def hook_fn(x: Tensor, hook: Any) -> Tensor:
                awaited.discard(layer)
                v = vector.to(x)
                change = v[:, None] if v.dim() == 2 else v
                if layer in self.targets:
                    unit = v / v.norm()
                    change = (self.targets[layer] - x @ unit)[..., None] * unit
                if self.gate is None:
                    return add(x, change)
                is_open = opened.get(id(self))
                return x if is_open is None else torch.where(is_open[:, None, None], add(x, change), x)

            return hook_fn

        hooks: list[tuple[str, Callable]] = []
        if (add := adder(self.positions)) is not None:
            if self.gate is not None:
                hooks.append((backend.resid_hook(backend.check_layer(self.gate.layer)), look))
            hooks += [(backend.resid_hook(layer), hook_for(layer, v)) for layer, v in self.additions.items()]
            awaited |= set(self.additions)
        for x in self.also:
            hooks += x.hooks(backend, adder, awaited, end, opened)
        return hooks


def _checked(gate: Any, layer: int, positions: str | Tensor) -> Any:
    """A gate that is read before the vector acts."""
    if gate is not None and gate.layer > layer:
        raise ValueError(
            f"the gate reads after layer {gate.layer}, but the vector acts after layer {layer}, before it; fit the gate with layers up "
            f"to {layer}"
        )
    if gate is not None and positions not in ("last", "generated"):
        raise ValueError("a gate reads the last prompt token: with when=, positions must be 'last' or 'generated'")
    return gate


def projection_target(vector: Tensor, about: Mapping[str, Any], layer: int) -> float:
    """Where `how="set"` moves the projection on the vector's direction: that of prompts that state the task."""
    if vector.dim() != 1 or not vector.norm() > 0:
        raise ValueError("how='set' needs one vector that isn't zero: a zero vector has no direction")
    if "projections" not in about:
        raise ValueError(
            "how='set' needs to know the projection of prompts that state the task, which this vector doesn't (it was combined, or "
            "saved by an earlier version); use one as ivl.extract_vector gives it, or how='add'"
        )
    return about["projections"][layer]

"""Injecting a vector into the residual stream while a context lasts."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

from jaxtyping import Float
from torch import Tensor

from ivlens.models.backends import backend_of
from ivlens.running.injection import Injection
from ivlens.running.positions import injected
from ivlens.steering.gate import Gate
from ivlens.vectors.vector import InstructionVector

__all__ = ["inject"]


def inject(
    model: Any,
    vector: InstructionVector | Float[Tensor, "*batch d_model"] | Sequence[InstructionVector],
    *,
    layer: int | None = None,
    scale: float | None = None,
    positions: str | Tensor | None = None,
    mode: str = "sum",
    how: str | None = None,
    when: Gate | None = None,
) -> AbstractContextManager[Any]:
    """Add a vector to the residual stream after a layer while the context lasts: r ← r + scale · θ (IV §4).

    Works under plain forward passes, the model's own `generate` and `hf_generate` (with and without a cache), in left-padded
    batches, and inside another injection. Afterwards the model is as before, also after an exception.

    Parameters
    ----------
    model
        A hooked model, such as `load_model` gives.
    vector
        An `InstructionVector`, or a tensor [d_model], or [batch d_model] for one vector per row; or several vectors, each with its
        own layer and scale.
    layer
        After which layer (negative ones count from the end); default: the vector's own.
    scale
        Strength; negative subtracts. Default: the vector's own, else 1.
    positions
        `last`: the last prompt token only (the papers' analysis; the answer then ends where it should); `generated`: that
        and every decoding step; `all`; or a tensor [batch] with one position per row, for right-padded batches. Default: the
        vector's own (`generated` for instructions on the form of an answer), else `last`.
    mode
        `sum`: the vector at one layer. `heads`: each head's share after its own layer (our choice of arXiv 2606.05079's idea).
    how
        `add`, or `set`: r ← r + (scale · m̄ − ⟨r, u⟩) u, with u the vector's direction and m̄ the mean projection on it of prompts that
        state the task (arXiv 2410.12877). Default: the vector's own, else `add`.
    when
        A `Gate`: the vector acts only on prompts that it opens for; on others the model's numbers are as without.

    Raises
    ------
    ValueError
        If the vector belongs to a model of another shape, the layer is out of range, or an option is unknown.
    RuntimeError
        If the model ran but the hook didn't fire.
    """
    options = {"layer": layer, "scale": scale, "positions": positions, "mode": mode, "how": how, "when": when}
    return injected(model, Injection.of(backend_of(model), vector, **options))

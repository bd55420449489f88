"""Which backend a hooked model has."""

from __future__ import annotations

from typing import Any

from ivlens.models.backend import Backend
from ivlens.models.bridge import BridgeBackend
from ivlens.models.hooked import HookedBackend

__all__ = ["backend_of"]


def backend_of(model: Any) -> Backend:
    """The backend of a hooked model; TypeError for what is none."""
    if hasattr(model, "original_model") and hasattr(model, "hooks"):
        return BridgeBackend(model)
    if any(cls.__name__ == "HookedTransformer" for cls in type(model).__mro__):
        return HookedBackend(model)
    said = f"expected a TransformerBridge or HookedTransformer, got {type(model).__name__}"
    raise TypeError(f"{said}; turn it into one with ivl.load_model(model, tokenizer=...)")

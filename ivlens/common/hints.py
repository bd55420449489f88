"""What to say of a name that isn't known, and of an error from elsewhere."""

from __future__ import annotations

import difflib
import textwrap
from collections.abc import Iterable

__all__ = ["hint", "reason"]


def hint(name: str, known: Iterable[str], otherwise: str | None = None) -> str:
    """The near names, or else all of them (or what is said otherwise).

    Examples
    --------
    >>> hint("ewcc", ["ewc", "lora"])
    "did you mean 'ewc'?"
    >>> hint("adam", ["ewc", "lora"])
    'choose from ewc, lora'
    """
    known = list(known)
    near = difflib.get_close_matches(str(name), known, n=3, cutoff=0.5)
    if near:
        return f"did you mean {' or '.join(map(repr, near))}?"
    return otherwise or f"choose from {', '.join(known)}"


def reason(error: Exception) -> str:
    """Its kind and what it says, in one line, cut short where a library lists all it knows."""
    return textwrap.shorten(f"{type(error).__name__}: {error}", 300, placeholder=" …")

"""Names as they are typed, what to say of one that isn't known, and of an error from elsewhere."""

from __future__ import annotations

import difflib
import textwrap
from collections.abc import Iterable

__all__ = ["hint", "reason", "typed"]


def typed(name: str, known: Iterable[str], what: str) -> str:
    """The one of these names that is meant: itself, or what it is in ASCII, where - is − and spaces don't count.

    Examples
    --------
    >>> typed("-vector", ["no vector", "− vector"], "condition")
    '− vector'

    Raises
    ------
    KeyError
        If there is none, with near ones, or more than one.
    """
    known = list(known)
    meant = [x for x in known if x == name] or [x for x in known if _plain(x) == _plain(name)]
    if len(meant) == 1:
        return meant[0]
    raise KeyError(
        f"{what} {name!r} is " + (f"one of {meant}; type it whole" if meant else f"unknown; {hint(name, known)}")
    )


def _plain(name: str) -> str:
    return "".join(str(name).replace("−", "-").split())


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

"""What stands in a record's cell, as text, or refused."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

__all__ = ["cell_text", "cell_texts"]


def cell_text(record: Mapping[str, Any], column: str, place: str) -> str | None:
    """A cell as text, or None where there is none. What isn't one text is refused: its repr would be taken for data."""
    value = record.get(column)
    if isinstance(value, str) and not value.isascii() and any("\ud800" <= c <= "\udfff" for c in value):
        raise ValueError(f"{place} has half a character under {column!r}: {value[:60]!r}; write it again")
    if value is None or isinstance(value, str):
        return value if value and value.strip() else None
    plain = value.item() if type(value).__module__ == "numpy" and getattr(value, "shape", None) == () else value
    if isinstance(plain, (bool, int)) or (isinstance(plain, float) and math.isfinite(plain)):
        return str(value)
    several = f"; give several right answers as a list under {'outputs'!r}" if isinstance(value, (list, tuple)) else ""
    nan = math.isnan(plain) if isinstance(plain, float) else type(value).__name__ in ("NAType", "NaTType")
    what = "a missing value" if nan else f"a {type(value).__name__}"
    raise ValueError(f"{place} has {what} under {column!r}, not a text: {str(value)[:60]}{several}")


def cell_texts(record: Mapping[str, Any], column: str, place: str) -> list[str] | None:
    """A cell that holds a list of texts, or None where there is none."""
    given = record.get(column)
    if given is None:
        return None
    given = given.tolist() if hasattr(given, "tolist") and type(given).__module__ == "numpy" else given
    if not isinstance(given, (list, tuple)):
        raise ValueError(f"{place} has {column}={given!r}; give a list of texts")
    texts = [cell_text({column: x}, column, place) for x in given]
    if not texts or None in texts:
        raise ValueError(f"{place} has {column}={given!r}; give a list of texts, none of them empty")
    return texts

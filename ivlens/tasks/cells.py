"""What stands in a record's cell, as text, or refused."""

from __future__ import annotations

import math
import re
from typing import Any

__all__ = ["cell_text", "cell_texts"]

HALF_A_CHARACTER = re.compile("[\ud800-\udfff]")


def cell_text(value: Any, column: str, place: str) -> str | None:
    """A cell as text, or None where there is none. What isn't one text is refused: its repr would be taken for data."""
    if value is None or isinstance(value, str):
        if value and HALF_A_CHARACTER.search(value):
            raise ValueError(f"{place} has half a character under {column!r}: {value[:60]!r}; write it again")
        return value if value and value.strip() else None
    plain = value.item() if type(value).__module__ == "numpy" and getattr(value, "shape", None) == () else value
    if isinstance(plain, (bool, int)) or (isinstance(plain, float) and math.isfinite(plain)):
        return str(value)
    missing = math.isnan(plain) if isinstance(plain, float) else type(value).__name__ in ("NAType", "NaTType")
    what = "a missing value" if missing else f"a {type(value).__name__}"
    several = "; give several right answers as a list under 'outputs'" if isinstance(value, (list, tuple)) else ""
    raise ValueError(f"{place} has {what} under {column!r}, not a text: {str(value)[:60]}{several}")


def cell_texts(value: Any, column: str, place: str) -> tuple[str, ...] | None:
    """A cell that holds a list of texts, without white space at their ends, or None where there is none."""
    if value is None:
        return None
    value = value.tolist() if type(value).__module__ == "numpy" else value
    texts = [cell_text(x, column, place) for x in value] if isinstance(value, (list, tuple)) else []
    if not texts or None in texts:
        raise ValueError(f"{place} has {column}={value!r}; give a list of texts, none of them empty")
    return tuple(text.rstrip() for text in texts)

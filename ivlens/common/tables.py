"""Tables for notebooks."""

from __future__ import annotations

import html

import pandas as pd

__all__ = ["table_html"]


def table_html(frame: pd.DataFrame, *, title: str = "", index: bool = True) -> str:
    """Everything escaped, texts whole, and a $ in them no formula (the classes are those that MathJax 2 and 3 leave alone)."""
    with pd.option_context("display.max_colwidth", None):  # else pandas cuts at 50 characters
        table = frame.to_html(index=index)
    head = f"<p>{html.escape(title)}</p>" if title else ""
    return f'<div class="tex2jax_ignore mathjax_ignore">{head}{table}</div>'

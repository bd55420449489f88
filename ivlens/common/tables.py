"""Tables for notebooks."""

from __future__ import annotations

import html

import pandas as pd

__all__ = ["table_html"]


def table_html(frame: pd.DataFrame, *, title: str = "", index: bool = True, lines: bool = False) -> str:
    """Everything escaped, texts whole, and a $ in them no formula (the classes are those that MathJax 2 and 3 leave alone).

    With `lines`, texts to read: flush left, line breaks as such instead of `\\n`.
    """
    with pd.option_context("display.max_colwidth", None):  # else pandas cuts at 50 characters
        if lines:
            shown = frame.map(_with_breaks).rename(columns=_with_breaks, index=_with_breaks)
            table = shown.to_html(index=index, escape=False, justify="left")
            table = table.replace("<td>", '<td style="text-align: left; vertical-align: top">')
        else:
            table = frame.to_html(index=index)
    head = f"<p>{html.escape(title)}</p>" if title else ""
    return f'<div class="tex2jax_ignore mathjax_ignore">{head}{table}</div>'


def _with_breaks(text: object) -> str:
    return html.escape(str(text).strip()).replace("\n", "<br>")

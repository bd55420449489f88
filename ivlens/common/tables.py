"""Tables for notebooks."""

from __future__ import annotations

import html
from collections.abc import Mapping
from typing import Any

import pandas as pd

__all__ = ["about_html", "table_html"]

TALL = 40  # rows; longer tables scroll


def table_html(frame: pd.DataFrame, *, title: str = "", index: bool = True, lines: bool = False) -> str:
    """Everything escaped, texts and tables whole, a $ no formula (the classes are those that MathJax 2 and 3 leave alone), and
    in the page's own colours, light or dark.

    With `lines`, texts to read: flush left, line breaks as such instead of `\\n`.
    """
    # Else pandas cuts at 50 characters, and lists at 100 items.
    with pd.option_context("display.max_colwidth", None, "display.max_seq_items", None):
        if lines:
            shown = frame.map(_with_breaks).rename(columns=_with_breaks, index=_with_breaks)
            table = shown.to_html(index=index, escape=False, justify="left")
            table = table.replace("<td>", '<td style="text-align: left; vertical-align: top">')
        else:
            table = frame.to_html(index=index)
    if len(frame) > TALL:
        table = f'<div style="max-height: 32em; overflow: auto">{table}</div>'
    head = f"<p>{html.escape(title)}</p>" if title else ""
    return f'<div class="tex2jax_ignore mathjax_ignore">{head}{table}</div>'


def about_html(about: Mapping[str, Any], *, title: str) -> str:
    """A name and what it is per row, like `table_html`."""
    frame = pd.DataFrame({"": [_shown(value) for value in about.values()]}, index=list(about))
    return table_html(frame, title=title, lines=True)


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {_shown(x)}" for key, x in value.items())
    if type(value) in (list, tuple):  # a Head is shown by its name
        return ", ".join(map(_shown, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _with_breaks(text: object) -> str:
    return html.escape(str(text).strip()).replace("\n", "<br>")

"""Conversations in a tokenizer's own template."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

__all__ = ["DATE", "answer_in_chat", "render_chat"]

DATE = "2025-01-01"  # what a template that asks for today's date is told, so that prompts are the same tomorrow
Turn = dict[str, str]


def render_chat(tokenizer: Any, turns: Sequence[Turn], options: Mapping[str, Any], *, open_end: bool = True) -> str:
    """The conversation as text; with an open end, up to where the assistant's next answer begins.

    Parameters
    ----------
    options
        `system` (a system prompt), `date` (default 2025-01-01), and whatever the template itself takes, such as
        `enable_thinking` (default False where the template knows it).

    Raises
    ------
    ValueError
        If the tokenizer has no template, or the template refuses these turns.
    """
    from jinja2.exceptions import TemplateError

    if getattr(tokenizer, "chat_template", None) is None:
        raise ValueError(
            "style='chat' needs a tokenizer with a chat template; use style='qa' or 'plain' for this model"
        )
    options = dict(options)
    day = datetime.fromisoformat(str(options.pop("date", DATE)))
    system = options.pop("system", None)
    turns = [*([{"role": "system", "content": system}] if system else []), *turns]
    template = tokenizer.get_chat_template() if hasattr(tokenizer, "get_chat_template") else tokenizer.chat_template
    if "enable_thinking" in template:
        options.setdefault("enable_thinking", False)
    template = re.sub(r"strftime_now\((['\"])(.*?)\1\)", lambda asked: repr(day.strftime(asked[2])), template)
    options |= {"chat_template": template, "add_generation_prompt": open_end}
    try:
        return tokenizer.apply_chat_template(turns, tokenize=False, **options)
    except TemplateError as error:
        raise ValueError(
            f"the chat template refuses this conversation ({error}); use style='qa', or template={{}}"
        ) from error


def answer_in_chat(tokenizer: Any, turns: Sequence[Turn], answer: str, options: Mapping[str, Any]) -> tuple[str, str]:
    """The answer as the template writes it after the conversation, and what it puts behind it."""
    before = render_chat(tokenizer, turns, options)
    whole = render_chat(tokenizer, [*turns, {"role": "assistant", "content": answer}], options, open_end=False)
    if not whole.startswith(before):  # such as an empty thought that stands in the open end only
        return answer, ""
    rest = whole[len(before) :]
    at = rest.find(answer.strip())
    return (answer, "") if at < 0 else (rest[: at + len(answer.strip())], rest[at + len(answer.strip()) :])

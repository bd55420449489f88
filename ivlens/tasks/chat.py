"""Conversations in a tokenizer's own template."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

__all__ = ["DATE", "chat_parts"]

DATE = "2025-01-01"  # what a template that asks for today's date is told, so that prompts are the same tomorrow
HERE = "\ue001"  # in an answer's place
Turn = dict[str, str]


def chat_parts(tokenizer: Any, turns: Sequence[Turn], options: Mapping[str, Any]) -> tuple[str, str, str]:
    """A conversation up to where the assistant's answer begins, white space that belongs to the answer, and what ends it.

    Options are those of `build_prompts`'s `template`. ValueError where the tokenizer has no template, or it refuses these turns.
    """
    before = _rendered(tokenizer, turns, options, open_end=True)
    whole = _rendered(tokenizer, [*turns, {"role": "assistant", "content": HERE}], options, open_end=False)
    if not whole.startswith(before) or HERE not in whole:  # such as an empty thought that stands in the open end only
        return before, "", ""
    lead, end = whole[len(before) :].split(HERE, 1)
    return (before + lead, "", end) if lead.strip() else (before, lead, end)  # some templates never open an answer


def _rendered(tokenizer: Any, turns: Sequence[Turn], options: Mapping[str, Any], *, open_end: bool) -> str:
    from jinja2.exceptions import TemplateError

    if getattr(tokenizer, "chat_template", None) is None:
        raise ValueError("style='chat' needs a tokenizer with a chat template; use style='qa' or 'plain'")
    options = dict(options)
    day = datetime.fromisoformat(str(options.pop("date", DATE)))
    if system := options.pop("system", None):
        turns = [{"role": "system", "content": system}, *turns]
    template = tokenizer.get_chat_template() if hasattr(tokenizer, "get_chat_template") else tokenizer.chat_template
    if "enable_thinking" in template:
        options.setdefault("enable_thinking", False)
    template = re.sub(r"strftime_now\(\s*(['\"])(.*?)\1\s*\)", lambda asked: repr(day.strftime(asked[2])), template)
    if re.search(r"strftime_now\s*\(", template):
        raise ValueError("the chat template can't be told a fixed date; give its strftime_now a format in quotes")
    options |= {"chat_template": template, "add_generation_prompt": open_end}
    try:
        return tokenizer.apply_chat_template(turns, tokenize=False, **options)
    except TemplateError as error:
        raise ValueError(
            f"the chat template refuses this conversation ({error}); try style='qa', template={{}}"
        ) from error

"""Verifiers: whether an answer has the form that was asked for, decided by a program from its text alone.

A check is named in a text, so that it stands in files and keys: `bullets`, `language: es`, `ends_with: That is all.`
"""

from __future__ import annotations

import inspect
import json
import re
from collections import Counter
from collections.abc import Callable
from functools import cache
from typing import Any

from ivlens.common.hints import hint

__all__ = ["CHECKS", "check_source", "parse_check", "passes", "register_check"]

Verifier = Callable[..., bool]
WORD = re.compile(r"\w+(?:['’]\w+)*")
CHECKS: dict[str, Verifier] = {}


def register_check(name: str) -> Callable[[Verifier], Verifier]:
    """Make a function of an answer's text (and of the argument after the colon, if it takes one) a check of this name.

    Examples
    --------
    >>> @register_check("shouts")
    ... def shouts(text): return text.endswith("!")
    >>> passes("shouts", "Oh no!")
    True
    """

    def add(function: Verifier) -> Verifier:
        if not re.fullmatch(r"\w+", name):
            raise ValueError(f"name={name!r} is no name for a check; use letters, digits and _")
        CHECKS[name] = function
        return function

    return add


def parse_check(check: str) -> tuple[Verifier, str | None]:
    """The function behind a check's text, and its argument.

    Raises
    ------
    ValueError
        If there is no such check (near ones are suggested), or it lacks its argument, or has one too many.
    """
    name, _, argument = (part.strip() for part in check.partition(":"))
    if name not in CHECKS:
        raise ValueError(f"check {name!r} is unknown; {hint(name, sorted(CHECKS))}, or add yours with register_check")
    takes = len(inspect.signature(CHECKS[name]).parameters) > 1
    if takes != bool(argument):
        wrong = f"needs an argument, such as {name + ': …'!r}" if takes else f"takes no argument, but got {argument!r}"
        raise ValueError(f"check {name!r} {wrong}")
    if name in COUNTED and not re.fullmatch(r"[1-9]\d*", argument):
        raise ValueError(f"check {check!r} needs a whole number of words, 1 or more")
    if name == "language" and argument not in LANGUAGES:
        raise ValueError(
            f"check {check!r} names a language that isn't told apart; choose one of {', '.join(LANGUAGES)}"
        )
    return CHECKS[name], argument or None


def passes(check: str, text: str, *, loose: bool = False) -> bool:
    """Whether an answer meets a check. Degenerate text (empty, one thing repeated, fences only) meets none.

    Parameters
    ----------
    loose
        Also count it where it meets the check without its first or last line, or without asterisks (IFEval, arXiv 2311.07911 §2.2);
        JSON that is cut off, once what is open is closed.

    Raises
    ------
    RuntimeError
        If the check itself raises.
    """
    function, argument = parse_check(check)
    given = () if argument is None else (argument,)
    for variant in _variants(text) if loose else [text.strip()]:
        try:
            if not is_degenerate(variant) and function(variant, *given):
                return True
        except Exception as error:
            raise RuntimeError(
                f"check {check!r} raised {type(error).__name__} ({error}) on the answer {variant[:80]!r}; a check takes any text and "
                "gives True or False"
            ) from error
    return False


def check_source(check: str) -> str:
    """The code behind a check, so that what was kept under its name isn't taken for another's."""
    function, _ = parse_check(check)
    try:
        return inspect.getsource(function)
    except (OSError, TypeError):
        return repr(getattr(function, "__code__", function).co_code if hasattr(function, "__code__") else function)


def _variants(text: str) -> list[str]:
    lines = text.strip().split("\n")
    cut = ["\n".join(part).strip() for part in (lines, lines[1:], lines[:-1], lines[1:-1])]
    return [*cut, *(part.replace("*", "").strip() for part in cut), *_closed(text.strip())]


def _closed(text: str) -> list[str]:
    """JSON that was cut off, its strings and brackets closed: as it stands, and without its last, unfinished member."""
    text = re.sub(r"^```(?:json)?\s*", "", text, flags=re.I)
    ends: list[tuple[str, list[str]]] = []
    stack: list[str] = []
    in_string = escaped = False
    for i, c in enumerate(text if text[:1] in ("{", "[") else ""):
        if in_string:
            in_string, escaped = escaped or c != '"', not escaped and c == "\\"
        elif c == '"':
            in_string = True
        elif c in "{[":
            stack.append("}" if c == "{" else "]")
        elif c in "}]" and stack:
            stack.pop()
        elif c == ",":
            ends = [(text[:i], stack.copy())]
    ends.append((text + '"' * in_string, stack))
    return [part + "".join(reversed(left)) for part, left in ends if left]


def is_degenerate(text: str) -> bool:
    """Whether a text says nothing: no letters, one word or phrase over and over, a letter drawn out."""
    words = WORD.findall(text.casefold())
    words = [word for word in words if re.search(r"[^\W\d_]", word)]
    if not words or any(len(word) > 7 and len(set(word)) < 3 for word in words):
        return True
    threes = list(zip(words, words[1:], words[2:]))
    commonest = Counter(words).most_common(1)[0][1]
    return (len(words) > 3 and commonest > 0.6 * len(words)) or (
        len(threes) > 6 and len(set(threes)) < 0.5 * len(threes)
    )


# -- form ---------------------------------------------------------------------------------------------------------------
@register_check("bullets")
def bullets(text: str) -> bool:
    """Two different bulleted lines or more, and no more other lines than these."""
    return _items(text, r"\s*[-*•–]\s+(?=\S)")


@register_check("numbered_list")
def numbered_list(text: str) -> bool:
    """Lines numbered 1, 2, …, two different ones or more, and no more other lines than these."""
    numbers = [int(n) for n in re.findall(r"^\s*(\d+)[.)]\s+(?=\S)", text, re.M)]
    return numbers == list(range(1, len(numbers) + 1)) and _items(text, r"\s*\d+[.)]\s+(?=\S)")


def _items(text: str, mark: str) -> bool:
    lines = [line for line in text.split("\n") if line.strip()]
    items = [re.sub(mark, "", line, count=1) for line in lines if re.match(mark, line)]
    said = [item.casefold().strip() for item in items if WORD.search(item)]
    return len(said) == len(items) and len(set(said)) >= 2 and 2 * len(items) >= len(lines)


@register_check("json")
def json_text(text: str) -> bool:
    """A JSON object or list with something in it, alone or in a code fence."""
    fenced = re.fullmatch(r"```(?:json)?\s*\n(.*?)\n\s*```", text, re.S | re.I)
    try:
        value = json.loads(fenced[1] if fenced else text)
    except (ValueError, RecursionError):
        return False
    return isinstance(value, (dict, list)) and bool(value)


@register_check("title")
def title(text: str) -> bool:
    """A title in double angular brackets, <<like this>>, on one line."""
    return any(WORD.search(found) for found in re.findall(r"<<([^<>\n]+)>>", text))


@register_check("poem")
def poem(text: str) -> bool:
    """Three short lines or more (two to ten words), nothing but such lines, no list."""
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    listed = any(re.match(r"([-*•–]|\d+[.)])\s", line) for line in lines)
    short = [2 <= len(WORD.findall(line)) <= 10 for line in lines[:-1]]  # the last may be cut off
    return len(lines) >= 3 and all(short) and len(WORD.findall(lines[-1])) <= 10 and not listed


@register_check("quoted")
def quoted(text: str) -> bool:
    """The whole answer in double quotation marks, and none within."""
    return bool(re.fullmatch(r"[\"“„«][^\"“”„«»]+[\"”“»]", text))


@register_check("capitals")
def capitals(text: str) -> bool:
    """Capital letters only."""
    return text == text.upper() and text != text.lower()


@register_check("lower_case")
def lower_case(text: str) -> bool:
    """No capital letter."""
    return text == text.lower() and text != text.upper()


# -- length and words ---------------------------------------------------------------------------------------------------
@register_check("one_sentence")
def one_sentence(text: str) -> bool:
    """One sentence of four words or more that has come to its end."""
    ends = re.findall(r"[.!?…]+[\"”')\]]*(?=\s|$)", re.sub(r"\b(?:Mr|Mrs|Ms|Dr|St|e\.g|i\.e|etc|vs)\.", " ", text))
    ended = re.search(r"[.!?…][\"”')\]]*$", text) is not None
    return ended and len(ends) == 1 and len(WORD.findall(text)) >= 4 and "\n" not in text


@register_check("at_most_words")
def at_most_words(text: str, n: str) -> bool:
    """No more than n words."""
    return len(WORD.findall(text)) <= int(n)


COUNTED = ("at_most_words",)


@register_check("ends_with")
def ends_with(text: str, sentence: str) -> bool:
    """Something, and then this sentence, word for word."""
    said, asked = (re.sub(r"\W+$", "", " ".join(x.casefold().split())) for x in (text, sentence))
    return said.endswith(asked) and bool(WORD.search(said[: len(said) - len(asked)]))


@register_check("no_comma")
def no_comma(text: str) -> bool:
    """Six words or more without a comma."""
    return not re.search("[,，、،]", text) and len(WORD.findall(text)) >= 6


@register_check("includes")
def includes(text: str, word: str) -> bool:
    """The word (or phrase) stands in it, beside others."""
    words = len(WORD.findall(text))
    return re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.I) is not None and words > 2 * len(WORD.findall(word))


@register_check("avoids")
def avoids(text: str, word: str) -> bool:
    """Six words or more, and this one isn't among them."""
    return not re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.I) and len(WORD.findall(text)) >= 6


# -- language -----------------------------------------------------------------------------------------------------------
LANGUAGES = (
    *("ar", "cs", "da", "de", "el", "en", "es", "fi", "fr", "he", "hi", "hu", "id", "it"),
    *("ja", "ko", "nl", "no", "pl", "pt", "ro", "ru", "sv", "th", "tr", "uk", "vi", "zh"),
)


@register_check("language")
def language(text: str, code: str) -> bool:
    """Written in this language (two letters, ISO 639-1), told from 27 others by py3langid."""
    return _identifier().classify(text)[0] == code and len(re.findall(r"[^\W\d_]", text)) >= 12


@cache
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    identifier = LanguageIdentifier.from_model_file(MODEL_FILE)
    identifier.set_languages(list(LANGUAGES))
    return identifier

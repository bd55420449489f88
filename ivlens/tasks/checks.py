"""Verifiers: whether an answer has the form that was asked for, decided by a program from its text alone.

A check is named in a text, so that it stands in files and keys: `bullets`, `language: es`, `ends_with: That is all.`
It sees the answer alone: whether this is to the point, or repeats the question, isn't asked.
What a word is, and which texts say nothing, is told in `tasks/answers.py`.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable
from functools import cache
from typing import Any

from ivlens.common.hints import hint
from ivlens.tasks.answers import closed_json, count_words, is_degenerate, loose_variants, stands_in, words_of

__all__ = ["CHECKS", "check_source", "parse_check", "passes", "register_check"]

Verifier = Callable[..., bool]
CHECKS: dict[str, Verifier] = {}


def register_check(name: str) -> Callable[[Verifier], Verifier]:
    """Make a function of an answer's text (and of the argument after the colon, if it takes one) the check called `name`.

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
    if name in WORDED and not words_of(argument):
        raise ValueError(f"check {check!r} needs a word after the colon")
    if name == "language" and argument not in LANGUAGES:
        raise ValueError(
            f"check {check!r} names a language that isn't told apart; choose one of {', '.join(LANGUAGES)}"
        )
    return CHECKS[name], argument or None


def passes(check: str, text: str, *, loose: bool = False) -> bool:
    """Whether an answer meets a check. Degenerate text (empty, one thing repeated, fences only) meets none.

    Parameters
    ----------
    check
        Its name, with its argument after a colon, such as `language: es`.
    text
        The answer.
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
    if is_degenerate(text):
        return False
    variants = loose_variants(text) if loose else [text.strip()]
    if loose and function is json_text:
        variants += closed_json(text.strip())
    for variant in variants:
        try:
            if not is_degenerate(variant) and function(variant, *given):
                return True
        except Exception as error:
            raise RuntimeError(
                f"check {check!r} raised {type(error).__name__} ({error}) on {variant[:80]!r}; it must give True or False of any text"
            ) from error
    return False


def check_source(check: str) -> str:
    """The code behind a check, of built-in ones with all they call, so that what was kept under its name isn't another's."""
    function, _ = parse_check(check)
    built_in = getattr(function, "__module__", None) == __name__
    try:
        return "".join(map(inspect.getsource, map(inspect.getmodule, (function, words_of)) if built_in else [function]))
    except (OSError, TypeError):
        return repr(getattr(function, "__code__", function).co_code if hasattr(function, "__code__") else function)


# -- form ---------------------------------------------------------------------------------------------------------------
@register_check("bullets")
def bullets(text: str) -> bool:
    """Two different bulleted lines or more (`*`, `-`, `•` …), few said twice, and no more other lines than these; the last may be
    cut off.
    """
    return _items(text, r"\s*(?:[-–—*+]\s+|[•‣◦●▪·]\s*)(?=\S)")


@register_check("numbered_list")
def numbered_list(text: str) -> bool:
    """Lines numbered 1, 2, … (`1.`, `1)`), two different ones or more, few said twice, and no more other lines than these; the last
    may be cut off.
    """
    mark = r"[ \t]*(?:\*\*|__)?\(?(\d+)[.)](?:\*\*|__)?[ \t]+(?=\S)"
    numbers = [int(n) for n in re.findall(f"^{mark}", text, re.M)]
    return numbers == list(range(1, len(numbers) + 1)) and _items(text, mark)


def _items(text: str, mark: str) -> bool:
    lines = [line for line in text.split("\n") if line.strip()]
    items = [words_of(line[found.end() :]) for line in lines if (found := re.match(mark, line))]
    if items and not items[-1] and re.match(mark, lines[-1]):
        items, lines = items[:-1], lines[:-1]
    different = len(set(map(tuple, items)))
    return all(items) and different >= 2 and 2 * different > len(items) and 2 * len(items) >= len(lines)


@register_check("json")
def json_text(text: str) -> bool:
    """A JSON object or list in which something is said (not only empty texts, nulls and lists), alone or in a code fence."""
    fenced = re.fullmatch(r"```(?:json)?\s*(.*?)\s*```", text, re.S | re.I)
    try:
        value = json.loads(fenced[1] if fenced else text, parse_constant=_refuse)
        return isinstance(value, (dict, list)) and _says(value)
    except (ValueError, RecursionError):
        return False


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


def _says(value: Any) -> bool:
    if isinstance(value, (dict, list)):
        return any(map(_says, value.values() if isinstance(value, dict) else value))
    return value is not None and bool(words_of(str(value)))


@register_check("title")
def title(text: str) -> bool:
    """A title in double angular brackets, <<like this>>, at the beginning of a line or after a colon, and words beside it."""
    titles = re.findall(r"(?:^|:)[^\w<>\n]*<<([^<>\n]+)>>", text, re.M)
    return any(map(words_of, titles)) and bool(words_of(re.sub("<<[^<>\n]*>>", "", text)))


@register_check("poem")
def poem(text: str) -> bool:
    """Three different lines or more of two to ten words each, no other lines but a short first one (a title) and a last one that is
    cut off, no list, code or table.
    """
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    words = [count_words(line) for line in lines]
    listed = any(re.match(r"([-–—*+•]|\d+[.)])\s|[`{}\[\]|<#]", line) for line in lines[1:])
    short = len({line.casefold() for line, n in zip(lines, words) if 2 <= n <= 10}) >= 3
    return short and min(words[1:-1]) >= 2 and max(words) <= 10 and not listed


@register_check("quoted")
def quoted(text: str) -> bool:
    """The whole answer in double quotation marks that belong together, and none within."""
    inner = '[^"“”„«»]+'
    pairs = (r"[\"“]", r"[\"”]"), ("„", r"[\"“”]"), ("«", "»"), ("»", "«"), ("”", "”")
    return any(re.fullmatch(first + inner + last, text) for first, last in pairs)


@register_check("capitals")
def capitals(text: str) -> bool:
    """No small letter, and more capitals than letters without a case."""
    return text == text.upper() and _mostly(str.isupper, text)


@register_check("lower_case")
def lower_case(text: str) -> bool:
    """No capital letter, and more small letters than letters without a case."""
    return text == text.lower() and _mostly(str.islower, text)


def _mostly(has_case: Callable[[str], bool], text: str) -> bool:
    letters = [c for c in text if c.isalpha()]
    return 2 * sum(map(has_case, letters)) > len(letters)


# -- length and words ---------------------------------------------------------------------------------------------------
TITLES = r"\b(?:Mr|Mrs|Ms|Dr|Prof|St|Mt|(?:[A-Z]\.)*[A-Z])\.(?=\s+\S)"  # and initials
ABBREVIATIONS = re.compile(TITLES + r"|\b(?:vs|etc|approx|ca|(?:[a-z]\.)*[a-z])\.(?=\s+[^\sA-Z])")
END = re.compile(r"[.!?…؟।]+([\"”»“’')\]*_]*)(?=\s|$)|[。！？]+")


@register_check("one_sentence")
def one_sentence(text: str) -> bool:
    """One sentence of four words or more, on one line, that has come to its end. Quoted words and dots (…) may end within it, where it
    goes on with a small letter.
    """
    text = ABBREVIATIONS.sub(" ", text)
    goes_on = [m for m in END.finditer(text) if m[1] or m[0].endswith(("…", "..."))]
    goes_on = {m.end() for m in goes_on if text[m.end() :].lstrip()[:1].islower()}
    ends = [m.end() for m in END.finditer(text) if m.end() not in goes_on]
    return len(ends) == 1 and not words_of(text[ends[0] :]) and count_words(text) >= 4 and "\n" not in text


@register_check("at_most_words")
def at_most_words(text: str, n: str) -> bool:
    """No more than n words."""
    return count_words(text) <= int(n)


@register_check("ends_with")
def ends_with(text: str, sentence: str) -> bool:
    """Something else, and then this sentence, word for word (but for case and punctuation)."""
    said, asked = words_of(text), words_of(sentence)
    rest = said
    while rest and rest[-len(asked) :] == asked:
        rest = rest[: -len(asked)]
    return rest != said and bool(rest)


@register_check("no_comma")
def no_comma(text: str) -> bool:
    """Six words or more without a comma, in numbers neither."""
    return not re.search("[,，、،﹐､]", text) and count_words(text) >= 6


@register_check("includes")
def includes(text: str, word: str) -> bool:
    """The word (or phrase) stands in it as it is, in any case, among more than as many others."""
    return stands_in(word, text) and len(words_of(text)) > 2 * len(words_of(word))


@register_check("avoids")
def avoids(text: str, word: str) -> bool:
    """Six words or more, and this one (or this phrase) isn't among them."""
    return not stands_in(word, text) and count_words(text) >= 6


COUNTED, WORDED = ("at_most_words",), ("ends_with", "includes", "avoids")


# -- language -----------------------------------------------------------------------------------------------------------
LANGUAGES = (
    *("ar", "cs", "da", "de", "el", "en", "es", "fi", "fr", "he", "hi", "hu", "id", "it"),
    *("ja", "ko", "nl", "no", "pl", "pt", "ro", "ru", "sv", "th", "tr", "uk", "vi", "zh"),
)


@register_check("language")
def language(text: str, code: str) -> bool:
    """Written in this language (two letters, ISO 639-1), told from 27 others by py3langid: three words or more that are clearly (e⁵ times)
    likelier in it than in any other, and no sentence or line that is far (e²⁰ times) likelier in another.
    """
    text = text.encode("utf-8", "replace").decode()  # half a character is none
    (first, score), (_, next_score) = _identifier().rank(text)[:2]
    if first != code or score - next_score < 5 or len(words_of(text)) < 3:
        return False
    ranks = [_identifier().rank(part) for part in re.split(r"[.!?:\n]+", text) if words_of(part)]
    return all(rank[0][1] - dict(rank)[code] < 20 for rank in ranks)


@cache
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    identifier = LanguageIdentifier.from_model_file(MODEL_FILE)
    identifier.set_languages(list(LANGUAGES))
    return identifier

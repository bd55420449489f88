"""Answers as texts: their words in any script, whether they say anything, and what is left of them without frame or finished.

A word is a run of letters and digits; in scripts without spaces between words (Chinese, Japanese, Thai, Khmer), a character.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter

__all__ = [
    "UNSPACED",
    "VOWELS",
    "closed_json",
    "count_words",
    "is_degenerate",
    "loose_variants",
    "stands_in",
    "words_of",
]

# Thai, Lao, Burmese, Khmer, kana, Han: no spaces between words. And their vowels that belong to the letter before.
UNSPACED = re.compile(
    "[\u0e01-\u0e2e\u0e40-\u0e46\u0e81-\u0eae\u0ec0-\u0ec6\u1000-\u102a\u103f\u1050-\u1055\u1780-\u17b3\u3005\u3040-\u30ff\u3400-\u4dbf"
    "\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
)
VOWELS = re.compile("[\u0e30-\u0e33\u0eb0-\u0eb3]")


def words_of(text: str) -> list[str]:
    """All words, small letters, accents composed."""
    words: list[str] = []
    inside, alone = False, False  # a word; a character that is one
    for c in unicodedata.normalize("NFC", text.casefold()):
        kind, single = unicodedata.category(c)[0], UNSPACED.match(c) is not None
        if kind == "M" or VOWELS.match(c):  # accents, vowel signs
            if inside:
                words[-1] += c
        elif kind not in "LN":
            inside = False
        elif inside and not single and not alone:
            words[-1] += c
        else:
            words.append(c)
            inside, alone = True, single
    return words


def count_words(text: str) -> int:
    """How many words: don't, well-known and 1,000 are one each."""
    return len(words_of(re.sub(r"(?<=[^\W_])['’‑-](?=[^\W_])|(?<=\d)[.,](?=\d)", "", text)))


def stands_in(asked: str, text: str) -> bool:
    """Whether a word or phrase stands in a text, word for word."""
    words, few = words_of(text), words_of(asked)
    return any(words[i : i + len(few)] == few for i in range(len(words)))


def is_degenerate(text: str) -> bool:
    """Whether a text says nothing: no letters (but for one to three numbers on a line), or one word, phrase or letter over and over."""
    return _drones(text) or _drones(re.sub(r"^[ \t]*```\w*[ \t]*$", "", text, flags=re.M))  # also but for its fences


def _drones(text: str) -> bool:
    said = words_of(text)
    words = [word for word in said if re.search(r"[^\W\d_]", word)]
    if not words and ("\n" in text.strip() or not 1 <= len(said) <= 3):
        return True
    letters = "".join(words or said)
    looped = sum(len(run[0]) for run in re.finditer(r"(.{1,60})\1{3,}", letters))  # hahahaha
    commonest = Counter(words or said).most_common(1)[0][1]
    threes = list(zip(words, words[1:], words[2:]))
    return (
        looped > 0.6 * len(letters)
        or (commonest > 2 and commonest > 0.6 * len(words))
        or (len(threes) > 3 and len(set(threes)) <= 0.5 * len(threes))
    )


def loose_variants(text: str) -> list[str]:
    """The text as it stands, without its first line, its last, and both; and each of these without asterisks."""
    lines = text.strip().split("\n")
    cut = ["\n".join(part).strip() for part in (lines, lines[1:], lines[:-1], lines[1:-1])]
    return [*cut, *(part.replace("*", "").strip() for part in cut)]


def closed_json(text: str) -> list[str]:
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

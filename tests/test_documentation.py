"""What the documentation tells people to type exists: every call's name and options, every command's."""

from __future__ import annotations

import ast
import inspect
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

import ivlens as ivl
from ivlens.cli import app

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
COMMANDS = typer.main.get_command(app)


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.S | re.M)


def named(node: ast.expr) -> Any:
    """What `ivl.a.b` in a text is; None for what hangs on anything else."""
    if isinstance(node, ast.Name):
        return ivl if node.id in ("ivl", "ivlens") else None
    if isinstance(node, ast.Attribute) and (owner := named(node.value)) is not None:
        return getattr(owner, node.attr)
    return None


def calls(code: str) -> Iterator[tuple[ast.Call, Any]]:
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Call) and (called := named(node.func)) is not None:
            yield node, called


def commands(text: str) -> Iterator[list[str]]:
    """The words after `ivlens` on every line that calls it."""
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(re.split(r"[|&>]", line)[0], comments=True)
        while words and words[0] != "ivlens":
            words = words[1:]
        if words[1:]:
            yield words[1:]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_calls_have_the_options_that_are_shown(page):
    for code in blocks(page, "python"):
        for call, called in calls(code):
            given = [x for x in call.args if not isinstance(x, ast.Starred)]
            options = {option.arg: None for option in call.keywords if option.arg is not None}
            try:
                inspect.signature(called).bind_partial(*given, **options)
            except TypeError as error:
                raise AssertionError(f"{page.name}: {ast.unparse(call)}: {error}") from error


def unknown(name: str, words: list[str]) -> list[str]:
    """Which of the words are options that this command doesn't have."""
    if name not in COMMANDS.commands:
        return [] if name.startswith("-") else [name]
    known = {option for p in COMMANDS.commands[name].params for option in (*p.opts, *p.secondary_opts)} | {"--help"}
    return [word for word in words if re.match("--?[a-z]", word) and word.split("=")[0] not in known]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_have_the_options_that_are_shown(page):
    for text in blocks(page, "(?:bash|yaml|console|sh)"):
        for name, *words in commands(text):
            assert not unknown(name, words), f"{page.name}: ivlens {name} {' '.join(words)}"


def test_a_wrong_option_would_be_seen():
    (call, called) = next(calls("import ivlens as ivl\nivl.inject(model, iv, strength=3)"))
    with pytest.raises(TypeError):
        inspect.signature(called).bind_partial(*call.args, **{x.arg: None for x in call.keywords})
    with pytest.raises(AttributeError):
        list(calls("ivl.locate(model)"))
    assert unknown("locate", ["-t", "a", "--outt", "b"]) == ["--outt"] and unknown("find", []) == ["find"]
    assert list(commands("OMP=1 ivlens locate -t a \\\n  --out b > log  # here\nls")) == [
        ["locate", "-t", "a", "--out", "b"]
    ]

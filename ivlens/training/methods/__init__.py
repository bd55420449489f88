"""Ways to train a stage, by name: plain LoRA, those that people use against forgetting, and guided training."""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

from ivlens.common.hints import hint
from ivlens.training.guidance import KL, Guidance, SplitKL
from ivlens.training.methods.averaging import Averaging
from ivlens.training.methods.ewc import EWC
from ivlens.training.methods.frozen_heads import FrozenHeads
from ivlens.training.methods.guided import Guided
from ivlens.training.methods.guided_averaging import GuidedAveraging
from ivlens.training.methods.lora import FreshLoRA, SequentialLoRA
from ivlens.training.methods.lwf import LwF
from ivlens.training.methods.method import Combined, Method
from ivlens.training.methods.o_lora import OLoRA
from ivlens.training.methods.rehearsal import Rehearsal, TextRehearsal
from ivlens.training.methods.replay import Replay
from ivlens.training.methods.stage import Stage

__all__ = [
    "EWC",
    "METHODS",
    "Averaging",
    "Combined",
    "FreshLoRA",
    "FrozenHeads",
    "Guided",
    "GuidedAveraging",
    "LwF",
    "Method",
    "OLoRA",
    "Rehearsal",
    "Replay",
]
__all__ += ["SequentialLoRA", "Stage", "TextRehearsal", "as_method"]

METHODS: dict[str, Method] = {
    "lora": SequentialLoRA(),
    "fresh_lora": FreshLoRA(),
    "ewc": EWC(),
    "lwf": LwF(),
    "replay": Replay(),
    "rehearsal": Rehearsal(),
    "text_rehearsal": TextRehearsal(),
    "o_lora": OLoRA(),
    "averaging": Averaging(),
    "frozen_heads": FrozenHeads(),
    "iv": Guided("paper"),
    "fvg": Guided("fvg-code"),
    "iv_averaging": GuidedAveraging(),
}


def as_method(method: str | Method | Mapping[str, Any] | Sequence[Any]) -> Method:
    """A method: as it is, by its name, with options, or several that go together.

    Examples
    --------
    >>> as_method("replay(share=0.1)")
    Replay(share=0.1, size=200)
    >>> as_method("iv + averaging") == as_method(["iv", {"averaging": {"share": 0.5}}]) == Guided() + Averaging()
    True

    Raises
    ------
    ValueError
        If a name or an option is unknown (the message suggests near ones), or methods don't go together.
    """
    if isinstance(method, Method):
        return method
    if isinstance(method, str):
        return _parsed(method)
    if isinstance(method, Mapping):
        parts = [_with_options(name, options or {}) for name, options in method.items()]
    else:
        parts = [as_method(part) for part in method]
    if not parts:
        raise ValueError(f"no method given; {hint('', METHODS)}")
    return parts[0] if len(parts) == 1 else Combined(tuple(parts))


def _parsed(text: str) -> Method:
    """Names, with options in brackets where there are any, with a + between them."""
    try:
        return _read(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, TypeError) as error:
        raise ValueError(f"method={text!r} is unknown; {hint(text, METHODS)}") from error


def _read(node: ast.expr) -> Method:
    match node:
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return _read(left) + _read(right)
        case ast.Name(id=name):
            return _with_options(name, {})
        case ast.Call(func=ast.Name(id=name), args=[], keywords=options):
            return _with_options(name, {option.arg: ast.literal_eval(option.value) for option in options})
    raise TypeError("neither a name, nor a name with options, nor a sum of these")


def _with_options(name: str, given: Mapping[str, Any]) -> Method:
    if name not in METHODS:
        raise ValueError(f"method={name!r} is unknown; {hint(name, METHODS)}")
    options, known = dict(given), [field.name for field in fields(METHODS[name])]
    if unknown := [option for option in options if option not in known]:
        raise ValueError(f"method {name!r} has no option {unknown[0]!r}; choose from {', '.join(known) or 'none'}")
    if isinstance(options.get("guidance"), Mapping):
        guidance = dict(options["guidance"])
        if "kl" in guidance:
            split = {field.name for field in fields(SplitKL)}
            guidance["kl"] = tuple((SplitKL if split & term.keys() else KL)(**term) for term in guidance["kl"])
        options["guidance"] = Guidance(**guidance)
    return replace(METHODS[name], **options)

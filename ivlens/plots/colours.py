"""The colours of figures, and which condition or method has which."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle

__all__ = ["BEFORE_AFTER", "COLOURS", "FAINT", "GRID", "INK", "MARK", "PARTS", "TASK_COLOURS"]
__all__ += ["condition_colours", "method_colours"]

INK, FAINT, GRID, MARK = "#1f2328", "#59636e", "#e6e8eb", "#d55e00"
# Okabe and Ito's colours, which people with any kind of colour vision tell apart.
TASK_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#7b4fa3", "#000000")
BEFORE_AFTER = {"before": "#7d8590", "after": "#d55e00"}
COLOURS = {
    "no vector": "#999999",
    "vector": "#0072b2",
    "random vector": "#e69f00",
    "random heads": "#d55e00",
    "other task": "#cc79a7",
    "demonstrations": "#009e73",
    # of free answers
    "told": "#009e73",
    "told + vector": "#56b4e9",
    "told − vector": "#7b4fa3",
    "told − random vector": "#8c6d31",
    # of models before and after training
    "before": "#999999",
    "before + vector": "#4d545c",
    "after": "#d5d9de",
    "old vector": "#0072b2",
    "old vector, by heads": "#56b4e9",
    "old − new vector": "#d55e00",
    "original state": "#009e73",
}
PARTS = {"met": "#0072b2", "on_topic": "#009e73", "fluent": "#e69f00"}  # of balance
MORE_CONDITIONS = ("#56b4e9", "#f0e442", "#000000", "#7b4fa3", "#8c6d31")
METHOD_COLOURS = {
    "lora": "#d55e00",
    "fresh_lora": "#e69f00",
    "ewc": "#009e73",
    "lwf": "#56b4e9",
    "replay": "#cc79a7",
    "o_lora": "#7b4fa3",
    "averaging": "#8c6d31",
    "iv": "#0072b2",
    "fvg": "#8fa300",
}
MORE_METHODS = (*METHOD_COLOURS.values(), "#c2185b", "#000000", "#7d8590")


def condition_colours(conditions: Sequence[str]) -> dict[str, str]:
    """A colour per condition: the known ones always have theirs."""
    kinds = {c: "demonstrations" if c.endswith("demonstrations") else c for c in conditions}
    return _filled({c: COLOURS.get(kind) for c, kind in kinds.items()}, MORE_CONDITIONS)


def method_colours(methods: Sequence[str]) -> dict[str, str]:
    """A colour per method, the same in all figures: the built-in ones always have theirs."""
    return _filled({m: METHOD_COLOURS.get(m) for m in methods}, MORE_METHODS)


def _filled(own: Mapping[str, str | None], more: Sequence[str]) -> dict[str, str]:
    free = cycle([colour for colour in more if colour not in own.values()])
    return {name: colour or next(free) for name, colour in own.items()}

"""How figures write numbers and names."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence

__all__ = ["counted", "escaped", "plain", "signed", "span", "unit", "which_tasks", "with_minus"]

UNITS = {
    "probability": "answer probability",
    "log_probability": "answer log-probability (nats)",
    "logit": "answer logit",
    "accuracy": "first-token accuracy",
    "first_token": "first-token accuracy",
    "rouge_l": "ROUGE-L (F1)",
    "met": "constraint met",
    "met_loose": "constraint met, loosely",
    "topic": "on topic (nats per token)",
    "surprise": "surprise (nats per token)",
}


def escaped(name: str) -> str:
    """A name as plotly shall show it: without its tags taking effect."""
    return html.escape(str(name), quote=False)


def with_minus(text: str) -> str:
    return text.replace("-", "−")


def signed(mean: float, error: float = math.nan) -> str:
    return with_minus(f"{mean:+.3f}") + ("" if math.isnan(error) else f" ± {error:.3f}")


def plain(scale: float) -> str:
    return with_minus(f"{scale:g}")


def counted(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def span(amounts: Sequence[int]) -> str:
    """The one amount, or from the least to the most."""
    least, most = min(amounts), max(amounts)
    return str(least) if least == most else f"{least} to {most}"


def which_tasks(names: Sequence[str]) -> str:
    return escaped(names[0]) if len(names) == 1 else counted(len(names), "task")


def unit(metric: str) -> str:
    return UNITS.get(metric, metric.replace("_", " "))

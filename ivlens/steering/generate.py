"""Continuations with and without a vector, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd
from torch import Tensor

from ivlens.common.hints import typed
from ivlens.common.tables import table_html
from ivlens.models.backends import backend_of
from ivlens.running.decoding import complete
from ivlens.running.injection import Injection
from ivlens.running.tokens import tokenize
from ivlens.steering.gate import Gate
from ivlens.tasks.prompts import Prompt, common_stop
from ivlens.vectors.vector import InstructionVector

__all__ = ["Generations", "generate"]


@dataclass(frozen=True)
class Generations:
    """Greedy continuations side by side. Shows as a table in Jupyter.

    Attributes
    ----------
    prompts
        The prompts' texts; of prompts in style `chat`, what the user says.
    texts
        From a condition ("no vector", "+ vector", "− vector") to one continuation per prompt.

    Notes
    -----
    Columns of your own: `Generations(prompts, {"told": told["no vector"], "steered": bare["+ vector"]})`.
    """

    prompts: list[str]
    texts: dict[str, list[str]]

    def __getitem__(self, condition: str) -> list[str]:
        """The texts of a condition, which may be typed in ASCII: `"-vector"` for `"− vector"`."""
        return self.texts[typed(condition, self.texts, "condition")]

    def to_dataframe(self) -> pd.DataFrame:
        """One row per prompt, one column per condition."""
        return pd.DataFrame({"prompt": self.prompts, **self.texts})

    def _repr_html_(self) -> str:
        return table_html(self.to_dataframe(), index=False, lines=True)

    def __repr__(self) -> str:
        return self.to_dataframe().map(lambda text: repr(text)[1:-1]).to_string(index=False)


def generate(
    model: Any,
    prompts: str | Prompt | Tensor | Sequence[str | Prompt | Tensor],
    *,
    vector: InstructionVector | Tensor | Sequence[InstructionVector] | None = None,
    layer: int | None = None,
    scale: float | None = None,
    positions: str | None = None,
    mode: str = "sum",
    how: str | None = None,
    when: Gate | None = None,
    max_new_tokens: int | None = None,
    stop: str | None = "auto",
    batch_size: int | None = None,
) -> Generations:
    """Greedy continuations without the vector, with it, and with it subtracted.

    Parameters
    ----------
    model
        A hooked model, such as `load_model` gives.
    prompts
        Texts, prompts, or token numbers (1-D tensors).
    vector, layer, scale, positions, mode, how, when
        As in `inject`. Without a vector there is one column.
    max_new_tokens
        Default: 10, or 40 where prompts are of a task with a check, whose answers are free.
    stop
        Text that ends a continuation (after something has been said); None for none but the end-of-text token. Default: a line's
        end, or none where an answer may have several lines.
    batch_size
        Prompts per forward pass; None for as many as there is room for. Halved where memory runs out.

    Notes
    -----
    For sampling and everything else `generate` of the model can do, call that inside `inject`.
    """
    backend = backend_of(model)
    prompts = [prompts] if not isinstance(prompts, Sequence) or isinstance(prompts, str) else list(prompts)
    rows = tokenize(backend, prompts)
    injections: dict[str, Injection | None] = {"no vector": None}
    if vector is not None:
        options: dict[str, Any] = {"layer": layer, "positions": positions, "mode": mode, "how": how, "when": when}
        plus = Injection.of(backend, vector, scale=scale, **options)
        injections["+ vector"] = plus
        injections["− vector"] = -plus
    max_new_tokens, stop = limits(prompts, max_new_tokens, stop)
    done = complete(backend, rows, injections, max_new_tokens=max_new_tokens, stop=stop, batch_size=batch_size)
    shown = [as_asked(p, backend.tokenizer) for p in prompts]
    return Generations(shown, {name: c.texts for name, c in done.items()})


def limits(
    prompts: Sequence[str | Prompt | Tensor], max_new_tokens: int | None = None, stop: str | None = "auto"
) -> tuple[int, str | None]:
    """How long continuations get, and the text that ends them; see `generate`."""
    built = [p for p in prompts if isinstance(p, Prompt)]
    if max_new_tokens is None:
        max_new_tokens = 40 if any(p.query.check for p in built) else 10
    return max_new_tokens, common_stop(built) if stop == "auto" else stop


def as_asked(prompt: str | Prompt | Tensor, tokenizer: Any) -> str:
    """A prompt's text; of one in style `chat`, what the user says."""
    if isinstance(prompt, Tensor):
        return tokenizer.decode(prompt.flatten())
    if isinstance(prompt, str) or prompt.style != "chat":
        return prompt if isinstance(prompt, str) else prompt.render(tokenizer)
    return replace(prompt, style="plain").render().rstrip("\n")

"""Where along layers and positions an instruction passes through the residual stream."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from ivlens.common.processes import hidden
from ivlens.common.statistics import standard_error
from ivlens.common.tables import table_html
from ivlens.models.backend import Backend
from ivlens.models.backends import backend_of
from ivlens.running.reading import read_prompts
from ivlens.running.replay import Sweep
from ivlens.running.sites import Sites
from ivlens.running.tokens import TokenizedPrompt, tokenize
from ivlens.tasks.prompts import Prompt

if TYPE_CHECKING:
    import plotly.graph_objects as go

__all__ = ["Edit", "ResidualEffects", "edit_effects", "residual_effects"]


@dataclass(frozen=True)
class ResidualEffects:
    """Effects of patching the clean residual stream into the corrupted run, [prompt layer position].

    `positions` count from the prompt's end: -1 is its last token.
    """

    values: Float[Tensor, "prompt layer position"]
    positions: tuple[int, ...]
    metric: str = "probability"

    def mean(self) -> Float[Tensor, "layer position"]:
        """Over prompts."""
        return self.values.mean(0)

    def stderr(self) -> Float[Tensor, "layer position"]:
        """Standard error of the mean over prompts. NaN, with a warning, of one prompt."""
        return torch.from_numpy(standard_error([self.values.double().numpy()])).float()

    def to_dataframe(self) -> pd.DataFrame:
        """One row per layer and position: mean and standard error."""
        places = product(range(self.values.shape[1]), self.positions)
        frame = pd.DataFrame(places, columns=["layer", "position"])
        return frame.assign(mean=self.mean().flatten().tolist(), stderr=self.stderr().flatten().tolist())

    def plot(self) -> go.Figure:
        """Heatmap, layer × position."""
        from ivlens.plots import plot_residual

        return plot_residual(self)

    def __repr__(self) -> str:
        (n, layers, _), mean = self.values.shape, self.mean()
        layer, i = divmod(int(mean.argmax()), len(self.positions))
        best = f"strongest {mean[layer, i]:+.3f} after layer {layer} at {self.positions[i]}"
        where = f"{layers} layers, positions {self.positions[0]} to {self.positions[-1]}"
        return f"ResidualEffects({n} prompts, {where}, {self.metric}; {best})"

    def _repr_html_(self) -> str:
        return table_html(self.to_dataframe().round(4), title=repr(self), index=False)


def residual_effects(
    model: Any,
    clean: Sequence[Prompt | str | Tensor],
    corrupted: Sequence[Prompt | str | Tensor],
    answers: Sequence[str] | None = None,
    *,
    positions: Sequence[int] = (-4, -3, -2, -1),
    metric: str = "probability",
    method: str = "auto",
    max_rows: int | None = None,
    progress: bool = True,
) -> ResidualEffects:
    """Patch the residual stream of clean runs into corrupted ones, layer by layer and position by position.

    Position -2 of a corrupted prompt takes the clean prompt's position -2, so the two need the same text near their end only.
    Effect = m(answer | do(r[l, p] := r_clean[l, p])) − m(answer), as in activation patching (arXiv 2202.05262).

    Parameters
    ----------
    positions
        Patched positions, counted from the prompt's end.
    """
    backend = backend_of(model)
    corrupted_tokens = tokenize(backend, corrupted, answers)
    clean_tokens = tokenize(backend, clean)
    if len(clean_tokens) != len(corrupted_tokens):
        raise ValueError(f"{len(clean_tokens)} clean but {len(corrupted_tokens)} corrupted prompts; give them in pairs")
    if max(positions) >= 0:
        raise ValueError(f"position={max(positions)}: positions count from the prompt's end, -1 is its last token")
    for i, row in enumerate(clean_tokens):
        if -min(positions) > len(row.prompt):
            there = f"clean prompt {i}, which has {len(row.prompt)} tokens"
            raise ValueError(f"position={min(positions)} is outside {there}")
    clean_tokens = [TokenizedPrompt(row.prompt) for row in clean_tokens]  # their answers aren't needed
    columns = []
    for position in tqdm(positions, desc="patching residuals", disable=hidden(progress)):
        states = read_prompts(backend, clean_tokens, resid=True, position=position).resid
        edits = [Edit({layer: states[:, layer]}, replace=True) for layer in range(backend.n_layers)]
        options = {"metric": metric, "position": position, "method": method, "max_rows": max_rows}
        values, baseline = edit_effects(backend, corrupted_tokens, edits, **options)
        columns.append(values - baseline[:, None])
    return ResidualEffects(torch.stack(columns, dim=-1), tuple(positions), metric)


@dataclass(frozen=True)
class Edit:
    """A change to the residual stream at one position: after each of these layers, add the value or put it in its place.

    A value is [d_model], or [prompt d_model] for one per prompt.
    """

    values: Mapping[int, Tensor]
    replace: bool = False


def edit_effects(
    backend: Backend,
    rows: Sequence[TokenizedPrompt],
    edits: Sequence[Edit],
    *,
    metric: str,
    position: int = -1,
    method: str = "auto",
    max_rows: int | None = None,
    bar: tqdm | None = None,
) -> tuple[Float[Tensor, "prompt edit"], Float[Tensor, " prompt"]]:
    """The metric of every prompt under every edit, and without any: all edits in one replay of each prompt's end."""
    order = sorted(range(len(edits)), key=lambda i: min(edits[i].values))

    def write(layer: int, sites: list[int], prompts: list[int], x: Tensor) -> None:
        for i, site in enumerate(sites):
            edit = edits[order[site]]
            value = edit.values[layer]
            value = (value[prompts] if value.dim() == 2 else value).to(x)
            x[:, i] = value if edit.replace else x[:, i] + value

    sites = Sites([sorted(edits[i].values) for i in order], backend.resid_hook, write, edits)
    sweep = Sweep(backend, rows, sites, metric=metric, position=position, method=method, max_rows=max_rows)
    values, baseline = torch.empty(len(rows), len(edits)), torch.empty(len(rows))
    columns = torch.tensor(order)
    for swept in sweep.run():
        values[torch.tensor(swept.index)[:, None], columns] = swept.values
        baseline[swept.index] = swept.baseline
        if bar is not None:
            bar.update(len(swept.index))
    return values, baseline

"""`InjectionSearch`: what layers and scales of an injection gave on validation prompts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product
from typing import TYPE_CHECKING

import pandas as pd
from jaxtyping import Float
from torch import Tensor

from ivlens.common.tables import table_html
from ivlens.vectors.vector import InstructionVector

if TYPE_CHECKING:
    import plotly.graph_objects as go

__all__ = ["InjectionSearch"]


@dataclass(frozen=True)
class InjectionSearch:
    """Accuracy (greedy decoding gives the answer) for every layer and scale, with the vector and with a random one of the same norm.

    Of free answers, in accuracy's place, the harmonic mean of constraint met, on topic and fluent; the random one at the best only.

    Attributes
    ----------
    vector
        The one tried.
    accuracy, control
        [layer scale], of the vector and of the random vector.
    baseline
        Accuracy with nothing injected.
    goal
        `induce` (highest accuracy wins) or `suppress` (largest drop below the random vector's wins).
    """

    vector: InstructionVector
    accuracy: Float[Tensor, "layer scale"]
    control: Float[Tensor, "layer scale"]
    baseline: float
    layers: tuple[int, ...]
    scales: tuple[float, ...]
    n: int
    goal: str = "induce"
    candidates: tuple[InstructionVector, ...] = ()  # one for each layer, where vectors are made for one
    measure: str = "accuracy"  # or, of free answers, "balance"
    others: tuple[InjectionSearch, ...] = ()  # of free answers, at other positions, where the best came out lower

    @property
    def positions(self) -> str | None:
        """Where the vector was added, as it says itself; None for the last prompt token."""
        return self.vector.metadata.get("positions")

    @property
    def best(self) -> InstructionVector:
        """The vector with the winning layer and scale set, and the accuracy there in its metadata, where it induces. Ties go to the
        smaller scale, then the lower layer."""
        score = self.accuracy if self.goal == "induce" else self.control - self.accuracy
        places = product(range(len(self.layers)), range(len(self.scales)))
        layer, scale = min(places, key=lambda at: (-round(score[at].item(), 6), abs(self.scales[at[1]]), at[0]))
        vector = self.candidates[layer] if self.candidates else self.vector
        does = {self.measure: self.accuracy[layer, scale].item()} if self.goal == "induce" else {}
        return replace(vector, layer=self.layers[layer], scale=self.scales[scale], metadata={**vector.metadata, **does})

    def plot(self) -> go.Figure:
        """Heatmap, scale × layer."""
        from ivlens.plots import plot_search

        return plot_search(self)

    def __repr__(self) -> str:
        best, of = self.best, "balance " * (self.measure == "balance")
        at = (self.layers.index(best.layer), self.scales.index(best.scale))
        where, *others = (f", positions {x.positions}" if x.positions else "" for x in (self, *self.others))
        beside = "".join(f"{other}: {x.accuracy.max():.0%}" for other, x in zip(others, self.others))
        return (
            f"InjectionSearch({self.vector.name}, {self.n} prompts: {of}{self.baseline:.0%} → {self.accuracy[at]:.0%} at layer "
            f"{best.layer}, scale {best.scale:g}{where}; random vector there {self.control[at]:.0%}{beside})"
        )

    def _repr_html_(self) -> str:
        both = zip(self.accuracy.tolist(), self.control.tolist())
        cells = [[f"{x:.0%}" + f" ({y:.0%})" * (y == y) for x, y in zip(*rows)] for rows in both]
        frame = pd.DataFrame(cells, [f"layer {x}" for x in self.layers], [f"scale {x:g}" for x in self.scales])
        own = table_html(frame, title=f"{self!r} In brackets: a random vector of the same norm.")
        return own + "".join(other._repr_html_() for other in self.others)

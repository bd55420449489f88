"""Where along layers and positions an instruction passes through the residual stream."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from ivlens.models.backends import Backend, backend_of
from ivlens.patching.metrics import check_metric
from ivlens.patching.replay import Sites, Sweep
from ivlens.prompts import Prompt, TokenizedPrompt, pad_left, tokenize

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

__all__ = ["ResidualEffects", "residual_effects"]


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
        """Standard error of the mean over prompts."""
        return self.values.std(0) / len(self.values) ** 0.5

    def to_dataframe(self) -> pd.DataFrame:
        """One row per layer and position: mean and standard error."""
        import pandas as pd

        mean, error = self.mean(), self.stderr()
        rows = [
            {"layer": layer, "position": p, "mean": mean[layer, i].item(), "stderr": error[layer, i].item()}
            for layer in range(len(mean))
            for i, p in enumerate(self.positions)
        ]
        return pd.DataFrame(rows)

    def plot(self) -> go.Figure:
        """Heatmap, layer × position."""
        from ivlens.plots import plot_residual

        return plot_residual(self)

    def __repr__(self) -> str:
        n, layers, _ = self.values.shape
        layer, i = divmod(int(self.mean().argmax()), len(self.positions))
        return (
            f"ResidualEffects({n} prompts, {layers} layers, positions {self.positions[0]} to {self.positions[-1]}, "
            f"{self.metric}; strongest {self.mean()[layer, i]:+.3f} after layer {layer} at {self.positions[i]})"
        )


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
    check_metric(metric)
    backend = backend_of(model)
    corrupted_tokens = tokenize(backend, corrupted, answers)
    clean_tokens = tokenize(backend, clean)
    if len(clean_tokens) != len(corrupted_tokens):
        raise ValueError(f"{len(clean_tokens)} clean but {len(corrupted_tokens)} corrupted prompts; give them in pairs")
    if not all(t.answer for t in corrupted_tokens):
        raise ValueError("answers are needed to measure an effect; pass one text per prompt")
    columns = []
    with tqdm(total=len(positions) * len(corrupted_tokens), desc="patching residuals", disable=not progress) as bar:
        for position in positions:
            if position >= 0:
                raise ValueError(f"position={position}: positions count from the prompt's end, -1 is its last token")
            columns.append(_at(backend, clean_tokens, corrupted_tokens, position, metric, method, max_rows, bar))
    return ResidualEffects(torch.stack(columns, dim=-1), tuple(positions), metric)


def _at(
    backend: Backend,
    clean: list[TokenizedPrompt],
    corrupted: list[TokenizedPrompt],
    position: int,
    metric: str,
    method: str,
    max_rows: int | None,
    bar: tqdm,
) -> Float[Tensor, "prompt layer"]:
    """Effects at one position. Each prompt has its own replacement, so each is a sweep of its own."""
    columns = torch.empty(len(corrupted), backend.n_layers)
    for i, (whole, broken) in enumerate(zip(clean, corrupted)):
        if position < -len(whole.prompt):
            raise ValueError(f"position={position} is outside clean prompt {i}, which has {len(whole.prompt)} tokens")
        replacement = _residuals(backend, whole, position)

        def write(layer: int, sites: list[int], x: Tensor, replacement: Tensor = replacement) -> None:
            x[:, 0] = replacement[layer].to(x)

        sites = Sites(range(backend.n_layers), backend.resid_hook, write)
        options = {"metric": metric, "position": position, "method": method, "max_rows": max_rows}
        sweep = Sweep(backend, [broken], sites, **options, checked=i > 0)
        for swept in sweep.run():
            columns[i] = (swept.values - swept.baseline[:, None])[0]
        method = sweep.method
        bar.update()
    return columns


@torch.inference_mode()
def _residuals(backend: Backend, prompt: TokenizedPrompt, position: int) -> Float[Tensor, "layer d_model"]:
    tokens, mask = pad_left([prompt.prompt], 0, backend.device)
    kept: dict[int, Tensor] = {}

    def keep(layer: int):
        def hook_fn(x: Tensor, hook: Any) -> None:
            kept[layer] = x[0, position].clone()

        return hook_fn

    with backend.model.hooks(fwd_hooks=[(backend.resid_hook(layer), keep(layer)) for layer in range(backend.n_layers)]):
        backend.forward(tokens, mask)
    return torch.stack([kept[layer].to(backend.device) for layer in range(backend.n_layers)])

"""Gates: a direction and a threshold that let a vector act only on prompts that want it (arXiv 2409.05907)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ivlens.common.storage import read_tensors, write_tensors
from ivlens.common.tables import about_html
from ivlens.models.backend import Backend
from ivlens.models.backends import backend_of
from ivlens.running.reading import in_order, read_batches
from ivlens.running.tokens import TokenizedPrompt, tokenize
from ivlens.tasks.prompts import Prompt

__all__ = ["Gate", "fit_gate"]

KIND = "gate"


@dataclass(frozen=True, eq=False)
class Gate:
    """Opens where cos(r − r̄, c) > τ, with r the residual stream after `layer` at a prompt's last token.

    Attributes
    ----------
    direction
        c, [d_model]: the mean of prompts that want the vector minus that of prompts that don't.
    center
        r̄, [d_model]: halfway between these means.
    layer
        After which r is read.
    threshold
        τ, −1 to 1.
    metadata
        How it does on the prompts that chose it: `f1`, `n`.
    """

    direction: Float[Tensor, " d_model"]
    center: Float[Tensor, " d_model"]
    layer: int
    threshold: float
    metadata: dict[str, Any] = field(default_factory=dict)

    def scores(self, resid: Float[Tensor, "row d_model"]) -> Float[Tensor, " row"]:
        """cos(r − r̄, c) of each row of `resid`."""
        away = resid.float() - self.center.to(resid.device).float()
        return torch.nn.functional.cosine_similarity(away, self.direction.to(resid.device).float()[None], dim=-1)

    def opens(self, resid: Float[Tensor, "row d_model"]) -> Bool[Tensor, " row"]:
        """For which rows of `resid` it opens."""
        return self.scores(resid) > self.threshold

    def on(self, model: Any, prompts: Sequence[Prompt | str]) -> list[bool]:
        """For which of `prompts` it opens on `model`."""
        return (_scores(backend_of(model), prompts, [self])[:, 0] > self.threshold).tolist()

    def save(self, path: str | Path) -> Path:
        """Save to `path`, one `.safetensors` file."""
        about = {"kind": KIND, "layer": self.layer, "threshold": self.threshold, "metadata": self.metadata}
        return write_tensors(path, {"direction": self.direction, "center": self.center}, about)

    @classmethod
    def load(cls, path: str | Path) -> Gate:
        """Load from `path` what `save` wrote."""
        tensors, about = read_tensors(path, kind=KIND)
        return cls(**tensors, **{k: about[k] for k in ("layer", "threshold", "metadata")})

    def __repr__(self) -> str:
        f1 = f", F1 {self.metadata['f1']:.2f} on {self.metadata['n']} prompts" if "f1" in self.metadata else ""
        return f"Gate(layer {self.layer}, cos > {self.threshold:.2f}{f1})"

    def _repr_html_(self) -> str:
        about = {"layer": self.layer, "threshold": self.threshold, "d_model": len(self.direction)}
        return about_html({**about, **self.metadata}, title=repr(self))


@torch.no_grad()
def fit_gate(
    model: Any,
    wanted: Sequence[Prompt | str],
    unwanted: Sequence[Prompt | str],
    *,
    valid: tuple[Sequence[Prompt | str], Sequence[Prompt | str]],
    layers: Sequence[int] | None = None,
) -> Gate:
    """Direction from the prompts given, layer and threshold by F1 on validation prompts (arXiv 2409.05907 §3.2).

    Parameters
    ----------
    model
        A hooked model, such as `load_model` gives.
    wanted, unwanted
        Prompts that the vector should act on, and prompts that it should leave alone.
    valid
        Both kinds again, from the validation split.
    layers
        Which layers to try; default all. A gate must not be read after the layer that its vector acts at.

    Raises
    ------
    ValueError
        If one of the four lists is empty, or the means of both kinds are the same.
    """
    backend = backend_of(model)
    for name, prompts in (("wanted", wanted), ("unwanted", unwanted), ("valid", valid[0]), ("valid", valid[1])):
        if not len(prompts):
            raise ValueError(
                f"{name} holds no prompts; a gate needs prompts of both kinds: those it opens for, and others"
            )
    layers = range(backend.n_layers) if layers is None else [backend.check_layer(x) for x in layers]
    yes, no = (_mean(backend, x) for x in (wanted, unwanted))
    gates = [Gate(yes[x] - no[x], (yes[x] + no[x]) / 2, x, 0.0) for x in layers if (yes[x] - no[x]).norm() > 0]
    scores = [_scores(backend, x, gates).unbind(1) for x in valid] if gates else [(), ()]
    found = [(*_threshold(a, b), gate) for gate, a, b in zip(gates, *scores)]
    if not found:
        raise ValueError("prompts that want the vector and those that don't look the same to the model; give others")
    f1, threshold, best = max(found, key=lambda x: (x[0], -x[2].layer))
    about = {"f1": f1, "n": len(valid[0]) + len(valid[1]), "model": backend.name}
    return Gate(best.direction, best.center, best.layer, threshold, about)


def _threshold(yes: Tensor, no: Tensor) -> tuple[float, float]:
    """The best F1, and the threshold for it: in the middle of the gap between two scores."""
    scores = torch.cat([yes, no]).sort().values
    cuts = torch.cat([scores[:1] - 1e-3, (scores[1:] + scores[:-1]) / 2])
    hits, false = (len(x) - torch.searchsorted(x.sort().values, cuts, right=True) for x in (yes, no))
    f1 = 2 * hits / (len(yes) + hits + false)
    best = torch.nonzero(f1 == f1.max())[:, 0]
    chosen = best[len(best) // 2]
    return f1[chosen].item(), cuts[chosen].item()


def _mean(backend: Backend, prompts: Sequence[Prompt | str]) -> Float[Tensor, "layer d_model"]:
    """Mean residual stream after each layer, at the prompts' last tokens."""
    batches = read_batches(backend, _bare(backend, prompts), lambda read: read["resid"].double().sum(0), resid=True)
    return (sum(total for _, total in batches) / len(prompts)).float()


def _scores(backend: Backend, prompts: Sequence[Prompt | str], gates: Sequence[Gate]) -> Float[Tensor, "prompt gate"]:
    """What every gate says of every prompt."""

    def scored(read: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"": torch.stack([gate.scores(read["resid"][:, gate.layer]) for gate in gates], dim=1)}

    return in_order(read_batches(backend, _bare(backend, prompts), scored, resid=True), len(prompts))[""]


def _bare(backend: Backend, prompts: Sequence[Prompt | str]) -> list[TokenizedPrompt]:
    return [TokenizedPrompt(x.prompt) for x in tokenize(backend, prompts)]

"""The instruction vector: the sum of what heads add to the residual stream."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from ivlens.common.tables import about_html
from ivlens.models.backends import backend_of
from ivlens.models.head import Head
from ivlens.running.injection import Injection
from ivlens.running.positions import injected
from ivlens.vectors.files import FILE, describe, read_vector, write_vector
from ivlens.vectors.recipe import recipe

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    import plotly.graph_objects as go


__all__ = ["InstructionVector"]

RESIDUAL = "as added to the residual stream"  # what a vector is in, `unit` of its metadata


@dataclass(frozen=True, eq=False)
class InstructionVector:
    """A direction in the residual stream that carries an instruction (θ_c of the paper, IV §3).

    Attributes
    ----------
    vector
        [d_model], the sum of the heads' shares.
    heads
        The heads it was summed over (empty for a vector made otherwise).
    shares
        What each head adds, [head d_model].
    layer, scale
        Where and how strongly to inject it, once chosen on validation data; None and 1.0 before.
    metadata
        Model, hook, prompts, seed and versions behind it.

    Notes
    -----
    A value: `a + b`, `a - b`, `2 * a`, `a / 2`, `-a` give new vectors, `a == b` compares numbers, heads, layer and scale. A sum
    keeps the layer and the scale on which both agree. Scale 1 is as much as the heads write themselves, on every architecture.
    """

    vector: Float[Tensor, " d_model"]
    heads: tuple[Head, ...] = ()
    shares: Float[Tensor, "head d_model"] | None = None
    layer: int | None = None
    scale: float = 1.0
    metadata: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.vector.dim() != 1 or not self.vector.is_floating_point():
            has = f"{self.vector.dtype} of shape {tuple(self.vector.shape)}"
            raise ValueError(f"a vector has one dimension, [d_model], of floating-point numbers; got {has}")
        if not all(torch.isfinite(x).all() for x in (self.vector, self.shares) if x is not None):
            raise ValueError("the vector holds NaN or infinite values; extract it again")
        if not isinstance(self.metadata, dict):
            raise ValueError(f"metadata={self.metadata!r} is no dictionary")
        object.__setattr__(self, "layer", None if self.layer is None else _whole(self.layer, "layer"))
        if isinstance(self.scale, bool) or not isinstance(self.scale, (int, float)) or not math.isfinite(self.scale):
            raise ValueError(f"scale={self.scale!r} is no finite number")
        if wrong := [head for head in self.heads if len(head) != 2]:
            raise ValueError(f"heads holds {wrong[0]!r}; give pairs of layer and head")
        heads = tuple(Head(*(_whole(x, "head") for x in head)) for head in self.heads)
        made_for = self.metadata.get("signature", {})
        most = [made_for.get(key, math.inf) for key in ("n_layers", "n_heads")]
        if wrong := [head for head in heads if not (0 <= head.layer < most[0] and 0 <= head.head < most[1])]:
            raise ValueError(f"the model that the vector was made for ({_shape(made_for)}) has no head {wrong[0]}")
        object.__setattr__(self, "heads", heads)
        shape = None if self.shares is None else tuple(self.shares.shape)
        if shape != ((len(heads), self.d_model) if heads else None):
            raise ValueError(f"{len(heads)} heads of width {self.d_model}, but shares of shape {shape}")

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, InstructionVector):
            return NotImplemented
        if (self.heads, self.layer, self.scale) != (other.heads, other.layer, other.scale):
            return False
        return torch.equal(self.vector, other.vector) and (not self.heads or torch.equal(self.shares, other.shares))

    def __hash__(self) -> int:
        return hash((self.heads, self.layer, self.scale, tuple(self.vector.tolist())))

    # -- what it is -------------------------------------------------------------------------------------------------
    @property
    def d_model(self) -> int:
        return self.vector.shape[0]

    @property
    def name(self) -> str:
        return str(self.metadata.get("task", "vector"))

    def norm(self) -> float:
        """Euclidean length."""
        return self.vector.norm().item()

    def cosine(self, other: InstructionVector | Tensor) -> float:
        """Cosine similarity with `other`, a vector of the same width."""
        theirs = other.vector if isinstance(other, InstructionVector) else other
        if theirs.shape != self.vector.shape:
            expected = f"expected a vector of width {self.d_model}, got shape {tuple(theirs.shape)}"
            raise ValueError(f"{expected}; they belong to different models")
        return torch.nn.functional.cosine_similarity(self.vector, theirs.to(self.vector), dim=0).item()

    def check_model(self, model: Any) -> None:
        """Raise ValueError if this is a vector of a model of another shape than `model`."""
        backend = backend_of(model)
        mine = self.metadata.get("signature")
        wrong = ""
        if self.d_model != backend.d_model:
            wrong = f"has width {self.d_model}, but {backend.name} has d_model {backend.d_model}"
        elif mine is not None and mine != backend.signature:
            made_for = f"{self.metadata.get('model', 'another model')} ({_shape(mine)})"
            wrong = f"was made for {made_for}, not for {backend.name} ({_shape(backend.signature)})"
        if wrong:
            raise ValueError(f"the vector {wrong}; extract a vector from this model with ivl.extract_vector")
        if self.heads and self.metadata.get("unit") != RESIDUAL and backend.post_norm(self.heads[0].layer) is not None:
            said = f"{self.name} was saved before shares went through the norm that follows {backend.name}'s attention"
            warnings.warn(f"{said}: its length isn't what the heads write; extract it again", stacklevel=4)

    # -- arithmetic -------------------------------------------------------------------------------------------------
    def __add__(self, other: InstructionVector) -> InstructionVector:
        if not isinstance(other, InstructionVector):
            return NotImplemented
        if other.d_model != self.d_model:
            widths = f"{self.d_model} and {other.d_model}"
            raise ValueError(f"can't add vectors of width {widths}; they belong to different models")
        theirs, mine = other.metadata.get("signature"), self.metadata.get("signature")
        if theirs and mine and theirs != mine:
            raise ValueError(f"can't add vectors of different models ({_shape(mine)} and {_shape(theirs)})")
        units = [v.metadata.get("unit") for v in (self, other) if v.heads]
        if len(set(units)) > 1:
            raise ValueError("can't add a vector saved before shares went through the norm; extract it again")
        shares: dict[Head, Tensor] = {}
        if self.heads and other.heads:  # else they wouldn't add up to the sum
            for v in (self, other):
                for head, share in zip(v.heads, v.shares):
                    shares[head] = shares[head] + share if head in shares else share
        heads = tuple(sorted(shares))
        metadata = {k: v for k, v in self.metadata.items() if k != "projections" and other.metadata.get(k) == v}
        return InstructionVector(
            self.vector + other.vector,
            heads,
            torch.stack([shares[h] for h in heads]) if heads else None,
            layer=self.layer if self.layer == other.layer else None,
            scale=self.scale if self.scale == other.scale else 1.0,
            metadata={**metadata, "task": f"{self.name} + {other.name}"},
        )

    def __mul__(self, factor: float) -> InstructionVector:
        if not isinstance(factor, (int, float)):
            return NotImplemented
        shares = None if self.shares is None else self.shares * factor
        # Projections are on its direction.
        kept = {k: v for k, v in self.metadata.items() if factor > 0 or k != "projections"}
        return replace(self, vector=self.vector * factor, shares=shares, metadata=kept)

    __rmul__ = __mul__

    def __neg__(self) -> InstructionVector:
        return self * -1.0

    def __sub__(self, other: InstructionVector) -> InstructionVector:
        return self + -other

    def __truediv__(self, divisor: float) -> InstructionVector:
        return self * (1 / divisor)

    # -- using it ---------------------------------------------------------------------------------------------------
    def inject(
        self,
        model: Any,
        *,
        layer: int | None = None,
        scale: float | None = None,
        positions: str | Tensor | None = None,
        mode: str = "sum",
        how: str | None = None,
        when: Any = None,
    ) -> AbstractContextManager:
        """Inject (or, with a negative scale, subtract) the vector while the context lasts.

        Parameters
        ----------
        model, layer, scale, positions, mode, how, when
            As in `ivlens.inject`.
        """
        options = {"layer": layer, "scale": scale, "positions": positions, "mode": mode, "how": how, "when": when}
        return injected(model, Injection.of(backend_of(model), self, **options))

    def plot(self) -> go.Figure:
        """Bars: each head's share along the vector."""
        from ivlens.plots import plot_shares

        return plot_shares(self)

    def recipe(self) -> str:
        """Python that makes this vector again: versions, model, task, heads, every option, layer and scale.

        ValueError if the metadata don't tell, as of sums, and of vectors from a list of prompts.
        """
        return recipe(self)

    # -- files and the hub ------------------------------------------------------------------------------------------
    def save(self, path: str | Path) -> Path:
        """Save to `path`, a folder: `vector.safetensors` with the numbers and `vector.json` to read."""
        return write_vector(path, self)

    @classmethod
    def load(cls, path: str | Path) -> InstructionVector:
        """Load from `path`, a folder that `save` wrote (or its safetensors file).

        Layer and scale are those in `vector.json`, which may be edited by hand; nothing else in it counts.

        Raises
        ------
        FileNotFoundError, ValueError
            If there is no such file, or it is truncated, was changed, or holds no instruction vector.
        """
        return cls(**read_vector(path))

    def push_to_hub(self, repo_id: str, *, private: bool = False, token: str | None = None, **upload: Any) -> str:
        """Upload to a Hugging Face repository and return its address. Checked by loading it back before upload.

        Parameters
        ----------
        repo_id
            Such as `you/past-tense-iv`; made where it doesn't exist.
        private
            Make it for yourself alone.
        token
            Of the hub; default: the one logged in with.
        upload
            More of `huggingface_hub.upload_folder`: `commit_message`, `revision`, `create_pr`, …
        """
        import tempfile

        import huggingface_hub

        with tempfile.TemporaryDirectory() as folder:
            self.save(folder)
            type(self).load(folder)
            (Path(folder) / "README.md").write_text(describe(self), encoding="utf-8")
            huggingface_hub.create_repo(repo_id, private=private, token=token, exist_ok=True)
            return str(huggingface_hub.upload_folder(repo_id=repo_id, folder_path=folder, token=token, **upload))

    @classmethod
    def from_pretrained(
        cls, repo_id: str | Path, *, revision: str | None = None, token: str | None = None
    ) -> InstructionVector:
        """Download from a Hugging Face repository, or load from a local folder.

        Parameters
        ----------
        repo_id
            Such as `you/past-tense-iv`, or a path.
        revision
            Branch, tag or commit.
        token
            Of the hub, where the repository is private; default: the one logged in with.
        """
        if Path(repo_id).exists():
            return cls.load(repo_id)
        import huggingface_hub

        return cls.load(huggingface_hub.hf_hub_download(str(repo_id), FILE, revision=revision, token=token))

    def __repr__(self) -> str:
        shown = ", ".join(map(str, self.heads[:4])) + (", …" if len(self.heads) > 4 else "")
        where = "" if self.layer is None else f", layer {self.layer}, scale {self.scale:g}"
        heads = f", {len(self.heads)} heads ({shown})" if self.heads else ""
        return f"InstructionVector({self.name}, d_model {self.d_model}, norm {self.norm():.2f}{heads}{where})"

    def _repr_html_(self) -> str:
        about = {"heads": self.heads, "layer": self.layer, "scale": self.scale}
        about |= {"d_model": self.d_model, "norm": self.norm(), **self.metadata}
        return about_html(about, title=f"InstructionVector({self.name})")


def _whole(x: Any, name: str) -> int:
    if isinstance(x, (bool, str)) or x != x or int(x) != x:
        raise ValueError(f"{name}={x!r} is no whole number")
    return int(x)


def _shape(signature: dict[str, int]) -> str:
    return ", ".join(f"{k} {v}" for k, v in signature.items())

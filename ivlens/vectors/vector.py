"""The instruction vector: the sum of what heads add to the residual stream."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from ivlens.common.storage import read_tensors, write_tensors
from ivlens.models.backends import backend_of
from ivlens.models.head import Head
from ivlens.running.positions import Injection, injected

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    import plotly.graph_objects as go


__all__ = ["InstructionVector"]

KIND = "instruction vector"
FILE, CARD = "vector.safetensors", "vector.json"


@dataclass(frozen=True)
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
    A value: `a + b`, `a - b`, `2 * a`, `a / 2`, `-a` give new vectors. On models with a norm after the attention output
    (Gemma 2 and 3, OLMo 2) it is the head's output before that norm.
    """

    vector: Float[Tensor, " d_model"]
    heads: tuple[Head, ...] = ()
    shares: Float[Tensor, "head d_model"] | None = None
    layer: int | None = None
    scale: float = 1.0
    metadata: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.vector.dim() != 1:
            raise ValueError(
                f"an instruction vector has one dimension, [d_model]; got shape {tuple(self.vector.shape)}"
            )
        if not torch.isfinite(self.vector).all():
            raise ValueError("the vector holds NaN or infinite values; extract it again")
        if len(self.heads) != (0 if self.shares is None else len(self.shares)):
            raise ValueError(
                f"{len(self.heads)} heads but shares of shape {None if self.shares is None else tuple(self.shares.shape)}"
            )

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
        """Cosine similarity with another vector of the same width."""
        other = _tensor(other, self.d_model).to(self.vector)
        return torch.nn.functional.cosine_similarity(self.vector, other, dim=0).item()

    def check_model(self, model: Any) -> None:
        """Raise ValueError if this is a vector of a model of another shape."""
        backend = backend_of(model)
        mine = self.metadata.get("signature")
        if self.d_model != backend.d_model:
            raise ValueError(
                f"the vector has width {self.d_model}, but {backend.name} has d_model {backend.d_model}; "
                "extract a vector from this model with ivl.extract_vector"
            )
        if mine is not None and mine != backend.signature:
            raise ValueError(
                f"the vector was made for {self.metadata.get('model', 'another model')} ({_shape(mine)}), not for "
                f"{backend.name} ({_shape(backend.signature)}); extract a vector from this model with ivl.extract_vector"
            )

    # -- arithmetic -------------------------------------------------------------------------------------------------
    def __add__(self, other: InstructionVector) -> InstructionVector:
        if not isinstance(other, InstructionVector):
            return NotImplemented
        if other.d_model != self.d_model:
            raise ValueError(
                f"can't add vectors of width {self.d_model} and {other.d_model}; they belong to different models"
            )
        theirs, mine = other.metadata.get("signature"), self.metadata.get("signature")
        if theirs and mine and theirs != mine:
            raise ValueError(f"can't add vectors of different models ({_shape(mine)} and {_shape(theirs)})")
        shares: dict[Head, Tensor] = {}
        for v in (self, other):
            for head, share in zip(v.heads, v.shares if v.shares is not None else ()):
                shares[head] = shares[head] + share if head in shares else share
        heads = tuple(sorted(shares))
        together = torch.stack([shares[h] for h in heads]) if heads else None
        metadata = {**self.metadata, "task": f"{self.name} + {other.name}"}
        return replace(self, vector=self.vector + other.vector, heads=heads, shares=together, metadata=metadata)

    def __mul__(self, factor: float) -> InstructionVector:
        if not isinstance(factor, (int, float)):
            return NotImplemented
        shares = None if self.shares is None else self.shares * factor
        return replace(self, vector=self.vector * factor, shares=shares)

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
        positions: str | Tensor = "last",
        mode: str = "sum",
    ) -> AbstractContextManager:
        """Inject (or, with a negative scale, subtract) the vector while the context lasts; see `steering.inject`."""
        options = {"layer": layer, "scale": scale, "positions": positions, "mode": mode}
        return injected(model, Injection.of(backend_of(model), self, **options))

    def plot(self) -> go.Figure:
        """Bars: each head's share along the vector."""
        from ivlens.plots import plot_shares

        return plot_shares(self)

    # -- files and the hub ------------------------------------------------------------------------------------------
    def save(self, path: str | Path) -> Path:
        """Save to a folder: `vector.safetensors` with the numbers and `vector.json` to read."""
        path = Path(path)
        tensors = {"vector": self.vector}
        if self.shares is not None:
            tensors["shares"] = self.shares
        about = {"kind": KIND, "heads": [list(h) for h in self.heads], "layer": self.layer, "scale": self.scale}
        about["metadata"] = self.metadata
        write_tensors(path / FILE, tensors, about)
        (path / CARD).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
        return path

    @classmethod
    def load(cls, path: str | Path) -> InstructionVector:
        """Load from a folder that `save` wrote (or its safetensors file)."""
        path = Path(path)
        tensors, about = read_tensors(path / FILE if path.is_dir() or not path.suffix else path, kind=KIND)
        return cls(
            tensors["vector"],
            tuple(Head(*h) for h in about["heads"]),
            tensors.get("shares"),
            layer=about["layer"],
            scale=about["scale"],
            metadata=about["metadata"],
        )

    def push_to_hub(self, repo_id: str, *, private: bool = False, token: str | None = None, **kwargs: Any) -> str:
        """Upload to a Hugging Face repository and return its address. Checked by loading it back before upload."""
        import tempfile

        import huggingface_hub

        with tempfile.TemporaryDirectory() as folder:
            self.save(folder)
            type(self).load(folder)
            (Path(folder) / "README.md").write_text(_card(self), encoding="utf-8")
            huggingface_hub.create_repo(repo_id, private=private, token=token, exist_ok=True)
            return str(huggingface_hub.upload_folder(repo_id=repo_id, folder_path=folder, token=token, **kwargs))

    @classmethod
    def from_pretrained(
        cls, repo_id: str | Path, *, revision: str | None = None, token: str | None = None
    ) -> InstructionVector:
        """Download from a Hugging Face repository, or load from a local folder."""
        if Path(repo_id).exists():
            return cls.load(repo_id)
        import huggingface_hub

        return cls.load(huggingface_hub.hf_hub_download(str(repo_id), FILE, revision=revision, token=token))

    def __repr__(self) -> str:
        shown = ", ".join(map(str, self.heads[:4])) + (", …" if len(self.heads) > 4 else "")
        where = "" if self.layer is None else f", layer {self.layer}, scale {self.scale:g}"
        heads = f", {len(self.heads)} heads ({shown})" if self.heads else ""
        return f"InstructionVector({self.name}, d_model {self.d_model}, norm {self.norm():.2f}{heads}{where})"


def _tensor(other: InstructionVector | Tensor, width: int) -> Tensor:
    tensor = other.vector if isinstance(other, InstructionVector) else other
    if tensor.shape != (width,):
        raise ValueError(
            f"expected a vector of width {width}, got shape {tuple(tensor.shape)}; they belong to different models"
        )
    return tensor


def _shape(signature: dict[str, int]) -> str:
    return ", ".join(f"{k} {v}" for k, v in signature.items())


def _card(vector: InstructionVector) -> str:
    """A model card: what the vector is, and how to use it."""
    about = "\n".join(f"| {k} | {v} |" for k, v in vector.metadata.items())
    where = 14 if vector.layer is None else vector.layer
    scale = vector.scale if math.isfinite(vector.scale) else 1.0
    return (
        "---\nlibrary_name: ivlens\ntags: [instruction-vector, interpretability]\n---\n"
        f"# Instruction vector: {vector.name}\n\n{vector!r}\n\n| | |\n|---|---|\n{about}\n\n"
        "```python\nimport ivlens as ivl\nmodel = ivl.load_model(...)\niv = ivl.InstructionVector.from_pretrained(...)\n"
        f"with iv.inject(model, layer={where}, scale={scale:g}):\n    ivl.generate(model, [...])\n```\n"
    )

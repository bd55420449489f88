"""The few things ivlens asks of a hooked model, answered for each kind of model.

Everything that differs between `TransformerBridge` (transformer-lens 4.x) and `HookedTransformer` (3.9) is in
`bridge.py` and `hooked.py`; the rest of the library only sees `Backend`.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ivlens.models.head import Head

__all__ = ["Backend", "Prefix"]

Hook = tuple[str, Callable]
_UNDER_WAY = threading.local()


@contextmanager
def keeping(keep: int) -> Iterator[None]:
    """Around a pass of ours: its last `keep` positions are the last prompt token and answer tokens."""
    before, _UNDER_WAY.keep = backend_ends(), keep
    try:
        yield
    finally:
        _UNDER_WAY.keep = before


def backend_ends() -> int | None:
    """How far from the end the last prompt token stands in the pass of ours that is under way; None in any other."""
    return getattr(_UNDER_WAY, "keep", None)


@dataclass
class Prefix:
    """A batch of prompts run once, cut open before its last `block` tokens.

    `cache` holds the keys and values of the first `n_prefix` positions; the rest is what a copy of the block needs to be
    run again on top of it: the block's tokens and, for every layer, which positions each block token may look at
    (so padding, sliding windows and chunked attention come out as the model itself built them).
    """

    tokens: Int[Tensor, "batch block"]
    attention_mask: Int[Tensor, "batch pos"]
    cache: Any
    n_prefix: int
    logits: Float[Tensor, "batch keep d_vocab"]
    visible: list[Bool[Tensor, "batch block pos"]]
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def block(self) -> int:
        return self.tokens.shape[1]


class Backend(ABC):
    """One hooked model seen through the operations the library needs. Holds no state of its own besides the model."""

    def __init__(self, model: Any):
        self.model, cfg = model, model.cfg
        self.n_layers: int = cfg.n_layers
        self.n_heads: int = cfg.n_heads
        self.d_model: int = cfg.d_model
        self.d_vocab = int(cfg.d_vocab)
        self.n_ctx: int | None = getattr(cfg, "n_ctx", None)
        self.name: str = str(getattr(cfg, "model_name", None) or type(model).__name__)

    # -- names and shapes -------------------------------------------------------------------------------------------
    @property
    def tokenizer(self) -> Any:
        if getattr(self.model, "tokenizer", None) is None:
            raise ValueError("the model has no tokenizer; load it with ivl.load_model(model, tokenizer=...)")
        return self.model.tokenizer

    @property
    def end_tokens(self) -> tuple[int, ...]:
        """All tokens that end an answer: the tokenizer's, and those that the model's own generation stops at."""
        config = getattr(getattr(self.model, "original_model", self.model), "generation_config", None)
        ends = [self.tokenizer.eos_token_id, getattr(config, "eos_token_id", None)]
        flat = [x for end in ends if end is not None for x in (end if isinstance(end, (list, tuple)) else [end])]
        return tuple(dict.fromkeys(flat))

    @property
    def device(self) -> torch.device:
        """Where token tensors go (the device of the embedding)."""
        return next((p.device for p in self.model.parameters() if not p.is_meta), torch.device("cpu"))

    @property
    def signature(self) -> dict[str, int]:
        """What two models must share for a vector of one to mean anything in the other."""
        return {"n_layers": self.n_layers, "n_heads": self.n_heads, "d_model": self.d_model, "d_vocab": self.d_vocab}

    @cached_property
    def d_head(self) -> int:
        """Width of a head's output; of the widest, where layers differ: others' are filled up with zeros."""
        return max(self.head_width(layer) for layer in range(self.n_layers))

    def head_width(self, layer: int) -> int:
        """Width of a head's output in one layer."""
        return self.model.cfg.d_head

    def by_head(self, x: Float[Tensor, "*batch rows d"]) -> Float[Tensor, "*batch head width"]:
        """What `z_hook` shows, by heads, as a view: the bridge cuts it by the keys' width, which isn't the values' everywhere."""
        return x if x.shape[-2] == self.n_heads else x.view(*x.shape[:-2], self.n_heads, -1)

    def padded(self, z: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch d_head"]:
        return torch.nn.functional.pad(z, (0, self.d_head - z.shape[-1]))

    def z_hook(self, layer: int) -> str:
        """Name of the heads' outputs before W_O; see `by_head`."""
        return f"blocks.{layer}.attn.hook_z"

    def resid_hook(self, layer: int) -> str:
        """Name of the residual stream after a layer, [batch pos d_model]."""
        return f"blocks.{layer}.hook_resid_post"

    def check_layer(self, layer: int) -> int:
        """The layer as a number from 0 (negative layers count from the end)."""
        if not -self.n_layers <= layer < self.n_layers:
            there = f"layers 0 to {self.n_layers - 1} (or -{self.n_layers} to -1 from the end)"
            raise ValueError(f"layer={layer} is out of range: {self.name} has {there}")
        return layer % self.n_layers

    def check_head(self, layer: int, head: int) -> Head:
        """The head, its layer as a number from 0."""
        layer = self.check_layer(layer)
        if not 0 <= head < self.n_heads:
            there = f"{self.name} has heads 0 to {self.n_heads - 1} in each layer"
            raise ValueError(f"head={head} is out of range: {there}")
        return Head(layer, head)

    def check_hooks(self) -> None:
        """Raise where a layer has no `hook_z`: state-space and some hybrid layers have no attention heads to patch."""
        missing = [layer for layer in range(self.n_layers) if self.z_hook(layer) not in self.model.hook_dict]
        if missing:
            some = ", ".join(map(str, missing[:8])) + (", …" if len(missing) > 8 else "")
            said = f"{self.name} has no attention output hook ({self.z_hook(missing[0])}) in layer(s) {some}"
            raise ValueError(f"{said}; use a model whose every layer has softmax attention")

    # -- running ----------------------------------------------------------------------------------------------------
    @abstractmethod
    def new_cache(self, batch: int) -> Any:
        """An empty key-value cache."""

    @abstractmethod
    def spread_cache(self, cache: Any, attention_mask: Int[Tensor, "batch pos"]) -> Any:
        """A cache of batch 1, for the rows of a batch padded on the left, each of which begins with these tokens."""

    @abstractmethod
    def forward(
        self,
        tokens: Int[Tensor, "batch new"],
        attention_mask: Int[Tensor, "batch pos"],
        *,
        cache: Any = None,
        keep: int = 1,
    ) -> Float[Tensor, "batch keep d_vocab"]:
        """Logits of the last `keep` positions. With a cache, `tokens` are the new ones and the mask covers all."""

    @abstractmethod
    def read_prefix(
        self,
        tokens: Int[Tensor, "batch pos"],
        attention_mask: Int[Tensor, "batch pos"],
        *,
        block: int,
        keep: int,
        shared: Prefix | None = None,
    ) -> Prefix:
        """Run prompts once and keep what replaying their last `block` tokens needs.

        `shared` is a prefix of batch 1 common to all prompts, which `tokens` then doesn't repeat (the mask still covers it).
        """

    @abstractmethod
    def run_copies(
        self,
        prefix: Prefix,
        masks: list[Bool[Tensor, "batch q k"]],
        new_copies: list[int],
        hooks: list[Hook],
        keep: int,
    ) -> Float[Tensor, "batch copy keep d_vocab"]:
        """Run copies of the block over the shared cache, each copy blind to the others.

        Copy 0 is the unchanged block. `new_copies[l]` further copies of it come into being below layer l, in order,
        so that work is only spent on layers where a copy differs from copy 0. `hooks` see [batch, copies · block, ...].
        `masks` say, per layer, which keys each packed query sees once all copies are there.
        """

    # -- what heads write -------------------------------------------------------------------------------------------
    @abstractmethod
    def project(self, layer: int, z: Float[Tensor, "row head d_head"]) -> Float[Tensor, "row d_model"]:
        """The attention's output for these heads' outputs, bias and adapters included."""

    @abstractmethod
    def post_norm(self, layer: int) -> Any:
        """The norm that the attention's output goes through before it is added (Gemma 2 and 3, OLMo 2), or None."""

    @property
    def residual_multiplier(self) -> float:
        """What a layer's output is multiplied by before it is added (Granite)."""
        return 1.0

    def norm_scales(self, layer: int, z: Float[Tensor, "row head d_head"]) -> Float[Tensor, " row"]:
        """1 / root mean square of the attention's output, which the norm after it divides by; 1 where there is none."""
        norm = self.post_norm(layer)
        if norm is None:
            return torch.ones(len(z))
        eps = getattr(norm, "variance_epsilon", getattr(norm, "eps", 1e-6))
        return (self.project(layer, z).float().square().mean(-1) + eps).rsqrt().cpu()

    def head_shares(
        self, layer: int, z: Float[Tensor, "head d_head"], scale: float | None = None
    ) -> Float[Tensor, "head d_model"]:
        """What each head's output adds to the residual stream, without the layer's output bias.

        Where a norm follows the attention, `scale` is the mean of `norm_scales` of the prompts behind z; None takes that of z itself.
        """
        rows = torch.zeros(self.n_heads + 1, self.n_heads, self.d_head, device=z.device, dtype=z.dtype)
        index = torch.arange(self.n_heads, device=z.device)
        rows[index, index] = z
        out = self.project(layer, rows)
        shares = ((out[:-1] - out[-1]) * self.residual_multiplier).to(z)
        norm = self.post_norm(layer)
        if norm is None:
            return shares
        if isinstance(norm, torch.nn.LayerNorm):
            raise ValueError(f"{self.name} centres what its attention adds, so that its heads have no shares")
        scale = self.norm_scales(layer, z[None]).item() if scale is None else scale
        gain = norm(torch.ones(1, 1, self.d_model, device=out.device, dtype=torch.float32))[0, 0]  # of ones, its weight
        return shares * scale * gain.to(shares)


def additive_mask(allowed: Bool[Tensor, "batch q k"], dtype: torch.dtype) -> Float[Tensor, "batch 1 q k"]:
    """The 4-D mask that attention layers add to their scores: 0 where a query may look, the lowest number where it may not."""
    return torch.zeros_like(allowed, dtype=dtype).masked_fill_(~allowed, torch.finfo(dtype).min)[:, None]


def append_copies(x: Float[Tensor, "batch rows d"], block: int, new: int) -> Float[Tensor, "batch more d"]:
    """Append `new` copies of the unpatched block, which is the first."""
    return x if new == 0 else torch.cat([x, x[:, :block].repeat(1, new, 1)], dim=1)


def position_ids(attention_mask: Int[Tensor, "batch pos"]) -> Int[Tensor, "batch pos"]:
    """Positions counted from the first real token, whichever side the padding is on."""
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)

"""`HookedTransformer` (transformer-lens 3.9): attention takes no 4-D mask, so replay lends its layers a mask and rotary
positions of its own while it runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from einops import einsum
from torch import Tensor

from ivlens.models.backend import Backend, Prefix, append_copies, keeping, position_ids

__all__ = ["HookedBackend"]


class HookedBackend(Backend):
    def new_cache(self, batch: int) -> Any:
        from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache

        return TransformerLensKeyValueCache.init_cache(self.model.cfg, self.model.cfg.device, batch)

    def spread_cache(self, cache, attention_mask):
        spread, index = self.new_cache(len(attention_mask)), position_ids(attention_mask)
        for entry, known in zip(spread.entries, cache.entries):
            entry.past_keys, entry.past_values = known.past_keys[0][index], known.past_values[0][index]
        spread.previous_attention_mask = attention_mask
        return spread

    def forward(self, tokens, attention_mask, *, cache=None, keep=1):
        with keeping(keep):
            resid = self.model(
                tokens,
                attention_mask=attention_mask[:, -tokens.shape[1] :],  # the cache remembers the rest
                past_kv_cache=cache,
                stop_at_layer=self.n_layers,
            )
        return self._unembed(resid[:, -keep:])

    def _unembed(self, resid: Tensor) -> Tensor:
        return self.model(resid, start_at_layer=self.n_layers)

    def read_prefix(self, tokens, attention_mask, *, block, keep, shared=None):
        cache = self.new_cache(tokens.shape[0])
        if shared is not None:
            rows = tokens.shape[0]
            for entry, known in zip(cache.entries, shared.cache.entries):
                entry.past_keys = known.past_keys.expand(rows, -1, -1, -1)
                entry.past_values = known.past_values.expand(rows, -1, -1, -1)
            cache.previous_attention_mask = attention_mask[:, : -tokens.shape[1]]
        cut = tokens.shape[1] - block
        visible: list[Tensor] = []
        start: list[Tensor] = []

        def see(x: Tensor, hook: Any) -> None:
            visible.append(~x[:, 0, cut:].isneginf())

        hooks = [(f"blocks.{layer}.attn.hook_attn_scores", see) for layer in range(self.n_layers)]
        hooks.append(("blocks.0.hook_resid_pre", lambda x, hook: start.append(x[:, cut:].clone())))
        with self.model.hooks(fwd_hooks=hooks):
            logits = self.forward(tokens, attention_mask, cache=cache, keep=keep)
        n_prefix = attention_mask.shape[1] - block
        for entry in cache.entries:
            entry.past_keys, entry.past_values = entry.past_keys[:, :n_prefix], entry.past_values[:, :n_prefix]
        cache.freeze()
        return Prefix(tokens[:, cut:], attention_mask, cache, n_prefix, logits, visible, {"start": start[0]})

    def run_copies(self, prefix, masks, new_copies, hooks, keep):
        positions = self.model.cfg.positional_embedding_type
        if positions not in ("standard", "rotary"):
            raise ValueError(f"{positions} positions depend on where a copy stands")
        block, n_copies, x = prefix.block, 1, prefix.extra["start"]
        with ExitStack() as stack:
            stack.enter_context(self.model.hooks(fwd_hooks=hooks))
            for layer, module in enumerate(self.model.blocks):
                x = append_copies(x, block, new_copies[layer])
                n_copies += new_copies[layer]
                n = n_copies * block
                mask = masks[layer][:, None, :n, : prefix.n_prefix + n]
                with _lend(module.attn, mask, prefix):
                    x = module(x, past_kv_cache_entry=prefix.cache[layer])
        x = x.unflatten(1, (n_copies, block))[:, :, block - keep :]
        return self._unembed(x.flatten(1, 2)).unflatten(1, (n_copies, keep))

    def project(self, layer, z):
        attn = self.model.blocks[layer].attn
        return einsum(z.to(attn.W_O), attn.W_O, "row head d_head, head d_head d_model -> row d_model") + attn.b_O

    def post_norm(self, layer):
        return getattr(self.model.blocks[layer], "ln1_post", None)


@contextmanager
def _lend(attn: Any, mask: Tensor, prefix: Prefix) -> Iterator[None]:
    """Let one attention layer run packed copies: every copy stands at the block's positions and sees `mask`."""
    rotate = attn.apply_rotary

    def apply_rotary(x: Tensor, past_kv_pos_offset: int = 0, attention_mask: Tensor | None = None) -> Tensor:
        batch, rows = x.shape[0], x.shape[1]
        known = prefix.attention_mask
        if past_kv_pos_offset == 0:  # keys: the cached ones, then the copies'
            cached = rotate(x[:, : prefix.n_prefix], 0, known[:, : prefix.n_prefix])
            return torch.cat([cached, apply_rotary(x[:, prefix.n_prefix :], prefix.n_prefix)], dim=1)
        copies = x.unflatten(1, (rows // prefix.block, prefix.block)).flatten(0, 1)
        turned = rotate(copies, prefix.n_prefix, known.repeat_interleave(rows // prefix.block, dim=0))
        return turned.unflatten(0, (batch, rows // prefix.block)).flatten(1, 2)

    attn.apply_rotary = apply_rotary
    attn._make_causal_mask = lambda **kwargs: mask.to(kwargs["device"])
    try:
        yield
    finally:
        del attn.apply_rotary, attn._make_causal_mask

"""`TransformerBridge`: the hooks live inside the Hugging Face model, which we call directly."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from ivlens.models.backend import Backend, Prefix, additive_mask, append_copies, keeping, position_ids

__all__ = ["BridgeBackend"]


def _prefix_cache() -> Any:
    """A key-value cache that, once frozen, hands out prefix + new keys without keeping the new ones.

    Made without the model's config on purpose: sliding-window layers would drop positions, whose masking we do ourselves.
    """
    from transformers.cache_utils import DynamicCache

    class PrefixCache(DynamicCache):
        frozen = False

        def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any):
            if not self.frozen:
                return super().update(key_states, value_states, layer_idx, *args, **kwargs)
            layer = self.layers[layer_idx]
            return torch.cat([layer.keys, key_states], dim=-2), torch.cat([layer.values, value_states], dim=-2)

    return PrefixCache()


class BridgeBackend(Backend):
    @property
    def hf_model(self) -> Any:
        return self.model.original_model

    def head_width(self, layer):
        width = getattr(self.model.blocks[layer].attn.o.original_component, "in_features", None)
        return width // self.n_heads if width else self.model.cfg.d_head

    def new_cache(self, batch: int) -> Any:
        return _prefix_cache()

    def spread_cache(self, cache, attention_mask):
        spread, index = _prefix_cache(), position_ids(attention_mask)
        for layer, entry in enumerate(cache.layers):
            spread.update(*(x[0][:, index].transpose(0, 1) for x in (entry.keys, entry.values)), layer)
        return spread

    def _call(self, keep: Tensor | int, **inputs: Any) -> Tensor:
        """Logits at `keep` positions: a number of last positions, or an index."""
        parameters = inspect.signature(self.hf_model.forward).parameters
        open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        if "position_ids" not in parameters and not open_ended:
            inputs.pop("position_ids")  # e.g. ALiBi models: the self-check decides whether replay serves them
        with _lean_unembedding(getattr(self.model, "unembed", None)):
            if "logits_to_keep" in parameters:
                return self.hf_model(logits_to_keep=keep, use_cache=True, **inputs).logits
            logits = self.hf_model(use_cache=True, **inputs).logits
        return logits[:, -keep:] if isinstance(keep, int) else logits[:, keep]

    def forward(self, tokens, attention_mask, *, cache=None, keep=1):
        with keeping(keep):
            return self._call(
                keep,
                input_ids=tokens,
                attention_mask=attention_mask,
                position_ids=position_ids(attention_mask)[:, -tokens.shape[1] :],
                past_key_values=_prefix_cache() if cache is None else cache,
            )

    def read_prefix(self, tokens, attention_mask, *, block, keep, shared=None):
        cache = _prefix_cache()
        if shared is not None:
            for layer, entry in enumerate(shared.cache.layers):
                cache.update(*(x.expand(len(tokens), -1, -1, -1) for x in (entry.keys, entry.values)), layer)
        visible: list[Tensor] = []
        causal = _causal(attention_mask, block)

        def see_mask(module: Any, args: tuple, kwargs: dict) -> None:
            mask = next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.dim() == 4), None)
            if mask is None:
                visible.append(causal)
            else:
                mask = mask if mask.dtype == torch.bool else mask == 0
                visible.append(mask[:, 0, mask.shape[2] - block :].expand(tokens.shape[0], -1, -1))

        with ExitStack() as stack:
            for module in self.model.blocks:
                stack.callback(module.register_forward_pre_hook(see_mask, with_kwargs=True).remove)
            logits = self.forward(tokens, attention_mask, cache=cache, keep=keep)
        n_prefix = attention_mask.shape[1] - block
        if block:
            cache.crop(-block)
        cache.frozen = True
        return Prefix(tokens[:, tokens.shape[1] - block :], attention_mask, cache, n_prefix, logits, visible)

    def run_copies(self, prefix, masks, new_copies, hooks, keep):
        block, copies = prefix.block, 1 + sum(new_copies)
        rows, dtype = copies * block, prefix.logits.dtype
        additive = {id(allowed): additive_mask(allowed, dtype) for allowed in masks}  # layers that see alike share one

        def grow(layer: int, n: int):
            def pre_hook(module: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
                mask = additive[id(masks[layer])][:, :, :n, : prefix.n_prefix + n]
                args = tuple(_cut(x, rows, n, mask) for x in args)
                kwargs = {key: _cut(x, rows, n, mask) for key, x in kwargs.items()}
                hidden = args[0] if args else kwargs["hidden_states"]
                hidden = hidden[:, :n] if layer == 0 else append_copies(hidden, block, new_copies[layer])
                return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

            return pre_hook

        keep_index = (torch.arange(copies)[:, None] * block + torch.arange(block - keep, block)).flatten()
        with ExitStack() as stack:
            n = block
            for layer, module in enumerate(self.model.blocks):
                n += new_copies[layer] * block
                stack.callback(module.register_forward_pre_hook(grow(layer, n), with_kwargs=True).remove)
            stack.enter_context(self.model.hooks(fwd_hooks=hooks))
            logits = self._call(
                keep_index.to(prefix.tokens.device),
                input_ids=prefix.tokens.repeat(1, copies),
                attention_mask=additive[id(masks[0])],
                position_ids=position_ids(prefix.attention_mask)[:, -block:].repeat(1, copies),
                past_key_values=prefix.cache,
            )
        return logits.unflatten(1, (copies, keep))

    def project(self, layer, z):
        projection = self.model.blocks[layer].attn.o.original_component
        # Through the module itself, not W_O: adapters and quantisation on the projection count.
        parameter = next(projection.parameters())
        dtype = parameter.dtype if parameter.is_floating_point() else self.model.cfg.dtype
        device = z.device if parameter.is_meta else parameter.device  # offloaded weights come when they are called
        return projection(z[..., : self.head_width(layer)].to(device, dtype).flatten(1)[:, None])[:, 0]

    def post_norm(self, layer):
        return getattr(getattr(self.model.blocks[layer], "ln1_post", None), "original_component", None)

    @property
    def residual_multiplier(self):
        return getattr(self.hf_model.config, "residual_multiplier", 1.0)


@contextmanager
def _lean_unembedding(unembed: Any) -> Iterator[None]:
    """Save, meanwhile, what the unembedding needn't do.

    The bridge adds zeros as a bias, which on every copy's logits cost 6 % of a sweep. And a slice of the positions, with weights
    that need no gradient (as under adapters), makes torch copy the weights once for every row.
    """
    component = getattr(unembed, "original_component", None)
    if component is None:
        yield
        return
    buffers = component._buffers
    bias = buffers.get("bias")
    zero = bias is not None and not bias.is_meta and not bias.any()
    handle = component.register_forward_pre_hook(lambda module, args: (args[0].contiguous(), *args[1:]))
    try:
        if zero:
            buffers["bias"] = None
        yield
    finally:
        handle.remove()
        if zero:
            buffers["bias"] = bias


def _causal(attention_mask: Tensor, queries: int) -> Tensor:
    """Plain causal visibility of the last `queries` positions, for models that hand their layers no mask."""
    keys = attention_mask.shape[1]
    lower = torch.ones(keys, keys, dtype=torch.bool, device=attention_mask.device).tril()[keys - queries :]
    return lower & attention_mask.bool()[:, None, :]


def _cut(value: Any, rows: int, n: int, mask: Tensor) -> Any:
    """One argument of a decoder layer, cut to the rows that exist so far. Hidden states (3-D floats) are left alone."""
    if isinstance(value, tuple) and value and all(isinstance(x, Tensor) for x in value):  # rotary tables (cos, sin)
        return tuple(x[..., :n, :] if x.shape[-2] == rows else x for x in value)
    if not isinstance(value, Tensor):
        return value
    if value.dim() == 4:
        return mask.to(value.device)
    if not value.is_floating_point() and value.shape[-1] == rows:  # position ids
        return value[..., :n]
    return value

"""A hooked model is compared with the Hugging Face or PEFT model that it was made from, on a few real tokens."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial, wraps
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ivlens.common.hints import reason
from ivlens.models.adapters import adapter_layers
from ivlens.models.backends import backend_of

__all__ = ["Reference", "evaluating", "without_training"]

TEXT = "The river bends twice before it reaches the mill, and in spring the lower path is under water."
MOST = 24  # tokens in each of two passes


@contextmanager
def evaluating(*models: torch.nn.Module) -> Iterator[None]:
    """Inside, without dropout; afterwards each module is in the mode that it was in."""
    training = [module for model in models for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def without_training(engine: Callable) -> Callable:
    """The model of the backend that comes first is measured in evaluation mode, and put back."""

    @wraps(engine)
    def measured(backend: Any, *args: Any, **options: Any) -> Any:
        with evaluating(backend.model, getattr(backend.model, "original_model", backend.model)):
            return engine(backend, *args, **options)

    return measured


@dataclass(frozen=True)
class Reference:
    """Tokens, and what the model says of them before it is hooked."""

    tokens: Int[Tensor, "1 pos"]
    logits: Float[Tensor, "pos d_vocab"]

    @classmethod
    @torch.no_grad()
    def of(cls, hf_model: Any, tokenizer: Any, label: str) -> Reference:
        """Raise ValueError where the model doesn't continue text: it gives no logits, or they depend on what comes later."""
        ids = tokenizer.encode(TEXT, add_special_tokens=True)[:MOST] or [0]
        half, otherwise = len(ids) // 2, "ivlens measures models that continue text, such as GPT, Llama or Gemma"
        device = next((p.device for p in hf_model.parameters() if not p.is_meta), torch.device("cpu"))
        try:
            tokens = torch.tensor([ids, ids[:half] + ids[half:][::-1]], device=device)
            tokens %= hf_model.config.get_text_config().vocab_size
            with evaluating(hf_model):
                logits, other = hf_model(input_ids=tokens, use_cache=False).logits[:, :, :].float().cpu()
        except (AttributeError, IndexError, TypeError, ValueError) as error:
            raise ValueError(f"{label} gives no logits for tokens alone ({reason(error)}); {otherwise}") from error
        most = (1e-3 if _dtype(hf_model) == torch.float32 else 0.05) * logits.abs().max()
        if half and (logits[:half] - other[:half]).abs().max() > most:
            raise ValueError(f"{label} reads ahead: what it says of a token depends on later ones; {otherwise}")
        return cls(tokens[:1], logits)

    @torch.no_grad()
    def check(self, model: Any, label: str) -> None:
        """Raise ValueError where the hooked model says something else, ignores an adapter, or has heads of other widths."""
        backend = backend_of(model)
        widths: dict[int, tuple[int, ...]] = {}
        silent = _adapters_in_use(model)

        def see(x: Tensor, hook: Any, layer: int) -> None:
            widths[layer] = tuple(x.shape[2:])

        def heard(module: Any, args: Any) -> None:
            silent.pop(module, None)

        tokens = self.tokens.to(backend.device)
        hooks = [(backend.z_hook(layer), partial(see, layer=layer)) for layer in range(backend.n_layers)]
        with ExitStack() as stack:
            for module in list(silent):
                stack.callback(module.register_forward_pre_hook(heard).remove)
            stack.enter_context(evaluating(model))
            stack.enter_context(model.hooks(fwd_hooks=hooks))
            logits = backend.forward(tokens, torch.ones_like(tokens), keep=tokens.shape[1])[0].float().cpu()
        for layer, seen in widths.items():
            if seen != (backend.n_heads, backend.head_width(layer)) and not _cut_by_keys(backend, layer, seen):
                said = f"layer {layer} of {label} has {' x '.join(map(str, seen))} heads' outputs"
                expected = f"{backend.n_heads} heads of {backend.head_width(layer)}, as in other layers"
                raise ValueError(f"{said}, not {expected}; use another model")
        if silent:
            such_as = next(iter(silent.values()))
            said = f"{len(silent)} adapter layers of {label} don't act in the hooked model, such as {such_as}"
            raise ValueError(f"{said}; merge the adapter (merge_and_unload) and load the merged model")
        dtype = _dtype(model)
        if not self.logits.isfinite().all():
            said = f"the logits of {label} aren't finite in {dtype}"
            warnings.warn(f"{said}; load it with dtype=torch.float32", stacklevel=3)
            return
        difference = (logits.softmax(-1) - self.logits.softmax(-1)).abs().max().item()
        if not difference <= (1e-3 if dtype == torch.float32 else 0.1):
            said = f"hooked, {label} gives other probabilities than the Hugging Face model"
            raise ValueError(f"{said}, by up to {difference:.1e}; it can't be measured")


def _cut_by_keys(backend: Any, layer: int, seen: tuple[int, ...]) -> bool:
    """Whether the hook shows whole heads cut by the keys' width, as in DeepSeek's attention, whose values have their own."""
    width = getattr(backend.model.blocks[layer].attn.original_component, "v_head_dim", None)
    return width is not None and len(seen) == 2 and seen[0] * seen[1] == backend.n_heads * width


def _dtype(model: Any) -> torch.dtype:
    return next(p.dtype for p in model.parameters() if p.is_floating_point())


def _adapters_in_use(model: Any) -> dict[Any, str]:
    """Layers with adapters switched on, each of which must run; but for experts', of which a few tokens don't reach all."""
    layers = adapter_layers(getattr(model, "original_model", model))
    return {x: name for name, x in layers.items() if not x.disable_adapters and ".experts." not in name}

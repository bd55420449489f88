"""Half precision: measured in float32 arithmetic, which rounds away less than a head does; on CPUs, trained by what is quick there."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psutil
import torch

__all__ = ["in_float32", "use_plain_attention"]

HALF = (torch.bfloat16, torch.float16)


@contextmanager
def in_float32(model: Any) -> Iterator[None]:
    """Inside, the same weights in float32; afterwards the model holds its own tensors again.

    In bfloat16 every patch, whatever it does, moves the answer's probability by some hundredths: what follows is rounded
    otherwise. On a GPU, where float32 takes many times as long, and where memory doesn't allow it, a warning says so.
    """
    modules = {id(module): module for module in (model, getattr(model, "original_model", model))}.values()
    tensors = {id(t): t for module in modules for t in [*module.parameters(), *module.buffers()] if t.dtype in HALF}
    if not tensors:
        yield
        return
    size = sum(4 * t.numel() for t in tensors.values())
    # What overflows in float16 is to be seen, so float16 stays as it is.
    fine = all(t.device.type == "cpu" and t.dtype == torch.bfloat16 for t in tensors.values())
    if not fine or size > 0.8 * psutil.virtual_memory().available:
        dtype = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
        said = f"effects in {dtype} carry rounding noise, of up to some hundredths of a probability"
        warnings.warn(f"{said}; load the model with dtype=torch.float32 to tell small effects from it", stacklevel=5)
        yield
        return
    own, dtype = {key: t.data for key, t in tensors.items()}, model.cfg.dtype
    try:
        with torch.inference_mode(False):
            for tensor in tensors.values():
                tensor.data = tensor.data.float()
        model.cfg.dtype = torch.float32
        yield
    finally:
        model.cfg.dtype = dtype
        for key, tensor in tensors.items():
            tensor.data = own[key]


def use_plain_attention(hf_model: Any) -> None:
    """On a CPU in half precision, train with attention by plain products, which take 40 % less time than torch's fused kernel there.

    The numbers are the same but for rounding.
    """
    on_cpu = all(weight.device.type == "cpu" for weight in hf_model.parameters())
    if on_cpu and hf_model.dtype in HALF and getattr(hf_model.config, "_attn_implementation", None) == "sdpa":
        hf_model.set_attn_implementation("eager")

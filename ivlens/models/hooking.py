"""A Hugging Face model becomes a hooked one."""

from __future__ import annotations

import copy
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ivlens.common.hints import reason
from ivlens.models.adapters import merged
from ivlens.models.backend import Backend
from ivlens.models.backends import backend_of
from ivlens.models.comparison import Reference

__all__ = ["check_in_memory", "hook_model", "is_placed", "text_part", "to_bridge", "tokenizing_backend", "with_path"]

FAILURES = (ValueError, RuntimeError, KeyError, AttributeError, TypeError, IndexError, AssertionError)


def unwrapped(hf_model: Any) -> Any:
    """The model inside a PEFT wrapper; any other as it is."""
    return hf_model.get_base_model() if hasattr(hf_model, "get_base_model") else hf_model


def is_placed(hf_model: Any) -> bool:
    """Quantised, spread over devices or offloaded: its weights must stay where and what they are."""
    inner = unwrapped(hf_model)
    offloaded = any(hasattr(module, "_hf_hook") for module in inner.modules())
    return bool(getattr(inner, "is_quantized", False) or getattr(inner, "hf_device_map", None) or offloaded)


def check_in_memory(hf_model: Any, label: str, what: str) -> None:
    """Raise ValueError where weights are offloaded or were never filled in."""
    if any(parameter.is_meta for parameter in hf_model.parameters()):
        raise ValueError(f"weights of {label} aren't in memory (meta device), so it can't be {what}; load it whole")


def tokenizing_backend(hf_model: Any, tokenizer: Any, label: str) -> Backend:
    """A backend that tokenizes as that of the hooked model would, without hooking the model, which would change it in place.

    Which models want a BOS is known to transformer-lens's adapter of the architecture: boot one layer of it.
    """
    inner = text_part(hf_model)
    config = copy.deepcopy(inner.config)
    config.num_hidden_layers, config.vocab_size, config.pad_token_id = 1, 8, None
    config.architectures = config.architectures or [type(inner).__name__]
    with torch.random.fork_rng():
        small = type(inner)(config)
    with tempfile.TemporaryDirectory(prefix="ivlens-tokenizer-") as folder:
        bridge = to_bridge(small, with_path(tokenizer, folder, own=True), label)
    bridge.cfg.model_name = label
    bridge.cfg.n_ctx = getattr(inner.config, "max_position_embeddings", bridge.cfg.n_ctx)
    return backend_of(bridge)


def text_part(hf_model: Any) -> Any:
    """The language model inside wrappers (PEFT's, for text and images), made of the same modules; any other as it is."""
    hf_model = unwrapped(hf_model)
    config = hf_model.config.get_text_config()
    language = getattr(getattr(hf_model, "model", None), "language_model", None)
    if config is hf_model.config or language is None or not hasattr(hf_model, "lm_head"):
        return hf_model
    from transformers import AutoModelForCausalLM

    if type(config) not in AutoModelForCausalLM._model_mapping:  # has no model of its own (Qwen's)
        return hf_model
    with torch.device("meta"):
        text = AutoModelForCausalLM.from_config(config)
    text.model, text.lm_head = language, hf_model.lm_head
    text.generation_config = hf_model.generation_config
    return text.train(hf_model.training)


def with_path(tokenizer: Any, folder: str, own: bool) -> Any:
    """Both hooked models load the tokenizer again from its path: where it may have been changed in memory, from a copy."""
    if not own:
        return tokenizer
    from transformers import AutoTokenizer

    tokenizer.save_pretrained(folder)
    copied = AutoTokenizer.from_pretrained(folder)
    copied.padding_side = tokenizer.padding_side
    return copied


def hook_model(hf_model: Any, tokenizer: Any, label: str, backend: str, placed: bool, reference: Reference) -> Any:
    try:
        from transformer_lens import HookedTransformer as Hooked
    except ImportError as error:
        Hooked = None
        if backend == "hooked":
            said = "transformer-lens's HookedTransformer was removed in 4.0"
            raise ValueError(f"{said}; use backend='bridge' or install transformer-lens==3.9.0") from error
    if Hooked is not None and backend != "bridge" and not placed:
        try:
            model = _to_hooked(Hooked, hf_model, tokenizer, label)
            reference.check(model, label)
            return model
        except FAILURES as error:
            if backend == "hooked":
                said = f"HookedTransformer can't convert {label} ({reason(error)})"
                raise ValueError(f"{said}; use backend='bridge'") from error
    try:
        model = to_bridge(hf_model, tokenizer, label)
    except torch.OutOfMemoryError:
        raise
    except FAILURES as error:
        raise ValueError(f"transformer-lens can't hook {label} ({reason(error)}); use another model") from error
    backend_of(model).check_hooks()
    reference.check(model, label)
    return model


def to_bridge(hf_model: Any, tokenizer: Any, label: str) -> Any:
    """Boot the model inside any PEFT wrapper: it is the same object, so adapters stay live and can be switched."""
    from transformer_lens.model_bridge import TransformerBridge

    inner = text_part(hf_model)
    inner.config.architectures = inner.config.architectures or [type(inner).__name__]  # made from a config: none
    device = None if is_placed(inner) else inner.device
    with _nothing_installed():
        bridge = TransformerBridge.boot_transformers(label, hf_model=inner, tokenizer=tokenizer, device=device)
    bridge.tokenizer.padding_side = tokenizer.padding_side
    bridge.eval()
    return bridge


@contextmanager
def _nothing_installed() -> Iterator[None]:
    """transformer-lens runs `pip install torchvision` for models that see images, and pip may replace torch."""
    run = subprocess.check_call

    def refused(command: Any, *args: Any, **options: Any) -> int:
        if "pip" in command:
            raise OSError("ivlens installs nothing")
        return run(command, *args, **options)

    subprocess.check_call = refused
    try:
        yield
    finally:
        subprocess.check_call = run


def _to_hooked(cls: type, hf_model: Any, tokenizer: Any, label: str) -> Any:
    """Raw weights in a HookedTransformer, by transformer-lens's own conversion for the architecture."""
    from transformer_lens import loading_from_pretrained as loading

    if hasattr(hf_model, "merge_and_unload"):
        hf_model = merged(hf_model)
    with tempfile.TemporaryDirectory(prefix="tl-") as folder:  # the conversion reads its config from a path
        hf_model.config.architectures = [type(hf_model).__name__]
        hf_model.config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        cfg = loading.get_pretrained_model_config(folder, device=hf_model.device, dtype=hf_model.dtype)
        kinds = getattr(hf_model.config, "layer_types", None) or ()
        rope = getattr(hf_model.config, "rope_parameters", None) or {}
        if ("sliding_attention" in kinds and not cfg.use_local_attn) or rope.get("rope_type") == "longrope":
            raise ValueError("long prompts are read otherwise, through windows or longrope, which it doesn't convert")
        state = loading.get_pretrained_state_dict(folder, cfg, hf_model=hf_model, dtype=hf_model.dtype)
    cfg.model_name, cfg.tokenizer_name = label, None
    model = cls(cfg, tokenizer, move_to_device=False)
    raw = dict.fromkeys(("fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases"), False)
    model.load_and_process_state_dict(state, **raw)
    model.move_model_modules_to_device()
    model.generation_config = hf_model.generation_config  # which tokens end an answer
    model.eval()
    return model

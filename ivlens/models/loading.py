"""`load_model`: a hooked model from a name, a folder, a GGUF file, or an object you already have."""

from __future__ import annotations

import copy
import difflib
import tempfile
from pathlib import Path
from typing import Any

import torch

from ivlens.common.keys import weights_fingerprint
from ivlens.models.adapters import add_adapter
from ivlens.models.backend import Backend
from ivlens.models.backends import backend_of
from ivlens.models.smollm2 import forget_quantization, smollm2_folder

__all__ = ["load_model"]

BUILT_IN = ("smollm2",)
BACKENDS = ("auto", "bridge", "hooked")


def load_model(
    name: Any = "smollm2",
    *,
    backend: str = "auto",
    adapter: str | Path | None = None,
    tokenizer: Any = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    device_map: Any = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Any:
    """A hooked model in raw weights (nothing folded or centred), in evaluation mode.

    Parameters
    ----------
    name
        `"smollm2"` (SmolLM2-135M-Instruct, offline), a hub id, a local folder, a `.gguf` file, a Hugging Face model, a PEFT
        model (its adapters stay as they are), or a hooked model, which comes back as it is.
    backend
        `"bridge"` for `TransformerBridge`, `"hooked"` for `HookedTransformer` (transformer-lens 3.9), or `"auto"`: hooked
        where it exists and can convert the model, else bridge.
    adapter
        A folder or hub id of a PEFT adapter to put on the model. The bridge runs it as it is; `HookedTransformer` merges it.
    tokenizer
        For model objects; taken from where the model came from if left out.
    dtype
        Default: float32 on a CPU, else the dtype the model was saved in.

    Raises
    ------
    ValueError, OSError
        If the name is unknown, can't be downloaded, or the model has no attention heads to hook; the message says what to do.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is unknown; choose one of {', '.join(BACKENDS)}")
    if hasattr(name, "hooks") and hasattr(name, "run_with_hooks"):
        backend_of(name).check_hooks()
        return name
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = dtype or (torch.float32 if torch.device(device).type == "cpu" and device_map is None else None)
    options = {"revision": revision, "trust_remote_code": trust_remote_code, "device_map": device_map}
    hf_model, tokenizer, label = load_hf(name, tokenizer, dtype, **options)
    if adapter is not None:
        hf_model = add_adapter(hf_model, adapter, label=label, fingerprint=weights_fingerprint(hf_model))
    if device_map is None:
        hf_model = hf_model.to(device)
    if dtype is not None and hf_model.dtype != dtype:  # else adapters, which are float32 on any base, would change too
        hf_model = hf_model.to(dtype)
    hf_model.eval()
    model = _hook(hf_model, _with_path(tokenizer), label, backend, device_map is not None)
    model.cfg.model_name = label
    backend_of(model).check_hooks()
    return model


# -- Hugging Face models ------------------------------------------------------------------------------------------------


def as_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """A floating-point dtype from itself or its name."""
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f"dtype={dtype!r} is no floating-point dtype; choose float32, bfloat16 or float16")
    return found


def load_hf(name: Any, tokenizer: Any = None, dtype: torch.dtype | None = None, **options: Any) -> tuple[Any, Any, str]:
    """A Hugging Face model from a name or an object, its tokenizer, and what to call it."""
    if isinstance(name, (str, Path)):
        return _from_name(str(name), tokenizer, dtype, options)
    label = getattr(getattr(name, "config", None), "_name_or_path", "") or type(name).__name__
    return name, tokenizer or _tokenizer_of(name, label), label


def tokenizing_backend(hf_model: Any, tokenizer: Any, label: str) -> Backend:
    """A backend that tokenizes as that of the hooked model would, without hooking the model, which would change it in place.

    Which models want a BOS is known to transformer-lens's adapter of the architecture: boot one layer of it.
    """
    config = copy.deepcopy(hf_model.config)
    config.num_hidden_layers, config.vocab_size, config.pad_token_id = 1, 8, None
    config.architectures = config.architectures or [type(hf_model).__name__]
    with torch.random.fork_rng():
        small = type(hf_model)(config)
    bridge = _to_bridge(small, _with_path(tokenizer), label)
    bridge.cfg.model_name = label
    return backend_of(bridge)


def _from_name(name: str, tokenizer: Any, dtype: torch.dtype | None, options: dict[str, Any]) -> tuple[Any, Any, str]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    label, where = name, name
    if name in BUILT_IN:
        where = str(smollm2_folder())
    elif name.endswith(".gguf"):
        path = Path(name)
        if not path.is_file():
            raise FileNotFoundError(f"no file {path}; give the path of a .gguf file")
        label, where, options = path.stem, str(path.parent), {**options, "gguf_file": path.name}
    elif Path(name).is_dir() and not any((Path(name) / f).is_file() for f in ("config.json", "adapter_config.json")):
        raise OSError(_not_found(name))
    dtype = dtype or "auto"
    try:
        model = AutoModelForCausalLM.from_pretrained(
            where, dtype=dtype, **{k: v for k, v in options.items() if v is not None}
        )
        if tokenizer is None:
            keep = ("revision", "trust_remote_code", "gguf_file")
            tokenizer = AutoTokenizer.from_pretrained(
                where, **{k: v for k, v in options.items() if k in keep and v is not None}
            )
    except OSError as error:
        raise OSError(_not_found(name)) from error
    if "gguf_file" in options:
        forget_quantization(model)
    return model, tokenizer, label


def _not_found(name: str) -> str:
    near = difflib.get_close_matches(name.lower(), BUILT_IN, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    if Path(name).exists():
        return f"the folder {name} holds no complete model (config.json, weights and tokenizer files); save it with save_pretrained"
    return (
        f"can't load model {name!r}: it isn't built in, not a local folder or .gguf file, not in the Hugging Face cache, and "
        f"it couldn't be downloaded from the hub (no network, no such id, or no access). {hint}"
        "Offline, use 'smollm2' or a local folder; online, check the id and log in with `hf auth login`"
    )


def _tokenizer_of(model: Any, where: str) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(where)
    except (OSError, ValueError) as error:
        raise ValueError("can't find this model's tokenizer; pass it with load_model(model, tokenizer=...)") from error


def _with_path(tokenizer: Any) -> Any:
    """Both hooked models load the tokenizer again from its path, so one made in memory is first saved to a folder."""
    if Path(str(getattr(tokenizer, "name_or_path", ""))).exists() and str(tokenizer.name_or_path):
        return tokenizer
    if tokenizer.init_kwargs.get("name_or_path"):
        return tokenizer
    from transformers import AutoTokenizer

    folder = tempfile.mkdtemp(prefix="ivlens-tokenizer-")
    tokenizer.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


# -- hooked models ------------------------------------------------------------------------------------------------------


def _hook(hf_model: Any, tokenizer: Any, label: str, backend: str, spread: bool) -> Any:
    hooked = _hooked_class()
    if backend == "hooked" and hooked is None:
        raise ValueError(
            "backend='hooked' needs HookedTransformer, which transformer-lens removed in 4.0; "
            "use backend='bridge' or install transformer-lens==3.9.0"
        )
    if hooked is not None and backend != "bridge" and not spread:
        try:
            return _to_hooked(hooked, hf_model, tokenizer, label)
        except (ValueError, RuntimeError, KeyError, AttributeError, TypeError) as error:
            if backend == "hooked":
                raise ValueError(
                    f"HookedTransformer can't convert {label} ({type(error).__name__}: {error}); use backend='bridge'"
                ) from error
    return _to_bridge(hf_model, tokenizer, label)


def _hooked_class() -> Any:
    try:
        from transformer_lens import HookedTransformer
    except ImportError:
        return None
    return HookedTransformer


def _to_bridge(hf_model: Any, tokenizer: Any, label: str) -> Any:
    """Boot the model inside any PEFT wrapper: it is the same object, so adapters stay live and can be switched."""
    from transformer_lens.model_bridge import TransformerBridge

    inner = hf_model.get_base_model() if hasattr(hf_model, "get_base_model") else hf_model
    inner.config.architectures = inner.config.architectures or [
        type(inner).__name__
    ]  # models made from a config have none
    device = None if getattr(inner, "hf_device_map", None) else inner.device
    bridge = TransformerBridge.boot_transformers(label, hf_model=inner, tokenizer=tokenizer, device=device)
    bridge.eval()
    return bridge


def _to_hooked(cls: type, hf_model: Any, tokenizer: Any, label: str) -> Any:
    """Raw weights in a HookedTransformer, by transformer-lens's own conversion for the architecture."""
    from transformer_lens import loading_from_pretrained as loading

    if hasattr(hf_model, "merge_and_unload"):
        hf_model = _merged(hf_model)
    with tempfile.TemporaryDirectory(prefix="tl-") as folder:  # the conversion reads its config from a path
        hf_model.config.architectures = [type(hf_model).__name__]
        hf_model.config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        cfg = loading.get_pretrained_model_config(folder, device=hf_model.device, dtype=hf_model.dtype)
        state = loading.get_pretrained_state_dict(folder, cfg, hf_model=hf_model, dtype=hf_model.dtype)
    cfg.model_name, cfg.tokenizer_name = label, None
    model = cls(cfg, tokenizer, move_to_device=False)
    model.load_and_process_state_dict(
        state, fold_ln=False, center_writing_weights=False, center_unembed=False, fold_value_biases=False
    )
    model.move_model_modules_to_device()
    model.eval()
    _check_conversion(hf_model, model)
    return model


@torch.inference_mode()
def _check_conversion(hf_model: Any, model: Any) -> None:
    """The conversion drops what it doesn't know (projection biases, rotary scaling, ...) without a word, so compare."""
    tokens = torch.arange(min(64, model.cfg.n_ctx), device=hf_model.device)[None] * 37 % model.cfg.d_vocab
    expected = hf_model(tokens).logits.float().softmax(-1)
    difference = (model(tokens).float().softmax(-1) - expected.to(model.cfg.device)).abs().max().item()
    if not difference <= (1e-3 if hf_model.dtype == torch.float32 else 0.1):
        raise ValueError(f"converted, its probabilities differ by {difference:.1e}")


def _merged(peft_model: Any) -> Any:
    """The adapters merged into a copy, so that the caller's model keeps them apart."""
    return copy.deepcopy(peft_model).merge_and_unload()

"""`load_model`: a hooked model from a name, a folder, a GGUF file, or an object you already have."""

from __future__ import annotations

import difflib
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch

from ivlens.common.keys import weights_fingerprint
from ivlens.common.processes import here
from ivlens.models.adapters import add_adapter, check_kind, fused_adapters, merged, switched_off
from ivlens.models.backends import backend_of
from ivlens.models.comparison import Reference
from ivlens.models.hooking import check_in_memory, hook_model, is_placed, with_path
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
    device
        Such as `cpu` or `cuda:1`; default: the first GPU, else the CPU.
    dtype
        Default: float32 on a CPU, else the dtype the model was saved in.
    device_map
        As transformers takes it (`"auto"`): over several devices, instead of `device`.
    revision
        Of a hub id: branch, tag or commit.
    trust_remote_code
        Run code that comes with a model.

    Raises
    ------
    ValueError, OSError
        If the name is unknown, can't be downloaded, or the model has no attention heads to hook; the message says what to do.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is unknown; choose one of {', '.join(BACKENDS)}")
    if is_hooked(name):
        asked = {"adapter": adapter, "tokenizer": tokenizer, "device": device, "dtype": dtype, "device_map": device_map}
        if given := [f"{key}={value!r}" for key, value in asked.items() if value is not None]:
            raise ValueError(f"{', '.join(given)} can't be given for a model that is hooked already; load it anew")
        backend_of(name).check_hooks()
        return name
    if isinstance(device_map, str) and (count := here()[1]) > 1:
        said = f"device_map={device_map!r} takes all devices, and each of {count} processes would"
        raise ValueError(f"{said}; start one process, or name the devices of this one, such as device_map={{'': 0}}")
    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
    default = torch.float32 if torch.device(where).type == "cpu" and device_map is None else None
    options = {"revision": revision, "trust_remote_code": trust_remote_code, "device_map": device_map}
    own = tokenizer is not None or not isinstance(name, (str, Path))
    hf_model, tokenizer, label = load_hf(name, tokenizer, dtype or default, **options)
    if adapter is not None:
        hf_model = add_adapter(hf_model, adapter, label=label, fingerprint=weights_fingerprint(hf_model))
    placed = device_map is not None or is_placed(hf_model)
    if placed:
        _check_placed(hf_model, device, dtype)
    else:
        check_in_memory(hf_model, label, "measured")
        hf_model, wanted = hf_model.to(where), dtype or default
        if wanted is not None and hf_model.dtype != wanted:  # else float32 adapters would change too
            hf_model = hf_model.to(wanted)
    hf_model.eval()
    check_kind(getattr(hf_model, "active_peft_config", None), label)
    reference = Reference.of(hf_model, tokenizer, label)
    if fused := fused_adapters(hf_model):
        done = "left out, being switched off" if switched_off(hf_model) else "merged"
        said = f"the adapter of {label} is {done}: it is on {', '.join(fused)}, which a hooked model cuts up"
        warnings.warn(f"{said}; switching it in the model you passed doesn't switch it here", stacklevel=2)
        hf_model = merged(hf_model)
    with tempfile.TemporaryDirectory(prefix="ivlens-tokenizer-") as folder:
        model = hook_model(hf_model, with_path(tokenizer, folder, own), label, backend, placed, reference)
    model.cfg.model_name = label
    backend_of(model).check_hooks()
    return model


def _check_placed(hf_model: Any, device: str | torch.device | None, dtype: torch.dtype | None) -> None:
    """Raise ValueError where a model that must stay as it is would have to be moved or converted."""
    elsewhere = device is not None and {p.device.type for p in hf_model.parameters()} != {torch.device(device).type}
    asked = [f"device={device}"] if elsewhere else []
    asked += [f"dtype={dtype}"] if dtype not in (None, hf_model.dtype) else []
    if asked:
        said = f"{' and '.join(asked)} can't be given for a model that is quantised or placed already"
        raise ValueError(f"{said}; load it as you want it")


def is_hooked(model: Any) -> bool:
    return hasattr(model, "hooks") and hasattr(model, "run_with_hooks")


# -- Hugging Face models ------------------------------------------------------------------------------------------------


def as_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """A floating-point dtype from itself or its name."""
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f"dtype={dtype!r} is no floating-point dtype; choose float32, bfloat16 or float16")
    return found


def load_hf(name: Any, tokenizer: Any = None, dtype: torch.dtype | None = None, **options: Any) -> tuple[Any, Any, str]:
    """A Hugging Face model from a name or an object, its tokenizer, and what to call it."""
    if is_hooked(name):
        raise ValueError("this model is hooked already; pass the Hugging Face model, its name or folder")
    if isinstance(name, (str, Path)):
        return _from_name(str(name), tokenizer, dtype, options)
    label = getattr(getattr(name, "config", None), "_name_or_path", "") or type(name).__name__
    return name, tokenizer or _tokenizer_of(name, label), label


def _from_name(name: str, tokenizer: Any, dtype: torch.dtype | None, options: dict[str, Any]) -> tuple[Any, Any, str]:
    from transformers import AutoTokenizer

    label, where = name, name
    options = {key: value for key, value in options.items() if value is not None}
    if name in BUILT_IN:
        where = str(smollm2_folder())
    elif name.endswith(".gguf"):
        path = Path(name)
        if not path.is_file():
            raise FileNotFoundError(f"no file {path}; give the path of a .gguf file")
        label, where, options = path.stem, str(path.parent), {**options, "gguf_file": path.name}
    elif Path(name).is_dir() and not any((Path(name) / f).is_file() for f in ("config.json", "adapter_config.json")):
        raise OSError(_not_found(name))
    try:
        model = _pretrained(where, dtype=dtype or "auto", **options)
        if tokenizer is None:
            options.pop("device_map", None)
            tokenizer = AutoTokenizer.from_pretrained(where, **options)
    except OSError as error:
        raise OSError(_not_found(name)) from error
    if "gguf_file" in options:
        forget_quantization(model)
    return model, tokenizer, label


def _pretrained(where: str, **options: Any) -> Any:
    """A model that writes text, alone or inside a wrapper for text and images."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    for kind in (AutoModelForCausalLM, AutoModelForImageTextToText):
        try:
            return kind.from_pretrained(where, **options)
        except ValueError as error:
            if "Unrecognized configuration class" not in str(error):
                raise
    raise ValueError(f"{where} is no model that continues text (such as GPT, Llama or Gemma); use one of those")


def _not_found(name: str) -> str:
    near = "did you mean 'smollm2'? " if difflib.get_close_matches(name.lower(), BUILT_IN, cutoff=0.5) else ""
    if Path(name).exists():
        return f"the folder {name} holds no complete model (config.json, weights and tokenizer files); save it with save_pretrained"
    return (
        f"can't load model {name!r}: it isn't built in, not a local folder or .gguf file, not in the Hugging Face cache, and "
        f"it couldn't be downloaded from the hub (no network, no such id, or no access). {near}"
        "Offline, use 'smollm2' or a local folder; online, check the id and log in with `hf auth login`"
    )


def _tokenizer_of(model: Any, where: str) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(where)
    except (OSError, ValueError) as error:
        raise ValueError("can't find this model's tokenizer; pass it with load_model(model, tokenizer=...)") from error

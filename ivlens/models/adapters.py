"""PEFT adapters: put on a model with checks, and several on one base model, of which one at a time is in use."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch

from ivlens.common.hints import reason

__all__ = [
    "adapter_distance",
    "adapter_weights",
    "add_adapter",
    "check_kind",
    "check_reloads",
    "check_stackable",
    "freeze_adapter",
    "fused_adapters",
    "hub_adapter",
    "is_adapter",
    "merged",
    "more_than_lora",
    "record_base",
    "stack_adapters",
    "stands_alone",
]

FUSED = {"c_attn", "query_key_value", "qkv_proj", "gate_up_proj", "Wqkv", "W_pack", "qkv", "att_proj"}
NOT_STACKED = (
    "use_dora", "lora_bias", "rank_pattern", "alpha_pattern", "modules_to_save", "bias", "target_parameters", "trainable_token_indices"
)  # fmt: skip
CONFIG, WEIGHTS, RECORD = "adapter_config.json", "adapter_model.safetensors", "ivlens.json"


def is_adapter(path: Any) -> bool:
    """Whether this is a folder with an adapter (or what is left of one)."""
    return isinstance(path, (str, Path)) and any((Path(path) / name).is_file() for name in (CONFIG, WEIGHTS))


def hub_adapter(name: str) -> str:
    """Where an adapter of the hub was downloaded to; anything else as it is."""
    import huggingface_hub

    if Path(name).exists() or name.count("/") != 1:
        return name
    try:
        huggingface_hub.hf_hub_download(name, CONFIG)
    except (OSError, ValueError):  # a model, or nothing there: whoever loads it says so
        return name
    return huggingface_hub.snapshot_download(name, allow_patterns=["adapter_*", RECORD])


def record_base(folder: str | Path, label: str, fingerprint: str) -> None:
    """Note beside an adapter which base it belongs to."""
    text = json.dumps({"base": label, "base_fingerprint": fingerprint}, indent=1) + "\n"
    (Path(folder) / RECORD).write_text(text, encoding="utf-8")


def check_files(path: str | Path) -> None:
    """Raise FileNotFoundError or ValueError where a local adapter lacks a file or one is truncated."""
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    for name in (CONFIG, WEIGHTS):
        if not (path / name).is_file():
            raise FileNotFoundError(f"the adapter {path} has no {name}; save it again with save_pretrained")
    try:
        with safe_open(str(path / WEIGHTS), "pt") as file:
            file.keys()
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path / WEIGHTS} is truncated or not a safetensors file ({error}); save it again") from error


def add_adapter(
    hf_model: Any, path: str | Path, *, label: str, fingerprint: str, name: str = "default", trainable: bool = False
) -> Any:
    """The model with an adapter on it: a new `PeftModel`, or the one given with one adapter more.

    `label` is what the base is called. Its `fingerprint` must be that of the base the adapter was trained on, where that is on record
    (`fine_tune` records it). FileNotFoundError or ValueError where a file is missing or truncated, or the base is another.
    """
    from peft import PeftModel

    if Path(path).is_dir():
        check_files(path)
        record = Path(path) / RECORD
        known = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {}
        if known and known.get("base_fingerprint") != fingerprint:
            other = f"another base model ({known.get('base')}), not on {label}"
            raise ValueError(f"the adapter {path} was trained on {other}; load it with the base it was trained on")
    try:
        if isinstance(hf_model, PeftModel):
            hf_model.load_adapter(str(path), adapter_name=name, is_trainable=trainable)
        else:
            hf_model = PeftModel.from_pretrained(hf_model, str(path), adapter_name=name, is_trainable=trainable)
    except (RuntimeError, ValueError, KeyError) as error:
        if any(weight.is_meta for weight in hf_model.parameters()):
            said = f"peft can't put the adapter {path} on {label}, whose weights are offloaded ({reason(error)})"
            raise ValueError(
                f"{said}; merge it where they fit (merge_and_unload), save that, and load its folder"
            ) from error
        said = f"the adapter {path} doesn't fit {label} ({reason(error)})"
        raise ValueError(f"{said}; load it with the base it was trained on") from error
    check_reloads(hf_model.peft_config[name], f"the adapter {path}")  # of a hub id, too
    return hf_model


def fused_adapters(hf_model: Any) -> list[str]:
    """Names of fused projections with an adapter on them: a hooked model cuts these into parts, which pass it by."""
    if not hasattr(hf_model, "merge_and_unload"):
        return []
    return sorted({name.rsplit(".", 1)[-1] for name in adapter_layers(hf_model)} & FUSED)


def adapter_layers(model: Any) -> dict[str, Any]:
    """Every layer with adapters on it, by name."""
    layers = model.named_modules()
    return {name: x for name, x in layers if hasattr(x, "active_adapters") and hasattr(x, "base_layer")}


def check_kind(config: Any, label: str) -> None:
    """Raise ValueError where an adapter is a prompt or prefix of its own, which no hooked model would run."""
    if getattr(config, "is_prompt_learning", False):
        said = f"the adapter of {label} goes before the prompt ({config.peft_type.value}) instead of changing weights"
        raise ValueError(f"{said}; use LoRA or another adapter that can be merged")


def check_reloads(config: Any, label: str) -> None:
    """Raise ValueError where peft takes a random part off the base's weights, and another one when the adapter is loaded again."""
    if str(init := getattr(config, "init_lora_weights", True)).startswith("pissa_niter"):
        said = f"{label} has init_lora_weights={init!r}, which changes the base by a random approximation, another one at every loading"
        raise ValueError(
            f"{said}; use 'pissa', which is exact, or save it by save_pretrained(path_initial_model_for_weight_conversion=...)"
        )


def merged(hf_model: Any) -> Any:
    """A copy with its adapters merged, or without them where they are switched off; the caller's model keeps them apart."""
    copied = copy.deepcopy(hf_model)
    if switched_off(hf_model):
        return copied.unload()
    whole = copied.merge_and_unload()
    whole.merged_adapter = True  # an adapter written from it would lack this one
    return whole


def switched_off(hf_model: Any) -> bool:
    return any(getattr(module, "disable_adapters", False) is True for module in hf_model.modules())


def stands_alone(path: str | Path) -> bool:
    """Whether this adapter is loaded as a whole model. Only plain LoRA is switched on a base that others share, and its distance
    known from A and B: not on fused projections, nor where its first values were taken off the base's weights.
    """
    from peft import PeftConfig

    config = PeftConfig.from_pretrained(str(path))
    check_kind(config, str(path))
    parts = {part for name in adapter_weights(path) for part in name.split(".")}
    return bool(more_than_lora(config) or parts & {*FUSED, "lora_embedding_A"})


def more_than_lora(config: Any) -> list[str]:
    """What makes this config another thing than one A and B for each module, added to the base as it is on disk."""
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    more = [] if kind == "LORA" else [kind]
    more += [f"{name}={value!r}" for name in NOT_STACKED if (value := getattr(config, name, None)) and value != "none"]
    init = getattr(config, "init_lora_weights", True)
    as_is = init in (None, True, False, "gaussian", "orthogonal", "eva", "mica")
    return more if as_is else [*more, f"init_lora_weights={init!r}"]


def check_stackable(config: Any) -> None:
    """Raise ValueError where an adapter of this config can't be put together with another one."""
    if more := more_than_lora(config):
        said = f"an adapter with {', '.join(more)} can't be put together with those of other stages"
        raise ValueError(f"{said}, as this method does; use a plain LoraConfig")


def freeze_adapter(peft_model: Any, name: str) -> None:
    """Keep an adapter as it is while another one is trained: no gradient, and no dropout."""
    from peft.tuners.lora import LoraLayer

    for module in peft_model.modules():
        if isinstance(module, LoraLayer) and name in module.lora_dropout:
            module.lora_dropout[name] = torch.nn.Identity()
    for path, weight in peft_model.named_parameters():
        if name in path.split("."):
            weight.requires_grad_(False)


@torch.inference_mode()
def adapter_distance(peft_model: Any, name: str) -> float:
    """How far an adapter moves the weights: the Euclidean norm of all its changes together; NaN where it isn't additive."""
    from peft.tuners.lora import LoraLayer

    total = 0.0
    for module in peft_model.modules():
        if isinstance(module, LoraLayer) and name in module.lora_A:
            total += adapter_change(module, name).double().square().sum().item()
    return total**0.5 if total else float("nan")


def adapter_change(layer: Any, name: str) -> torch.Tensor:
    """What a LoRA adapter adds to its layer's weight, wherever accelerate keeps its parts."""
    from accelerate.utils import align_module_device

    with align_module_device(layer.lora_A[name]), align_module_device(layer.lora_B[name]):
        return layer.get_delta_weight(name)


def describe_config(config: Any) -> str:
    """A peft config as text that is the same in every process: its sets are sorted."""
    plain = {key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}
    return json.dumps(plain, sort_keys=True, default=str)


def adapter_weights(path: str | Path) -> dict[str, torch.Tensor]:
    """The tensors of an adapter folder."""
    from safetensors.torch import load_file

    check_files(path)
    return load_file(str(Path(path) / WEIGHTS))


def stack_adapters(first: str | Path, second: str | Path) -> None:
    """Make the LoRA adapter in folder `second` do what both do together: rows of A and columns of B side by side, exactly."""
    from safetensors.torch import save_file

    configs = [json.loads((Path(path) / CONFIG).read_text(encoding="utf-8")) for path in (first, second)]
    parts = [_scaled(adapter_weights(path), config, path) for path, config in zip((first, second), configs)]
    if parts[0].keys() != parts[1].keys():
        raise ValueError(f"{first} and {second} are on different modules; train every stage with the same settings")
    one, two = parts
    stacked = {name: torch.cat([one[name], two[name]], dim=0 if ".lora_A." in name else 1) for name in one}
    rank = sum(config["r"] for config in configs)
    changed = {**configs[1], "r": rank, "lora_alpha": rank, "use_rslora": False}  # B carries the scale
    (Path(second) / CONFIG).write_text(json.dumps(changed, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    save_file(stacked, str(Path(second) / WEIGHTS), {"format": "pt"})


def _scaled(weights: dict[str, torch.Tensor], config: dict[str, Any], path: str | Path) -> dict[str, torch.Tensor]:
    """With the adapter's scale, alpha / r, in B."""
    plain = all(".lora_A." in name or ".lora_B." in name for name in weights)
    if config.get("peft_type") != "LORA" or not plain or config.get("rank_pattern") or config.get("alpha_pattern"):
        raise ValueError(f"{path} is no plain LoRA adapter, and only those can be put together; use a plain LoraConfig")
    scale = config["lora_alpha"] / (config["r"] ** 0.5 if config.get("use_rslora") else config["r"])
    return {name: weight * scale if ".lora_B." in name else weight for name, weight in weights.items()}

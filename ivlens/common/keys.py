"""The one key by which anything kept is found again, and what is said where settings differ from those on record."""

from __future__ import annotations

import dataclasses
import enum
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

__all__ = ["all_weights", "differences", "files_key", "in_use", "key", "recorded", "weights_fingerprint"]

WHOLE, SAMPLES = 1 << 16, 4096  # weights up to that size are read whole; of larger ones so many, and the sums of rows


def key(*parts: Any, **named: Any) -> str:
    """Sixteen hexadecimal digits that are the same for equal parts only, in every process.

    Plain values count by type (`0`, `False` and `"0"` differ), tensors by dtype, shape and bytes, dataclasses by all fields, sets
    and mappings in any order, functions by name, models by what they compute: configuration, every weight, its dtype, and which
    adapters are on.

    Raises
    ------
    TypeError
        If a part's contents can't be told.

    Examples
    --------
    >>> key(0) == key(False), key((1, 2)) == key([1, 2]), key({"a": 1, "b": 2}) == key({"b": 2, "a": 1})
    (False, True, True)
    """
    return _hash(json.dumps(_plain([parts, named])).encode())


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _plain(value: Any) -> Any:
    """As what JSON can say; everything but plain values and sequences names its type."""
    if isinstance(value, enum.Enum):
        return _plain(value.value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if hasattr(value, "_fields"):  # a named tuple
        return {"type": _name(type(value)), "is": [_plain(x) for x in value]}
    if isinstance(value, (list, tuple, range)):
        return [_plain(x) for x in value]
    if isinstance(value, (set, frozenset)):
        return {"type": "set", "is": sorted((_plain(x) for x in value), key=json.dumps)}
    if isinstance(value, Mapping):
        return {"type": "mapping", "is": sorted(([_plain(k), _plain(v)] for k, v in value.items()), key=json.dumps)}
    if isinstance(value, torch.Tensor):
        return {"type": str(value.dtype), "shape": list(value.shape), "is": _hash(_bytes(value))}
    if isinstance(value, torch.nn.Module):
        return {"type": "model", "is": _model(value)}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"type": _name(type(value)), "is": fields}
    if isinstance(value, (bytes, Path, torch.dtype, torch.device)):
        return {"type": type(value).__name__.removeprefix("Posix").removeprefix("Windows"), "is": str(value)}
    if isinstance(value, type) or hasattr(value, "__qualname__"):
        if (name := _name(value)) and "<" not in name:
            return {"type": "name", "is": name}
    elif hasattr(value, "dtype") and hasattr(value, "tobytes"):  # numpy's arrays and scalars
        return {"type": str(value.dtype), "shape": list(value.shape), "is": _hash(value.tobytes())}
    said = f"{type(value).__name__} {str(value)[:60]!r} has no key by which results kept for it would be found again"
    raise TypeError(f"{said}; pass plain values, tensors, dataclasses or named functions, or leave `folder` out")


def _name(of: Any) -> str:
    return f"{of.__module__}.{of.__qualname__}"


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


# -- models -------------------------------------------------------------------------------------------------------------


def _model(model: torch.nn.Module) -> list[Any]:
    """Configuration, adapters and weights. An adapter counts as it is switched now."""
    parts = _switches(model)
    configs = [module.config for module in model.modules() if hasattr(getattr(module, "config", None), "to_dict")]
    config = configs[0] if configs else getattr(model, "cfg", None)
    if hasattr(config, "to_dict"):
        parts.append(_settings(config.to_dict()))
    parts += [[name, *_weight(weight)] for name, weight in all_weights(model)]
    return parts


def _switches(model: torch.nn.Module) -> list[Any]:
    """Which adapters are on, module by module."""
    switches = ("disable_adapters", "active_adapters", "merged_adapters", "scaling")
    return [
        [name, _plain({x: getattr(module, x) for x in switches if hasattr(module, x)})]
        for name, module in model.named_modules()
        if hasattr(module, "disable_adapters")
    ]


def _settings(config: Mapping[str, Any]) -> Any:
    """What of a configuration has to do with what a model computes."""
    beside = ("_name_or_path", "model_name", "transformers_version", "tokenizer_name", "device", "architectures")
    found = {}
    for name, value in config.items():
        if name not in beside and not name.startswith("_"):
            try:
                found[name] = _plain(value)
            except TypeError:  # an object of transformer-lens's, made from the rest
                continue
    return _plain(found)


def all_weights(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Every weight by name, those that accelerate has offloaded too."""
    for name, weight in model.named_parameters():
        if weight.is_meta:
            module, _, leaf = name.rpartition(".")
            offloaded = getattr(getattr(model.get_submodule(module), "_hf_hook", None), "weights_map", None)
            if offloaded is None:
                raise ValueError(f"{name} isn't in memory, so results kept for it aren't told apart; leave folder out")
            weight = offloaded[leaf]
        yield name, weight


@torch.no_grad()
def _weight(weight: torch.Tensor) -> list[Any]:
    """Its dtype and shape, and bits that change with any number in it."""
    about = [str(weight.dtype), list(weight.shape)]
    if weight.numel() <= WHOLE:
        return [*about, _hash(_bytes(weight))]
    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32}.get(weight.element_size(), torch.int64)
    bits = weight.detach().contiguous().view(whole)
    some = bits.flatten()[:: max(bits.numel() // SAMPLES, 1)]
    return [*about, _hash(_bytes(some)), _hash(_bytes(bits.reshape(-1, bits.shape[-1]).sum(-1, dtype=torch.int64)))]


def weights_fingerprint(model: torch.nn.Module) -> str:
    """Tells base models apart by some of every weight, the same in every dtype: what folders of adapters have on record."""
    digest = hashlib.sha256()
    for _, weight in all_weights(model):
        some = weight.detach().flatten()
        some = some[:: max(len(some) // 64, 1)].to("cpu", torch.bfloat16)
        digest.update(some.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]


def in_use(model: torch.nn.Module) -> str:
    """Tells models apart as they are now, by some of every weight and the adapters that are on: quicker than `key`."""
    return key(weights_fingerprint(model), _switches(model))


def files_key(folder: str | Path) -> str:
    """Of a folder's files: their names, sizes, and some of what is in them (small ones whole)."""
    folder, found = Path(folder), []
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        size = path.stat().st_size
        with path.open("rb") as file:
            digest = hashlib.sha256()
            for start in range(0, size, max(size // 256, WHOLE)):
                file.seek(start)
                digest.update(file.read(WHOLE))
        found.append((path.relative_to(folder).as_posix(), size, digest.hexdigest()))
    return key(found)


# -- settings on record -------------------------------------------------------------------------------------------------


def recorded(settings: Mapping[str, Any], shown: Mapping[str, Any]) -> dict[str, Any]:
    """Settings for a JSON file: as they are `shown`, plain ones as they are, and the key of each, which tells them apart."""
    told = {n: v if v is None or isinstance(v, (bool, int, float, str)) else str(v) for n, v in settings.items()}
    return {**told, **shown, "keys": {name: key(value) for name, value in settings.items()}}


def differences(there: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What differs between two records; empty where nothing does."""
    known, told, contents = there.get("keys", {}), [], []
    for name in dict.fromkeys([*known, *now["keys"]]):
        if known.get(name) != now["keys"].get(name):
            one, two = there.get(name), now.get(name)
            if json.dumps(one) == json.dumps(two):
                contents.append(f"{name}: other contents than there")
            else:
                told.append(f"{name}: {one!r} there, {two!r} now")
    return ", ".join(told or contents)

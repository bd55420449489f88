"""Files: tensors as safetensors, everything else as JSON in their header. Written whole or not at all, by one process of several."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from ivlens.common.processes import is_main, on_main

__all__ = ["kept", "read_json", "read_tensors", "safe_name", "write_json", "write_tensors", "write_text"]

T = TypeVar("T")


def safe_name(name: str) -> str:
    """A name as one of a file or folder, wherever it came from: never a path, and no longer than file systems allow.

    Examples
    --------
    >>> safe_name("EWC(strength=1/2)"), safe_name("../..")
    ('EWC_strength_1_2_', '_..')
    """
    safe = "".join(c if c.isalnum() or c in "-_." else "_" for c in name)
    safe = safe.lstrip(".") or "_"  # nothing hidden, and no way up
    return safe if len(safe) <= 100 else f"{safe[:80]}-{hashlib.sha256(name.encode()).hexdigest()[:12]}"


def kept(path: Path | None, make: Callable[[], T], read: Callable[[Path], T], write: Callable[[Path, T], Any]) -> T:
    """What is kept at a path, the same in every process, or else what `make` gives, kept from now on; with None, nothing is."""
    if path is None:
        return make()
    about = f"what is kept at {path}"
    found = on_main(lambda: read(path) if path.exists() else None, about)
    if found is not None:
        return found
    made = make()

    def again() -> T:  # as it is read another time
        write(path, made)
        return read(path)

    return on_main(again, about)


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], about: Mapping[str, Any] | None = None) -> Path:
    """Write tensors and a JSON-able description to one file, replacing it in one step."""
    from safetensors.torch import save_file

    tensors = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
    return _replace(path, lambda partial: save_file(tensors, partial, {"about": json.dumps(about or {})}))


def read_tensors(path: str | Path, *, kind: str | None = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and description of a file; FileNotFoundError or ValueError where it is missing, damaged, or of another kind."""
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}; give the path of a .safetensors file that ivlens saved")
    try:
        with safe_open(str(path), "pt") as file:
            about = json.loads((file.metadata() or {}).get("about", "{}"))
            tensors = {key: file.get_tensor(key) for key in file.keys()}
    except (SafetensorError, OSError, json.JSONDecodeError) as error:
        said = f"{path} is truncated or not a safetensors file ({error})"
        raise ValueError(f"{said}; save or download it again") from error
    if kind is not None and about.get("kind") != kind:
        raise ValueError(f"{path} holds {about.get('kind') or 'something ivlens did not save'}, not {kind}")
    for key, tensor in tensors.items():
        if tensor.is_floating_point() and kind is not None and not torch.isfinite(tensor).all():
            raise ValueError(f"{path}: {key} holds NaN or infinite values; save it again from a sound run")
    return tensors, about


def write_json(path: str | Path, kind: str, content: Mapping[str, Any]) -> Path:
    """Write a JSON file that says what it holds, replacing it in one step."""
    return write_text(path, json.dumps({"kind": kind, **content}, ensure_ascii=False, indent=1) + "\n")


def write_text(path: str | Path, text: str) -> Path:
    """Write a text file, replacing it in one step."""
    return _replace(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def _replace(path: str | Path, write: Callable[[Path], Any]) -> Path:
    """Write beside the path, and put that in its place in one step."""
    path = Path(path)
    if not is_main():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    write(partial)
    os.replace(partial, path)
    return path


def read_json(path: str | Path, kind: str) -> dict[str, Any]:
    """What `write_json` wrote; FileNotFoundError or ValueError where it is missing, damaged, or of another kind."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}; give the path of one that ivlens saved")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is truncated or not JSON ({error})") from error
    if not isinstance(content, dict) or content.get("kind") != kind:
        raise ValueError(f"{path} holds no {kind} that ivlens saved")
    return content

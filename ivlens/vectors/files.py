"""Vectors in files: a folder with the numbers, a description to read and edit, and a card for the hub."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

from ivlens.common.storage import read_tensors, write_tensors, write_text

__all__ = ["CARD", "FILE", "describe", "read_vector", "write_vector"]

KIND = "instruction vector"
FILE, CARD = "vector.safetensors", "vector.json"


def write_vector(path: str | Path, vector: Any) -> Path:
    """Write an `InstructionVector` to a folder; other files in it stay."""
    path = Path(path)
    tensors = {"vector": vector.vector}
    if vector.shares is not None:
        tensors["shares"] = vector.shares
    about = {"kind": KIND, "heads": [list(h) for h in vector.heads], "layer": vector.layer, "scale": vector.scale}
    about["metadata"] = vector.metadata
    write_tensors(path / FILE, tensors, {**about, "sum": _sum(about)})
    write_text(path / CARD, json.dumps(about, ensure_ascii=False, indent=2) + "\n")
    return path


def read_vector(path: str | Path) -> dict[str, Any]:
    """The parts of an `InstructionVector` that `write_vector` wrote; see `InstructionVector.load`."""
    path = Path(path)
    file = path / FILE if path.is_dir() or not path.suffix else path
    tensors, about = read_tensors(file, kind=KIND)
    if "sum" in about and about.pop("sum") != _sum(about):
        raise ValueError(f"the description in {file} was changed after it was saved; save or download it again")
    if missing := [key for key in ("heads", "layer", "scale", "metadata") if key not in about]:
        raise ValueError(f"{file} has no {missing[0]!r}; save or download it again")
    if "vector" not in tensors:
        raise ValueError(f"{file} holds no vector; save or download it again")
    parts = {"vector": tensors["vector"], "heads": tuple(map(tuple, about["heads"])), "shares": tensors.get("shares")}
    parts |= {key: about[key] for key in ("layer", "scale", "metadata")}
    card = file.with_name(CARD)
    return {**parts, **_edited(card)} if file.name == FILE and card.is_file() else parts


def _sum(about: dict[str, Any]) -> str:
    """Tells whether a description is the one that was saved."""
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]


def _edited(card: Path) -> dict[str, Any]:
    """Layer and scale as they stand in the file that people read, and edit."""
    try:
        about = json.loads(card.read_text(encoding="utf-8"))
        layer, scale = about["layer"], about["scale"]
        return {"layer": None if layer is None else int(layer), "scale": float(scale)}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{card} can't be read ({error}); mend its layer and scale, or remove it") from error


def describe(vector: Any) -> str:
    """A model card: what the vector is, and how to use it."""
    about = "\n".join(f"| {k} | {v} |" for k, v in vector.metadata.items())
    where = 14 if vector.layer is None else vector.layer
    scale = vector.scale if math.isfinite(vector.scale) else 1.0
    return (
        "---\nlibrary_name: ivlens\ntags: [instruction-vector, interpretability]\n---\n"
        f"# Instruction vector: {vector.name}\n\n{vector!r}\n\n| | |\n|---|---|\n{about}\n\n"
        "```python\nimport ivlens as ivl\nmodel = ivl.load_model(...)\niv = ivl.InstructionVector.from_pretrained(...)\n"
        f"with iv.inject(model, layer={where}, scale={scale:g}):\n    ivl.generate(model, [...])\n```\n"
    )

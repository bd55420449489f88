"""Vectors from and for other programs: the Function Vectors code's `.pt`, and control vectors in GGUF (repeng, llama.cpp)."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ivlens.vectors.vector import RESIDUAL, InstructionVector

__all__ = ["export_vector", "import_vector"]

PREFIX, ARCHITECTURE = "direction.", "controlvector"
ENDINGS = (".pt", ".gguf")


def import_vector(path: str | Path, *, layer: int | None = None) -> InstructionVector | list[InstructionVector]:
    """A vector that another program made. Tensors are read, and nothing is executed.

    Parameters
    ----------
    path
        `.pt`: a tensor that `torch.save` wrote, as [d_model] or with further dimensions of size 1 (a function vector of arXiv
        2310.15213 has [1 1 d_model]). `.gguf`: a control vector, one direction for each of its layers.
    layer
        After which layer a `.pt` is injected; the Function Vectors code calls it `edit_layer`, and it doesn't stand in the file.

    Returns
    -------
    InstructionVector, or a list of them
        A list for `.gguf`, each with its layer, acting at all positions, as there; `inject` and `generate` take it whole.

    Raises
    ------
    FileNotFoundError, ValueError
        If there is no such file, it holds anything but tensors, or no vector.
    """
    path = Path(path)
    if path.suffix not in ENDINGS:
        raise ValueError(f"path={str(path)!r} must end in {' or '.join(ENDINGS)}; InstructionVector.load reads ours")
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}; give the path of a .pt or .gguf file")
    if path.suffix == ".gguf":
        if layer is not None:
            raise ValueError(f"layer={layer} can't be given for a .gguf, which has its own; leave it out")
        return _from_gguf(path)
    return InstructionVector(_from_pt(path), layer=layer, metadata={"task": path.stem, "unit": RESIDUAL})


def export_vector(
    vector: InstructionVector | Sequence[InstructionVector], path: str | Path, *, architecture: str = "llama"
) -> Path:
    """Write vectors for other programs, times their scale, which these files don't hold.

    Parameters
    ----------
    vector
        One, or for `.gguf` several, each with a layer of its own.
    path
        `.pt`: a tensor [1 1 d_model], as the Function Vectors code has it. `.gguf`: a control vector for llama.cpp, which adds
        `direction.N` after block N, counted from 0, at every token.
    architecture
        The model's, as llama.cpp calls it (`controlvector.model_hint`).

    Raises
    ------
    ValueError
        If a vector has no layer, layer 0 (which llama.cpp doesn't address), or sets a projection instead of adding.
    """
    path = Path(path)
    several = [vector] if isinstance(vector, InstructionVector) else list(vector)
    if path.suffix not in ENDINGS or (path.suffix == ".pt" and len(several) != 1) or not several:
        raise ValueError(f"{len(several)} vectors for {str(path)!r}: write one to .pt, or one or more to .gguf")
    if setting := [v.name for v in several if v.metadata.get("how") == "set"]:
        raise ValueError(f"{setting[0]!r} sets a projection, and these files can only add; tune it with how='add'")
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".pt":
        torch.save((several[0].vector * several[0].scale)[None, None], path)
        return path
    return _to_gguf(several, path, architecture)


def _from_pt(path: Path) -> Tensor:
    try:
        found: Any = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        said = f"{path} is damaged, or holds more than tensors ({type(error).__name__})"
        raise ValueError(f"{said}: it isn't read, because reading could execute it; save the tensor alone") from error
    if not isinstance(found, Tensor):
        raise ValueError(
            f"{path} holds a {type(found).__name__}, not a tensor; save the vector alone: torch.save(fv, …)"
        )
    if found.dim() == 0 or found.numel() != found.shape[-1]:
        shape = f"{path} has shape {tuple(found.shape)}, which is no vector"
        raise ValueError(
            f"{shape}; of mean head activations, make one by vectors.vector_from_heads(model, x[:, :, -1], heads)"
        )
    return found.flatten().float()


def _from_gguf(path: Path) -> list[InstructionVector]:
    from gguf import GGUFReader

    try:
        reader = GGUFReader(path)
    except (ValueError, IndexError, KeyError) as error:
        raise ValueError(f"{path} is truncated or no GGUF file ({error}); save it again") from error
    directions = {}
    for tensor in reader.tensors:
        if tensor.name.startswith(PREFIX) and tensor.name.removeprefix(PREFIX).isdigit():
            if str(tensor.tensor_type.name) not in ("F32", "F16"):
                raise ValueError(f"{path}: {tensor.name} is {tensor.tensor_type.name}; only F32 and F16 are read")
            directions[int(tensor.name.removeprefix(PREFIX))] = torch.tensor(tensor.data).float().flatten()
    if not directions:
        raise ValueError(f"{path} holds no {PREFIX}N, so it is no control vector; `load_model` reads a model's .gguf")
    about = {"task": path.stem, "positions": "all", "unit": RESIDUAL}
    return [InstructionVector(values, layer=n, metadata=about) for n, values in sorted(directions.items())]


def _to_gguf(vectors: Sequence[InstructionVector], path: Path, architecture: str) -> Path:
    from gguf import GGUFWriter

    layers = [v.layer for v in vectors]
    if None in layers or len(set(layers)) < len(layers) or min(layers) < 1:
        said = f"the vectors have layers {layers}, but each needs one of its own, from 1 on"
        raise ValueError(f"{said} (llama.cpp doesn't steer layer 0); set it: replace(iv, layer=…)")
    if elsewhere := [v.name for v in vectors if v.metadata.get("positions") != "all"]:
        said = (
            f"{elsewhere[0]!r} acts at the last prompt token or while generating, but a control vector at every token"
        )
        warnings.warn(f"{said}: choose its scale by inject(positions='all') first", stacklevel=3)
    writer = GGUFWriter(path, ARCHITECTURE)
    writer.add_string(f"{ARCHITECTURE}.model_hint", architecture)
    writer.add_int32(f"{ARCHITECTURE}.layer_count", len(vectors))
    for v in vectors:
        writer.add_tensor(f"{PREFIX}{v.layer}", (v.vector * v.scale).float().cpu().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path

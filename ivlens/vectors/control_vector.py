"""Control vectors in GGUF, as repeng and llama.cpp have them: a direction for each of some layers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["read_control_vector", "write_control_vector"]

PREFIX, ARCHITECTURE = "direction.", "controlvector"


def read_control_vector(path: Path) -> dict[int, Float[Tensor, " d_model"]]:
    """From each layer to its direction, ascending; ValueError where the file is damaged or holds none."""
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
    return dict(sorted(directions.items()))


def write_control_vector(path: Path, directions: Mapping[int, Float[Tensor, " d_model"]], architecture: str) -> None:
    """`direction.N` is added after block N, counted from 0. llama.cpp reads the directions alone, none of the fields."""
    from gguf import GGUFWriter

    writer = GGUFWriter(path, ARCHITECTURE)
    writer.add_string(f"{ARCHITECTURE}.model_hint", architecture)
    writer.add_int32(f"{ARCHITECTURE}.layer_count", len(directions))
    for layer, direction in sorted(directions.items()):
        writer.add_tensor(f"{PREFIX}{layer}", direction.float().cpu().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

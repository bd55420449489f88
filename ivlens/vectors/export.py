"""Vectors from other programs, and written for those that serve models."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ivlens import __version__
from ivlens.common.storage import write_text
from ivlens.models.backends import backend_of
from ivlens.models.biases import save_adapter_with_biases, save_model_with_biases
from ivlens.running.injection import projection_target
from ivlens.vectors.control_vector import read_control_vector, write_control_vector
from ivlens.vectors.interventions import Step, added, write_easysteer, write_interventions
from ivlens.vectors.vector import RESIDUAL, InstructionVector

__all__ = ["export_vector", "import_vector"]

ENDINGS = {"pt": ".pt", "llama.cpp": ".gguf", "vllm": ".json"}  # others are folders
FORMATS = (*ENDINGS, "easysteer", "transformers", "peft")
# Where a vector acts there: where it is added by that program, whatever it was tuned for.
ACTS_AT: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(FORMATS, ("all",)),
    "pt": ("last",),
    "easysteer": ("last", "generated", "all"),
}
GATED = "can't be written: no such program looks at a prompt before it steers. Ask it beforehand, when.on(model, prompts), and steer only"


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
    if path.suffix not in (".pt", ".gguf"):
        raise ValueError(f"path={str(path)!r} must end in .pt or .gguf; InstructionVector.load reads ours")
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}; give the path of a .pt or .gguf file")
    if path.suffix == ".gguf":
        if layer is not None:
            raise ValueError(f"layer={layer} can't be given for a .gguf, which has its own; leave it out")
        about = {"task": path.stem, "positions": "all", "unit": RESIDUAL}
        return [InstructionVector(v, layer=n, metadata=about) for n, v in read_control_vector(path).items()]
    return InstructionVector(_from_pt(path), layer=layer, metadata={"task": path.stem, "unit": RESIDUAL})


def export_vector(
    vector: InstructionVector | Sequence[InstructionVector],
    path: str | Path,
    *,
    format: str | None = None,
    model: Any = None,
    positions: str | int | None = None,
    when: Any = None,
    architecture: str | None = None,
) -> Path:
    """Write vectors for programs that serve models, times their scale. What a program can't do exactly is refused.

    Parameters
    ----------
    vector
        One, or several, each with its own layer and scale; at one layer they are summed. Only one to `.pt`.
    path
        A file, or for `easysteer`, `transformers` and `peft` a folder that is new or empty.
    format
        `llama.cpp` (`.gguf`): a control vector. `vllm` (`.json`): `intervene=` of transformer_lens's `boot_vllm`. `easysteer`: its
        steering specification and the files it names. `transformers`: the whole model, with the vector as a bias of what the layer's
        feed-forward writes. `peft`: an adapter with that bias, a few kB, or the LoRA adapter on the model and the bias in one. `pt`: a
        tensor [1 1 d_model], as the Function Vectors code (arXiv 2310.15213) has it. Default: by the path's ending.
    model
        A hooked model, such as `load_model` gives. For `transformers` and `peft`, which need the bridge; elsewhere the vectors are
        checked against it, and it tells the `architecture`.
    positions
        Where the vectors act, as in `inject`. Default: each one's own, else `last`. `easysteer` has `last`, `generated` and `all`; `pt`
        is for `last`; all others steer every token, prompt and answer: choose the scale with `positions="all"` before. For `vllm` also a
        token's number, counted from 0: `len(tokens) - 1` is `last`.
    when
        A `Gate` is refused: none of these programs has one.
    architecture
        What the model's is called (`llama`, `qwen2`, …), for `llama.cpp` and `easysteer` (`controlvector.model_hint`, a note that
        llama.cpp doesn't read). Default: `model`'s.

    Raises
    ------
    ValueError
        If the format has no such layer (llama.cpp no layer 0), positions or gate, only adds where the vector sets a projection, or a
        bias isn't the same as the vector (a norm after the feed-forward, experts).
    """
    path, several = Path(path), [vector] if isinstance(vector, InstructionVector) else list(vector)
    format = _format(path, format)
    if when is not None:
        raise ValueError(f"when={when!r} {GATED} those that it opens for")
    if not several or (format == "pt" and len(several) != 1):
        raise ValueError(f"{len(several)} vectors for {str(path)!r}: write one to .pt, and one or more to all others")
    if format in ("transformers", "peft") and model is None:
        raise ValueError(f"format={format!r} changes weights, so it needs them; pass model=")
    steps = [_step(v, format, model, positions) for v in several]
    hint = _architecture(model, architecture) if format in ("llama.cpp", "easysteer") else ""
    if format not in ENDINGS and path.exists() and (path.is_file() or any(path.iterdir())):
        raise ValueError(f"{path} isn't empty; give a new folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    write: dict[str, Callable[[], None]] = {
        "pt": lambda: torch.save(steps[0].vector[None, None], path),
        "llama.cpp": lambda: write_control_vector(path, added(steps), hint),
        "vllm": lambda: write_interventions(path, steps),
        "easysteer": lambda: write_easysteer(path, steps, hint),
        "transformers": lambda: save_model_with_biases(backend_of(model), added(steps), path),
        "peft": lambda: save_adapter_with_biases(backend_of(model), added(steps), path),
    }
    write[format]()
    if format not in ENDINGS:
        write_text(path / "README.md", _card(several, steps, format))
    return path


def _format(path: Path, format: str | None) -> str:
    """As given, or by the path's ending."""
    format = next((x for x, ending in ENDINGS.items() if ending == path.suffix), "") if format is None else format
    if format not in FORMATS:
        said = f"format={format!r} is unknown" if format else f"path={str(path)!r} doesn't tell the format"
        raise ValueError(f"{said}; choose one of {', '.join(FORMATS)}")
    if path.suffix != ENDINGS.get(format, path.suffix):
        raise ValueError(f"path={str(path)!r} must end in {ENDINGS[format]} for format={format!r}")
    return format


def _step(v: InstructionVector, format: str, model: Any, positions: str | int | None) -> Step:
    """What a vector does, once the format can do it; else ValueError."""
    if model is not None:
        v.check_model(model)
    at = v.metadata.get("positions", "last") if positions is None else positions
    numbered = format == "vllm" and isinstance(at, int) and not isinstance(at, bool) and at >= 0
    if at not in ACTS_AT[format] and not numbered:
        raise ValueError(_elsewhere(v, format, at))
    if format == "pt":
        layer = 0  # which doesn't stand in the file
    elif v.layer is None:
        raise ValueError(f"{v.name!r} has no layer; choose one with ivl.tune_injection, or replace(iv, layer=…)")
    else:
        layer = _layer(v, format, model)
    if v.metadata.get("how", "add") == "add":
        return Step(layer, at, v.vector * v.scale)
    if format != "easysteer":
        raise ValueError(f"{v.name!r} sets a projection, and format={format!r} can only add; tune it with how='add'")
    return Step(layer, at, v.vector, v.scale * projection_target(v.vector, v.metadata, layer))


def _layer(v: InstructionVector, format: str, model: Any) -> int:
    """Counted from 0."""
    known = v.metadata.get("signature") if model is None else backend_of(model).signature
    n = (known or {}).get("n_layers")
    if v.layer < 0 and n is None:
        raise ValueError(
            f"layer={v.layer} of {v.name!r} counts from the end; pass model=, which tells how many there are"
        )
    if n is not None and not -n <= v.layer < n:
        raise ValueError(f"layer={v.layer} of {v.name!r} is out of range: the model has layers 0 to {n - 1}")
    layer = v.layer if n is None else v.layer % n
    if format == "llama.cpp" and layer == 0:
        raise ValueError(f"{v.name!r} acts after layer 0, which llama.cpp doesn't steer; tune it for one from 1 on")
    return layer


def _elsewhere(v: InstructionVector, format: str, at: Any) -> str:
    """That a vector acts at other positions than the format can have it."""
    there = " or ".join(map(repr, ACTS_AT[format]))
    said = f"{v.name!r} acts at positions={at!r}, but format={format!r} has only {there}"
    if ACTS_AT[format] != ("all",):
        return f"{said}; pass positions= to write it so"
    number = ", or the last prompt token's number, positions=len(tokens) - 1" if format == "vllm" else ""
    said += f", every token of prompt and answer, where another scale is right{number}"
    return f"{said}. Tune it so, ivl.tune_injection(..., positions='all'), or pass positions='all' to write it as it is"


def _card(vectors: Sequence[InstructionVector], steps: Sequence[Step], format: str) -> str:
    """What stands in a folder, to read."""
    rows = [f"| {v.name} | {s.layer} | {v.scale:g} | {s.positions} |" for v, s in zip(vectors, steps)]
    what = {
        "transformers": "The model's weights hold",
        "peft": "The adapter holds",
        "easysteer": "`steering.json` asks for",
    }
    everywhere = "" if format == "easysteer" else " It acts on every token, of prompts and of answers."
    return (
        f"# Steered\n\n{what[format]} what ivlens {__version__} adds after layers:{everywhere}\n\n"
        "| vector | layer | scale | positions |\n|---|---:|---:|---|\n" + "\n".join(rows) + "\n"
    )


def _architecture(model: Any, given: str | None) -> str:
    config = getattr(getattr(model, "original_model", None), "config", None)
    if given is None and config is None:
        raise ValueError("a control vector says whose it is: pass model=, or architecture=, such as 'llama' or 'qwen2'")
    return config.model_type if given is None else given


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

"""A base model and what training made of it, one at a time in use; adapters share one base in memory."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ivlens.common.keys import all_weights, weights_fingerprint
from ivlens.models.adapters import adapter_change, adapter_distance, add_adapter, check_files, is_adapter, stands_alone
from ivlens.models.backends import backend_of
from ivlens.models.loading import load_hf, load_model

__all__ = ["FINAL", "SAVED", "SETTINGS", "Checkpoint", "checkpoints_in", "open_checkpoints"]

SETTINGS, FINAL = "settings.json", "final"  # in the folder of a training run
SAVED = "saved"  # in each of its checkpoints that was written to its end


@dataclass(frozen=True)
class Checkpoint:
    """A model at one point of its training, after so many steps, where its name tells (`checkpoint-40`).

    `with checkpoint.use() as model:` gives the hooked model, and meanwhile `checkpoint.distance(model)` how far its weights are from
    the base's (Euclidean norm of the change).
    """

    label: str
    step: int | None
    use: Callable[[], AbstractContextManager[Any]]
    distance: Callable[[Any], float]


def open_checkpoints(
    base: Any, checkpoints: Sequence[Any], *, dtype: torch.dtype | None = None, device_map: Any = None
) -> tuple[list[Checkpoint], dict[str, str]]:
    """The base first, then every checkpoint; and the ones that can't be opened, with the reason.

    Parameters
    ----------
    base
        A name or folder as for `load_model`, or a hooked model.
    checkpoints
        Adapter folders, folders of `fine_tune` (all their checkpoints), model names or folders, or hooked models.
    dtype
        Of the base under adapters; default as for `load_model`.
    device_map
        Of models that are loaded by name; see `load_model`.

    Raises
    ------
    ValueError
        If a checkpoint has another architecture or vocabulary than the base, or an adapter belongs to another base.
    """
    entries = [inner for entry in checkpoints for inner in _expanded(entry)]
    if not entries:
        raise ValueError("no checkpoints given; pass adapter folders, model folders or hooked models")
    labelled = dict(zip(_labels(entries), entries))
    broken: dict[str, str] = {}
    for label, entry in labelled.items():
        try:
            if is_adapter(entry):
                check_files(entry)
        except (FileNotFoundError, ValueError) as error:
            broken[label] = str(error)
            warnings.warn(f"{label} left out: {error}", stacklevel=3)
    whole = {label: entry for label, entry in labelled.items() if label not in broken}
    adapters = {label: entry for label, entry in whole.items() if is_adapter(entry)}
    if adapters and not isinstance(base, (str, Path)):
        raise ValueError("adapters can't be put on a model that is hooked already; pass the base's name or folder")
    switched = {label: entry for label, entry in adapters.items() if not stands_alone(entry)}
    if switched:
        start, opened = _with_adapters(base, switched, dtype, device_map)
    else:
        named = isinstance(base, (str, Path))
        model = load_model(base, dtype=dtype, device_map=device_map) if named else base
        start, opened = Checkpoint("base", 0, lambda: nullcontext(model), lambda _: 0.0), {}
    for label, entry in whole.items():
        if label in switched:
            continue
        load = partial(load_model, entry)  # a hooked model comes back as it is
        if isinstance(entry, (str, Path)):
            how: dict[str, Any] = {"dtype": dtype, "device_map": device_map}
            how["backend"] = "bridge" if switched else "auto"  # as the base
            load = partial(_merged, base, entry, **how) if label in adapters else partial(load_model, entry, **how)
        opened[label] = _with_own_weights(label, load, _step(entry), start)
    return [start, *(opened[label] for label in whole)], broken


def checkpoints_in(folder: str | Path) -> list[Path]:
    """The checkpoints of a training run that were written to their end, by steps; others' aren't ours to use or remove."""
    found = [p for p in Path(folder).glob("checkpoint-*") if p.name.split("-")[-1].isdigit() and (p / SAVED).is_file()]
    return sorted(found, key=lambda p: int(p.name.split("-")[-1]))


def check_same_shape(base: Any, other: Any, label: str) -> None:
    """Raise ValueError unless two hooked models can be compared head by head and token by token."""
    one, two = backend_of(base), backend_of(other)
    differing = [f"{k} {v} and {two.signature[k]}" for k, v in one.signature.items() if v != two.signature[k]]
    if not differing and [w.shape for w in _weights(base)] != [w.shape for w in _weights(other)]:
        differing = ["shapes of the weights"]
    if one.tokenizer is not two.tokenizer and one.tokenizer.get_vocab() != two.tokenizer.get_vocab():
        differing.append("the tokenizers' words")
    if differing:
        said = f"{label} has another architecture or vocabulary than the base model ({', '.join(differing)})"
        raise ValueError(f"{said}; compare checkpoints of one model only")


@torch.no_grad()
def _weights(model: Any) -> Iterator[torch.Tensor]:
    """Every weight as it acts: with the adapters in use on it, and once where the bridge keeps the projection that it cut up."""
    named = dict(all_weights(model))
    whole = {".qkv.": ".q.", "._original_component.gate_up_proj.": ".gate."}  # and a part of it
    for name, weight in named.items():
        cut = (f"{name.split(w)[0]}{part}_original_component.weight" for w, part in whole.items() if w in name)
        if ".lora_" in name or any(part in named for part in cut):
            continue
        if name.endswith(".base_layer.weight"):
            layer = model.get_submodule(name.removesuffix(".base_layer.weight"))
            if not layer.disable_adapters:
                weight = sum((adapter_change(layer, adapter) for adapter in layer.active_adapters), weight)
        yield weight.detach()


def _expanded(entry: Any) -> list[Any]:
    """A training run's folder as its checkpoints."""
    if not isinstance(entry, (str, Path)) or not (Path(entry) / SETTINGS).is_file():
        return [entry]
    kept = checkpoints_in(entry)
    steps = json.loads((Path(entry) / SETTINGS).read_text(encoding="utf-8"))["steps"]
    return kept if kept and _step(kept[-1]) == steps else [*kept, Path(entry) / FINAL]


def _labels(entries: Sequence[Any]) -> list[str]:
    """Each path by as much of its end as tells it apart from the others, in the usual case its last folder."""
    for n in range(1, max((len(Path(e).parts) for e in entries if isinstance(e, (str, Path))), default=1) + 1):
        labels = [
            "/".join(Path(entry).parts[-n:]) if isinstance(entry, (str, Path)) else f"{backend_of(entry).name} {i}"
            for i, entry in enumerate(entries, start=1)
        ]
        if len(set(labels)) == len(labels):
            return labels
    raise ValueError("a checkpoint was given twice; pass each once")


def _step(entry: Any) -> int | None:
    name = Path(entry).name if isinstance(entry, (str, Path)) else ""
    if name == FINAL and (Path(entry).parent / SETTINGS).is_file():
        return json.loads((Path(entry).parent / SETTINGS).read_text(encoding="utf-8"))["steps"]
    number = name.rsplit("-", 1)[-1]
    return int(number) if name.startswith("checkpoint-") and number.isdigit() else None


def _with_adapters(
    base: Any, adapters: Mapping[str, str | Path], dtype: torch.dtype | None, device_map: Any
) -> tuple[Checkpoint, dict[str, Checkpoint]]:
    """All adapters on one base model, loaded before it is hooked: afterwards peft no longer finds its modules."""
    hf_model, tokenizer, name = load_hf(base, dtype=_dtype(dtype, device_map), device_map=device_map)
    fingerprint = weights_fingerprint(hf_model)
    slots = {label: f"checkpoint_{i}" for i, label in enumerate(adapters)}
    for label, path in adapters.items():
        hf_model = add_adapter(hf_model, path, label=name, fingerprint=fingerprint, name=slots[label])
    moved = _dtype(dtype, None) if device_map is None else None
    peft_model, model = hf_model, load_model(hf_model, backend="bridge", tokenizer=tokenizer, dtype=moved)
    model.cfg.model_name = name

    @contextmanager
    def plain() -> Iterator[Any]:
        with peft_model.disable_adapter():
            yield model

    def checkpoint(label: str, slot: str) -> Checkpoint:
        @contextmanager
        def use() -> Iterator[Any]:
            peft_model.set_adapter(slot)
            yield model

        return Checkpoint(label, _step(adapters[label]), use, lambda _: adapter_distance(peft_model, slot))

    start = Checkpoint("base", 0, plain, lambda _: 0.0)
    return start, {label: checkpoint(label, slot) for label, slot in slots.items()}


def _dtype(given: torch.dtype | None, device_map: Any) -> torch.dtype | None:
    """In which a model is read from its files; None for that of the files."""
    on_cpu = device_map is None and not torch.cuda.is_available()
    return torch.float32 if given is None and on_cpu else given


def _merged(base: str | Path, path: str | Path, dtype: torch.dtype | None, backend: str, device_map: Any = None) -> Any:
    """The base with one adapter merged into it."""
    if device_map is not None:
        said = f"the adapter {path} is merged into its base, which must be in memory whole"
        raise ValueError(
            f"{said}; merge it yourself (merge_and_unload), save that, and give its folder with device_map"
        )
    hf_model, tokenizer, name = load_hf(base, dtype=_dtype(dtype, None))
    hf_model = add_adapter(hf_model, path, label=name, fingerprint=weights_fingerprint(hf_model))
    whole = hf_model.merge_and_unload()
    return load_model(whole, tokenizer=tokenizer, dtype=_dtype(dtype, None), backend=backend)


def _with_own_weights(label: str, load: Callable[[], Any], step: int | None, start: Checkpoint) -> Checkpoint:
    """A hooked model, or one that is loaded for as long as it is in use."""

    @contextmanager
    def use() -> Iterator[Any]:
        model = load()
        with start.use() as base:
            check_same_shape(base, model, label)
        yield model

    def distance(model: Any) -> float:
        with start.use() as base:  # without the adapter that is on it now
            pairs = zip(_weights(model), _weights(base), strict=True)
            return sum((a - b.to(a)).double().square().sum().item() for a, b in pairs) ** 0.5

    return Checkpoint(label, step, use, distance)

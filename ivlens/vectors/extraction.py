"""Making vectors from heads' mean outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ivlens import __version__
from ivlens.models.backends import backend_of
from ivlens.models.head import Head
from ivlens.patching.effects import HeadEffects
from ivlens.patching.heads import HeadMeans, read_heads
from ivlens.tasks.counterfactuals import counterfactual
from ivlens.tasks.prompts import Prompt, build_prompts
from ivlens.tasks.task import Task
from ivlens.vectors.vector import RESIDUAL, InstructionVector

__all__ = ["WAYS", "extract_vector", "vector_from_heads"]

WAYS = ("heads", "difference", "residual")


@torch.no_grad()
def vector_from_heads(
    model: Any,
    outputs: Float[Tensor, "layer head d_head"] | HeadMeans,
    heads: Sequence[Head | tuple[int, int]],
    **metadata: Any,
) -> InstructionVector:
    """θ = Σ z̄[l, h] · W_O[l, h] over `heads`, without output biases (IV §3), as it's added to the residual stream.

    Adapters on the projection count. Where a norm follows the attention (Gemma 2 and 3, OLMo 2) shares go through it, with its
    scale as it is on the prompts, on average; the vector's metadata holds it (`norm_scales`, by layer).

    Parameters
    ----------
    outputs
        Mean outputs, as of `mean_head_outputs` (then the norm's scale is that of the mean), or what `read_heads` gives.
    """
    backend = backend_of(model)
    heads = tuple(sorted({backend.check_head(*head) for head in heads}))
    if not heads:
        raise ValueError("no heads given; pass some, such as effects.top(10)")
    layers = sorted({h.layer for h in heads})
    if isinstance(outputs, HeadMeans):
        means, scales = outputs.z, {layer: outputs.norm_scales[layer].item() for layer in layers}
    else:
        means, scales = outputs, {layer: backend.norm_scales(layer, outputs[None, layer]).item() for layer in layers}
    by_layer = {layer: backend.head_shares(layer, means[layer], scales[layer]) for layer in layers}
    shares = torch.stack([by_layer[h.layer][h.head].float().cpu() for h in heads]).clone()
    normed = {str(layer): scale for layer, scale in scales.items() if backend.post_norm(layer) is not None}
    about = {
        "model": backend.name,
        "signature": backend.signature,
        "hook": "attn.hook_z · W_O",
        "unit": RESIDUAL,
        **({"norm_scales": normed} if normed else {}),
        **metadata,
        **_versions(),
    }
    return InstructionVector(shares.sum(0), heads, shares, metadata=about)


def extract_vector(
    model: Any,
    task: Task | Sequence[Prompt],
    heads: Sequence[Head | tuple[int, int]] | HeadEffects | None = None,
    *,
    way: str = "heads",
    layer: int | None = None,
    shots: int = 10,
    instruction: bool | str | int = False,
    style: str = "qa",
    template: Mapping[str, Any] | None = None,
    n_prompts: int = 50,
    only_correct: bool = False,
    seed: int = 0,
    batch_size: int | None = None,
    progress: bool = False,
) -> InstructionVector:
    """The instruction vector of a task: the heads' mean outputs over prompts that state it, summed (IV §3).

    Parameters
    ----------
    model
        A hooked model, such as `load_model` gives.
    task
        A task (training split), or your own list of `Prompt`.
    heads
        The instruction heads, or `HeadEffects` to take its ten best. None for `way="residual"`.
    way
        `heads`: the paper's. `difference`: the same, minus that of the same queries without instruction and demonstrations (our
        choice). `residual`: the difference of mean residual streams after `layer`, with minus without (arXiv 2410.12877 §3).
    layer
        Where a residual difference is taken, and injected.
    shots, instruction, style, template
        How the prompts look; see `build_prompts`.
    n_prompts
        Prompts per task, over which the mean is taken.
    only_correct
        Count only prompts whose answer's first token the model ranks first.
    seed
        Of all that is drawn at random; global random states are left alone.
    batch_size
        Prompts per forward pass; None for as many as there is room for. Halved where memory runs out.
    progress
        Show a progress bar.
    """
    if way not in WAYS:
        raise ValueError(f"way={way!r} is unknown; choose one of {', '.join(WAYS)}")
    if (heads is None) != (way == "residual") or (layer is None) == (way == "residual"):
        needs = "layer=, and no heads" if way == "residual" else "heads, such as effects.top(10), and no layer="
        raise ValueError(f"way={way!r} needs {needs}")
    heads = heads.top(10) if isinstance(heads, HeadEffects) else heads
    if isinstance(task, Task):
        look: dict[str, Any] = {"shots": shots, "instruction": instruction, "style": style, "seed": seed}
        look |= {"template": dict(template)} if template else {}
        prompts = build_prompts(task, n=n_prompts, split="train", repeat=True, **look)
        about = {"n_prompts": n_prompts, **look, "task": task.name}
    else:
        prompts = list(task)
        about = {"n_prompts": len(prompts), "task": prompts[0].task if prompts else ""}
    about |= {"only_correct": only_correct, "way": way}
    if prompts and prompts[0].query.check:
        about["positions"] = "generated"  # the form of an answer is decided all along it
    untold = None if way == "heads" else counterfactual(prompts, "no_instruction")
    if prompts and untold == prompts:
        raise ValueError(f"way={way!r} of prompts that state no task is zero; pass instruction=True or shots=10")
    options: dict[str, Any] = {"resid": True, "batch_size": batch_size, "progress": progress}
    read = read_heads(model, prompts, only_correct=only_correct, **options)
    bare = None if untold is None else read_heads(model, [untold[i] for i in read.which], **options)
    if way == "residual":
        backend = backend_of(model)
        layer = backend.check_layer(layer)
        about |= {"model": backend.name, "signature": backend.signature, "unit": RESIDUAL, **_versions()}
        vector = InstructionVector(read.resid[layer] - bare.resid[layer], layer=layer)
    else:
        vector = vector_from_heads(model, read, heads, **about)
        if bare is not None:
            vector, about = vector - vector_from_heads(model, bare, heads, **about), vector.metadata
        else:
            about = vector.metadata
    unit = vector.vector / vector.norm() if vector.norm() else vector.vector
    projections = (read.resid @ unit).tolist()  # by layer, for how="set"
    return replace(vector, metadata={**about, "projections": projections})


def _versions() -> dict[str, str]:
    return {"ivlens": __version__, "transformer_lens": version("transformer-lens"), "torch": torch.__version__}

"""A constant added after layers, in weights that plain transformers and peft load: a bias of what the feed-forward writes."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ivlens.models.adapters import WEIGHTS, adapter_layers, more_than_lora
from ivlens.models.backend import Backend
from ivlens.models.comparison import evaluating
from ivlens.models.hooking import check_in_memory

__all__ = ["save_adapter_with_biases", "save_model_with_biases"]

Additions = Mapping[int, Float[Tensor, " d_model"]]
OTHERWISE = "serve it with format='llama.cpp', 'vllm' or 'easysteer'"


def save_model_with_biases(backend: Backend, additions: Additions, path: Path) -> None:
    """A folder with the whole model, its tokenizer, and the constants as biases.

    Raises
    ------
    ValueError
        If the architecture has no such bias and no `mlp_bias` in its config, or an adapter is on the model.
    """
    hf_model, projections = _projections(backend, additions)
    if _in_use(hf_model):
        said = f"{backend.name} has an adapter on it, which a whole model doesn't keep apart"
        raise ValueError(f"{said}; write format='peft', or merge it (merge_and_unload) and load the merged model")
    if getattr(hf_model, "is_quantized", False):
        raise ValueError(f"the weights of {backend.name} are quantised; write format='peft', or load it unquantised")
    check_in_memory(hf_model, backend.name, "written")
    config = copy.deepcopy(hf_model.config)
    if lacking := [name for name, module, _ in projections if module.bias is None]:
        if getattr(config, "mlp_bias", None) is not False:
            said = f"{config.model_type} has no bias in {lacking[0]}, and none that its config switches on"
            raise ValueError(f"{said}; write format='peft', whose adapter carries one")
        config.mlp_bias = True
    with torch.device("meta"):
        whole = type(hf_model)(config)
    own, state = {_plain(name): weight for name, weight in hf_model.state_dict().items()}, dict[str, Tensor]()
    for name, empty in whole.state_dict().items():
        if name in own:
            state[name] = own[name]
        elif lacking and ".mlp." in name and name.endswith(".bias"):
            state[name] = torch.zeros(empty.shape, dtype=hf_model.dtype, device=backend.device)
        else:
            raise ValueError(f"hooked, {backend.name} has no {name}, so it can't be written whole; write format='peft'")
    for name, _, bias in projections:
        state[f"{name}.bias"] = state[f"{name}.bias"] + bias.to(state[f"{name}.bias"])
    whole.load_state_dict(state, assign=True)
    whole.tie_weights()
    whole.generation_config = hf_model.generation_config
    whole.save_pretrained(path)
    backend.tokenizer.save_pretrained(path)


def save_adapter_with_biases(backend: Backend, additions: Additions, path: Path) -> None:
    """A folder with an adapter: the LoRA that is in use on the model, if any, and the constants as biases of its B.

    Raises
    ------
    ValueError
        If the adapter is another kind than plain LoRA, or was merged when the model was loaded.
    """
    from peft import LoraConfig
    from safetensors.torch import save_file

    hf_model, projections = _projections(backend, additions)
    if getattr(hf_model, "merged_adapter", False):
        said = f"the adapter of {backend.name} was merged on loading, and would be missing from this one"
        raise ValueError(f"{said}; write format='transformers', which keeps the merged weights")
    plain = {"r": 1, "lora_alpha": 1, "task_type": "CAUSAL_LM"}
    config = LoraConfig(**plain, base_model_name_or_path=hf_model.config._name_or_path)
    parts: dict[str, Tensor] = {}
    if adapters := _in_use(hf_model):
        config = copy.deepcopy(hf_model.peft_config[adapters[0]])
        parts = _parts_of(hf_model, adapters, config)
    rank, scaling = config.r, config.lora_alpha / (config.r**0.5 if config.use_rslora else config.r)
    for name, module, bias in projections:
        parts.setdefault(f"{name}.lora_A.weight", torch.zeros(rank, _inputs(module)))
        parts.setdefault(f"{name}.lora_B.weight", torch.zeros(len(bias), rank))
        parts[f"{name}.lora_B.bias"] = bias / scaling
    # Modules by their whole names: no pattern is left that could mean another one.
    config.target_modules = sorted({name.rsplit(".", 2)[0] for name in parts})
    config.layers_to_transform = config.layers_pattern = config.exclude_modules = None
    config.lora_bias, config.init_lora_weights, config.inference_mode = True, True, True
    config.fan_in_fan_out |= any(type(module).__name__ == "Conv1D" for _, module, _ in projections)
    config.save_pretrained(str(path))
    weights = {f"base_model.model.{name}": x.detach().cpu().contiguous() for name, x in parts.items()}
    save_file(weights, str(path / WEIGHTS), {"format": "pt"})


def _in_use(hf_model: Any) -> list[str]:
    """Adapters that act."""
    layers = [x for x in adapter_layers(hf_model).values() if not x.disable_adapters]
    return sorted({name for layer in layers for name in layer.active_adapters})


def _parts_of(hf_model: Any, adapters: list[str], config: Any) -> dict[str, Tensor]:
    """A and B of the one LoRA adapter in use, with biases of 0."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    more = ["several adapters at once"] if len(adapters) > 1 else more_than_lora(config)
    names, found = _names(hf_model), dict[str, Tensor]()
    for layer in (x for x in hf_model.modules() if isinstance(x, BaseTunerLayer)):
        name = names.get(id(layer), "a part that the bridge cuts up")
        if adapters[0] in layer.lora_A and id(layer) in names:
            b = layer.lora_B[adapters[0]].weight
            found[f"{name}.lora_A.weight"] = layer.lora_A[adapters[0]].weight
            found |= {f"{name}.lora_B.weight": b, f"{name}.lora_B.bias": b.new_zeros(len(b))}
        elif adapters[0] in layer.active_adapters:
            more = [*more, f"LoRA on {name}"]
    if more:
        said = f"the model has {', '.join(more)}, beside which an adapter has no bias"
        raise ValueError(f"{said}; merge it (merge_and_unload) and load the merged model")
    return found


def _projections(
    backend: Backend, additions: Additions
) -> tuple[Any, list[tuple[str, Any, Float[Tensor, " d_model"]]]]:
    """The Hugging Face model, and for each layer the projection that its feed-forward ends with, by its plain name, and the bias."""
    hf_model = getattr(backend.model, "original_model", None)
    if hf_model is None:
        said = f"{backend.name} is a HookedTransformer, whose weights aren't as transformers has them"
        raise ValueError(f"{said}; load it with load_model(..., backend='bridge')")
    names, found = _names(hf_model), []
    for layer, addition in additions.items():
        out = getattr(getattr(backend.model.blocks[layer], "mlp", None), "out", None)
        module = getattr(out, "original_component", None)
        if id(module) not in names or not hasattr(module, "weight"):
            said = (
                f"layer {layer} of {backend.name} has no one projection that its feed-forward ends with (experts, say)"
            )
            raise ValueError(f"{said}, so a bias can't stand for the vector; {OTHERWISE}")
        found.append((names[id(module)], module, (addition / backend.residual_multiplier).float().cpu()))
    _check_exact(backend, additions, found)
    return hf_model, found


@torch.no_grad()
def _check_exact(backend: Backend, additions: Additions, projections: list[tuple[str, Any, Tensor]]) -> None:
    """Raise ValueError where biases don't do what adding after the layers does: a norm follows them, say."""
    tokens = torch.arange(1, 13, device=backend.device)[None] % backend.d_vocab

    def logits(hooks: list[tuple[str, Any]]) -> Tensor:
        with evaluating(backend.model, backend.model.original_model), backend.model.hooks(fwd_hooks=hooks):
            return backend.forward(tokens, torch.ones_like(tokens), keep=tokens.shape[1])

    wanted = logits([(backend.resid_hook(n), lambda x, hook, v=v: x + v.to(x)) for n, v in additions.items()])
    with ExitStack() as stack:
        for _, module, bias in projections:
            handle = module.register_forward_hook(lambda module, args, out, bias=bias: out + bias.to(out))
            stack.callback(handle.remove)
        found = logits([])
    most = (1e-4 if wanted.dtype == torch.float32 else 0.05) * wanted.abs().max()
    if not (found - wanted).abs().max() <= most:
        said = f"in {backend.name}, a bias of {projections[0][0]} isn't what is added after the layer: a norm may follow it"
        raise ValueError(f"{said}, as in Gemma 2 and 3 and OLMo 2; {OTHERWISE}")


def _plain(name: str) -> str:
    """Without the modules that the bridge and peft put in between."""
    return name.replace("._original_component", "").replace(".base_layer", "")


def _names(hf_model: Any) -> dict[int, str]:
    """What transformers calls modules, by their id: the bridge adds paths of its own, and peft passes over names it doesn't know."""
    with torch.device("meta"):
        known = dict(type(hf_model)(copy.deepcopy(hf_model.config)).named_modules())
    every = ((_plain(name), module) for name, module in hf_model.named_modules(remove_duplicate=False))
    return {id(module): name for name, module in every if name in known}


def _inputs(module: Any) -> int:
    """How wide what a projection reads is, of GPT-2's Conv1D too."""
    return getattr(module, "in_features", None) or module.weight.shape[0]

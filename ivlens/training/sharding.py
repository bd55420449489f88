"""Which models, and which ways of spreading them over processes, training is served under, and the whole of what is spread."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from ivlens.training.methods import Method

__all__ = ["check_guided", "check_sharding", "learns_prompts", "whole_weights"]

NEEDS_WHOLE = {"penalty", "trained weights"}  # what a method may do that asks for every weight in one piece


def check_sharding(trainer: Any, method: Method | None = None) -> None:
    """Raise ValueError where a model is spread in a way in which it would be trained or saved wrongly."""
    from accelerate.utils import DistributedType

    accelerator, whole = trainer.accelerator, "use version 2 of FSDP (fsdp_version: 2), or plain data parallelism"
    kind = accelerator.distributed_type
    if kind in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise ValueError(
            f"training under {kind.value} isn't served here: its weights are spread unlike torch's; {whole}"
        )
    if kind != DistributedType.FSDP:
        return
    if not accelerator.is_fsdp2:
        raise ValueError(
            f"version 1 of FSDP flattens the weights, among which hooks and adapters are no longer found; {whole}"
        )
    if method is not None and (parts := [part for part in method.parts if part.changes & NEEDS_WHOLE]):
        said = f"{parts[0]!r} looks at every weight in training, and FSDP leaves each process a part of them"
        raise ValueError(f"{said}; train with it under plain data parallelism, or take another method")


def check_guided(trainer: Any) -> None:
    """`check_sharding`, and raise ValueError where one process would spread rows over several GPUs, or the loss isn't that of the rows."""
    if trainer.args.n_gpu > 1:
        there = f"{trainer.args.n_gpu} GPUs are visible to one process, which guided training doesn't split over"
        raise ValueError(f"{there}; start it with `accelerate launch`, or set CUDA_VISIBLE_DEVICES to one of them")
    if learns_prompts(trainer.model):
        there = (
            "an adapter that puts tokens of its own before the prompt moves the positions that guided training counts"
        )
        raise ValueError(f"{there}; take LoRA, or train without guidance")
    if trainer.args.label_smoothing_factor:
        raise ValueError(
            "label_smoothing_factor isn't part of the guided loss; leave it out, or train without guidance"
        )
    check_sharding(trainer)


def learns_prompts(model: Any) -> bool:
    """Whether an adapter of peft puts tokens of its own before every prompt, as prompt and prefix tuning do."""
    return any(config.is_prompt_learning for config in getattr(model, "peft_config", {}).values())


def whole_weights(trainer: Any) -> dict[str, Tensor] | None:
    """Of a model that FSDP has spread, all weights, in the main process; called in every one. None where nothing is spread."""
    accelerator = trainer.accelerator
    return accelerator.get_state_dict(trainer.model) if getattr(accelerator, "is_fsdp2", False) else None

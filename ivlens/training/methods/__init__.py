"""Ways to train a stage, by name: plain LoRA, those that people use against forgetting, and guided training."""

from __future__ import annotations

from ivlens.common.hints import hint
from ivlens.training.methods.averaging import Averaging
from ivlens.training.methods.ewc import EWC
from ivlens.training.methods.guided import Guided
from ivlens.training.methods.lora import FreshLoRA, SequentialLoRA
from ivlens.training.methods.lwf import LwF
from ivlens.training.methods.method import Method, Stage
from ivlens.training.methods.o_lora import OLoRA
from ivlens.training.methods.replay import Replay

__all__ = ["EWC", "METHODS", "Averaging", "FreshLoRA", "Guided", "LwF", "Method", "OLoRA", "Replay"]
__all__ += ["SequentialLoRA", "Stage", "as_method"]

METHODS: dict[str, Method] = {
    "lora": SequentialLoRA(),
    "fresh_lora": FreshLoRA(),
    "ewc": EWC(),
    "lwf": LwF(),
    "replay": Replay(),
    "o_lora": OLoRA(),
    "averaging": Averaging(),
    "iv": Guided("paper"),
    "fvg": Guided("fvg-code"),
}


def as_method(method: str | Method) -> Method:
    """A method by its name, or as it is.

    Raises
    ------
    ValueError
        If the name is unknown; the message suggests near ones.
    """
    if isinstance(method, Method):
        return method
    if method not in METHODS:
        raise ValueError(f"method={method!r} is unknown; {hint(method, METHODS)}")
    return METHODS[method]

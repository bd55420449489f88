"""Fine-tuning on a task's answers, by the methods in `methods/`: plain, protected, or guided by instruction vectors."""

from ivlens.training.finetune import fine_tune
from ivlens.training.guidance import KL, Guidance, SplitKL
from ivlens.training.run import TrainingRun

__all__ = ["KL", "METHODS", "Guidance", "SplitKL", "TrainingRun", "fine_tune"]


def __getattr__(name: str):
    if name == "METHODS":  # loads transformers' Trainer
        from ivlens.training.methods import METHODS

        return METHODS
    raise AttributeError(f"module 'ivlens.training' has no attribute {name!r}")

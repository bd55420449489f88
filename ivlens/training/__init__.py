"""Fine-tuning on a task's answers, plainly and guided by instruction vectors."""

from ivlens.training.finetune import TrainingRun, fine_tune
from ivlens.training.guidance import KL, Guidance

__all__ = ["KL", "Guidance", "TrainingRun", "fine_tune"]

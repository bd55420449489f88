"""Fine-tuning on a task's answers."""

from ivlens.training.finetune import TrainingRun, fine_tune

__all__ = ["TrainingRun", "fine_tune"]

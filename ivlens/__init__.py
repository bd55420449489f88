"""ivlens: find, extract, inject and follow the instruction vectors of language models, on TransformerLens.

Implements arXiv 2406.12227, "Interpretable Catastrophic Forgetting of Large Language Model Fine-tuning via Instruction Vector".
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

# In the order a user meets them; each is imported when first used, so that `import ivlens` costs nothing.
_HOME = {
    "load_model": "ivlens.models.loading",
    "Task": "ivlens.tasks.task",
    "Example": "ivlens.tasks.task",
    "TaskSuite": "ivlens.tasks.suite",
    "load_tasks": "ivlens.tasks.suite",
    "Prompt": "ivlens.tasks.prompts",
    "build_prompts": "ivlens.tasks.prompts",
    "locate_heads": "ivlens.patching.locating",
    "HeadEffects": "ivlens.patching.effects",
    "Head": "ivlens.models.head",
    "extract_vector": "ivlens.vectors.extraction",
    "InstructionVector": "ivlens.vectors.vector",
    "inject": "ivlens.steering.inject",
    "generate": "ivlens.steering.generate",
    "tune_injection": "ivlens.steering.tuning",
    "evaluate": "ivlens.steering.evaluation",
    "Evaluation": "ivlens.steering.evaluation",
    "AnswerProbabilities": "ivlens.dynamics.probabilities",
    "answer_probabilities": "ivlens.dynamics.probabilities",
    "compare_probabilities": "ivlens.dynamics.probabilities",
    "fine_tune": "ivlens.training.finetune",
    "TrainingRun": "ivlens.training.run",
    "compare": "ivlens.dynamics.tracking",
    "track": "ivlens.dynamics.tracking",
    "Change": "ivlens.dynamics.change",
    "recover": "ivlens.dynamics.restoring",
    "Recovery": "ivlens.dynamics.recovery",
    "IVTrainer": "ivlens.training.trainer",
    "Guidance": "ivlens.training.guidance",
    "Section": "ivlens.report",
    "write_report": "ivlens.report",
    "passes": "ivlens.tasks.checks",
    "register_check": "ivlens.tasks.checks",
    "with_own_answers": "ivlens.running.answers",
    "Generations": "ivlens.steering.generate",
    "Gate": "ivlens.steering.gate",
    "fit_gate": "ivlens.steering.gate",
}

ROOMS = (
    "models",
    "tasks",
    "running",
    "patching",
    "vectors",
    "steering",
    "dynamics",
    "training",
    "continual",
    "plots",
    "report",
)

__all__ = [*_HOME, "continual", "patching", "__version__"]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    if name in ROOMS:
        return importlib.import_module(f"ivlens.{name}")
    raise AttributeError(f"module 'ivlens' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)

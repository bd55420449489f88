"""Learning without forgetting."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ivlens.training.guidance import KL, Guidance
from ivlens.training.methods.method import Method
from ivlens.training.methods.stage import Stage

if TYPE_CHECKING:
    from transformers import Trainer

__all__ = ["LwF"]


@dataclass(frozen=True)
class LwF(Method):
    """Learning without forgetting (arXiv 1606.09282): the model before the stage teaches it on the new task's own prompts.

    The same divergence as in guided training, without a vector in the teacher.

    Attributes
    ----------
    weight, temperature
        λ and T; T = 2 as in the paper.
    shots
        With demonstrations in the teacher's prompts it is self-distillation from these (arXiv 2601.19897, on the task's answers
        instead of sampled ones).
    """

    changes: ClassVar[frozenset[str]] = frozenset({"loss"})
    weight: float = 1.0
    temperature: float = 2.0
    shots: int = 0

    @property
    def guidance(self) -> Guidance:
        kl = (KL(weight=self.weight, temperature=self.temperature),)
        return Guidance(progressive=False, kl=kl, shots=self.shots)

    @property
    def teacher_shots(self) -> int:
        return self.shots

    def __post_init__(self) -> None:
        self.guidance  # noqa: B018 - raises where an option is out of range

    def loss(self, stage: Stage) -> tuple[type[Trainer], dict[str, Any]]:
        from ivlens.training.trainer import IVTrainer

        return IVTrainer, {"vectors": None, "guidance": self.guidance}

"""What guides training: which terms, how strong, and the presets of the paper and of the follow-up's code."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

__all__ = ["KL", "PRESETS", "Guidance", "SplitKL", "checked_guidance"]

DIRECTIONS = ("teacher_student", "student_teacher")
POSITIONS = ("answer", "last", "all")
SCHEDULES = ("linear", "cosine", "constant")
GATES = ("right", "probability", "none")
SITES = ("residual", "attention")


def _check(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name}={value!r} is unknown; choose one of {', '.join(known)}")


@dataclass(frozen=True)
class KL:
    """A divergence from the steered teacher.

    Attributes
    ----------
    positions
        `answer`: those that predict answer tokens; `last`: the last prompt token; `all`: every real token.
    weight
        λ of this term, times the mean over its positions.
    direction, temperature
        See `losses.kl_divergence`.
    least
        Counted only above this value (FVG's code), in each part of a batch that is split.
    """

    positions: str = "answer"
    weight: float = 1.0
    direction: str = "teacher_student"
    temperature: float = 1.0
    least: float = 0.0

    def __post_init__(self) -> None:
        _check("positions", self.positions, POSITIONS)
        _check("direction", self.direction, DIRECTIONS)
        if self.weight < 0:
            raise ValueError(f"weight={self.weight} is negative; a divergence is only ever made smaller: use 0 or more")
        if self.temperature <= 0:
            raise ValueError(f"temperature={self.temperature} must be above 0")


@dataclass(frozen=True)
class SplitKL:
    """A divergence from the steered teacher, split at the right token y, over the positions that predict answer tokens:

    λ₁ (1 − p_T(y)) KL(p̃_T ‖ p̃_S) + λ₂ g KL(b_T ‖ b_S), p̃ being a distribution without y and b = (p(y), 1 − p(y)). With λ₁ = λ₂ and
    g = 1 that is KL(p_T ‖ p_S) (decoupled distillation, arXiv 2203.08679). The first part never moves p_S(y); the gate g on the
    second keeps a teacher that doesn't know the task from pulling it down (our choice; cf. arXiv 2402.13669).

    Attributes
    ----------
    others, right
        λ₁ and λ₂.
    gate
        g: 1 where the teacher ranks y first and else 0 (`right`), p_T(y) (`probability`), or 1 (`none`).
    """

    others: float = 1.0
    right: float = 1.0
    gate: str = "right"
    positions: ClassVar[str] = "answer"
    temperature: ClassVar[float] = 1.0

    def __post_init__(self) -> None:
        _check("gate", self.gate, GATES)
        if self.others < 0 or self.right < 0:
            raise ValueError(f"others={self.others} and right={self.right} must be 0 or more")

    @property
    def weight(self) -> float:
        return max(self.others, self.right)


@dataclass(frozen=True)
class Guidance:
    """How instruction vectors guide training (IV; FVG).

    Attributes
    ----------
    progressive
        Inject α(t) · θ into the model in training, α fading from 1 to 0 (IV).
    schedule, until
        How it fades (`linear` or `cosine`), to zero at this fraction of the steps (our choice); `constant` doesn't (arXiv
        2507.21509): the vector stays on throughout, and is left out afterwards.
    kl
        Divergences from the teacher: the model before training, with θ injected. The student's is without injection.
    shots, steered
        What the teacher is shown: so many demonstrations before each question (arXiv 2601.19897; 0: what the student is), and θ.
    heads_weight, heads_least
        λ of head consistency, counted only above `heads_least` (FVG; off at 0).
    layer, scale
        Where and how strongly θ enters; None: the vector's own, else, a third of the depth down (site `residual`) or 9/32 of
        it (site `attention`).
    site
        `residual`: the residual stream after the layer; `attention`: its attention's output.
    """

    progressive: bool = True
    schedule: str = "linear"
    until: float = 0.5
    kl: tuple[KL | SplitKL, ...] = (KL(),)
    shots: int = 0
    steered: bool = True
    heads_weight: float = 0.0
    heads_least: float = 0.0
    layer: int | None = None
    scale: float | None = None
    site: str = "residual"

    def __post_init__(self) -> None:
        _check("schedule", self.schedule, SCHEDULES)
        _check("site", self.site, SITES)
        if not 0 < self.until <= 1:
            meant = "the fraction of the steps after which nothing is injected"
            raise ValueError(f"until={self.until} is outside (0, 1]: {meant}")
        if self.shots < 0:
            raise ValueError(f"shots={self.shots} is negative; use 0 or more demonstrations")
        if self.shots and any(term.positions == "all" for term in self.kl):
            raise ValueError(
                f"shots={self.shots}: the teacher's prompts are others, so use positions 'answer' or 'last'"
            )
        if self.heads_weight < 0:
            raise ValueError(f"heads_weight={self.heads_weight} is negative; use 0 or more")

    @property
    def needs_teacher(self) -> bool:
        return bool(self.heads_weight) or any(term.weight for term in self.kl)

    def check_data(self, columns: Sequence[str]) -> None:
        """Raise ValueError where the teacher is to be shown demonstrations and the data's `columns` have none for it."""
        if self.shots and "teacher_ids" not in columns:
            there = f"shots={self.shots}, but the data hold no prompts for the teacher"
            raise ValueError(f"{there}; build them with answer_dataset(..., teacher=[...]), or use fine_tune")

    def strength(self, step: int, steps: int) -> float:
        """α at `step`, from 0, of so many `steps`.

        Examples
        --------
        >>> [Guidance(until=0.5).strength(step, 8) for step in range(6)]
        [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]
        """
        if not self.progressive:
            return 0.0
        if self.schedule == "constant":
            return 1.0
        done = min(step / (self.until * steps), 1.0)
        return 1.0 - done if self.schedule == "linear" else (1 + math.cos(math.pi * done)) / 2


_FVG_KL = {"direction": "student_teacher", "temperature": 2.0, "least": 0.1}
_FVG = {"kl": (KL("last", 20.0, **_FVG_KL), KL("all", 0.1, **_FVG_KL)), "heads_weight": 1.0, "heads_least": 0.01}
PRESETS = {"paper": Guidance(), "fvg-code": Guidance(progressive=False, site="attention", **_FVG)}


def checked_guidance(guidance: str | Guidance, vectors: Any, keep: int | str | None) -> Guidance:
    """The guidance meant, by a preset's name or itself, which must go with the other arguments."""
    if isinstance(guidance, str):
        if guidance not in PRESETS:
            known = ", ".join(PRESETS)
            raise ValueError(f"guidance={guidance!r} is unknown; choose one of {known}, or pass a Guidance")
        guidance = PRESETS[guidance]
    if vectors is None and (guidance.progressive or guidance.heads_weight):
        nothing = "vectors=None leaves nothing to inject and no heads to compare"
        raise ValueError(f"{nothing}; pass the vectors, or Guidance(progressive=False, heads_weight=0)")
    if guidance.shots and keep is None:
        raise ValueError(
            f"shots={guidance.shots} needs keep_teacher, a number of tokens or 'full': the teacher is asked once"
        )
    whole = isinstance(keep, int) and not isinstance(keep, bool) and keep > 0
    if not (keep is None or keep == "full" or whole):
        raise ValueError(f"keep_teacher={keep!r} must be a number of tokens above 0, 'full', or None to keep nothing")
    if any(isinstance(term, SplitKL) for term in guidance.kl) and keep is not None and keep != "full" and keep < 2:
        raise ValueError(f"keep_teacher={keep!r} leaves no token beside the right one; keep two or more, or None")
    if keep is not None and len({term.temperature for term in guidance.kl}) > 1:
        raise ValueError("keep_teacher needs one temperature for all divergences; pass keep_teacher=None")
    return guidance

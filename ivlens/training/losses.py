"""The terms of the guided loss as plain functions of tensors; padding never counts."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ivlens.training.data import IGNORED

__all__ = ["answer_loss", "answer_positions", "answer_tokens", "head_consistency", "kl_divergence"]
__all__ += ["last_prompt_positions", "lm_loss"]


def answer_positions(labels: Int[Tensor, "row pos"]) -> Bool[Tensor, "row pos"]:
    """Positions whose logits predict an answer token: one before each."""
    return torch.nn.functional.pad(labels[:, 1:] != IGNORED, (0, 1), value=False)


def answer_tokens(labels: Int[Tensor, "row pos"]) -> Int[Tensor, " n"]:
    """The tokens that `answer_positions` predict, in the order of rows."""
    return labels[:, 1:][labels[:, 1:] != IGNORED]


def last_prompt_positions(labels: Int[Tensor, "row pos"]) -> Int[Tensor, " row"]:
    """Position of each row's last prompt token, whichever side the padding is on.

    Raises
    ------
    ValueError
        If a row has no answer token, or no prompt before it.
    """
    first = (labels != IGNORED).int().argmax(dim=1)
    if (labels.gather(1, first[:, None]) == IGNORED).any() or (first == 0).any():
        raise ValueError("a row has no prompt or no answer; build the data with ivlens.training.data.answer_dataset")
    return first - 1


def lm_loss(
    logits: Float[Tensor, "row pos d_vocab"], labels: Int[Tensor, "row pos"], count: Tensor | int | None = None
) -> Float[Tensor, ""]:
    """Cross-entropy of the answer tokens (nats), summed and divided by `count` (default: how many there are)."""
    return answer_loss(logits[answer_positions(labels)], labels, count)


def answer_loss(
    logits: Float[Tensor, "n d_vocab"], labels: Int[Tensor, "row pos"], count: Tensor | int | None = None
) -> Float[Tensor, ""]:
    """`lm_loss` of logits at the answer's positions only, in the order of rows."""
    targets = answer_tokens(labels)
    total = torch.nn.functional.cross_entropy(logits.float(), targets, reduction="sum")
    return total / (len(targets) if count is None else count)


def kl_divergence(
    student: Float[Tensor, "n d_vocab"],
    teacher: Float[Tensor, "n d_vocab"],
    *,
    direction: str = "teacher_student",
    temperature: float = 1.0,
) -> Float[Tensor, " n"]:
    """KL per position, in nats: KL(teacher ‖ student) (IV) or, with `student_teacher`, KL(student ‖ teacher) (FVG's code).

    Both are softened by `temperature` first; the result isn't multiplied by its square (our choice).
    """
    p, q = (x.float().div(temperature).log_softmax(-1) for x in (teacher, student))
    if direction == "student_teacher":
        p, q = q, p
    return (p.exp() * (p - q)).sum(-1)


def head_consistency(
    student: Float[Tensor, "row head d_head"], teacher: Float[Tensor, "row head d_head"]
) -> Float[Tensor, ""]:
    """Sum over heads of the mean squared distance of their outputs at the last prompt token (FVG)."""
    return (student.float() - teacher.float()).square().mean(dim=(0, 2)).sum()

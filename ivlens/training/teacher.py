"""The steered teacher, which never changes while a stage is trained: its outputs computed once per example and kept."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from ivlens.common.processes import hidden
from ivlens.common.storage import read_tensors, write_tensors
from ivlens.training.data import IGNORED
from ivlens.training.guidance import KL, SplitKL
from ivlens.training.losses import kl_divergence

__all__ = ["KeptTeacher", "TopK", "affordable", "as_before", "blank_adapters", "guided_divergence"]
__all__ += ["keep_teacher", "kept_divergence", "split_divergence"]

KIND = "teacher outputs"
LEAST = 16  # fewer tokens per position than this say too little


@dataclass(frozen=True)
class TopK:
    """Log-probabilities of the k likeliest tokens at each of n positions; what is left over counts as one more token."""

    values: Float[Tensor, "n k"]
    indices: Int[Tensor, "n k"]

    @classmethod
    def of(
        cls, logits: Float[Tensor, "n d_vocab"], k: int, temperature: float, right: Int[Tensor, " n"] | None = None
    ) -> TopK:
        """With `right`, this token is among the k; where it isn't by itself, in place of the least likely of them."""
        log_p = logits.float().div(temperature).log_softmax(-1)
        values, indices = log_p.topk(min(k, logits.shape[-1]), dim=-1)
        if right is not None:
            missing = (indices != right[:, None]).all(-1)
            indices[missing, -1] = right[missing]
            values = log_p.gather(-1, indices)
        return cls(values, indices.int())

    def __getitem__(self, where: Bool[Tensor, " n"]) -> TopK:
        return TopK(self.values[where], self.indices[where])

    def __len__(self) -> int:
        return len(self.values)


def kept_divergence(
    student: Float[Tensor, "n d_vocab"], teacher: TopK, *, direction: str, temperature: float
) -> Float[Tensor, " n"]:
    """KL over the teacher's k tokens and the remainder as one; the full KL where all tokens were kept.

    Never more than the full KL, and less by at most the remainder's part of it: p_rest · KL(rest ‖ rest), the divergence of
    the two distributions within the remainder, in the direction asked for (chain rule of the KL).
    """
    softened = student.float() / temperature if temperature != 1 else student.float()
    q = softened.gather(-1, teacher.indices.long()) - softened.logsumexp(-1, keepdim=True)
    p = teacher.values
    if p.shape[-1] < student.shape[-1]:
        rests = [1 - x.exp().sum(-1, keepdim=True) for x in (p, q)]  # kept above what float32 can tell from nothing
        p, q = (torch.cat([x, rest.clamp(min=1e-7).log()], dim=-1) for x, rest in zip((p, q), rests))
    if direction == "student_teacher":
        p, q = q, p
    return (p.exp() * (p - q)).sum(-1)


def split_divergence(
    student: Float[Tensor, "n d_vocab"], teacher: TopK | Float[Tensor, "n d_vocab"], right: Int[Tensor, " n"], gate: str
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
    """(1 − p_T(y)) KL(p̃_T ‖ p̃_S) and g KL(b_T ‖ b_S) per position, in nats; see `SplitKL`. The right token y must be kept.

    Of what is not kept, the remainder counts as one token, as in `kept_divergence`.
    """
    if isinstance(teacher, Tensor):
        everything = torch.arange(teacher.shape[-1], device=teacher.device).expand(teacher.shape)
        teacher = TopK(teacher.float().log_softmax(-1), everything)
    student, y = student.float(), right[:, None]
    here = teacher.indices == y
    known = teacher.values.masked_fill(~here, -torch.inf).logsumexp(-1)  # log p_T(y)
    others = student.scatter(-1, y, -torch.inf)
    whole, beside = student.logsumexp(-1), others.logsumexp(-1)
    unknown = torch.log1p(-known.exp().clamp(max=1 - 1e-7))  # log(1 − p_T(y))
    p = (teacher.values - unknown[:, None]).masked_fill(here, -torch.inf)
    q = (others - beside[:, None]).gather(-1, teacher.indices.long())
    if p.shape[-1] < student.shape[-1]:
        rests = [1 - x.exp().sum(-1, keepdim=True) for x in (p, q)]
        p, q = (torch.cat([x, rest.clamp(min=1e-7).log()], dim=-1) for x, rest in zip((p, q), rests))
    some = p > -torch.inf
    apart = torch.where(some, p.exp() * (p.where(some, 0.0) - q.where(some, 0.0)), 0.0).sum(-1)
    own, rest = student.gather(-1, y)[:, 0] - whole, beside - whole
    of_right = known.exp() * (known - own) + unknown.exp() * (unknown - rest)
    gates = {"right": known >= teacher.values.amax(-1), "probability": known.exp(), "none": torch.ones_like(known)}
    return unknown.exp() * apart, gates[gate] * of_right


def guided_divergence(
    term: KL | SplitKL,
    student: Float[Tensor, "n d_vocab"],
    teacher: TopK | Float[Tensor, "n d_vocab"],
    right: Int[Tensor, " n"],
) -> Float[Tensor, " n"]:
    """A term of the guided loss at each of its positions, weighted; `right` are the answer's tokens there, for a `SplitKL`."""
    if isinstance(term, SplitKL):
        others, of_right = split_divergence(student, teacher, right, term.gate)
        return term.others * others + term.right * of_right
    divergence = kept_divergence if isinstance(teacher, TopK) else kl_divergence
    each = divergence(student, teacher, direction=term.direction, temperature=term.temperature)
    return term.weight * each * (each.mean() > term.least)


@dataclass(frozen=True)
class KeptTeacher:
    """Outputs of every example: at its positions, one example after the other, and of the heads at the last prompt token."""

    top: TopK
    offsets: Int[Tensor, " example"]  # where each example's positions begin, and where the last one's end
    z: Float[Tensor, "example head d_head"] | None  # None where there are no heads to compare

    def rows(self, examples: Int[Tensor, " row"], device: torch.device) -> tuple[TopK, Tensor | None]:
        """Those of a batch, in its order."""
        index = torch.cat([torch.arange(self.offsets[i], self.offsets[i + 1]) for i in examples.tolist()])
        top = TopK(self.top.values[index].to(device), self.top.indices[index].to(device))
        return top, None if self.z is None else self.z[examples.cpu()].to(device)

    def save(self, path: Path) -> None:
        tensors = {"values": self.top.values, "indices": self.top.indices, "offsets": self.offsets}
        write_tensors(path, tensors if self.z is None else {**tensors, "z": self.z}, {"kind": KIND})

    @classmethod
    def load(cls, path: Path) -> KeptTeacher:
        tensors, _ = read_tensors(path, kind=KIND)
        return cls(TopK(tensors["values"], tensors["indices"]), tensors["offsets"], tensors.get("z"))


def keep_teacher(
    n: int,
    teach: Callable[[Sequence[int]], tuple[list[Tensor], Tensor | None]],
    *,
    k: int,
    temperature: float,
    right: Sequence[Sequence[Sequence[int]]] | None = None,
    path: Path,
    batch_size: int,
    progress: bool,
) -> KeptTeacher:
    """Ask the teacher about every example once, or read what an earlier run with the same teacher kept.

    `teach` goes from example numbers to each one's logits [position d_vocab], and the heads' outputs. `right`: tokens and labels of the
    examples, whose next tokens are then among those kept. A disk that can't take the file costs the file only: the run goes on with what
    is in memory.
    """
    if path.is_file():
        return KeptTeacher.load(path)
    values, indices, z, lengths = [], [], [], [0]
    for start in tqdm(range(0, n, batch_size), desc="teacher", disable=hidden(progress)):
        logits, heads = teach(range(start, min(start + batch_size, n)))
        for i, each in enumerate(logits, start=start):
            following = None if right is None else _next_tokens(*(x[i] for x in right), len(each)).to(each.device)
            top = TopK.of(each, k, temperature, following)
            values.append(top.values.cpu())
            indices.append(top.indices.cpu())
            lengths.append(len(top))
        if heads is not None:
            z.append(heads.float().cpu())
    top = TopK(torch.cat(values), torch.cat(indices))
    kept = KeptTeacher(top, torch.tensor(lengths).cumsum(0), torch.cat(z) if z else None)
    try:
        kept.save(path)
    except OSError as error:
        warnings.warn(f"the teacher's outputs aren't kept on disk ({error}); training goes on without", stacklevel=3)
    return kept


def _next_tokens(tokens: Sequence[int], labels: Sequence[int], positions: int) -> Int[Tensor, " n"]:
    """What follows each position: every one of a row (after the last, nothing: 0), or those that predict the answer."""
    everywhere = positions == len(tokens)
    return torch.tensor([*tokens[1:], 0] if everywhere else [x for x in labels[1:] if x != IGNORED])


def affordable(k: int, positions: int, budget: float) -> int | None:
    """Tokens per position that so many GB hold: the k asked for, fewer with a warning, or None with another."""
    fit = int(budget * 1e9) // (8 * positions)  # a float32 and an int32 each
    if fit >= k:
        return k
    needed = f"{k} tokens of the teacher at each of {positions} positions are {8e-9 * positions * k:.1f} GB"
    if fit >= LEAST:
        what = f"above teacher_budget={budget}: the {fit} likeliest are kept instead"
    else:
        what = f"and teacher_budget={budget} is too small for {LEAST}: the teacher runs in every step instead"
    warnings.warn(f"{needed}, {what}", stacklevel=3)
    return fit if fit >= LEAST else None


def blank_adapters(model: Any) -> set[str] | None:
    """The LoRA adapters in training if they still do nothing: switched off, they leave the model as it was; else None."""
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    parts = [name.split(".") for name in trained]
    if not trained or not all("lora_A" in part or "lora_B" in part for part in parts):
        return None  # every weight, or a kind of adapter whose effect can't be told from its weights
    if any("lora_B" in name.split(".") and bool(weight.any()) for name, weight in trained.items()):
        return None
    return {part[part.index(kind) + 1] for part in parts for kind in ("lora_A", "lora_B") if kind in part}


@contextmanager
def as_before(model: Any, off: set[str] = frozenset()) -> Iterator[Any]:
    """The model without dropout and without what these LoRA adapters add; others stay on."""
    from peft.tuners.lora import LoraLayer

    training, scales = model.training, []
    model.eval()
    for module in model.modules() if off else ():
        if isinstance(module, LoraLayer):
            scales += [(module.scaling, name, module.scaling[name]) for name in off & module.scaling.keys()]
    try:
        for scaling, name, _ in scales:
            scaling[name] = 0.0
        yield model
    finally:
        for scaling, name, scale in scales:
            scaling[name] = scale
        model.train(training)

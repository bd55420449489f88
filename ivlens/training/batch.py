"""Batches of guided training: rows padded, tasks and examples numbered, and which positions each loss term is over."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import DataCollatorForSeq2Seq

from ivlens.models.backend import position_ids
from ivlens.training.data import IGNORED
from ivlens.training.guidance import POSITIONS, Guidance
from ivlens.training.losses import answer_positions, last_prompt_positions

__all__ = ["Batch", "Collator", "as_teacher", "count_positions", "kept_positions"]

COLUMNS = ("input_ids", "attention_mask", "labels", "example")


class Collator(DataCollatorForSeq2Seq):
    """Pads on `side`, so that what a batch gives doesn't depend on the tokenizer's own: on the right, where positions are those
    of the tokens anyway, or, where a model is told its positions (`positioned`), on the left. Tasks become their numbers."""

    def __init__(self, tokenizer: Any, tasks: Sequence[str] = (), side: str = "right", *, positioned: bool = False):
        tokenizer = copy.copy(tokenizer)  # the user's keeps its side
        tokenizer.padding_side = side
        super().__init__(tokenizer, padding=True, label_pad_token_id=IGNORED)
        self.tasks, self.positioned = list(tasks), positioned

    def __call__(self, features: list[dict[str, Any]], return_tensors: str | None = None) -> Any:
        rows = [{name: row[name] for name in COLUMNS if name in row} for row in features]
        batch = super().__call__(rows, return_tensors)
        if "example" in batch:  # of the training data; others are only scored
            batch["task"] = torch.tensor([self.tasks.index(row["task"]) for row in features])
        if self.positioned:
            batch["position_ids"] = position_ids(batch["attention_mask"])
        return batch


def as_teacher(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of the data as its teacher is asked: other prompts where it has any, and the same answer."""
    ids = row.get("teacher_ids") or row["input_ids"]
    answer = [label for label in row["labels"] if label != IGNORED]
    labels = [IGNORED] * (len(ids) - len(answer)) + answer
    return {**row, "input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}


@dataclass(frozen=True)
class Batch:
    """What the collator gives, sorted.

    `where` says which positions each divergence is over, by name, and at which ones a teacher is `kept`: all that any needs.
    """

    inputs: dict[str, Tensor]  # what a model takes
    labels: Int[Tensor, "row pos"]
    tasks: Int[Tensor, " row"]
    examples: Int[Tensor, " row"]
    last: Int[Tensor, " row"]  # position of the last prompt token
    where: dict[str, Bool[Tensor, "row pos"]]

    @classmethod
    def of(cls, collated: Mapping[str, Tensor], guidance: Guidance, *, positioned: bool) -> Batch:
        """With positions counted from the first real token where the model takes them, also where padding is on the left."""
        inputs = dict(collated)
        labels, tasks, examples = (inputs.pop(key) for key in ("labels", "task", "example"))
        last = last_prompt_positions(labels)
        where = {"answer": answer_positions(labels), "all": inputs["attention_mask"].bool()}
        where["last"] = torch.zeros_like(where["all"]).scatter(1, last[:, None], True)
        where["kept"] = where[_kept(guidance)]
        if positioned:
            inputs["position_ids"] = position_ids(inputs["attention_mask"])
        return cls(inputs, labels, tasks, examples, last, where)


def count_positions(collated: Iterable[Mapping[str, Tensor]], device: torch.device) -> Int[Tensor, " kind"]:
    """How many positions of each kind in `POSITIONS` there are in batches together."""
    counts = {kind: torch.zeros((), dtype=torch.long, device=device) for kind in POSITIONS}
    for each in collated:
        counts["answer"] += (each["labels"][:, 1:] != IGNORED).sum().to(device)
        counts["last"] += len(each["labels"])
        counts["all"] += each["attention_mask"].sum().to(device)
    return torch.stack([counts[kind] for kind in POSITIONS])


def kept_positions(labels: Iterable[list[int]], guidance: Guidance) -> int:
    """At how many positions a teacher is kept, in rows with these labels."""
    everything = _kept(guidance) == "all"
    return sum(len(row) if everything else sum(label != IGNORED for label in row) for row in labels)


def _kept(guidance: Guidance) -> str:
    return "all" if any(term.positions == "all" for term in guidance.kl) else "answer"

"""`IVTrainer`: fine-tuning guided by instruction vectors, so that other skills are not overlaid."""

from __future__ import annotations

import copy
import hashlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DataCollatorForSeq2Seq, Trainer

from ivlens.models.backends import weights_fingerprint
from ivlens.training.data import IGNORED
from ivlens.training.guidance import KL, PRESETS, Guidance
from ivlens.training.hooks import TrainingHooks
from ivlens.training.losses import answer_positions, head_consistency, kl_divergence, last_prompt_positions, lm_loss
from ivlens.training.teacher import KeptTeacher, TopK, keep_teacher, kept_divergence
from ivlens.vectors import InstructionVector

__all__ = ["IVTrainer"]


class IVTrainer(Trainer):
    """A `transformers.Trainer` whose loss is ℓ_LM + λ_kl · ℓ_KL + λ_heads · ℓ_heads (IV §6; FVG).

    Parameters
    ----------
    model
        A PEFT model, whose adapters disabled are the teacher, or a Hugging Face model, of which a frozen copy is.
    vectors
        The instruction vector of every task in the data.
    guidance
        `"paper"`, `"fvg-code"`, or a `Guidance`.
    train_dataset
        With the columns of `ivlens.training.data.answer_dataset`.
    keep_teacher
        How many of the teacher's likeliest tokens are kept per position (the rest counts as one), computed once before
        training and kept in the output folder; None runs the teacher in every step. Default: 256.

    Notes
    -----
    While the injection fades, each step runs every row twice: with it for ℓ_LM, without it for ℓ_KL. The terms are logged as
    `lm_loss`, `kl_loss` and `heads_loss`. Rows may be padded on either side.

    Raises
    ------
    ValueError
        If a task has no vector, a vector belongs to a model of another width, or a preset is unknown.
    """

    def __init__(
        self,
        model: Any,
        *,
        vectors: Mapping[str, InstructionVector],
        guidance: str | Guidance = "paper",
        train_dataset: Any,
        processing_class: Any,
        keep_teacher: int | None = 256,
        **arguments: Any,
    ):
        if isinstance(guidance, str) and guidance not in PRESETS:
            raise ValueError(
                f"guidance={guidance!r} is unknown; choose one of {', '.join(PRESETS)}, or pass a Guidance"
            )
        self.guidance = PRESETS[guidance] if isinstance(guidance, str) else guidance
        self.tasks = list(dict.fromkeys(train_dataset["task"]))
        if missing := [task for task in self.tasks if task not in vectors]:
            raise ValueError(f"no vector for task(s) {', '.join(missing)}; extract one each with ivl.extract_vector")
        chosen = [vectors[task] for task in self.tasks]
        width, depth = model.config.hidden_size, model.config.num_hidden_layers
        for task, vector in zip(self.tasks, chosen):
            if vector.d_model != width:
                raise ValueError(
                    f"the vector of task {task!r} has width {vector.d_model}, but the model has {width}; "
                    "extract a vector from this model with ivl.extract_vector"
                )
        self._layers = torch.tensor([_layer(self.guidance, vector, depth) for vector in chosen])
        scales = [vector.scale if self.guidance.scale is None else self.guidance.scale for vector in chosen]
        self._thetas = torch.stack([scale * vector.vector.float() for scale, vector in zip(scales, chosen)])
        heads = chosen[0].heads if self.guidance.heads_weight else ()
        self._hooks = TrainingHooks(heads, self.guidance.site)
        self._terms: dict[str, list[float]] = {}
        arguments.setdefault("data_collator", _Collator(processing_class, self.tasks))
        numbered = train_dataset.add_column("example", list(range(len(train_dataset))))
        super().__init__(model, train_dataset=numbered, processing_class=processing_class, **arguments)
        self._keep = keep_teacher if self.guidance.needs_teacher else None
        self._kept: KeptTeacher | None = None
        self._positioned = "position_ids" in inspect.signature(_inner(model).forward).parameters
        self._frozen = None
        temperatures = {term.temperature for term in self.guidance.kl}
        if self._keep is not None and len(temperatures) > 1:
            raise ValueError("keep_teacher needs one temperature for all divergences; pass keep_teacher=None")
        self._temperature = temperatures.pop() if temperatures else 1.0
        if self.guidance.needs_teacher and self._keep is None and not hasattr(model, "peft_config"):
            self._frozen = copy.deepcopy(model).eval().requires_grad_(False)

    def train(self, *args: Any, **options: Any) -> Any:
        layers = set(self._layers.tolist())
        self._hooks.attach(self.model, self.processing_class, layers)
        frozen_hooks = TrainingHooks(self._hooks.heads, self.guidance.site)
        if self._frozen is not None:
            self._teacher_hooks = frozen_hooks.attach(self._frozen.to(self.args.device), self.processing_class, layers)
        else:
            self._teacher_hooks = self._hooks
        try:
            if self._keep is not None:  # before a checkpoint is loaded: the teacher is the model as it was
                self._kept = self._keep_outputs()
            return super().train(*args, **options)
        finally:
            self._hooks.detach()
            frozen_hooks.detach()

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        inputs = dict(inputs)
        tasks, labels, examples = inputs.pop("task"), inputs.pop("labels"), inputs.pop("example")
        inputs = self._positioned_inputs(inputs)
        last = last_prompt_positions(labels)
        where = self._where(inputs, labels, last)
        teacher, teacher_z = self._taught(model, inputs, tasks, last, examples, where)
        alpha = self.guidance.strength(self.state.global_step, self.state.max_steps)
        twice = alpha > 0 and self.guidance.needs_teacher
        fed = {key: torch.cat([x, x]) for key, x in inputs.items()} if twice else inputs
        self._set(self._hooks, tasks, last, [alpha, 0.0] if twice else [alpha])
        outputs = model(**fed)
        steered, plain = outputs.logits[: len(labels)], outputs.logits[-len(labels) :]
        terms = {"lm": lm_loss(steered, labels, num_items_in_batch)}
        if teacher is not None:
            terms["kl"] = sum(
                (self._kl(term, plain, teacher, where, num_items_in_batch) for term in self.guidance.kl),
                plain.new_zeros(()),
            )
        if teacher_z is not None:
            loss = head_consistency(self._hooks.z[-len(labels) :], teacher_z)
            terms["heads"] = self.guidance.heads_weight * loss * (loss > self.guidance.heads_least)
        for name, value in terms.items():
            self._terms.setdefault(f"{name}_loss", []).append(float(value.detach()))
        loss = sum(terms.values())
        return (loss, outputs) if return_outputs else loss

    def _kl(self, term: KL, student: Tensor, teacher: TopK, where: dict[str, Tensor], count: Any) -> Tensor:
        """One divergence, a mean over its positions (over the whole accumulated batch where those are the answer's)."""
        here = where[term.positions]
        options = {"direction": term.direction, "temperature": term.temperature}
        if isinstance(teacher, TopK):
            each = kept_divergence(student[here], teacher[here[where["kept"]]], **options)
        else:
            each = kl_divergence(student[here], teacher[here], **options)
        counted = count if count is not None and term.positions == "answer" else len(each)
        return term.weight * (each.sum() / counted) * (each.mean() > term.least)

    def _where(self, inputs: dict[str, Any], labels: Tensor, last: Tensor) -> dict[str, Tensor]:
        """Which positions each divergence is over, and which ones a teacher is kept at: all that any needs."""
        where = {"answer": answer_positions(labels), "all": inputs["attention_mask"].bool()}
        where["last"] = torch.zeros_like(where["all"]).scatter(1, last[:, None], True)
        needed = {term.positions for term in self.guidance.kl}
        return {**where, "kept": where["all"] if "all" in needed else where["answer"]}

    def _taught(
        self,
        model: Any,
        inputs: dict[str, Any],
        tasks: Tensor,
        last: Tensor,
        examples: Tensor,
        where: dict[str, Tensor],
    ) -> tuple[Any, Any]:
        if self._kept is not None:
            return self._kept.rows(examples, last.device)
        return self._teach(model, inputs, tasks, last) if self.guidance.needs_teacher else (None, None)

    def _keep_outputs(self) -> KeptTeacher:
        """The teacher's outputs for every example, from the output folder if they are there."""
        model, device = self.accelerator.unwrap_model(self.model).to(self.args.device), self.args.device

        def teach(examples: Sequence[int]) -> tuple[list[Tensor], Tensor | None]:
            batch = self.data_collator([self.train_dataset[i] for i in examples]).to(device)
            inputs = self._positioned_inputs({k: batch[k] for k in ("input_ids", "attention_mask")})
            last = last_prompt_positions(batch["labels"])
            kept = self._where(inputs, batch["labels"], last)["kept"]
            logits, z = self._teach(model, inputs, batch["task"], last)
            return [logits[i][kept[i]] for i in range(len(examples))], z

        digest = hashlib.sha256(repr((weights_fingerprint(model), self._keep, self.guidance, self._layers)).encode())
        digest.update(self._thetas.numpy().tobytes() + repr(self.train_dataset["input_ids"][:]).encode())
        return keep_teacher(
            len(self.train_dataset),
            teach,
            k=self._keep,
            temperature=self._temperature,
            path=Path(self.args.output_dir) / f"teacher-{digest.hexdigest()[:16]}.safetensors",
            batch_size=self.args.per_device_train_batch_size,
            progress=not self.args.disable_tqdm,
        )

    def _positioned_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """With positions counted from the first real token, also where the padding is on the left."""
        if not self._positioned:
            return inputs
        return {**inputs, "position_ids": (inputs["attention_mask"].long().cumsum(-1) - 1).clamp(min=0)}

    @torch.no_grad()
    def _teach(self, model: Any, inputs: dict[str, Any], tasks: Tensor, last: Tensor) -> tuple[Any, Any]:
        """The steered teacher's logits and head outputs."""
        self._set(self._teacher_hooks, tasks, last, [1.0])
        with _as_before(self._frozen if self._frozen is not None else self.accelerator.unwrap_model(model)) as before:
            logits = before(**inputs).logits
        return logits, self._teacher_hooks.z.clone() if self._hooks.heads else None

    def _set(self, hooks: TrainingHooks, tasks: Tensor, last: Tensor, strengths: list[float]) -> None:
        """What the hooks add in the next pass: each row its task's vector at its task's layer."""
        rows = tasks.cpu().repeat(len(strengths))
        strength = torch.tensor(strengths).repeat_interleave(len(tasks))
        thetas = strength[:, None] * self._thetas[rows]
        hooks.positions = last.repeat(len(strengths))
        hooks.additions = {
            layer: (thetas * (self._layers[rows] == layer)[:, None]).to(last.device)
            for layer in set(self._layers.tolist())
            if any(strengths)
        }

    def log(self, logs: dict[str, float], *args: Any, **options: Any) -> None:
        """As the Trainer, with the terms' means since the last time."""
        if "loss" in logs:
            logs = {**logs, **{name: sum(values) / len(values) for name, values in self._terms.items()}}
            self._terms.clear()
        super().log(logs, *args, **options)


class _Collator(DataCollatorForSeq2Seq):
    """Pads on the tokenizer's side; tasks become their numbers."""

    def __init__(self, tokenizer: Any, tasks: list[str]):
        super().__init__(tokenizer, padding=True, label_pad_token_id=IGNORED)
        self.tasks = tasks

    def __call__(self, features: list[dict[str, Any]], return_tensors: str | None = None) -> Any:
        rows = [{key: value for key, value in row.items() if key != "task"} for row in features]
        batch = super().__call__(rows, return_tensors)
        batch["task"] = torch.tensor([self.tasks.index(row["task"]) for row in features])
        return batch


def _layer(guidance: Guidance, vector: InstructionVector, depth: int) -> int:
    layer = vector.layer if guidance.layer is None else guidance.layer
    if layer is None or (guidance.site == "attention" and guidance.layer is None):
        layer = depth // 3 if guidance.site == "residual" else depth * 9 // 32
    if not -depth <= layer < depth:
        raise ValueError(f"layer={layer} is out of range: the model has layers 0 to {depth - 1}")
    return layer % depth


def _inner(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@contextmanager
def _as_before(model: Any) -> Iterator[Any]:
    """The model before this stage: adapters off, no dropout."""
    training = model.training
    model.eval()
    try:
        with model.disable_adapter() if hasattr(model, "peft_config") else nullcontext():
            yield model
    finally:
        model.train(training)

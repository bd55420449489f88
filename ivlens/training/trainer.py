"""`IVTrainer`: fine-tuning guided by instruction vectors, so that other skills are not overlaid."""

from __future__ import annotations

import copy
import inspect
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer

from ivlens.common.keys import key
from ivlens.training.batch import Batch, Collator, as_teacher, count_positions, kept_positions
from ivlens.training.branches import Fed, doubled, packed, packing_fits, single
from ivlens.training.guidance import KL, POSITIONS, Guidance, SplitKL, checked_guidance
from ivlens.training.hooks import TaskInjection, TrainingHooks
from ivlens.training.losses import answer_loss, answer_tokens, head_consistency
from ivlens.training.sharding import check_guided
from ivlens.training.teacher import (
    KeptTeacher,
    TopK,
    affordable,
    as_before,
    blank_adapters,
    guided_divergence,
    keep_teacher,
)
from ivlens.vectors.vector import InstructionVector

__all__ = ["IVTrainer"]

EXACT, CLOSE = 1e-4, 0.05  # how far packed logits may be from those of doubled rows, in float32 and below


class IVTrainer(Trainer):
    """A `transformers.Trainer` whose loss is ℓ_LM + λ_kl · ℓ_KL + λ_heads · ℓ_heads (IV §6; FVG).

    Parameters
    ----------
    model
        A PEFT or Hugging Face model. As it is when `train` begins, adapters included, it is the teacher.
    vectors
        The instruction vector of every task in the data; None injects nothing anywhere (learning without forgetting).
    guidance
        `"paper"`, `"fvg-code"`, or a `Guidance`.
    train_dataset
        With the columns of `ivlens.training.data.answer_dataset`. An `eval_dataset` needs no `task`.
    keep_teacher
        How many of the teacher's likeliest tokens are kept per position (the rest counts as one), computed once before
        training and kept in the output folder; `"full"` keeps them all, None runs the teacher in every step.
    teacher_budget
        Gigabytes, in memory and on disk each, that what is kept may take; fewer tokens are kept where more would.
    processing_class
        The model's tokenizer.
    arguments
        More of `transformers.Trainer`: `args`, `eval_dataset`, `callbacks`, …

    Notes
    -----
    While the injection fades, a step is one pass with it for ℓ_LM and without it for ℓ_KL: the last prompt token and the answer are fed
    twice, or every row, where a model doesn't take that. Logged apart: `lm_loss`, `kl_loss`, `heads_loss` and the strength `alpha`.

    Raises
    ------
    ValueError
        If a task has no vector, a vector belongs to a model of another width, or options don't go together.
    """

    def __init__(
        self,
        model: Any,
        *,
        vectors: Mapping[str, InstructionVector] | None,
        guidance: str | Guidance = "paper",
        train_dataset: Any,
        processing_class: Any,
        keep_teacher: int | str | None = 256,
        teacher_budget: float = 2.0,
        **arguments: Any,
    ):
        self.guidance = checked_guidance(guidance, vectors, keep_teacher)
        tasks = list(dict.fromkeys(train_dataset["task"]))
        self._injection = TaskInjection.of(vectors, tasks, self.guidance, model.config.get_text_config())
        heads = vectors[tasks[0]].heads if self.guidance.heads_weight else ()
        self._hooks, self._frozen_hooks = (TrainingHooks(heads, self.guidance.site) for _ in range(2))
        parameters = inspect.signature(_inner(model).forward).parameters
        self._positioned, self._sparse = "position_ids" in parameters, "logits_to_keep" in parameters
        # Padded on the left, answers stand in the same columns, and fewer logits are needed.
        side = "left" if self._positioned else "right"
        arguments.setdefault("data_collator", Collator(processing_class, tasks, side, positioned=self._positioned))
        self.guidance.check_data(train_dataset.column_names)
        numbered = train_dataset.add_column("example", list(range(len(train_dataset))))
        super().__init__(model, train_dataset=numbered, processing_class=processing_class, **arguments)
        self.args.remove_unused_columns = False  # the collator needs those that the model doesn't
        self.label_names = self.label_names or ["labels"]  # transformers finds none on some PEFT models
        self.model_accepts_loss_kwargs = True  # the loss is normalized over the accumulated batch here, for any model
        self.current_gradient_accumulation_steps = 1
        self.teacher_seconds = 0.0
        self._keep, self._budget = keep_teacher, teacher_budget
        self._kept: KeptTeacher | None = None
        self._frozen: Any = None
        self._off: set[str] = set()
        self._packs = False
        self._totals: dict[str, Tensor] = {}
        self._terms: dict[str, list[Tensor]] = {}

    def train(self, *args: Any, **options: Any) -> Any:
        check_guided(self)
        with self.prepared():  # before a checkpoint is loaded: the teacher is the model as it was
            return super().train(*args, **options)

    @contextmanager
    def prepared(self) -> Iterator[None]:
        """Inside, the hooks are on the model and the teacher is the model as it is now."""
        model = self.accelerator.unwrap_model(self.model).to(self.args.device)
        layers = set(self._injection.layers.tolist())
        keep = self._affordable()
        if self.guidance.needs_teacher and keep is None:
            if self.guidance.shots:
                raise ValueError(
                    f"teacher_budget={self._budget} is too small to ask a teacher with demonstrations once"
                )
            blank = blank_adapters(model)
            self._off = blank or set()
            if blank is None:
                self._frozen = copy.deepcopy(model).requires_grad_(False)
                self._frozen_hooks.attach(self._frozen, self.processing_class, layers)
        self._hooks.attach(model, self.processing_class, layers)
        try:
            if keep is not None:
                self._kept = self._keep_outputs(model, keep)
            self._packs = self._packing_works(model)
            yield
        finally:
            self._hooks.detach()
            self._frozen_hooks.detach()
            self._kept = self._frozen = None
            self._off = set()

    def get_batch_samples(self, *args: Any) -> Any:
        samples, count = super().get_batch_samples(*args)
        counts = self.accelerator.gather(count_positions(samples, self.args.device)[None])
        self._totals = dict(zip(POSITIONS, counts.sum(0)))
        return samples, count

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        if "example" not in inputs:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        batch = self._batch(inputs)
        teacher, teacher_z = self._taught(model, batch)
        alpha = self.guidance.strength(self.state.global_step, self.state.max_steps)
        fed = self._feed(batch, apart=alpha > 0 and teacher is not None)
        self._injection.aim(self._hooks, fed, batch, alpha)
        kept = batch.where["kept"] if self.guidance.kl and teacher is not None else None
        outputs, steered, plain = fed.run(model, batch.where["answer"], kept, sparse=self._sparse)

        # Each process computes its part of a mean over the whole accumulated batch; gradients are averaged over processes.
        whole = num_items_in_batch is not None
        totals = self._totals if whole else dict(zip(POSITIONS, count_positions([inputs], steered.device)))
        share = self.accelerator.num_processes if whole else 1
        terms = {"lm_loss": share * answer_loss(steered, batch.labels, totals["answer"])}
        if plain is not None:
            each = [self._kl(term, plain, teacher, batch, totals) for term in self.guidance.kl]
            terms["kl_loss"] = share * sum(each)
        if teacher_z is not None:
            distance = head_consistency(self._hooks.z, teacher_z)
            weight = share * self.guidance.heads_weight * (distance > self.guidance.heads_least)
            terms["heads_loss"] = weight * distance * (len(teacher_z) / totals["last"])
        loss = sum(terms.values())
        self._note({**terms, "alpha": alpha} if self.guidance.progressive else terms)
        return (loss, outputs) if return_outputs else loss

    def prediction_step(self, model: Any, inputs: Mapping[str, Tensor], *args: Any, **options: Any) -> Any:
        """Evaluated is the model as it will be used: nothing injected, the loss on the labels alone."""
        self._hooks.rest()
        inputs = {name: value for name, value in inputs.items() if name not in ("task", "example")}
        return super().prediction_step(model, inputs, *args, **options)

    def _kl(self, term: KL | SplitKL, student: Tensor, teacher: TopK | Tensor, batch: Batch, totals: Any) -> Tensor:
        """One divergence, a mean over its positions in the whole accumulated batch."""
        here = batch.where[term.positions][batch.where["kept"]]
        if not here.all():
            student, teacher = student[here], teacher[here]
        return guided_divergence(term, student, teacher, answer_tokens(batch.labels)).sum() / totals[term.positions]

    def _batch(self, collated: Mapping[str, Tensor]) -> Batch:
        return Batch.of(collated, self.guidance, positioned=self._positioned)

    def _rows(self, examples: Sequence[int], of_teacher: bool = False) -> Batch:
        """Examples of the training data as a batch, as the student is asked or the teacher."""
        rows = [as_teacher(row) if of_teacher else row for row in map(self.train_dataset.__getitem__, examples)]
        return self._batch(self.data_collator(rows).to(self.args.device))

    def _feed(self, batch: Batch, *, apart: bool) -> Fed:
        if not apart:
            return single(batch.inputs)
        if self._packs:
            return packed(batch.inputs, batch.last, _inner(self.accelerator.unwrap_model(self.model)).dtype)
        return doubled(batch.inputs)

    @torch.no_grad()
    def _packing_works(self, model: Any) -> bool:
        """Whether a packed pass gives what doubled rows give, on the first rows."""
        if not (self.guidance.progressive and self.guidance.needs_teacher):
            return False
        batch = self._rows(range(min(4, len(self.train_dataset))))
        longest = max(map(len, self.train_dataset["input_ids"]))
        if not packing_fits(model.config.get_text_config(), batch.inputs, longest):
            return False
        found = []
        for self._packs in (False, True):
            fed = self._feed(batch, apart=True)
            self._injection.aim(self._hooks, fed, batch, 1.0)
            with as_before(model), self.accelerator.autocast():
                try:
                    _, *logits = fed.run(model, batch.where["answer"], batch.where["kept"], sparse=self._sparse)
                except Exception:  # whatever a model says to a mask it doesn't know
                    if self._packs:
                        return False
                    raise
            found.append(torch.cat(logits).float())
        away = (found[1] - found[0]).norm() / (found[0] - found[0].mean(-1, keepdim=True)).norm()
        exact = _inner(model).dtype == torch.float32 and self.accelerator.mixed_precision == "no"
        return bool(away <= (EXACT if exact else CLOSE))

    def _taught(self, model: Any, batch: Batch) -> tuple[TopK | Tensor | None, Tensor | None]:
        if not self.guidance.needs_teacher:
            return None, None
        if self._kept is not None:
            return self._kept.rows(batch.examples, batch.last.device)
        if self._frozen is not None:
            return self._teach(self._frozen, self._frozen_hooks, batch)
        return self._teach(self.accelerator.unwrap_model(model), self._hooks, batch)

    @torch.no_grad()
    def _teach(self, model: Any, hooks: TrainingHooks, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """The steered teacher's logits and head outputs."""
        fed = single(batch.inputs)
        self._injection.aim(hooks, fed, batch, float(self.guidance.steered))
        with as_before(model, self._off) as before, self.accelerator.autocast():
            _, _, logits = fed.run(before, None, batch.where["kept"], sparse=self._sparse)
        return logits, hooks.z.clone() if hooks.heads else None

    def _affordable(self) -> int | None:
        """How many tokens per position are kept, if any."""
        if self._keep is None or not self.guidance.needs_teacher:
            return None
        vocabulary = self.model.config.get_text_config().vocab_size
        k = vocabulary if self._keep == "full" else min(self._keep, vocabulary)
        return affordable(k, kept_positions(self.train_dataset["labels"], self.guidance), self._budget)

    def _keep_outputs(self, model: Any, k: int) -> KeptTeacher:
        """The teacher's outputs for every example, from the output folder if they are there."""
        start = time.perf_counter()

        def teach(examples: Sequence[int]) -> tuple[Sequence[Tensor], Tensor | None]:
            batch = self._rows(examples, of_teacher=True)
            logits, z = self._teach(model, self._hooks, batch)
            return logits.split(batch.where["kept"].sum(1).tolist()), z

        data, columns = self.train_dataset, ("input_ids", "labels", "task", "teacher_ids")
        rows = [list(data[name]) for name in columns if name in data.column_names]
        kept_as = key(model, k, self.accelerator.mixed_precision, self.guidance, self._injection, rows)
        path = Path(self.args.output_dir) / f"teacher-{kept_as}.safetensors"
        options = {"batch_size": self.args.per_device_train_batch_size, "progress": not self.args.disable_tqdm}
        heat = self.guidance.kl[0].temperature if self.guidance.kl else 1.0
        options["right"] = rows[:2] if any(isinstance(term, SplitKL) for term in self.guidance.kl) else None
        with self.args.main_process_first(desc="the teacher's outputs"):  # the others then find the file
            kept = keep_teacher(len(rows[0]), teach, k=k, temperature=heat, path=path, **options)
        self.teacher_seconds = time.perf_counter() - start
        return kept

    def _note(self, terms: Mapping[str, Tensor | float]) -> None:
        """For the log: the losses of accumulated parts add up to those of a step, as in the Trainer's."""
        parts = self.current_gradient_accumulation_steps
        for name, value in {**terms, "steps": 1 / parts}.items():
            value = torch.as_tensor(value, dtype=torch.float32, device=self.args.device).detach()
            self._terms.setdefault(name, []).append(value / parts if name == "alpha" else value)

    def log(self, logs: dict[str, float], *args: Any, **options: Any) -> None:
        """As the Trainer, with the terms' means since the last time, over all processes."""
        if "loss" in logs and self._terms:
            sums = self.accelerator.reduce(torch.stack([torch.stack(x).sum() for x in self._terms.values()]), "mean")
            means = dict(zip(self._terms, sums.tolist()))
            steps = means.pop("steps")
            logs = {**logs, **{name: value / steps for name, value in means.items()}}
            self._terms.clear()
        super().log(logs, *args, **options)


def _inner(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model

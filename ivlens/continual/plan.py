"""What a run has left to do, and about how long that takes: timed on one training step and one batch of prompts."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch

from ivlens.common.tables import table_html
from ivlens.continual.experiment import Experiment, Stop
from ivlens.continual.scoring import scored_prompts
from ivlens.models.backends import backend_of
from ivlens.models.hooking import tokenizing_backend
from ivlens.models.loading import load_hf, load_model
from ivlens.running.tokens import tokenize
from ivlens.tasks.prompts import build_prompts
from ivlens.training.data import answer_dataset

__all__ = ["Plan", "plan"]


@dataclass(frozen=True)
class Plan:
    """Stages by method and seed.

    Attributes
    ----------
    stages
        One row per stage: method, seed, stage, task, state (`to train`, `to score` or `done`), minutes left.
    """

    stages: pd.DataFrame
    step_seconds: float
    score_seconds: float

    @property
    def minutes(self) -> float:
        """About how long all that is left takes: the steps of plain training, and scoring."""
        return float(self.stages["minutes"].sum())

    def table(self) -> pd.DataFrame:
        """One row per method: stages, those done, minutes left."""
        done = self.stages.assign(done=self.stages["state"] == "done").groupby("method", sort=False)
        return done.agg(stages=("stage", "size"), done=("done", "sum"), minutes=("minutes", "sum")).reset_index()

    def __repr__(self) -> str:
        parts = f"a step takes {self.step_seconds:.2f} s, scoring a stage {self.score_seconds:.0f} s"
        longer = "methods with a teacher or a penalty take longer"
        table = self.table().to_string(index=False)
        return f"Plan(about {self.minutes:.0f} minutes: {parts}; {longer})\n{table}"

    def _repr_html_(self) -> str:
        return table_html(self.stages, title=repr(self).splitlines()[0], index=False)


def plan(experiment: Experiment) -> Plan:
    """Time one step and one batch on the first task, and add up what isn't done yet."""
    step, score = _step_seconds(experiment), _score_seconds(experiment)
    steps = experiment.training["steps"] * int(experiment.training.get("gradient_accumulation_steps", 1))

    def left(stop: Stop) -> tuple[str, float]:
        if not stop.trained:
            return "to train", (steps * step + score) / 60
        return ("done", 0.0) if experiment.scores(stop.folder) else ("to score", score / 60)

    columns = ["method", "seed", "stage", "task", "state", "minutes"]
    rows = [(s.label, s.seed, s.number, s.task, *left(s)) for s in experiment.stops()]
    return Plan(pd.DataFrame(rows, columns=columns), step, score)


def _step_seconds(experiment: Experiment) -> float:
    """Forward and backward pass of one batch, to the inputs: with adapters most weights have no gradient of their own."""
    from transformers import DataCollatorForSeq2Seq

    training = experiment.training
    hf_model, tokenizer, label = load_hf(experiment.model, dtype=experiment.dtype)
    options: dict[str, Any] = {key: training[key] for key in ("shots", "instruction", "style")}
    prompts = build_prompts(next(iter(experiment.sequence.values())), n=training["batch_size"], **options)
    rows = answer_dataset(tokenizing_backend(hf_model, tokenizer, label), prompts).remove_columns("task")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    device = "cuda" if torch.cuda.is_available() else "cpu"
    hf_model.requires_grad_(False).to(device).train()
    hf_model.get_input_embeddings().requires_grad_(True)
    batch = DataCollatorForSeq2Seq(tokenizer, padding=True)(list(rows)).to(device)

    def step() -> None:
        with torch.autocast(device, dtype=torch.bfloat16, enabled=bool(training.get("bf16"))):
            hf_model(**batch).loss.backward()

    return _seconds(step)


def _score_seconds(experiment: Experiment) -> float:
    """Time per token of one batch, times the tokens of all prompts beyond what they share, options and answers included."""
    backend = backend_of(load_model(experiment.model, backend="bridge", dtype=experiment.dtype))
    tokens = 0
    for _, task, look in experiment.looks():
        shots = look["shots"]
        prompts = scored_prompts(task, experiment.scoring, **{**look, "shots": 0})
        rows = tokenize(backend, prompts)
        told = [sum(map(len, p.query.choices or ())) / 4 for p in prompts]  # about four characters a token
        tokens += sum(len(row.prompt) + 2 * len(row.answer) + more for row, more in zip(rows, told))
        tokens += shots * sum(len(row.prompt) for row in rows) / len(rows)
    some = torch.full((16, 32), rows[0].prompt[0], device=backend.device)

    def forward() -> None:
        with torch.inference_mode():
            backend.forward(some, torch.ones_like(some))

    return _seconds(forward) / some.numel() * tokens


def _seconds(step: Any) -> float:
    """Of the second call; the first one warms up."""
    for _ in range(2):
        start = time.perf_counter()
        step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    return time.perf_counter() - start

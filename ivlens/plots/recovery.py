"""Figures of training, of what it did to answers, and of putting old vectors back."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import pandas as pd
import plotly.graph_objects as go

from ivlens.plots.colours import FAINT, TASK_COLOURS
from ivlens.plots.style import finish
from ivlens.plots.traces import before_after, rate, task_bars, task_rows
from ivlens.plots.words import counted, escaped, plain, span, which_tasks

if TYPE_CHECKING:
    from ivlens.dynamics import Recovery
    from ivlens.dynamics.probabilities import AnswerProbabilities
    from ivlens.training import TrainingRun

__all__ = ["plot_loss", "plot_probabilities", "plot_recovery"]

OF_BASE = ("before", "before + vector")  # the same hits at every checkpoint


def plot_loss(run: TrainingRun) -> go.Figure:
    """Loss over steps."""
    log = [entry for entry in run.log if "loss" in entry]
    if not log:
        raise ValueError(f"the run in {run.folder} logged no loss; log more often: fine_tune(…, logging_steps=1)")
    steps, losses = [entry["step"] for entry in log], [entry["loss"] for entry in log]
    line = go.Scatter(x=steps, y=losses, mode="lines+markers" if len(log) <= 60 else "lines")
    line.update(line={"color": TASK_COLOURS[0], "width": 2.5}, marker_size=6)
    figure = go.Figure(line.update(hovertemplate="step %{x}: %{y:.3f}<extra></extra>"))
    about, axis = run.settings, {"rangemode": "tozero", "zerolinecolor": FAINT, "ticklabelstandoff": 4}
    figure.update_xaxes(title_text="step", **axis)
    figure.update_yaxes(title_text="loss (nats)", **axis)
    amounts = f"{counted(about['steps'], 'step')} of {counted(about['batch_size'], 'prompt')}"
    how = f"{escaped(about['method'])}, {amounts}, learning rate {plain(about['learning_rate'])}"
    notes = [f"mean over answer tokens, {losses[0]:.3f} at first, {losses[-1]:.3f} at last · {how}"]
    title = f"Loss while training on {which_tasks(about['tasks'])}"
    return finish(figure, title, notes, width=560, height=300, right=24)


def plot_probabilities(before: AnswerProbabilities, after: AnswerProbabilities) -> go.Figure:
    """Knowledge beside instruction probability, before and after training: a row per task, on a log axis, 95 % intervals."""
    if before.task_names != after.task_names:
        raise ValueError("before and after cover different tasks; measure both on the same ones")
    tasks = before.task_names
    frames = {"before": before.to_dataframe(), "after": after.to_dataframe()}
    frames = {when: frame.rename(columns={"probability": "mean"}) for when, frame in frames.items()}
    means = [x for frame in frames.values() for x in frame["mean"] if x > 0]
    lows = [max(x, min(means) / 30) for frame in frames.values() for x in frame["low"] if x > 0]
    floor = math.floor(math.log10(min(lows, default=0.1)) - 0.05)
    titles = ("knowledge: the answer, asked plainly", "instruction: the form that is asked for")
    figure, size = task_rows(tasks, titles)
    for column, kind in enumerate(("knowledge", "instruction"), start=1):
        parts = {when: frame[frame["kind"] == kind] for when, frame in frames.items()}
        before_after(figure, column, parts, tasks, named=column == 1, digits=".2~g", least=10.0**floor)
    figure.update_xaxes(type="log", range=[floor, 0.06], title_text="probability of the answer")
    decades = range(0, floor - 1, -max(1, math.ceil(-floor / 6)))
    powers = [f"{10.0**k:g}" if k >= -3 else f"10<sup>−{-k}</sup>" for k in decades]
    figure.update_xaxes(tickvals=[10.0**k for k in decades], ticktext=powers)
    notes = [f"mean and 95% interval · {span([*frames['before']['n'], *frames['after']['n']])} prompts per point"]
    if any((frame["mean"] <= 0).any() for frame in frames.values()):
        notes.append("at the left edge: too small for a number")
    title = "Knowledge and instruction probability before and after training"
    return finish(figure, title, notes, **size)


def plot_recovery(recovery: Recovery, checkpoint: str | None = None) -> go.Figure:
    """Bars per task: accuracy under every condition, with 95 % intervals.

    Parameters
    ----------
    checkpoint
        Only this one; None pools the hits of all.
    """
    scores = recovery.scores
    labels = list(dict.fromkeys(scores["checkpoint"]))
    if checkpoint is not None:
        if checkpoint not in labels:
            raise ValueError(f"checkpoint={checkpoint!r} is unknown; there are {', '.join(map(str, labels))}")
        scores = scores[scores["checkpoint"] == checkpoint]
        labels = [checkpoint]
    # The base model answered once, and its hits stand at every checkpoint.
    again = scores["condition"].isin(OF_BASE) & scores.duplicated(["task", "condition", "prompt"])
    frame = _accuracies(scores[~again])
    tasks = list(dict.fromkeys(scores["task"]))
    conditions = [name for name in recovery.conditions if name in set(frame["condition"])]
    figure, size = task_bars(frame, tasks, conditions, "accuracy, whole answer")
    of_base = frame["condition"].isin(OF_BASE)
    n = span(frame[~of_base]["n"])
    notes = [f"{escaped(labels[0])} · mean and 95% interval · {n} prompts per bar"]
    if len(labels) > 1:
        pooled = f"mean and 95% interval · answers pooled over {len(labels)} checkpoints as if independent"
        notes = [pooled, f"{n} answers per bar; before training {span(frame[of_base]['n'])}"]
    return finish(figure, "Accuracy with the old vector put back", notes, **size)


def _accuracies(scores: pd.DataFrame) -> pd.DataFrame:
    rows = []
    for (task, condition), part in scores.groupby(["task", "condition"], sort=False):
        found = rate(part["hit"].tolist(), list(zip(part["checkpoint"], part["query"])))
        rows.append({"task": task, "condition": condition, **found})
    return pd.DataFrame(rows)

"""Free answers scored without a judge: the constraint met, still on topic, fluent (the three things asked in arXiv 2501.17148)."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from ivlens.common.statistics import resampled_means
from ivlens.models.backend import Backend
from ivlens.running.decoding import choose, complete
from ivlens.running.injection import Injection
from ivlens.running.tokens import TokenizedPrompt, tokenize
from ivlens.tasks.checks import passes
from ivlens.tasks.prompts import Prompt
from ivlens.tasks.task import same_input

__all__ = ["Unsteered", "balance", "balance_table", "score_free", "told_by", "written"]

Condition = tuple[str, int]  # its name, and which draw of a random control


class Unsteered:
    """The unsteered model, its answers to the bare questions, and what it says of others' answers to them.

    Parameters
    ----------
    bare
        The questions without instruction.
    """

    def __init__(self, backend: Backend, bare: Sequence[Prompt], *, max_new_tokens: int, batch_size: int | None = None):
        self.backend, self.bare, self.batch_size = backend, list(bare), batch_size
        self.answers = written(backend, bare, {0: None}, max_new_tokens=max_new_tokens, batch_size=batch_size)[0]

    def scores(self, *several: Sequence[str]) -> list[list[dict[str, float]]]:
        """Of several conditions' answers, one per question each: `met` and `met_loose` (0 or 1), `topic` and `surprise` (nats per
        token).

        `topic`: how much likelier this answer, rather than the one to the next question, makes the unsteered answer that it stands
        before; 0 where answers say nothing of their questions. ROUGE-L told right from wrong questions less well, above all
        between languages. `surprise`: minus the log-probability that the unsteered model gives it after the bare question;
        its exponential is the perplexity.
        """
        topic = self._topic([text for texts in several for text in texts])
        surprise = self._surprise([text for texts in several for text in texts])
        rows = []
        for prompt, text, *values in zip(self.bare * len(several), itertools.chain(*several), topic, surprise):
            check = prompt.query.check
            met = {"met": float(passes(check, text)), "met_loose": float(passes(check, text, loose=True))}
            rows.append({**met, "topic": float(values[0]), "surprise": float(values[1])})
        return [rows[i : i + len(self.bare)] for i in range(0, len(rows), len(self.bare))]

    def _topic(self, texts: Sequence[str]) -> np.ndarray:
        """Log-probability per token of each unsteered answer after this text, minus that after the text to the next question."""
        n, some = len(self.answers), np.array([bool(x.strip()) for x in self.answers])
        answers = [x if says else "." for x, says in zip(self.answers, some)]
        before = [f"{text.strip()}\n\n" for text in texts]
        own, earlier = (
            tokenize(self.backend, before, [answers[(j - k) % n] for j in range(len(texts))]) for k in (0, 1)
        )
        both = choose(
            self.backend, own, [(x.answer, y.answer) for x, y in zip(own, earlier)], batch_size=self.batch_size
        )
        scores = np.array(both).reshape(-1, n, 2)  # condition, question, before which answer
        change = (scores[:, :, 0] - np.roll(scores[:, :, 1], -1, axis=1)) / [len(row.answer) for row in own[:n]]
        return np.where(some, change, 0.0).reshape(-1)

    def _surprise(self, texts: Sequence[str]) -> np.ndarray:
        asked = self.bare * (len(texts) // len(self.bare))
        rows = tokenize(
            self.backend, [replace(p, query=replace(p.query, output=x.strip())) for p, x in zip(asked, texts)]
        )
        # An answer that says nothing is the end of text.
        rows = [replace(x, answer=x.answer or self.backend.end_tokens[:1]) for x in rows]
        done = complete(self.backend, rows, {0: None}, batch_size=self.batch_size)[0]
        return -np.array(done.log_probability) / [len(row.answer) for row in rows]


def told_by(instruction: bool | str | int | None) -> bool | str | int:
    """The instruction of told questions: what is given, the first wording (0) included, and else a wording drawn per question."""
    return True if instruction is None or instruction is False else instruction


def written(
    backend: Backend,
    prompts: Sequence[Prompt],
    injections: Mapping[Hashable, Injection | None],
    *,
    max_new_tokens: int,
    batch_size: int | None = None,
    bar: tqdm | None = None,
) -> dict[Hashable, list[str]]:
    """Free answers under every injection."""
    rows = [TokenizedPrompt(row.prompt) for row in tokenize(backend, prompts)]
    done = complete(backend, rows, injections, max_new_tokens=max_new_tokens, stop=None, batch_size=batch_size, bar=bar)
    return {name: [text.strip() for text in result.texts] for name, result in done.items()}


def balance(scores: Mapping[str, Any], told: Mapping[str, Any]) -> dict[str, Any]:
    """Means of a condition's scores beside those of told answers (numbers or arrays): each between 0 and 1, and their harmonic mean.

    `met` as it is; `on_topic`, the share of the told answers' topic, NaN and left out where these have none; `fluent`, the told
    answers' perplexity over this one's.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        share = np.clip(np.divide(scores["topic"], told["topic"]), 0.0, 1.0)
        on_topic = np.where(np.greater(told["topic"], 0), share, np.nan)
        fluent = np.minimum(np.exp(np.subtract(told["surprise"], scores["surprise"])), 1.0)
        parts = np.stack([np.asarray(scores["met"], float), on_topic, fluent])
        mean = (~np.isnan(parts)).sum(0) / np.nansum(1 / parts, axis=0)
    return {"met": scores["met"], "on_topic": on_topic, "fluent": fluent, "balance": mean}


def check_told(told: Mapping[str, float], task: str) -> None:
    """Warn where told answers say nothing of their questions: then nothing can be a share of that."""
    if told["topic"] <= 0:
        said = f"the told answers of {task!r} say no more of their own questions than of others (topic {told['topic']:+.3f} nats)"
        warnings.warn(
            f"{said}, so `on_topic` is undefined and left out of the balance; ask more questions", stacklevel=4
        )


def balance_table(scores: pd.DataFrame) -> pd.DataFrame:
    """`balance` of every task and condition, with its 95 % interval (bootstrap over queries), n, and the perplexity."""
    names = ["met", "topic", "surprise"]
    means = scores.groupby(["task", "condition", "prompt", "query"], sort=False)[names].mean()  # over draws
    rows = []
    for task in scores["task"].unique():
        told = means.loc[task, "told"]
        check_told(told.mean(), task)
        for condition in scores.loc[scores["task"] == task, "condition"].unique():
            own = means.loc[task, condition]
            asked = own.index.get_level_values("query").tolist()
            both = np.concatenate([own.to_numpy(), told.loc[own.index].to_numpy()], axis=1)
            drawn = resampled_means([both], [asked]).T
            low, high = np.quantile(
                balance(*(dict(zip(names, x)) for x in (drawn[:3], drawn[3:])))["balance"], [0.025, 0.975]
            )
            row = {"task": task, "condition": condition, **balance(own.mean(), told.mean())}
            row |= {"low": low, "high": high, "perplexity": math.exp(own["surprise"].mean()), "n": len(set(asked))}
            rows.append(row)
    return pd.DataFrame(rows).astype(dict.fromkeys(("on_topic", "fluent", "balance"), float))


def score_free(
    backend: Backend,
    task: str,
    asked: Sequence[Sequence[Prompt]],
    conditions: Mapping[Condition, Injection | None],
    unsteered: Unsteered,
    lengths: Mapping[str, int],
) -> list[dict[str, Any]]:
    """Scores of bare questions under each condition, and of told ones with the vector added and subtracted."""
    told: dict[Condition, Injection | None] = {("told", 0): None}
    for (name, draw), injection in conditions.items():
        if name == "vector":
            told |= {("told + vector", draw): injection, ("told − vector", draw): -injection}
        elif name == "random vector":
            told[("told − random vector", draw)] = -injection
    rows = []
    for prompts, some in zip(asked, (conditions, told)):
        answers = written(backend, prompts, some, **lengths)
        for ((condition, draw), texts), each in zip(answers.items(), unsteered.scores(*answers.values())):
            for i, (prompt, text, scores) in enumerate(zip(prompts, texts, each)):
                row = {"task": task, "condition": condition, "draw": draw, "prompt": i, **scores}
                query = prompt.query
                rows.append(
                    row
                    | {"query": same_input(query), "input": query.input, "answer": unsteered.answers[i], "text": text}
                )
    return rows

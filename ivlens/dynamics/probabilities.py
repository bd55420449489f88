"""Knowledge and instruction probability: does the model know the answer, and does it give it in the form asked for?"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from ivlens.common.processes import hidden
from ivlens.common.statistics import bootstrap_mean, sign_flip
from ivlens.common.storage import read_tensors, write_tensors
from ivlens.common.tables import table_html
from ivlens.models.backends import backend_of
from ivlens.running.reading import read_prompts
from ivlens.running.tokens import tokenize
from ivlens.tasks.prompts import Prompt, build_prompts
from ivlens.tasks.suite import as_suite
from ivlens.tasks.task import Example, Task, same_input

__all__ = ["AnswerProbabilities", "answer_probabilities", "compare_probabilities"]

KINDS = ("knowledge", "instruction")
FILE_KIND = "answer probabilities"


@dataclass(frozen=True)
class AnswerProbabilities:
    """Log-probabilities of answers (IV §2), per task [prompt], in nats.

    Attributes
    ----------
    knowledge
        log P(y | x): the answer's content, after the bare question.
    instruction
        log P(y_c | c, x): the answer in the form the instruction asks for, after instruction and query.
    tokens
        Answer tokens behind each, [prompt 2] (knowledge, instruction).
    metadata
        Model and settings, and what each prompt asks (`queries`, by task).
    """

    knowledge: dict[str, Float[Tensor, " prompt"]]
    instruction: dict[str, Float[Tensor, " prompt"]]
    tokens: dict[str, Tensor]
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def task_names(self) -> list[str]:
        return list(self.knowledge)

    def per_token(self, kind: str, task: str) -> Float[Tensor, " prompt"]:
        """Mean log-probability per answer token (nats) of one `kind`, `knowledge` or `instruction`, and `task`."""
        return getattr(self, kind)[task] / self.tokens[task][:, KINDS.index(kind)]

    def _asked(self, task: str) -> Sequence[Any]:
        """What each prompt asks."""
        return self.metadata.get("queries", {}).get(task, range(len(self.knowledge[task])))

    def to_dataframe(self) -> pd.DataFrame:
        """One row per task and kind: mean sequence probability and mean log-probability per token, 95 % bootstrap intervals."""
        rows = []
        for task in self.task_names:
            for kind in KINDS:
                chance, asked = getattr(self, kind)[task].exp().numpy(), self._asked(task)
                low, high = bootstrap_mean([chance], [asked])
                row = {"task": task, "kind": kind, "probability": float(chance.mean()), "low": low, "high": high}
                rows.append({**row, "log_probability": self.per_token(kind, task).mean().item(), "n": len(set(asked))})
        return pd.DataFrame(rows)

    def save(self, path: str | Path) -> Path:
        """Save to `path`, one `.safetensors` file."""
        kinds, tasks = (*KINDS, "tokens"), self.task_names
        tensors = {f"{kind}/{task}": getattr(self, kind)[task] for kind in kinds for task in tasks}
        about = {"kind": FILE_KIND, "tasks": tasks, "metadata": self.metadata}
        return write_tensors(path, tensors, about)

    @classmethod
    def load(cls, path: str | Path) -> AnswerProbabilities:
        """Load from `path` what `save` wrote."""
        tensors, about = read_tensors(path, kind=FILE_KIND)
        parts = ({task: tensors[f"{kind}/{task}"] for task in about["tasks"]} for kind in (*KINDS, "tokens"))
        return cls(*parts, about["metadata"])

    def __repr__(self) -> str:
        return f"AnswerProbabilities\n{self.to_dataframe().round(4).to_string(index=False)}"

    def _repr_html_(self) -> str:
        return table_html(self.to_dataframe().round(4), index=False)


@torch.inference_mode()
def answer_probabilities(
    model: Any,
    tasks: Task | Iterable[Task] | Mapping[str, Task],
    *,
    shots: int = 0,
    instruction: bool | str | int = 0,
    style: str = "qa",
    split: str = "test",
    n_prompts: int | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> AnswerProbabilities:
    """Knowledge probability P(y | x) and instruction probability P(y_c | c, x) of every example (IV §2).

    An example needs a `question` (asked plainly) and a `content` (the answer's text); its `output` is the answer in the form
    the instruction asks for, such as an option letter. Probabilities are of the whole answer, teacher-forced.

    Parameters
    ----------
    model
        A hooked model, such as `load_model` gives.
    tasks
        A task, a list of tasks, or tasks by name, such as `load_tasks` gives.
    shots, instruction, style
        How the prompts look; see `build_prompts`. Those of the bare question have neither demonstrations nor instruction.
    split
        `train`, `valid` or `test`: where the prompts' queries come from.
    n_prompts
        Prompts per task; None for the whole split.
    batch_size
        Prompts per forward pass; None for as many as there is room for. Halved where memory runs out.
    seed
        Of all that is drawn at random; global random states are left alone.
    progress
        Show a progress bar.

    Raises
    ------
    ValueError
        If a task's examples have no question, content or output.
    """
    suite, backend = as_suite(tasks, answered=[split]), backend_of(model)
    found: dict[str, dict[str, Tensor]] = {"knowledge": {}, "instruction": {}, "tokens": {}}
    queries: dict[str, list[str]] = {}
    options: dict[str, Any] = {"instruction": instruction, "style": style, "split": split, "seed": seed}
    with tqdm(total=2 * len(suite), desc="answer probabilities", disable=hidden(progress)) as bar:
        for task in suite.values():
            prompts = build_prompts(task, n=n_prompts, shots=shots, **options)
            queries[task.name], lengths = [same_input(prompt.query) for prompt in prompts], []
            for kind, asked in (("knowledge", [_plain(p) for p in prompts]), ("instruction", prompts)):
                bar.set_postfix_str(f"{task.name}, {kind}")
                rows = tokenize(backend, asked)
                found[kind][task.name] = read_prompts(backend, rows, batch_size=batch_size).scores["log_probability"]
                lengths.append(torch.tensor([len(row.answer) for row in rows]))
                bar.update()
            found["tokens"][task.name] = torch.stack(lengths, dim=1)
    return AnswerProbabilities(**found, metadata={"model": backend.name, "shots": shots, **options, "queries": queries})


def _plain(prompt: Prompt) -> Prompt:
    """The question asked plainly, answered by its content."""
    query = prompt.query
    if not query.question or not query.content:
        needed = "'question' (asked plainly) and 'content' (the answer's text), beside 'input' and 'output'"
        there = f"task {prompt.task!r} has no content answer to {query.input!r}"
        raise ValueError(f"{there}: knowledge probability needs records with {needed}")
    return Prompt(Example(query.question, query.content), style=prompt.style, task=prompt.task)


def compare_probabilities(before: AnswerProbabilities, after: AnswerProbabilities, *, seed: int = 0) -> pd.DataFrame:
    """How far each kind fell, and whether instruction fell further than knowledge: one row per task, and all together.

    Falls are of the mean log-probability per token (nats), prompt by prompt, paired by what they ask; `p` is two-sided from
    flipping the signs of the paired differences (instruction's fall − knowledge's fall) at random. `*_ratio` is the mean
    sequence probability after over before. Our choice.

    Parameters
    ----------
    before, after
        Measured alike, on the same prompts.
    seed
        Of all that is drawn at random; global random states are left alone.
    """
    if before.task_names != after.task_names:
        raise ValueError("before and after cover different tasks; measure both on the same ones")
    recorded = all("queries" in found.metadata for found in (before, after))
    if not recorded:
        warnings.warn("what was asked isn't on record (older files): prompts are paired in their order", stacklevel=2)
    elif (one := _look(before)) != (two := _look(after)):
        raise ValueError(f"before was asked with {one}, after with {two}; measure both alike")
    pairs = {}  # where both asked the same, repeated queries in their order
    for task in before.task_names:
        both = [found._asked(task) if recorded else range(len(found.knowledge[task])) for found in (before, after)]
        if sorted(both[0]) != sorted(both[1]):
            raise ValueError(
                f"before and after asked different prompts of task {task!r}; measure both on the same ones"
            )
        pairs[task] = [sorted(range(len(x)), key=x.__getitem__) for x in both]
    asked = {t: [before._asked(t)[i] for i in pairs[t][0]] for t in pairs}
    falls = {
        kind: {t: (before.per_token(kind, t)[i] - after.per_token(kind, t)[j]).numpy() for t, (i, j) in pairs.items()}
        for kind in KINDS
    }
    rows = []
    for name in [*before.task_names, "all tasks"]:
        tasks = before.task_names if name == "all tasks" else [name]
        queries = [asked[t] for t in tasks]
        row: dict[str, Any] = {"task": name}
        for kind in KINDS:
            values = [falls[kind][t] for t in tasks]
            low, high = bootstrap_mean(values, queries, seed=seed)
            mean = sum(v.mean() for v in values) / len(values)
            chances = [[x[t].exp().mean().item() for t in tasks] for x in (getattr(before, kind), getattr(after, kind))]
            row |= {f"{kind}_fall": mean, f"{kind}_low": low, f"{kind}_high": high}
            row[f"{kind}_ratio"] = sum(chances[1]) / sum(chances[0])
        extra = [falls["instruction"][t] - falls["knowledge"][t] for t in tasks]
        low, high = bootstrap_mean(extra, queries, seed=seed)
        row |= {"difference": sum(v.mean() for v in extra) / len(extra), "low": low, "high": high}
        n = sum(len(set(x)) for x in queries)
        rows.append({**row, "p": sign_flip(extra, queries, seed=seed), "n": n})
    return pd.DataFrame(rows)


def _look(found: AnswerProbabilities) -> dict[str, Any]:
    """What else makes the prompts; the seed where something is drawn."""
    about = found.metadata
    drawn = ("seed",) if about["shots"] or about["instruction"] is True else ()
    return {option: about[option] for option in ("shots", "instruction", "style", *drawn)}

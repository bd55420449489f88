"""Every result shows as a table in a notebook: whole, escaped, a $ no formula, in the page's own colours."""

from __future__ import annotations

import html
import importlib
import re
from pathlib import Path

import pandas as pd
import pytest
import torch

import ivlens as ivl
from ivlens.common.tables import about_html, table_html
from ivlens.continual.plan import Plan
from ivlens.dynamics import Snapshot
from ivlens.models.head import Head
from ivlens.patching import ResidualEffects
from ivlens.steering import InjectionSearch
from tests.test_continual_results import frame, results

NAME = "from $5 to $6 <b> & " + "on and " * 30 + "on"  # of a task, method, checkpoint or model
HEADS = tuple(Head(layer, 0) for layer in range(60))
ROOMS = ("models", "tasks", "patching", "vectors", "steering", "dynamics", "training", "continual")


def vector(layer: int = 3) -> ivl.InstructionVector:
    shares = torch.ones(60, 4)
    about = {"task": NAME, "model": NAME, "projections": [0.5 + i for i in range(150)]}
    return ivl.InstructionVector(shares.sum(0), HEADS, shares, layer=layer, metadata=about)


def snapshot(label: str) -> Snapshot:
    values = {NAME: torch.tensor([1.0, 0.0])}
    return Snapshot(label, 1, {NAME: vector()}, {NAME: torch.ones(4)}, values, values)


def example(kind: str) -> object:
    """One result of every kind, with more rows than pandas shows, where there are rows."""
    if kind == "Task":
        records = [{"input": f"{i}", "output": NAME} for i in range(100)]
        return ivl.Task.from_records(records, name=NAME, instruction=["Go.", NAME])
    if kind == "Evaluation":
        row = {"condition": NAME, "draw": 0, "prompt": 0, "input": "a", "exact_match": 1.0, "text": "b"}
        return ivl.Evaluation(pd.DataFrame([{"task": f"{i}", **row} for i in range(100)]), {"split": NAME})
    if kind == "Recovery":
        rows = [("before", 1.0), ("before + vector", 1.0), ("after", 0.0), ("old vector", 0.5)]
        rows = [{"checkpoint": NAME, "task": f"{i}", "condition": c, "hit": x} for i in range(100) for c, x in rows]
        rows = pd.DataFrame(rows).assign(prompt=0, query="q")
        return ivl.Recovery(rows, rows.rename(columns={"hit": "accuracy"}).assign(layer=1, scale=1.0))
    if kind == "Checkup":
        row = {"asked": True, "added": "", "prompt": 0, "query": "q", "text": "a"}
        skills = [f"{NAME} {i}" for i in range(100)]
        rows = [{"skill": x, "model": m, "hit": 1.0, **row} for x in skills for m in ("before", "after")]
        heads = pd.DataFrame(columns=["skill", "head", "written"])
        about = {"tolerance": 0.05, "skills": {x: {"chance": 0.0, "not_looked_at": ""} for x in skills}}
        return ivl.Checkup(pd.DataFrame(rows), heads, about)
    if kind == "Plan":
        about = {"method": NAME, "seed": 0, "stage": 1, "task": "a", "state": "done", "minutes": 0.0}
        return Plan(pd.DataFrame([about] * 100), 1.0, 1.0)
    if kind == "ContinualResults":
        hits = {NAME: [[1, 2, 3, 6, 7, 4, 5], *([[8, 3, 3, 6, 7, 4, 5]] * 3)]}
        return results(frame(hits), methods=(NAME,))
    return {
        "AnswerProbabilities": lambda: ivl.AnswerProbabilities(
            *({NAME: torch.tensor([-1.0, -2.0])} for _ in range(2)), {NAME: torch.ones(2, 2)}
        ),
        "Change": lambda: ivl.Change((snapshot("base"), *(snapshot(f"{NAME} {i}") for i in range(100)))),
        "Gate": lambda: ivl.Gate(torch.ones(4), torch.zeros(4), 2, 0.5, {"model": NAME, "f1": 1.0, "n": 4}),
        "Generations": lambda: ivl.Generations([NAME] * 100, {NAME: [NAME] * 100}),
        "HeadEffects": lambda: ivl.HeadEffects(
            torch.arange(288.0).view(2, 12, 12), torch.zeros(2), (NAME,) * 2, queries=("a", "b")
        ),
        "InjectionSearch": lambda: InjectionSearch(
            vector(), *(torch.full((100, 2), x) for x in (0.5, 0.25)), 0.1, tuple(range(100)), (1.0, 2.0), 8
        ),
        "InstructionVector": vector,
        "ResidualEffects": lambda: ResidualEffects(torch.rand(2, 60, 2), (-2, -1), NAME),
        "Snapshot": lambda: snapshot(NAME),
        "TaskSuite": lambda: ivl.TaskSuite([example("Task")]),
        "TrainingRun": lambda: ivl.TrainingRun(
            Path("run"),
            {"tasks": [NAME], "base": "b", "method": "lora", "weights": "LoRA", "steps": 100, "batch_size": 1},
            [{"step": float(i), "loss": 1.0} for i in range(100)],
            {},
        ),
    }[kind]()


def kinds() -> list[str]:
    """Classes that a user gets as a result: those that can be saved, drawn, or made a table of."""
    rooms = [importlib.import_module(f"ivlens.{room}") for room in ROOMS]
    public = {name: getattr(place, name) for place in (ivl, *rooms) for name in place.__all__} | {"Plan": Plan}
    shows = [
        x for x in public.values() if isinstance(x, type) and {"save", "plot", "to_dataframe", "table"} & set(vars(x))
    ]
    return sorted({x.__name__ for x in [*shows, ivl.Generations]})


ROWS = dict.fromkeys(("Change", "Checkup", "Evaluation", "Generations", "Plan", "Recovery", "Task", "TrainingRun"), 100)
ROWS |= {"HeadEffects": 144, "InjectionSearch": 100, "ResidualEffects": 120}


@pytest.mark.filterwarnings("ignore")  # so few prompts have no intervals
@pytest.mark.parametrize("kind", kinds())
def test_a_result_shows_whole_in_a_notebook(kind):
    page = example(kind)._repr_html_()
    assert page.startswith('<div class="tex2jax_ignore mathjax_ignore">') and page.endswith("</div>")
    text = html.unescape(re.sub("<[^>]*>", "", page))
    assert NAME in text and "<b>" not in page and "..." not in text and "…" not in text
    assert page.count("<tr") > ROWS.get(kind, 0)
    assert not re.search(r"color|background|#[0-9a-f]{3}\b|rgb", page), "in dark themes, too"


def test_values_of_all_kinds_are_whole():
    about = {"<i>": None, "numbers": [0.123456, *range(200)], "map": {"a": (1.0, Head(3, 4))}, "text": NAME}
    page = html.unescape(about_html(about, title="5 < 6"))
    assert (
        "0.1235, 0, 1," in page and ", 199<" in page and "a: 1, L3H4<" in page and NAME in page and "<p>5 < 6" in page
    )
    wide = pd.DataFrame([list(range(80))] * 300, columns=[f"c{i}" for i in range(80)])
    assert table_html(wide).count("<td>") == 80 * 300 and "overflow: auto" in table_html(wide)
    assert "overflow" not in table_html(wide.head(40))
    assert ", 149]" in table_html(pd.DataFrame({"a": [list(range(150))]}))

"""The demo on a tiny model: its part on the form of answers, and all of it where a model can't take that part."""

from __future__ import annotations

import pytest

import ivlens as ivl
from ivlens import demo
from ivlens.report import write_report
from tests import tiny

pytestmark = pytest.mark.model


@pytest.fixture(scope="module")
def roomy(tokenizer):
    return ivl.load_model(tiny.hf_model("llama", max_position_embeddings=2048), tokenizer=tokenizer)


@pytest.mark.slow
def test_an_instruction_on_the_form_is_located_tuned_scored_and_shown(roomy, tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "CONSTRAINT", "short")  # of which a random model's answers are
    found = demo.Constraint.study(roomy, tmp_path, 0)
    assert found.effects.metric == "log_probability" and len(found.search.best.heads) == 6
    assert found.scores.conditions[:4] == ["no vector", "vector", "random vector", "told"]
    assert ivl.Evaluation.load(tmp_path / "evaluation.json").scores.equals(found.scores.scores)
    assert ivl.InstructionVector.load(tmp_path / "vector") == found.search.best
    for name in (
        "with the vector",
        "without",
        "with a random one",
        "unsteered",
        "less the vector",
        "less a random one",
    ):
        assert f"{name} " in found.summary()
    page = write_report(tmp_path, title="x", sections=[found.section()]).read_text()
    assert all(
        f">{name}</th>" in page for name in ("not told", "told", "with the vector", "random vector", "balance", "low")
    )
    assert page.count('class="figure"') == 3


@pytest.mark.slow
def test_the_demo_goes_through_where_a_model_does_not_follow(roomy, tmp_path):
    """A random model never gives its answers a title."""
    page = demo.run_demo(roomy, tmp_path).read_text()
    assert "How well it works" in page and "Not shown: none of 24 answers to 6 prompts of task" in page
    assert not (tmp_path / "title").exists()

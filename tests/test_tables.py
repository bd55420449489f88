"""Result objects as tables of a notebook, and looking into them by the names that they show."""

import html

import pandas as pd
import pytest

import ivlens as ivl
from ivlens.common.tables import table_html
from ivlens.steering import Generations


def test_texts_are_whole_and_a_dollar_is_no_formula():
    text = "from $5 to $6 <b> " * 9 + "end"
    for page in (
        table_html(pd.DataFrame({"a": [text]}), title="5 < 6"),
        Generations([text], {"no vector": ["short"]})._repr_html_(),
        Generations(["short"], {"no vector": [text]})._repr_html_(),
    ):
        assert page.startswith('<div class="tex2jax_ignore mathjax_ignore">')
        assert page.endswith("</div>")
        assert text.replace("<", "&lt;").replace(">", "&gt;") in page
    assert "<p>5 &lt; 6</p>" in table_html(pd.DataFrame({"a": [1]}), title="5 < 6")
    assert pd.get_option("display.max_colwidth") == 50


def test_plain_generations_are_whole():
    shown = repr(Generations(["p" * 80], {"no vector": ["x" * 90 + "\n"]}))
    assert "p" * 80 in shown
    assert "x" * 90 + "\\n" in shown


def test_the_suites_instructions_are_whole():
    page = html.unescape(ivl.load_tasks()._repr_html_())
    assert all(task.instructions[0] in page for task in ivl.load_tasks().values())


def test_answers_keep_their_lines_and_show_no_markup():
    page = Generations(["Tell me about <b>"], {"+ <i>": ["* one\n* two\n"]})._repr_html_()
    assert "* one<br>* two</td>" in page and "Tell me about &lt;b&gt;" in page and "+ &lt;i&gt;" in page
    assert "<b>" not in page and "<i>" not in page and "\\n" not in page
    shown = ivl.load_tasks(group="formats").to_dataframe()
    assert "output" not in shown and shown["check"]["spanish"] == "language: es"
    assert "check" not in ivl.load_tasks().to_dataframe()


def test_conditions_may_be_typed_in_ascii():
    shown = Generations(["a"], {"no vector": ["n"], "+ vector": ["p"], "− vector": ["m"]})
    for name, text in {"− vector": "m", "- vector": "m", "-vector": "m", "+vector": "p", "no vector": "n"}.items():
        assert shown[name] == [text]
    with pytest.raises(KeyError, match="condition '− vectr' is unknown; did you mean '− vector'"):
        shown["− vectr"]
    both = Generations(["a"], {"- x": ["own"], "− x": ["other"]})
    assert both["- x"] == ["own"] and both["− x"] == ["other"]
    with pytest.raises(KeyError, match="condition '-x' is one of"):
        both["-x"]


def test_rows_of_a_condition_may_be_asked_for_in_ascii():
    rows = [
        {"task": "t", "condition": c, "draw": 0, "prompt": 0, "query": "q", "met": 1.0}
        for c in ("told", "told − vector")
    ]
    found = ivl.Evaluation(pd.DataFrame(rows))
    assert found["told - vector"].index.tolist() == found["told − vector"].index.tolist() == [1]
    hits = pd.DataFrame([{"condition": c, "prompt": 0, "hit": 1.0} for c in ("old vector", "old − new vector")])
    back = ivl.Recovery(hits, pd.DataFrame())
    assert back["old - new vector"].index.tolist() == [1] and back["old vector"].index.tolist() == [0]
    with pytest.raises(KeyError, match=r"condition 'new vector' is unknown; did you mean .*'old vector'"):
        back["new vector"]

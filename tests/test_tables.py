"""Result objects as tables of a notebook."""

import html

import pandas as pd

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

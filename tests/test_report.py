from __future__ import annotations

import json
import os
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest

import ivlens
from ivlens.report import Section, write_figure, write_report
from ivlens.steering.generate import Generations

EVIL = "<script>alert('x')</script><img src=x onerror=alert(1)>"


class Page(HTMLParser):
    """Tags, and the text of table cells, of a page."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.cells: list[tuple[str, str, str]] = []  # tag, class, text
        self.scripts: list[str] = []
        self.open: str = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.open = tag if tag != "span" else self.open
        if tag in ("td", "th"):
            self.cells.append((tag, dict(attrs).get("class") or "", ""))
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag):
        self.open = "" if tag != "span" else self.open

    def handle_data(self, data):
        if self.open in ("td", "th"):
            tag, kind, text = self.cells[-1]
            self.cells[-1] = (tag, kind, text + data)
        elif self.open == "script":
            self.scripts[-1] += data

    def all(self, tag: str) -> list[dict]:
        return [attrs for name, attrs in self.tags if name == tag]


@pytest.fixture
def report(tmp_path):
    """`report(items…)` writes a page with one section and returns its text."""

    def write(*items, **options) -> str:
        options = {"title": "A report", "sections": [Section("One", "Said first.", items)], **options}
        return write_report(tmp_path / "report.html", **options).read_text(encoding="utf-8")

    return write


@pytest.fixture
def figure() -> go.Figure:
    return go.Figure(go.Bar(x=["a"], y=[1.0])).update_layout(title=EVIL, width=600, height=300)


# -- the page ----------------------------------------------------------------------------------------------------------
def test_path_may_be_a_file_or_a_folder(tmp_path):
    sections = [Section("One")]
    assert write_report(tmp_path / "deep" / "a.html", title="t", sections=sections) == tmp_path / "deep" / "a.html"
    path = write_report(str(tmp_path / "folder"), title="t", sections=sections)
    assert path == tmp_path / "folder" / "report.html" and path.is_file()


def test_contents_lead_to_the_sections(report):
    page = Page(report(sections=[Section("One"), Section("Two & three")]))
    targets = [a["href"] for a in page.all("a")]
    assert targets == ["#" + s["id"] for s in page.all("section")] and len(targets) == 2


def test_about_and_version_stand_at_the_end(report):
    text = report(about={"model": "smollm2", "shots": "0"}, summary="In short.")
    assert f"ivlens {ivlens.__version__}" in text
    assert [c[2] for c in Page(text).cells] == ["model", "smollm2", "shots", "0"]
    assert "<p>In short.</p>" in text and "<p>Said first.</p>" in text


def test_paragraphs(report):
    text = report("one\n\ntwo\nlines")
    assert "<p>one</p><p>two\nlines</p>" in text


def test_markup_is_escaped_everywhere(report):
    frame = pd.DataFrame({EVIL: [EVIL]}, index=pd.Index([EVIL], name=EVIL))
    generations = Generations([EVIL], {EVIL: [EVIL], "− " + EVIL: [EVIL]})
    text = report(
        title=EVIL,
        summary=EVIL,
        sections=[Section(EVIL, EVIL, [EVIL, frame, generations])],
        about={EVIL: EVIL},
    )
    page = Page(text)
    assert not page.all("script") and not page.all("img")
    assert "<script" not in text and text.count("&lt;script&gt;") >= 15


def test_items_are_checked():
    with pytest.raises(TypeError, match="pass a list"):
        Section("One", items="a paragraph")
    with pytest.raises(TypeError, match=r"dict.*DataFrame"):
        Section("One", items=[{"a": 1}])


# -- figures -----------------------------------------------------------------------------------------------------------
def test_plotly_is_embedded_once_and_only_for_figures(report, figure):
    assert not Page(report("no figure")).all("script")
    text = report(figure, figure)
    scripts = Page(text).scripts
    assert sum(len(script) > 1e6 for script in scripts) == 1
    assert len(re.findall(r"Plotly\.newPlot\(", text.replace(max(scripts, key=len), ""))) == 2
    ids = [a["id"] for a in Page(text).all("div") if a.get("class") == "plotly-graph-div"]
    assert len(set(ids)) == 2


def test_page_asks_for_nothing(report, figure):
    text = report(figure)
    page = Page(text)
    for tag, attrs in page.tags:
        assert "src" not in attrs and tag not in ("link", "iframe", "object", "embed")
        assert not attrs.get("href", "#").startswith("http")
    assert "@import" not in text.replace(max(page.scripts, key=len), "") and "@font-face" not in text
    (policy,) = [a["content"] for a in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none'") and "http" not in policy


def test_figures_are_responsive_and_unchanged(report, figure):
    before = figure.to_json()
    text = report(figure)
    drawn = next(s for s in Page(text).scripts if "newPlot" in s and len(s) < 1e6)
    assert '"responsive": true' in drawn and '"autosize":true' in drawn and '"width":600' not in drawn
    assert any("width:600px" in a.get("style", "") for a in Page(text).all("div"))
    assert "sendChartToCloud" not in drawn and '"modeBarButtons": [["toImage"]]' in drawn
    assert figure.to_json() == before


def test_script_cannot_break_out_of_a_figure(report, figure):
    drawn = Page(report(figure)).scripts
    assert not any("alert('x')</script>" in script for script in drawn)
    assert sum("newPlot" in s and "alert" in s for s in drawn if len(s) < 1e6) == 1  # the title is data


# -- tables ------------------------------------------------------------------------------------------------------------
def cells(text: str) -> list[tuple[str, str]]:
    return [(kind, said) for tag, kind, said in Page(text).cells if tag == "td"]


def test_numbers_are_rounded_and_on_the_right(report):
    frame = pd.DataFrame({"name": ["a"], "n": [12], "x": [0.123456], "p": [0.0000123], "zero": [0.0], "none": [np.nan]})
    assert cells(report(frame)) == [
        ("", "a"),
        ("n", "12"),
        ("n", "0.123"),
        ("n", "1.2e-05"),
        ("n", "0.000"),
        ("", "–"),
    ]


def test_index_is_shown_where_it_says_something(report):
    frame = pd.DataFrame({"x": [1.5, 2.0]})
    assert [said for _, said in cells(report(frame))] == ["1.500", "2.000"]
    assert [said for _, said in cells(report(frame.set_index(pd.Index(["a", "b"]))))] == ["a", "1.500", "b", "2.000"]
    both = pd.MultiIndex.from_tuples([("a", "vector"), ("a", "none")], names=["task", "x"])
    page = Page(report(frame.set_index(both)))
    assert [said for tag, _, said in page.cells if tag == "th"] == ["task", "x", "x"]
    assert [said for tag, _, said in page.cells if tag == "td"][:3] == ["a", "vector", "1.500"]


def test_columns_of_several_levels_and_empty_tables(report):
    frame = pd.DataFrame([[1, 2]], columns=pd.MultiIndex.from_tuples([("a", "b"), ("a", "c")]))
    assert [said for tag, _, said in Page(report(frame)).cells if tag == "th"] == ["a · b", "a · c"]
    assert cells(report(pd.DataFrame({"a": []}))) == []


def test_generations_keep_line_breaks_and_tint_steered_columns(report):
    generations = Generations(["Q: walk\nA:"], {"no vector": [""], "+ vector": [" walked\n"], "− vector": [" walk"]})
    assert cells(report(generations)) == [
        ("text ", "Q: walk\nA:"),
        ("text ", ""),
        ("text steered", " walked\n"),
        ("text steered minus", " walk"),
    ]
    text = report(generations)
    style = text[text.index("<style>") : text.index("</style>")]
    assert re.search(r"td\.text \{[^}]*monospace[^}]*white-space: pre-wrap", style)
    assert text.count('<span class="break"></span>\n') == 2


# -- images ------------------------------------------------------------------------------------------------------------
def _kaleido(folder: Path, monkeypatch, body: str) -> None:
    """A kaleido in the place of the real one; images are drawn in a process of their own."""
    (folder / "lib").mkdir()
    code = f"import json, sys\ndef calc_fig_sync(figure, *, opts, kopts):\n    {body}\n"
    (folder / "lib" / "kaleido.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(folder / "lib"))


def test_figure_is_written_by_kaleido(tmp_path, figure, monkeypatch):
    _kaleido(tmp_path, monkeypatch, "return json.dumps([figure, opts, kopts]).encode()")
    path = write_figure(figure, tmp_path / "deep" / "a.svg", scale=3)
    given, options, settings = json.loads(path.read_bytes())
    assert given["data"] == json.loads(figure.to_json())["data"]
    assert options == {"format": "svg", "width": 600, "height": 300, "scale": 3}
    assert settings == {"mathjax": False}


def test_what_to_install_is_said(tmp_path, figure, monkeypatch):
    _kaleido(tmp_path, monkeypatch, "raise RuntimeError('no browser')")
    with pytest.raises(RuntimeError, match=r"Chrome or Chromium.*no browser.*plotly_get_chrome.*BROWSER_PATH"):
        write_figure(figure, tmp_path / "a.png")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match="pip install 'kaleido"):
        write_figure(figure, tmp_path / "a.png")
    assert not (tmp_path / "a.png").exists()


@pytest.mark.skipif(os.name == "nt", reason="the browser is a shell script")
@pytest.mark.slow
def test_a_silent_browser_is_given_up_and_ended(tmp_path, figure, monkeypatch):
    import psutil

    from ivlens.plots import image

    browser = tmp_path / "browser"
    browser.write_text("#!/bin/sh\necho here >$0.log\nsleep 98765\n")
    browser.chmod(0o755)
    monkeypatch.setenv("BROWSER_PATH", str(browser))
    monkeypatch.setattr(image, "PATIENCE", 4)
    with pytest.raises(RuntimeError, match="answer within 4 s"):
        write_figure(figure, tmp_path / "a.png")
    assert (tmp_path / "browser.log").exists()
    lines = [" ".join(p.info["cmdline"] or ()) for p in psutil.process_iter(["cmdline"])]
    assert not [line for line in lines if str(browser) in line or "sleep 98765" in line]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["browser", "browser.log"]


def test_image_formats_are_checked(tmp_path, figure):
    with pytest.raises(ValueError, match=r"\.png, \.svg"):
        write_figure(figure, tmp_path / "a.gif")


@pytest.mark.slow
def test_png_where_a_browser_is_there(tmp_path, figure):
    try:
        path = write_figure(figure, tmp_path / "a.png")
    except RuntimeError as error:
        pytest.skip(str(error))
    assert path.read_bytes().startswith(b"\x89PNG")

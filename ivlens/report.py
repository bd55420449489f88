"""A report as one HTML file that needs nothing else: no network, no fonts, no other files."""

from __future__ import annotations

import html
import importlib.util
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import plotly.graph_objects as go

from ivlens import __version__
from ivlens.common.storage import write_text
from ivlens.plots.image import draw
from ivlens.steering.generate import Generations

if TYPE_CHECKING:
    from ivlens.steering.evaluation import Evaluation

__all__ = ["Section", "side_by_side", "write_figure", "write_report"]

# Of plotly's buttons only the one that saves an image; others send the figure to a web site. Dragging zooms anyway.
CONFIG = {"responsive": True, "displaylogo": False, "modeBarButtons": [["toImage"]]}
ITEMS = (str, go.Figure, pd.DataFrame, Generations)
UNSTEERED = ("no vector", "not told", "told", "random vector")  # columns without a tint
COLUMNS = {"no vector": "not told", "told": "told", "vector": "with the vector", "random vector": "random vector"}
SIDE_BY_SIDE = (
    "The first test questions as they come, none chosen; ✓ where the answer meets its constraint, ✗ where it doesn't."
)
BALANCE = (
    "On topic and fluent are shares of what told answers reach; the balance is the harmonic mean of the three. An answer "
    "that says nothing any more may still meet its constraint; the balance shows it."
)
FORMATS = ("png", "svg", "pdf", "jpg", "jpeg", "webp")


@dataclass(frozen=True)
class Section:
    """Part of a report.

    Attributes
    ----------
    title
        Its heading, also in the contents.
    text
        Said first; an empty line starts a new paragraph.
    items
        Shown below it, in order: figures, tables, generations, and strings, which are paragraphs too.
    """

    title: str
    text: str = ""
    items: Sequence[go.Figure | pd.DataFrame | Generations | str] = ()

    def __post_init__(self) -> None:
        if isinstance(self.items, ITEMS):
            raise TypeError(f"items of section {self.title!r} is a single {type(self.items).__name__}; pass a list")
        for item in self.items:
            if not isinstance(item, ITEMS):
                what = "pass a plotly figure, a DataFrame, Generations or a string"
                raise TypeError(f"section {self.title!r} can't show a {type(item).__name__}; {what}")


def write_report(
    path: str | Path,
    *,
    title: str,
    sections: Sequence[Section],
    summary: str = "",
    about: Mapping[str, str] | None = None,
) -> Path:
    """Write a report that can be opened offline, mailed and archived, and return its path.

    Parameters
    ----------
    path
        An `.html` file, or a folder to write `report.html` into.
    title
        Of the page.
    sections
        In order.
    summary
        Said before everything else.
    about
        Model and settings, shown at the end.
    """
    path = Path(path)
    if path.suffix.lower() not in (".html", ".htm"):
        path = path / "report.html"
    titles = [f'<li><a href="#section-{i}">{_escape(s.title)}</a></li>' for i, s in enumerate(sections, start=1)]
    contents = f'<nav aria-label="Contents"><h2>Contents</h2><ol>{"".join(titles)}</ol></nav>\n' if titles else ""
    body = "".join(_section(i, section) for i, section in enumerate(sections, start=1))
    rows = "".join(f"<tr><th>{_escape(k)}</th><td>{_escape(v)}</td></tr>" for k, v in (about or {}).items())
    table = f'<div class="scroll"><table class="about"><tbody>{rows}</tbody></table></div>'
    settings = f"<h2>About</h2>{table}" if rows else ""
    script = ""
    if any(isinstance(item, go.Figure) for section in sections for item in section.items):
        from plotly.offline import get_plotlyjs

        script = f"<script>{get_plotlyjs()}</script>"
    page = (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n{POLICY}\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_escape(title)}</title>\n<style>{STYLE}</style>\n{script}\n</head>\n<body>\n<main>\n"
        f"<header><h1>{_escape(title)}</h1>{_paragraphs(summary)}</header>\n"
        f"{contents}{body}<footer>{settings}<p>Made with ivlens {_escape(__version__)}.</p></footer>\n"
        "</main>\n</body>\n</html>\n"
    )
    return write_text(path, page)


def side_by_side(evaluation: Evaluation, task: str, *, n: int = 8) -> Generations:
    """Free answers to the first questions: not told, told, with the vector and with a random one, each marked as met or not."""
    marks = evaluation.scores["met"].map({1.0: "✓ ", 0.0: "✗ "})
    marked = replace(evaluation, scores=evaluation.scores.assign(text=marks + evaluation.scores["text"])).answers(task)
    return Generations(
        marked.prompts[:n], {name: marked[key][:n] for key, name in COLUMNS.items() if key in marked.texts}
    )


def write_figure(figure: go.Figure, path: str | Path, *, scale: float = 2.0) -> Path:
    """Write a figure as an image, by kaleido, and return its path. The ending chooses the format: png, svg, pdf, …

    Parameters
    ----------
    scale
        Pixels of the image per pixel of the figure.

    Raises
    ------
    RuntimeError
        Without kaleido or a browser that it can use, or where that doesn't answer
        within 30 seconds. `figure.write_html` and `write_report` need neither.
    """
    path = Path(path)
    ending = path.suffix.lower().lstrip(".")
    if ending not in FORMATS:
        raise ValueError(f"path={str(path)!r} must end in one of {', '.join('.' + f for f in FORMATS)}")
    if importlib.util.find_spec("kaleido") is None:
        raise RuntimeError(f"can't write {path.name}: images need kaleido; install it: pip install 'kaleido>=1'")
    layout = figure.layout
    options = {"format": ending, "scale": scale, "width": layout.width or 900, "height": layout.height or 560}
    try:
        image = draw(figure, options)
    except Exception as error:
        raise RuntimeError(
            f"can't write {path.name}: kaleido needs a Chrome or Chromium browser and found none that works ({error}). "
            "Install one, by plotly_get_chrome or the system's package manager (apt install chromium), or name one in "
            "the environment variable BROWSER_PATH. figure.write_html and ivl.write_report need no browser."
        ) from error
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(image)
    return path


# -- parts of the page -------------------------------------------------------------------------------------------------
def _escape(text: Any) -> str:
    return html.escape(str(text))


def _paragraphs(text: str) -> str:
    parts = (part.strip() for part in str(text).split("\n\n"))
    return "".join(f"<p>{_escape(part)}</p>" for part in parts if part)


def _section(number: int, section: Section) -> str:
    items = "".join(_item(item, f"figure-{number}-{i}") for i, item in enumerate(section.items, start=1))
    head = f"<h2>{_escape(section.title)}</h2>{_paragraphs(section.text)}"
    return f'<section id="section-{number}">{head}{items}</section>\n'


def _item(item: Any, name: str) -> str:
    if isinstance(item, str):
        return _paragraphs(item)
    if isinstance(item, Generations):
        return _generations(item)
    if isinstance(item, pd.DataFrame):
        return _table(item)
    return _figure(item, name)


def _figure(figure: go.Figure, name: str) -> str:
    """As wide as the figure was made, narrower where the page is."""
    width = figure.layout.width or 900
    size = f"width:{width:.0f}px;min-width:{min(width, max(430, 0.8 * width)):.0f}px"  # on a phone, scroll
    figure = go.Figure(figure).update_layout(width=None, autosize=True)
    inner = figure.to_html(full_html=False, include_plotlyjs=False, div_id=name, config=CONFIG)
    return f'<div class="scroll"><div class="figure" style="{size}">{inner}</div></div>'


def _table(frame: pd.DataFrame) -> str:
    """Every cell escaped, numbers rounded and on the right. The index is shown where it says something."""
    if not isinstance(frame.index, pd.RangeIndex) or frame.index.name is not None:
        index = frame.index.to_frame(index=False)
        index.columns = ["" if name is None else name for name in frame.index.names]
        frame = pd.concat([index, frame.reset_index(drop=True)], axis=1)
    names = [" · ".join(map(str, name)) if isinstance(name, tuple) else str(name) for name in frame.columns]
    columns = [frame.iloc[:, i].tolist() for i in range(len(names))]
    kinds = [' class="n"' if _is_numeric(column) else "" for column in columns]
    cells = [[f"<td{kind}>{_cell(x)}</td>" for x in column] for column, kind in zip(columns, kinds, strict=True)]
    head = [f"<th{kind}>{_escape(name)}</th>" for name, kind in zip(names, kinds, strict=True)]
    return f'<div class="scroll tall">{_rows(head, cells)}</div>'


def _rows(head: Sequence[str], columns: Sequence[Sequence[str]], kind: str = "") -> str:
    rows = "".join(f"<tr>{''.join(row)}</tr>" for row in zip(*columns, strict=True))
    return f"<table{kind}><thead><tr>{''.join(head)}</tr></thead><tbody>{rows}</tbody></table>"


def _is_numeric(column: Sequence[Any]) -> bool:
    known = [x for x in column if not _missing(x)]
    return bool(known) and all(isinstance(x, numbers.Number) and not isinstance(x, bool) for x in known)


def _missing(x: Any) -> bool:
    return x is None or x is pd.NA or x is pd.NaT or (isinstance(x, numbers.Real) and x != x)


def _cell(x: Any) -> str:
    if _missing(x):
        return "–"
    if isinstance(x, numbers.Real) and not isinstance(x, numbers.Integral):
        size = abs(float(x))  # three decimals, or an exponent where those would say nothing
        return f"{float(x):.1e}" if 0 < size < 0.0005 or size >= 1e7 else f"{float(x):.3f}"
    return _escape(x)


def _generations(generations: Generations) -> str:
    """Side by side, line breaks kept, steered columns tinted."""
    columns = [("prompt", "", generations.prompts)]
    tints = {n: "steered minus" if n.startswith(("−", "-")) else "steered" for n in generations.texts}
    tints |= dict.fromkeys(UNSTEERED, "")
    columns += [(name, tints[name], texts) for name, texts in generations.texts.items()]
    head = [f'<th class="{tint}">{_escape(name)}</th>' for name, tint, _ in columns]
    cells = [[f'<td class="text {tint}">{_lines(text)}</td>' for text in texts] for _, tint, texts in columns]
    table = _rows(head, cells, ' class="generations"')
    return f'<div class="scroll">{table}</div>'


def _lines(text: str) -> str:
    return _escape(text).replace("\n", '<span class="break"></span>\n')


# The browser itself is told to fetch nothing. Some of plotly's traces make functions from text, hence unsafe-eval.
POLICY = (
    "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; script-src 'unsafe-inline' "
    "'unsafe-eval'; style-src 'unsafe-inline'; img-src data: blob:; font-src data:; worker-src blob:\">"
)

STYLE = """
:root { color-scheme: light dark; --ink: #1f2328; --faint: #59636e; --line: #d9dde2; --page: #fff; --band: #f4f6f8;
  --link: #0b5cad; --plus: #e3f0fb; --minus: #fdebe2; }
@media (prefers-color-scheme: dark) { :root { --ink: #e2e5e9; --faint: #9aa4af; --line: #3a424b; --page: #16191d;
  --band: #20252b; --link: #79b8ff; --plus: #16324a; --minus: #47281a; } }
* { box-sizing: border-box; }
body { margin: 0; color: var(--ink); background: var(--page);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1000px; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .75rem; overflow-wrap: anywhere; }
h2 { font-size: 1.3rem; line-height: 1.3; margin: 0 0 .6rem; overflow-wrap: anywhere; }
section { margin-top: 2.6rem; padding-top: 1.4rem; border-top: 1px solid var(--line); }
p { max-width: 46rem; margin: 0 0 .9rem; white-space: pre-line; overflow-wrap: anywhere; }
header p { font-size: 1.1rem; color: var(--faint); }
a { color: var(--link); text-decoration: none; } a:hover { text-decoration: underline; }
nav { margin-top: 1.4rem; padding: .9rem 1.2rem; background: var(--band); border-radius: 8px; }
nav h2 { font-size: .85rem; color: var(--faint); margin: 0 0 .3rem; } nav ol { margin: 0; padding-left: 1.3rem; }
.scroll { overflow-x: auto; margin: 0 0 1.4rem; } .tall { max-height: 32rem; overflow-y: auto; }
.figure { max-width: 100%; background: #fff; border-radius: 6px; overflow: hidden; }
table { border-collapse: collapse; font-size: .9rem; line-height: 1.4; }
th, td { padding: .32rem .75rem; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line); }
thead th { position: sticky; top: 0; background: var(--band); font-weight: 600; white-space: nowrap; }
.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.generations { width: 100%; }
td.text { font: .85rem/1.45 ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace;
  white-space: pre-wrap; overflow-wrap: anywhere; min-width: 9rem; }
td.text:empty::after { content: "(nothing)"; color: var(--faint); font-style: italic; }
.break::after { content: "\\21B5"; color: var(--faint); opacity: .7; }
.steered { background: var(--plus); } .steered.minus { background: var(--minus); }
thead th.steered { background: var(--plus); } thead th.steered.minus { background: var(--minus); }
footer { margin-top: 3rem; padding-top: 1.2rem; border-top: 1px solid var(--line); color: var(--faint);
  font-size: .9rem; }
.about { margin-bottom: 1rem; } .about th { font-weight: 600; white-space: nowrap; }
.about td { overflow-wrap: anywhere; }
@media print { main { max-width: none; padding: 0; } .tall { max-height: none; } nav { display: none; }
  .figure, tr { break-inside: avoid; } }
"""

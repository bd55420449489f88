"""Pages of the documentation from the notebooks as they are kept, with live figures, and a gallery of these: docs/notebooks/, which git
leaves out.

python notebooks/pages.py        # `make docs` does
"""

from __future__ import annotations

import base64
from dataclasses import dataclass
from pathlib import Path

import nbformat
import plotly.graph_objects as go
from nbconvert import MarkdownExporter
from plotly.offline import get_plotlyjs

PLOTLY = "application/vnd.plotly.v1+json"
ROOT = Path(__file__).parent
PAGES = ROOT.parent / "docs" / "notebooks"
SCRIPT = '<script src="plotly.min.js"></script>\n\n'  # of the site itself: nothing is fetched from elsewhere
GALLERY = "# Figures, and the lines that make them\n\nEach stands in a notebook; click it to see it there, live.\n"


@dataclass
class Figure:
    """A notebook's figure: its name, the cell that makes it, and how it looks."""

    name: str
    source: str
    png: bytes


def page(path: Path) -> tuple[str, list[Figure]]:
    """One notebook as Markdown, in which the browser draws the figures; and these."""
    notebook, figures = nbformat.read(path, as_version=4), []
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            data = output.get("data", {})
            if PLOTLY in data:
                name = f"{path.stem}-{len(figures) + 1}"
                figures.append(Figure(name, cell.source, base64.b64decode(data["image/png"])))
                drawn = go.Figure({key: data[PLOTLY][key] for key in ("data", "layout")})
                html = drawn.to_html(full_html=False, include_plotlyjs=False)
                output.data = {"text/html": f'<div id="{name}">{html}</div>'}
            elif "text/html" in data:
                output.data = {"text/html": f"<div>{data['text/html']}</div>"}
    text, _ = MarkdownExporter().from_notebook_node(notebook)
    return SCRIPT + text.replace("](../docs/", "](../"), figures


def main() -> None:
    PAGES.mkdir(exist_ok=True)
    (PAGES / "plotly.min.js").write_text(get_plotlyjs(), encoding="utf-8")
    gallery = [GALLERY]
    for path in sorted(ROOT.glob("*.ipynb")):
        text, figures = page(path)
        (PAGES / f"{path.stem}.md").write_text(text, encoding="utf-8")
        for figure in figures:
            (PAGES / f"{figure.name}.png").write_bytes(figure.png)
            link = f"[![{figure.name}]({figure.name}.png)]({path.stem}.md#{figure.name})"
            gallery.append(f"{link}\n\n```python\n{figure.source}\n```\n")
        print(f"{path.stem}: {len(figures)} figures")
    (PAGES / "gallery.md").write_text("\n".join(gallery), encoding="utf-8")


if __name__ == "__main__":
    main()

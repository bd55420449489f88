"""Pages of the documentation from the notebooks as they are kept, with live figures: docs/notebooks/*.md, which git leaves out.

python notebooks/pages.py        # `make docs` does
"""

from __future__ import annotations

from pathlib import Path

import nbformat
import plotly.graph_objects as go
from nbconvert import MarkdownExporter
from plotly.offline import get_plotlyjs

PLOTLY = "application/vnd.plotly.v1+json"
ROOT = Path(__file__).parent
PAGES = ROOT.parent / "docs" / "notebooks"
SCRIPT = '<script src="../plotly.min.js"></script>\n\n'  # of the site itself: nothing is fetched from elsewhere


def page(path: Path) -> str:
    """One notebook as Markdown; its figures are drawn by the browser."""
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            if PLOTLY in (data := output.get("data", {})):
                figure = go.Figure({key: data[PLOTLY][key] for key in ("data", "layout")})
                output.data = {"text/html": figure.to_html(full_html=False, include_plotlyjs=False)}
            elif "text/html" in data:
                output.data = {"text/html": f"<div>{data['text/html']}</div>"}
    text, _ = MarkdownExporter().from_notebook_node(notebook)
    return SCRIPT + text.replace("](../docs/", "](../")


def main() -> None:
    PAGES.mkdir(exist_ok=True)
    (PAGES / "plotly.min.js").write_text(get_plotlyjs(), encoding="utf-8")
    for path in sorted(ROOT.glob("*.ipynb")):
        (PAGES / f"{path.stem}.md").write_text(page(path), encoding="utf-8")
        print(PAGES / f"{path.stem}.md")


if __name__ == "__main__":
    main()

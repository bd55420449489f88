"""Run notebooks and keep what they show: figures as plotly's own and beside it as PNG, which GitHub and printers can show.

python notebooks/execute.py [NOTEBOOK ...]        # all of them by default, which takes long
"""

from __future__ import annotations

import base64
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import nbformat
import plotly.graph_objects as go
from nbclient import NotebookClient

from ivlens.plots.image import draw

PLOTLY, WIDGET = "application/vnd.plotly.v1+json", "application/vnd.jupyter.widget-view+json"
MOST = 1_000_000  # bytes of a notebook


def execute(path: Path) -> None:
    """Run one in its place; it is written only where all cells went through and it isn't too large."""
    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as folder:  # where a notebook's own files go
        where = {"metadata": {"path": folder}}
        NotebookClient(notebook, timeout=None, resources=where, store_widget_state=False).execute()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in map(_kept, cell.outputs) if output is not None]
            cell.metadata.pop("execution", None)
    text = nbformat.writes(notebook) + "\n"
    if (size := len(text.encode())) > MOST:
        raise ValueError(
            f"{path.name} would have {size / 1e6:.1f} MB, more than {MOST / 1e6:.0f}; show smaller figures"
        )
    path.write_text(text, encoding="utf-8")
    print(f"{path.name}: {size / 1e3:.0f} kB")


def _kept(output: Any) -> Any:
    """Without bars of progress and warnings on the way."""
    data = output.get("data", {})
    if (output.output_type == "stream" and output.name == "stderr") or WIDGET in data:
        return None
    if PLOTLY in data:
        figure = go.Figure({key: data[PLOTLY][key] for key in ("data", "layout")})
        output.data = {PLOTLY: data[PLOTLY], "image/png": base64.b64encode(draw(figure, {"format": "png"})).decode()}
    return output


if __name__ == "__main__":
    os.environ["PLOTLY_RENDERER"] = "plotly_mimetype"
    for given in map(Path, sys.argv[1:] or sorted(Path(__file__).parent.glob("*.ipynb"))):
        execute(given)

"""The notebooks run from top to bottom, are kept with what they show, and become pages of the documentation."""

import base64
import importlib
import os
from pathlib import Path

import pytest

PLOTLY = "application/vnd.plotly.v1+json"
NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))
# Where a notebook has a cell tagged `parameters`, it is run with these instead.
SMALL = {
    "01_locate_and_steer": {"N_EFFECTS": 2, "N_PROMPTS": 4, "LAYERS": [9, 18, 27]},
    "02_before_and_after": {"N_PROMPTS": 4, "STEPS": 10},
    "03_train_without_forgetting": {"STEPS": 2, "N_PROMPTS": 4, "N_EFFECTS": 1, "METHODS": ["lora", "iv"]},
    "04_format_instructions": {
        "N_PROMPTS": 3,
        "N_MEAN": 6,
        "N_VALID": 2,
        "N_TEST": 2,
        "LAYERS": [22],
        "SCALES": [4.0],
    },
}
# Put after the cell that makes `vectors`: the sequence takes these, and doesn't extract them again after every stage.
TAKEN = """from ivlens.continual import vectors as made
made.base_vectors = lambda *args, **options: vectors
made.similarities = lambda *args: dict.fromkeys(vectors, 1.0)"""
LONG = ("04_format_instructions",)


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs_and_shows_something_in_its_last_cell(path, tmp_path, monkeypatch):
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    if path.stem in LONG and "IVLENS_LONG_TESTS" not in os.environ:
        pytest.skip("takes more than six minutes; set IVLENS_LONG_TESTS=1 to run it")
    notebook = nbformat.read(path, as_version=4)
    tagged = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ())]
    assert len(tagged) == (path.stem in SMALL)
    for cell in tagged:
        cell.source += "".join(f"\nassert {name}\n{name} = {value!r}" for name, value in SMALL[path.stem].items())
    after = [i for i, cell in enumerate(notebook.cells) if "vectors[name] = search.best" in cell.source]
    for i in after:
        notebook.cells.insert(i + 1, nbformat.v4.new_code_cell(TAKEN))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # the other test process works beside it
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in cells)
    assert cells[-1].outputs


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_kept_with_its_outputs_each_figure_as_a_picture_too(path):
    nbformat = pytest.importorskip("nbformat")
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    shown = [output for cell in cells for output in cell.outputs]
    figures = [x.data for x in shown if PLOTLY in x.get("data", {})]
    assert figures and not [x for x in shown if x.output_type == "error"]
    assert all(base64.b64decode(data["image/png"]).startswith(b"\x89PNG") for data in figures)
    assert path.stat().st_size < 1_000_000


def test_a_page_has_the_live_figure_and_the_cell_that_made_it(tmp_path, monkeypatch):
    nbformat = pytest.importorskip("nbformat")
    pytest.importorskip("nbconvert")
    monkeypatch.syspath_prepend(NOTEBOOKS[0].parent)
    pages = importlib.import_module("pages")
    png = base64.b64encode(b"picture").decode()
    drawn = {"data": [{"type": "bar", "y": [7]}], "layout": {"title": {"text": "seven"}}}
    output = nbformat.v4.new_output("display_data", {PLOTLY: drawn, "image/png": png})
    cells = [
        nbformat.v4.new_markdown_cell("# Seven\n\nsee [findings](../docs/findings.md)"),
        nbformat.v4.new_code_cell("bars(7)", outputs=[output]),
    ]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "a.ipynb")
    text, (figure,) = pages.page(tmp_path / "a.ipynb")
    assert (figure.name, figure.source, figure.png) == ("a-1", "bars(7)", b"picture")
    assert '<div id="a-1">' in text and "Plotly.newPlot" in text and '"seven"' in text
    assert "[findings](../findings.md)" in text and "cdn" not in text.lower()


@pytest.mark.slow
@pytest.mark.parametrize("widgets", [False, True])
def test_bars_in_a_kernel_need_no_widgets_and_print_no_warning(widgets):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    if widgets:
        pytest.importorskip("ipywidgets")
    block = "" if widgets else "import sys; sys.modules['ipywidgets'] = None"
    source = (
        "import ivlens as ivl\nfrom ivlens.running.reading import tqdm\nfor _ in tqdm(range(3), desc='some bar'): pass"
    )
    cells = [nbformat.v4.new_code_cell(text) for text in (block, source)]
    notebook = nbformat.v4.new_notebook(cells=cells)
    nbclient.NotebookClient(notebook, timeout=600).execute()
    shown = notebook.cells[1].outputs
    text = str(shown)
    assert "Warning" not in text and "IProgress" not in text
    assert ("widget-view" in text) == widgets and ("some bar" in text or widgets)

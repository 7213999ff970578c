"""The site: its notebooks run as they stand, and its reference has the whole public interface."""

import io
import json
import re
from pathlib import Path

import matplotlib.image
import pytest

import metadyn
from metadyn import figures

DOCS = Path(__file__).parent.parent / "docs"
NOTEBOOKS = sorted((DOCS / "tutorials").glob("*.ipynb"))


def test_there_are_five_tutorials():
    assert len(NOTEBOOKS) == 5
    navigation = (DOCS.parent / "mkdocs.yml").read_text()
    assert all(f"tutorials/{path.name}" in navigation for path in NOTEBOOKS)


@pytest.mark.slow  # the strict build of the site runs them too, and fails where one does
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_from_top_to_bottom(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    matplotlib.use("agg")
    cells = [c for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code"]
    assert not any(cell["outputs"] for cell in cells)  # the site's build adds outputs
    scope = {"__name__": "notebook"}
    monkeypatch.setitem(__import__("sys").modules, "notebook", type(metadyn)("notebook"))
    for i, cell in enumerate(cells):
        exec(compile("".join(cell["source"]), f"{path.name}, cell {i + 1}", "exec"), scope)


def test_a_notebook_shows_a_figure_that_a_cell_ends_with():
    figure, (axis,) = figures.grid(1, width=2, height=1.5)
    axis.plot([0, 1])
    picture = matplotlib.image.imread(io.BytesIO(figure._repr_png_()))
    assert picture.shape[:2] == (150, 200)
    assert picture.std() > 0.02


def test_the_reference_has_the_whole_public_interface():
    pages = "".join(page.read_text() for page in (DOCS / "reference").glob("*.md"))
    shown = set(re.findall(r"^::: ([\w.]+)$", pages, re.MULTILINE))
    for name in metadyn.__all__:
        module = getattr(metadyn, name).__module__
        assert {module, f"{module}.{name}"} & shown, name

"""``notebooks/quickstart.ipynb`` runs, and says nothing of the machine that it was written on."""

import ast
import json
import re
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from PIL import Image

import clipward
from clipward.cli.app import load_studio

NOTEBOOK = ROOT / "notebooks/quickstart.ipynb"
BOOK = json.loads(NOTEBOOK.read_text())
CODE = [cell for cell in BOOK["cells"] if cell["cell_type"] == "code"]


def source(cell: dict) -> str:
    return re.sub(r"%pip", "pass #", "".join(cell["source"]))


def test_the_notebook_is_kept_without_outputs() -> None:
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in CODE)
    assert not re.search(r"/(root|home|tmp|work|Users)/", NOTEBOOK.read_text())
    assert len({cell["id"] for cell in BOOK["cells"]}) == len(BOOK["cells"])


def test_each_cell_runs_on_a_tiny_model(config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a cell shows is a picture; the settings and methods that it names are there."""
    loaded = []

    def load(name: str) -> clipward.Model:
        loaded.append(name)
        model = load_studio(config, device="cpu").model
        sample = model.sample
        monkeypatch.setattr(model, "sample", lambda *given, **named: sample(*given, **named | {"skip_steps": 2}))
        return model

    monkeypatch.setattr(clipward, "load", load)
    names: dict[str, Any] = {}
    shown = []
    for cell in CODE:
        tree = ast.parse(source(cell))
        last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, cell["id"], "exec"), names)
        if last is not None:
            assert isinstance(last, ast.Expr)
            shown.append(eval(compile(ast.Expression(last.value), cell["id"], "eval"), names))
    assert loaded == ["faces64"]
    assert len(shown) == 5
    assert all(isinstance(picture, Image.Image) and picture.height == 160 for picture in shown)
    kept, edited = names["face"], names["edited"][0]
    assert edited.size == kept.size
    below = (0, kept.height // 2, kept.width, kept.height)
    assert edited.crop(below).tobytes() == kept.crop(below).tobytes()


@pytest.mark.slow
def test_the_notebook_runs_in_a_kernel(tmp_path: Path) -> None:
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    book = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.NotebookClient(book, timeout=600, iopub_timeout=60, resources={"metadata": {"path": str(ROOT)}}).execute()
    outputs = [each for cell in book.cells for each in cell.get("outputs", [])]
    assert len([each for each in outputs if "image/png" in each.get("data", {})]) == 5
    assert not [each for each in outputs if each.output_type == "error"]

"""The notebooks run from top to bottom, as they stand."""

import json
from pathlib import Path

import matplotlib
import pytest

from zoo.encodings import registry

NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"


@pytest.fixture
def as_it_was(monkeypatch):
    """A part that a notebook registers is no one else's."""
    monkeypatch.setattr(registry, "_parts", dict(registry._parts))
    monkeypatch.chdir(NOTEBOOKS)
    matplotlib.use("agg")


@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda path: path.name)
def test_every_cell_runs(path, as_it_was, capsys):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    names = {"__name__": "__main__"}
    for number, cell in enumerate(cells):
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"{path.name}, cell {number}", "exec"), names)
    shown = capsys.readouterr().out
    assert "no: position encoding 'fox' cannot be used with mixer 'softmax'" in shown
    assert "did you mean 'strength'" in shown

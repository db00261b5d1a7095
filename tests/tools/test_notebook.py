"""examples/from_scratch.ipynb runs, and prints and draws what is stored in it."""

from __future__ import annotations

import contextlib
import io
import json
import warnings
from pathlib import Path

import pytest

pytestmark = pytest.mark.pages

NOTEBOOK = Path(__file__).resolve().parents[2] / "examples" / "from_scratch.ipynb"


def test_cells_do_what_is_stored() -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names: dict = {"__name__": "__main__"}
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    assert any([cell.get("outputs") for cell in cells])
    for number, cell in enumerate(cells, 1):
        if cell["cell_type"] != "code":
            continue
        plt.close("all")
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "FigureCanvasAgg is non-interactive")
            try:
                exec(compile("".join(cell["source"]), f"cell {number}", "exec"), names)
            except Exception as error:
                pytest.fail(f"{NOTEBOOK.name}, cell {number}: {type(error).__name__}: {error}", pytrace=False)
        texts = ["".join(output["text"]) for output in cell["outputs"] if output["output_type"] == "stream"]
        pictures = [output for output in cell["outputs"] if "image/png" in output.get("data", {})]
        assert printed.getvalue() == "".join(texts), f"cell {number}"
        assert len(plt.get_fignums()) == len(pictures), f"cell {number}"
    plt.close("all")

"""docs/tutorials/diffusion_from_scratch.ipynb runs from top to bottom, at small size."""

import json
import warnings
from pathlib import Path

import pytest
import torch

NOTEBOOK = Path(__file__).parents[1] / "docs" / "tutorials" / "diffusion_from_scratch.ipynb"
SMALL = {"N = 400": "N = 60", "TRAINING_STEPS = 1500": "TRAINING_STEPS = 60", '"heun", 500': '"heun", 20'}


def test_the_notebook_runs():
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("agg")
    from matplotlib import pyplot

    open_before = set(pyplot.get_fignums())  # by other tests of this process
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    for full, small in SMALL.items():
        assert full in code
        code = code.replace(full, small)
    names = {}
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore", RuntimeWarning)  # many open figures
        exec(compile(code, NOTEBOOK.name, "exec"), names)
    assert len(set(pyplot.get_fignums()) - open_before) == 9  # one for each cell that plots
    pyplot.close("all")
    assert names["result"].isfinite().all() and len(names["images"]) == 8


def test_its_outputs_are_saved():
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    plots = [out for cell in cells for out in cell.get("outputs", []) if "image/png" in out.get("data", {})]
    assert len(plots) == 9

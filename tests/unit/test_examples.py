"""The examples, with ranks that are tasks of this process: each trains something."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from mpilsgd import in_process

# The first imports torch._dynamo: before conftest.py freezes what imports left.
torch.optim.SGD([torch.zeros(1)], lr=0.1)
EXAMPLES = Path(__file__).parents[2] / "examples"


def script(name: str, workers: int, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """As `mpiexec -n WORKERS python -m mpi4py EXAMPLE ARGUMENTS`, without the processes."""
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    code = compile((EXAMPLES / name).read_text(), name, "exec")

    def rank() -> None:
        exec(code, {"__name__": "__main__"})

    in_process(rank, workers=workers)


@pytest.mark.parametrize(
    "name, workers, arguments, said, low, high",
    [
        ("language_model.py", 2, ["40"], r"([\d.]+) bits a character", 2, 4.5),
        ("gan.py", 2, ["300"], r"radius ([\d.]+)", 0.7, 1.3),
        ("tree.py", 7, [], r"mean squared error ([\d.]+)", 0.009, 0.03),
    ],
)
def test_a_script_trains(
    name: str,
    workers: int,
    arguments: list[str],
    said: str,
    low: float,
    high: float,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    script(name, workers, arguments, monkeypatch)
    told = capsys.readouterr().out
    found = re.search(said, told)
    assert found is not None, told
    assert low <= float(found[1]) <= high, told


def test_examples_are_short() -> None:
    files = [path for path in EXAMPLES.iterdir() if path.suffix == ".py"]
    assert len(files) >= 8
    assert not [path.name for path in files if len(path.read_text().splitlines()) >= 60]


def test_the_cells_of_the_notebook_run(capsys: pytest.CaptureFixture[str]) -> None:
    cells = json.loads((EXAMPLES / "notebook.ipynb").read_text())["cells"]
    names: dict[str, Any] = {}
    for cell in cells + cells[4:5]:  # one a second time
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), names)
    assert names["errors"][-1] < 0.05 < names["errors"][0]


@pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("nbclient", "ipykernel"))), reason="needs the package nbclient"
)
def test_the_notebook_runs_in_a_kernel() -> None:
    import nbclient
    import nbformat

    notebook = nbformat.read(EXAMPLES / "notebook.ipynb", as_version=4)
    nbclient.NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(EXAMPLES)}}).execute()
    printed = [output.text for cell in notebook.cells for output in cell.get("outputs", [])]
    assert "test error after each epoch" in "".join(printed)

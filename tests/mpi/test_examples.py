"""The examples on real ranks, and those that need libraries of others."""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from harness import WORLD

pytestmark = [pytest.mark.mpi, pytest.mark.processes, pytest.mark.brief(2)]
EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(autouse=True)
def place(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A folder for what is saved; an example may take variables out of the environment."""
    monkeypatch.chdir(folder)
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


def figure(
    name: str,
    arguments: list[str],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> float:
    """Runs an example on all ranks; the number that rank 0 prints."""
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    exec(compile((EXAMPLES / name).read_text(), name, "exec"), {"__name__": "__main__"})
    found = re.search(said, capsys.readouterr().out)
    return WORLD.bcast(float(found[1]) if found else None)


def test_plain_torch_loads_what_the_first_script_saves(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    error = figure("train.py", [], r"test error ([\d.]+) %", monkeypatch, capsys)
    model = torch.nn.Sequential(torch.nn.Linear(2, 64), torch.nn.ReLU(), torch.nn.Linear(64, 2))
    model.load_state_dict(torch.load("model.pt", weights_only=True))
    torch.manual_seed(0)
    x = torch.randn(12_000, 2)[10_000:]
    wrong = model(x).argmax(1) != (x.norm(dim=1) > 1.18).long()
    assert error < 3
    assert f"{100 * wrong.float().mean():.1f}" == f"{error:.1f}"


@pytest.mark.parametrize("name", ["asynchronous.py", "tree.py"])
def test_nobody_waits_and_all_learn(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert 0.009 <= figure(name, [], r"mean squared error ([\d.]+)", monkeypatch, capsys) <= 0.03


@pytest.mark.skipif(importlib.util.find_spec("lightning") is None, reason="needs the package lightning")
@pytest.mark.filterwarnings("ignore")  # of that package
def test_lightning(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert figure("lightning_module.py", [], r"test error ([\d.]+) %", monkeypatch, capsys) <= 5


@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="needs the package transformers")
@pytest.mark.filterwarnings("ignore")  # of that package
def test_huggingface(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert figure("huggingface.py", ["20"], r"([\d.]+) nats a character", monkeypatch, capsys) < 4
    from transformers import GPT2LMHeadModel

    GPT2LMHeadModel.from_pretrained("model")

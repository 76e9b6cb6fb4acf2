"""The examples on real ranks, and those that need libraries of others."""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
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


@pytest.mark.parametrize(
    "name, arguments, said, low, high",
    [
        ("train.py", [], r"test error ([\d.]+) %", 0, 3),
        ("language_model.py", ["40"], r"([\d.]+) bits a character", 2, 4.5),
        ("gan.py", ["300"], r"radius ([\d.]+)", 0.7, 1.3),
        ("asynchronous.py", [], r"mean squared error ([\d.]+)", 0.009, 0.03),
    ],
)
def test_a_script_trains(
    name: str,
    arguments: list[str],
    said: str,
    low: float,
    high: float,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert low <= figure(name, arguments, said, monkeypatch, capsys) <= high


def test_a_tree_trains(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert 0.009 <= figure("tree.py", [], r"mean squared error ([\d.]+)", monkeypatch, capsys) <= 0.03


@pytest.mark.skipif(importlib.util.find_spec("lightning") is None, reason="needs the package lightning")
def test_lightning(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert figure("lightning_module.py", [], r"test error ([\d.]+) %", monkeypatch, capsys) <= 5


@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="needs the package transformers")
def test_huggingface(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert figure("huggingface.py", ["20"], r"([\d.]+) nats a character", monkeypatch, capsys) < 4
    if WORLD.rank == 0:
        from transformers import GPT2LMHeadModel

        GPT2LMHeadModel.from_pretrained("model")

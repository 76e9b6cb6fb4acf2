"""What the tests of `mpilsgd train` share."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from mpi4py import MPI

from mpilsgd.exchange import leaving
from mpilsgd.train import job, loop
from mpilsgd.train.run_directory import RunDirectory
from mpilsgd.train.together import FAILED, Stopped

WORLD = MPI.COMM_WORLD
METHODS = {
    "AllreduceSGD": (),
    "LocalSGD": ("--period", "5"),
    "LSGD": ("--period", "5", "--pull", "0.2"),
    "EASGD": ("--period", "5"),
    "DiLoCo": ("--period", "5", "--fragments", "5"),
}
QUICK = ("--threads", "1", "--device", "cpu", "--eval_every", "2", "--lr", "0.2")


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def untimed(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {
            key: value
            for key, value in row.items()
            if key not in ("wall_s", "t_compute", "t_data", "t_comm", "t_wait")
        }
        for row in rows
    ]


def everyone_got(status: int, expected: int) -> None:
    assert WORLD.allgather(status) == [expected] * WORLD.size


@contextmanager
def as_a_process() -> Iterator[None]:
    """A job that ends in an error leaves its methods to the end of the process: they end here, in one order.

    Whether the garbage collector has found one yet, and so on which list it is, differs from rank to rank.
    """
    books = leaving.books()
    first = next(books.serials)
    yield
    left = {**dict(books.living.items()), **books.abandoned}
    for serial in sorted(left):
        if serial > first:
            left[serial].close()


def killed(argv: list[str], output: Path, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run is there up to a step, at which it has ended as a failed one does."""
    whole = loop.Trainer._step

    def kill(self: loop.Trainer, *arguments: Any) -> None:
        if self.progress.step == step:
            raise Stopped("killed", FAILED)
        whole(self, *arguments)

    with as_a_process(), monkeypatch.context() as patch:
        patch.setattr(loop.Trainer, "_step", kill)
        everyone_got(job.main([*argv, "--output", str(output)]), FAILED)


# A model that keeps statistics and draws random numbers, as a module of the user's.
NET = """
def net(input_shape, classes):
    layers = torch.nn.Linear(64, 32), torch.nn.BatchNorm1d(32), torch.nn.ReLU(), torch.nn.Dropout(0.2)
    return torch.nn.Sequential(torch.nn.Flatten(), *layers, torch.nn.Linear(32, classes))
"""


def same_run(one: Path, other: Path, step: int) -> None:
    """Both runs ended after this step with the same bits everywhere, and told the same."""
    assert untimed(lines(one / "metrics.jsonl")) == untimed(lines(other / "metrics.jsonl"))
    assert lines(one / "leaders.jsonl") == lines(other / "leaders.jsonl")
    states = [RunDirectory(run).load(WORLD.rank, step) for run in (one, other)]
    for state in states:
        assert state["progress"]["step"] == step
    equal(states[0]["model"], states[1]["model"])
    equal(states[0]["optimizer"], states[1]["optimizer"])
    equal(*[torch.load(run / "checkpoint" / "center.pt", weights_only=True) for run in (one, other)])


def equal(one: Any, other: Any) -> None:
    """The same bits everywhere in two nested states."""
    assert type(one) is type(other)
    if isinstance(one, dict):
        assert list(one) == list(other)
        for key in one:
            equal(one[key], other[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            equal(a, b)
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    else:
        assert one == other

"""What the tests of `mpilsgd train` share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mpi4py import MPI

WORLD = MPI.COMM_WORLD
METHODS = {
    "AllreduceSGD": (),
    "LocalSGD": ("--period", "5"),
    "LSGD": ("--period", "5", "--pull", "0.2"),
    "EASGD": ("--period", "5"),
}
QUICK = ("--threads", "1", "--device", "cpu", "--eval_every", "2", "--lr", "0.2")


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def untimed(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {key: value for key, value in row.items() if key not in ("wall_s", "t_compute", "t_data", "t_comm")}
        for row in rows
    ]


def everyone_got(status: int, expected: int) -> None:
    assert WORLD.allgather(status) == [expected] * WORLD.size

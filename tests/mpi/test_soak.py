"""Long tests, run by name: bash tests/run.sh mpi --slow cycles."""

from __future__ import annotations

import os
import resource
from typing import Any

import pytest
import torch
from harness import WORLD, check_together

import mpilsgd

pytestmark = [pytest.mark.mpi, pytest.mark.slow]

CYCLES = int(os.environ.get("MPILSGD_CYCLES", "1000"))
WAYS: list[tuple[Any, dict[str, Any]]] = [
    (mpilsgd.LSGD, {"asynchronous": True, "period": 2}),
    (mpilsgd.LSGD, {"asynchronous": "wait-free", "period": 2}),
    (mpilsgd.EASGD, {"asynchronous": True, "period": 1}),
    (mpilsgd.EASGD, {"asynchronous": True, "period": 2, "overlap": True}),
    (mpilsgd.EASGD, {"period": 2, "overlap": True}),
    (mpilsgd.Downpour, {"momentum": 0.5}),
    (mpilsgd.Downpour, {"order": "round-robin", "average": "running"}),
    (mpilsgd.ADMM, {"rho": 0.5, "asynchronous": True}),
]


def shared_files() -> int:
    return len(os.listdir("/dev/shm"))


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_a_thousand_cycles_leave_nothing_behind() -> None:
    """Short runs, started and ended: no hang, no leak of shared memory, files, communicators or memory."""
    errors, marks = [], []
    for cycle in range(CYCLES):
        kind, options = WAYS[cycle % len(WAYS)]
        shared = cycle % 3 != 2  # every third by messages: remote windows, polling threads
        topology = mpilsgd.Topology(shared=shared)
        model = torch.nn.Linear(40, 10)
        opt = kind(torch.optim.SGD(model.parameters(), lr=0.01), topology, **options)
        for _ in range(1 + (WORLD.rank + cycle) % 4):  # unequal numbers of steps
            opt.zero_grad()
            loss = model(torch.ones(2, 40)).square().mean()
            loss.backward()
            opt.step(loss=loss)
        if cycle % 2:
            with opt.center():
                assert torch.isfinite(model.weight).all()
        opt.close()
        topology.free()
        if cycle in (CYCLES // 5, CYCLES - 1):
            WORLD.Barrier()
            marks.append((shared_files(), open_files(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss))
            WORLD.Barrier()
    (shm, files, peak), (shm_now, files_now, peak_now) = marks[0], marks[-1]
    if shm_now > shm or files_now > files:
        errors.append(f"/dev/shm from {shm} to {shm_now} files, open files from {files} to {files_now}")
    if peak_now - peak > 50 * 1024:
        errors.append(f"memory grew from {peak // 1024} to {peak_now // 1024} MiB")
    check_together(errors)

"""What asynchronous methods need of an MPI, and what is said where it is missing."""

from __future__ import annotations

import subprocess
import sys
import types

import pytest
from mpi4py import MPI

from mpilsgd.comm.onesided import Board, expose


def test_an_mpi_without_windows_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise NotImplementedError("no windows here")

    monkeypatch.setattr("mpilsgd.comm.onesided.MPI", types.SimpleNamespace(**{**vars(MPI), "Win": None}))
    monkeypatch.setattr(
        "mpilsgd.comm.onesided.MPI.Win",
        types.SimpleNamespace(Allocate=refuse, Allocate_shared=refuse, Create=refuse),
    )
    for make in (lambda: Board(MPI.COMM_WORLD, 1, False), lambda: expose(MPI.BOTTOM, MPI.COMM_WORLD)):
        with pytest.raises(RuntimeError, match=r"no windows here.*asynchronous methods need it"):
            make()


def test_too_low_a_thread_level_is_refused() -> None:
    """In a process of its own: a second thread may not talk MPI there."""
    script = """
import mpi4py
mpi4py.rc.thread_level = "funneled"
import torch, mpilsgd
model = torch.nn.Linear(3, 1)
try:
    mpilsgd.EASGD(torch.optim.SGD(model.parameters(), lr=0.1), asynchronous=True, overlap=True)
except ValueError as error:
    assert "MPI_THREAD_MULTIPLE" in str(error) and "thread_level" in str(error), error
else:
    raise SystemExit("it was not refused")
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stderr

"""Jobs of their own, started by a test of several ranks: how a job ends, and what starts it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mpi4py import MPI

WORLD = MPI.COMM_WORLD
# What a launcher tells one rank: a rank's own child is not to take itself for it.
PER_RANK = ("PMI", "HYD", "OMPI_COMM", "OMPI_UNIVERSE", "OMPI_APP", "OMPI_FIRST", "OMPI_FILE", "PRTE_L")


@dataclass(frozen=True)
class Ended:
    """How a job ended."""

    status: int
    out: str
    err: str
    seconds: float  # from its start
    at: float  # the time

    def __str__(self) -> str:
        return f"status {self.status} after {self.seconds:.0f} s\n{self.out}{self.err}"


def mpiexec(ranks: int, seconds: float) -> list[str]:
    """The launcher of this test run, for so many ranks that end together, after so many seconds at the latest."""
    found = os.environ.get("MPILSGD_MPIEXEC") or shutil.which("mpiexec", path=Path(sys.executable).parent)
    limit = ["--timeout", str(int(seconds))] if MPI.get_vendor()[0] == "Open MPI" else []
    return [found or "mpiexec", *limit, "-n", str(ranks), sys.executable, "-m", "mpi4py"]


def torchrun(ranks: int, seconds: float) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(ranks)]


def job(
    folder: Path,
    script: str,
    *arguments: object,
    launcher: Callable[[int, float], list[str]] = mpiexec,
    ranks: int = 2,
    seconds: float = 60,
) -> Ended:
    """Rank 0 runs the script; all ranks get to know how it ended. Collective."""
    ended = None
    if WORLD.rank == 0:
        file = folder / "script.py"
        file.write_text(script)
        own = {name: value for name, value in os.environ.items() if not name.startswith(PER_RANK)}
        started = time.monotonic()
        running = subprocess.Popen(
            [*launcher(ranks, seconds), str(file), *map(str, arguments)],
            env=own | {"MPIEXEC_TIMEOUT": str(int(seconds)), "OMP_NUM_THREADS": "1"},
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        try:
            out, err = running.communicate(timeout=seconds + 20)
        except subprocess.TimeoutExpired:
            os.killpg(running.pid, signal.SIGKILL)
            out, err = running.communicate()
        ended = Ended(running.returncode, out, err, time.monotonic() - started, time.time())
    told = WORLD.Ibarrier()
    while not told.Test():  # without a busy core
        time.sleep(0.05)
    return WORLD.bcast(ended)

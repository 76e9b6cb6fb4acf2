"""Jobs of their own, started by a test of several ranks: how a job ends, and what starts it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
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


def mpiexec(ranks: int) -> list[str]:
    """The launcher of this test run, for so many ranks that end together."""
    found = os.environ.get("MPILSGD_MPIEXEC") or shutil.which("mpiexec", path=Path(sys.executable).parent)
    return [found or "mpiexec", "-n", str(ranks), sys.executable, "-m", "mpi4py"]


def torchrun(ranks: int) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(ranks)]


def job(folder: Path, script: str, *arguments: object, launch: list[str], seconds: float = 60) -> Ended:
    """Rank 0 runs the script; all ranks get to know how it ended. Collective."""
    ended = None
    if WORLD.rank == 0:
        file = folder / "script.py"
        file.write_text(script)
        own = {name: value for name, value in os.environ.items() if not name.startswith(PER_RANK)}
        started = time.monotonic()
        try:
            done = subprocess.run(
                [*launch, str(file), *map(str, arguments)],
                env=own | {"MPIEXEC_TIMEOUT": str(int(seconds)), "OMP_NUM_THREADS": "1"},
                cwd=folder,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=seconds + 20,
            )
            ended = Ended(done.returncode, done.stdout, done.stderr, time.monotonic() - started, time.time())
        except subprocess.TimeoutExpired as late:
            parts = [(part or b"").decode(errors="replace") for part in (late.stdout, late.stderr)]
            ended = Ended(124, *parts, time.monotonic() - started, time.time())
    told = WORLD.Ibarrier()
    while not told.Test():  # without a busy core
        time.sleep(0.05)
    return WORLD.bcast(ended)

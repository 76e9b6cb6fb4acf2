"""Whether MPI may be given the memory of devices: what it says is tried, first where a crash does no harm.

An MPI that calls itself CUDA-aware may still crash on such memory, or move other bytes than those: with a transport
that it has chosen, on a driver that it was not built for. The child is a process of one rank, this module as a program.
"""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from weakref import WeakKeyDictionary

import torch

from mpilsgd import devices
from mpilsgd.comm import MPI, Topology, here, inquiry
from mpilsgd.comm.channel import memory_of

SIZES = (8, 1 << 16, 1 << 24)  # bytes: MPIs treat short and long messages otherwise
_PATIENCE = 120.0  # seconds for the child, which starts MPI
# what tells a process of its launcher, by the first letters: the child is none of its ranks
_LAUNCHERS = ("PMI", "PMIX", "OMPI_", "PRTE_", "HYDRA", "MPI_LOCAL", "SLURM_", "MPIEXEC")
_known: WeakKeyDictionary[Topology, tuple[bool, str]] = WeakKeyDictionary()


class DevicePathWarning(UserWarning):
    """MPI calls itself CUDA-aware and fails at it; vectors go through the host's memory."""


def takes_devices(topology: Topology, place: torch.device) -> bool:
    """Whether messages between islands are sent from and received into device memory. Collective over the world."""
    return path(topology, place)[0]


def path(topology: Topology, place: torch.device) -> tuple[bool, str]:
    """The same, with the reason. It is found out once a topology."""
    if topology not in _known:
        _known[topology] = _find(topology, place)
    return _known[topology]


def _find(topology: Topology, place: torch.device) -> tuple[bool, str]:
    support = inquiry.cuda_support() if here.rank.is_process else inquiry.CudaSupport(False, "no MPI is used")
    if topology.cuda_aware is not None:
        return topology.cuda_aware, f"cuda_aware={topology.cuda_aware} was asked for"
    told = topology.allgather(support)
    support = min(told, key=lambda one: one.aware)
    if not support.aware:
        return False, support.why
    for attempt in (lambda: in_child(place), lambda: around(topology, place)):
        problems = [problem for problem in topology.allgather(attempt()) if problem]
        if problems:
            why = f"{support.why}, but a trial failed: {problems[0]}"
            if topology.world.rank == 0:
                warnings.warn(f"{why}; vectors go through the host's memory", DevicePathWarning, stacklevel=6)
            return False, why
    return True, f"{support.why}, and messages of {', '.join(map(str, SIZES))} bytes came whole"


def command(place: torch.device) -> list[str]:
    return [sys.executable, "-m", "mpilsgd.transport.probe", str(place.index)]


def in_child(place: torch.device) -> str | None:
    """What went wrong with messages of a child process to itself."""
    environment = {
        k: v for k, v in os.environ.items() if not k.startswith(_LAUNCHERS) or k.startswith("OMPI_MCA")
    }
    try:
        done = subprocess.run(
            command(place), env=environment, capture_output=True, text=True, timeout=_PATIENCE, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    if done.returncode == 0:
        return None
    last = (done.stderr.strip().splitlines() or ["no message"])[-1]
    return f"the child process ended with status {done.returncode}: {last}"


def around(topology: Topology, place: torch.device) -> str | None:
    """What went wrong with a message to the next rank, on another node or not, from the one before. Collective."""
    world = topology.world
    return trial(world, (world.rank + 1) % world.size, (world.rank - 1) % world.size, place)


def trial(comm: MPI.Comm, after: int, before: int, place: torch.device) -> str | None:
    for size in SIZES:
        values = torch.arange(size // 8, dtype=torch.int64, device=place)
        sent = values + comm.rank
        received = torch.zeros_like(sent)
        devices.finish(place)
        coming = comm.Irecv(memory_of(received, True), before)
        comm.Isend(memory_of(sent, True), after).Wait()
        coming.Wait()
        if not bool(torch.equal(received, values + before)):
            return f"a message of {size} bytes came with other bytes"
    return None


def main(do: Callable[[], torch.device]) -> int:
    place = do()
    problem = trial(MPI.COMM_SELF, 0, 0, place)
    if problem:
        print(problem, file=sys.stderr)
    return int(problem is not None)


if __name__ == "__main__":
    sys.exit(main(lambda: torch.device("cuda", int(sys.argv[1]))))

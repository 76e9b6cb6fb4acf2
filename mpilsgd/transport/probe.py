"""Whether MPI may be given the memory of devices: what it says is tried, first where a crash does no harm.

An MPI that calls itself CUDA-aware may still crash on such memory, or move other bytes than those: with a transport
that it has chosen, on a driver that it was not built for. The child is a process of one rank, this module as a program.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
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
_LAUNCHERS = (
    "PMI",
    "OMPI_",
    "PRTE_",
    "HYDRA",
    "MPI_LOCAL",
    "SLURM_",
    "MPIEXEC",
    "PALS_",
    "FLUX_",
    "I_MPI_",
    "MV2_",
)
_known: WeakKeyDictionary[Topology, dict[torch.device, tuple[bool, str]]] = WeakKeyDictionary()


class DevicePathWarning(UserWarning):
    """MPI calls itself CUDA-aware and fails at it; vectors go through the host's memory."""


def takes_devices(topology: Topology, place: torch.device) -> bool:
    """Whether messages between islands are sent from and received into device memory. Collective over the world."""
    return path(topology, place)[0]


def path(topology: Topology, place: torch.device) -> tuple[bool, str]:
    """The same, with the reason. It is found out once a topology and device."""
    known = _known.setdefault(topology, {})
    if not all(topology.allgather(place in known)):
        known[place] = _find(topology, place)
    return known[place]


def _find(topology: Topology, place: torch.device) -> tuple[bool, str]:
    if not here.rank.is_process:
        return False, "ranks are tasks of one process"
    problem = None if devices.identity(place) else "the extension was built without CUDA"
    if place.type == "cuda" and torch.cuda.current_device() != place.index:
        problem = f"{place} is not the current device: torch.cuda.set_device() makes it that"
    problems = [problem for problem in topology.allgather(problem) if problem]
    if problems:
        return False, problems[0]
    if topology.cuda_aware is not None:
        return topology.cuda_aware, f"cuda_aware={topology.cuda_aware} was asked for"
    support = min(topology.allgather(inquiry.cuda_support()), key=lambda one: one.aware)
    if not support.aware:
        return False, support.why
    for attempt in (lambda: in_child(place), lambda: around(topology.world, place)):
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
    with tempfile.TemporaryFile() as told:  # a pipe would be held open by what the child leaves behind
        try:
            status = subprocess.run(
                command(place),
                env=environment,
                stdout=subprocess.DEVNULL,
                stderr=told,
                timeout=_PATIENCE,
                check=False,
            ).returncode
        except (OSError, subprocess.TimeoutExpired) as error:
            return str(error)
        told.seek(0)
        lines = told.read().decode(errors="replace").strip().splitlines() or ["no message"]
    return None if status == 0 else f"the child process ended with status {status}: {lines[-1]}"


def around(comm: MPI.Comm, place: torch.device) -> str | None:
    """What went wrong with messages to the next rank, and from the one before. Collective; who finds no memory says so
    before anyone sends, and an MPI that raises ends the job: it has passed the child's trial.
    """
    rooms: list[devices.Memory] = []
    problem = None
    try:
        rooms = [devices.Memory(place, max(SIZES)) for _ in range(2)]
    except (MemoryError, RuntimeError) as error:
        problem = str(error)
    problems = [problem for problem in comm.allgather(problem) if problem]
    if not problems:
        problem = _trial(comm, (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size, place, rooms)
    for room in rooms:
        room.free()
    return problems[0] if problems else problem


def _trial(
    comm: MPI.Comm, after: int, before: int, place: torch.device, rooms: list[devices.Memory]
) -> str | None:
    for size in SIZES:
        sent, received = (devices.vector(place, room.address, torch.int64, size // 8) for room in rooms)
        values = torch.arange(size // 8, dtype=torch.int64, device=place)
        sent.copy_(values + comm.rank)
        received.zero_()
        devices.finish(place)
        coming = comm.Irecv(memory_of(received, True), before)
        comm.Isend(memory_of(sent, True), after).Wait()
        coming.Wait()
        if not bool(torch.equal(received, values + before)):
            return f"a message of {size} bytes came with other bytes"
    return None


def main(do: Callable[[], torch.device]) -> int:
    place = do()
    problem = around(MPI.COMM_SELF, place)
    if problem:
        print(problem, file=sys.stderr)
    return int(problem is not None)


def _current(index: int) -> torch.device:
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


if __name__ == "__main__":
    sys.exit(main(lambda: _current(int(sys.argv[1]))))

"""What the MPI underneath is and can do: its library, threads, nodes, shared memory, CUDA."""

from __future__ import annotations

import ctypes
import functools
import os
import socket
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import mpi4py

from mpilsgd.comm.counting import progresses_alone
from mpilsgd.comm.mpi import MPI
from mpilsgd.comm.windows import free_shared_memory

THREAD_LEVELS = "SINGLE", "FUNNELED", "SERIALIZED", "MULTIPLE"
# Where a launcher says how many processes it starts (not SLURM_NTASKS, which a batch script has too).
LAUNCHER_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MPI_LOCALNRANKS", "SLURM_STEP_NUM_TASKS")
# What an MPI names its memory kinds for CUDA (MPI 4.1, "mpi_memory_alloc_kinds": "mpi,system,cuda:device").
CUDA_KIND = "cuda"


class CudaSupport(NamedTuple):
    """Whether MPI says that it takes CUDA tensors directly, and how that was found."""

    aware: bool
    why: str


def info(comm: MPI.Comm | None = None) -> dict[str, Any]:
    """Facts about MPI and the nodes, the same on every rank. Collective over `comm` (None: COMM_WORLD).

    Returns:
        library, library_version: "MPICH", "5.0.2"; standard: "5.0"; mpi4py: its version.
        thread_level: its name; cuda: a `CudaSupport`.
        progresses_alone: whether one-sided operations across nodes are served without the target's help.
        size: number of ranks; apart: what is wrong where the launcher started more (None: it did not).
        hosts: the host name of every rank; nodes: the ranks of every set that shares memory.
        shared_memory, memory: bytes free in /dev/shm and in all, for every set of `nodes`.
    """
    world = MPI.COMM_WORLD if comm is None else comm
    node = world.Split_type(MPI.COMM_TYPE_SHARED, key=world.rank)
    first = node.bcast(world.rank)
    node.Free()
    mine = (first, socket.gethostname(), free_shared_memory(), available_memory(), cuda_support())
    rows = world.allgather(mine)
    firsts = sorted({row[0] for row in rows})
    name, version = _library()
    major, minor = MPI.Get_version()
    return {
        "library": name,
        "library_version": version,
        "standard": f"{major}.{minor}",
        "mpi4py": mpi4py.__version__,
        "thread_level": _thread_level(),
        "cuda": min((row[4] for row in rows), key=lambda support: support.aware),
        "progresses_alone": progresses_alone(world, firsts),
        "size": world.size,
        "apart": apart(world.size),
        "hosts": [row[1] for row in rows],
        "nodes": [[rank for rank, row in enumerate(rows) if row[0] == f] for f in firsts],
        "shared_memory": [rows[f][2] for f in firsts],
        "memory": [rows[f][3] for f in firsts],
    }


def _thread_level() -> str:
    names = {getattr(MPI, f"THREAD_{level}"): f"MPI_THREAD_{level}" for level in THREAD_LEVELS}
    return names.get(MPI.Query_thread(), "unknown")


def hosts(comm: MPI.Comm) -> list[str]:
    """The host name of every rank. Collective."""
    return comm.allgather(socket.gethostname())


def launched_processes(environment: Mapping[str, str]) -> int | None:
    """The number of processes that mpiexec, srun or torchrun started, by the variables it sets; None without them.

    More than COMM_WORLD has means that the launcher belongs to another MPI than the one mpi4py has loaded, or to none:
    every process then is a world of its own.
    """
    torchrun = ("WORLD_SIZE",) if "TORCHELASTIC_RUN_ID" in environment else ()
    for name in (*LAUNCHER_SIZES, *torchrun):
        if environment.get(name, "").isdigit():
            return int(environment[name])
    return None


def apart(seen: int) -> str | None:
    """What is wrong where a launcher started more processes than the `seen` ranks, and how to start them instead."""
    launched = launched_processes(os.environ)
    if launched is None or launched <= seen:
        return None
    if "TORCHELASTIC_RUN_ID" in os.environ:
        by_accelerate = any(name.startswith("ACCELERATE_") for name in os.environ)
        return (
            f"{'accelerate launch' if by_accelerate else 'torchrun'} started {launched} processes, which MPI does not "
            f"know of, so they do not train together: use mpiexec -n {launched} python -m mpi4py SCRIPT instead"
        )
    name, version = MPI.get_vendor()
    return (
        f"the launcher started {launched} processes, but MPI sees {seen}, so they do not train together: mpi4py has "
        f"loaded {name} {'.'.join(map(str, version))}, and the launcher is of another MPI; use the mpiexec that lies "
        "beside this python, or under Slurm srun --mpi=pmi2 (MPICH) or srun --mpi=pmix (Open MPI)"
    )


@functools.cache
def warn_if_apart() -> None:
    """Says once in this process that the launcher is not the MPI's."""
    if launched_processes(os.environ) is None:  # MPI need not be there yet
        return
    told = apart(MPI.COMM_WORLD.size)
    if told is not None:
        warnings.warn(told, RuntimeWarning, stacklevel=4)  # who wraps an optimizer


def cuda_support() -> CudaSupport:
    """What MPI says about CUDA memory: by its memory kinds (MPI 4.1), else by the common extension."""
    kinds = memory_kinds(MPI.COMM_WORLD)
    if kinds is not None and any(kind.split(":")[0] == CUDA_KIND for kind in kinds.split(",")):
        return CudaSupport(True, f"mpi_memory_alloc_kinds is {kinds}")
    answer = _query_cuda_support()
    asked = "" if kinds is None else f"mpi_memory_alloc_kinds is {kinds}; "
    if answer is None:
        return CudaSupport(False, f"{asked}MPI has no MPIX_Query_cuda_support()")
    return CudaSupport(bool(answer), f"{asked}MPIX_Query_cuda_support() is {answer}")


def memory_kinds(comm: MPI.Comm) -> str | None:
    """The memory kinds MPI works with on this communicator ("mpi,system,cuda"); None before MPI 4.1."""
    information = comm.Get_info()
    try:
        return information.Get("mpi_memory_alloc_kinds")
    finally:
        information.Free()


def available_memory() -> int:
    """Bytes of memory still to be had on this node, within this container's limit; 0 where unknown."""
    sizes = []
    try:
        with open("/proc/meminfo") as file:
            sizes += [int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable:")]
    except OSError:
        pass
    try:
        with open("/sys/fs/cgroup/memory.max") as limit, open("/sys/fs/cgroup/memory.current") as used:
            sizes.append(int(limit.read()) - int(used.read()))
    except (OSError, ValueError):  # version 1, or no limit ("max")
        pass
    return max(0, min(sizes, default=0))


def _query_cuda_support() -> int | None:
    """MPIX_Query_cuda_support() of the MPI library that mpi4py has loaded; None if it has no such function.

    The symbol is looked up in mpi4py's extension and all that it was linked with, then in the whole process.
    """
    for path in (MPI.__file__, None):
        try:
            function = ctypes.CDLL(path).MPIX_Query_cuda_support
        except (OSError, AttributeError):
            continue
        function.restype = ctypes.c_int
        function.argtypes = []
        return int(function())
    return None


def _library() -> tuple[str, str]:
    """Name and version of the MPI library, from what it says about itself."""
    text = MPI.Get_library_version().strip("\0 \n")
    name, _ = MPI.get_vendor()
    first = text.splitlines()[0] if text else ""
    if name == "MPICH" and first.startswith("MPICH Version:"):
        return name, first.split(":", 1)[1].strip()
    if first.startswith("Open MPI"):
        return "Open MPI", first.split(",")[0].removeprefix("Open MPI").strip().removeprefix("v")
    return name, first

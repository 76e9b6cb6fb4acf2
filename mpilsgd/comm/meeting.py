"""Where the ranks of a channel meet: in memory that they share within an island, by MPI between islands."""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch

from mpilsgd.comm.mpi import MPI, here
from mpilsgd.comm.waiting import complete
from mpilsgd.comm.windows import Window

_core: Any = None
with contextlib.suppress(ImportError):
    _core = importlib.import_module("mpilsgd._core")

_NUMBERS = 32  # of a row that goes in one piece


class Meeting(Protocol):
    """Nobody goes on before all have come. Who waits leaves the core to others, where it is by MPI only if `patient`.

    through_mpi: shared windows have to be synchronised before and after.
    """

    through_mpi: bool

    def table(self, row: Sequence[float], patient: bool) -> np.ndarray:
        """Every rank's row of numbers, (size, len(row)), in the order of the ranks."""

    def barrier(self, patient: bool) -> None:
        """All have come."""

    def fence(self, patient: bool) -> None:
        """Those of this island have come."""

    def look_after(self) -> None:
        """Raises if a rank of this island is no more, as far as that can be seen."""

    def free(self) -> None:
        """Collective."""


def meeting(comm: MPI.Comm, local: MPI.Comm, heads: MPI.Comm, islands: list[int], name: int) -> Meeting:
    """For the ranks of `comm`. islands: of each of them; name: of this one in the world. Collective."""
    alone = len(set(islands)) == comm.size > 1
    if alone or not comm.allreduce(here.rank.is_process and hasattr(_core, "Meeting"), MPI.LAND):
        return MpiMeeting(comm, local)
    return SharedMeeting(local, heads, islands, name)


class MpiMeeting:
    """Where no rank shares memory with another, where ranks are tasks of one process, or without the extension."""

    through_mpi = True

    def __init__(self, comm: MPI.Comm, local: MPI.Comm):
        self._comm, self._local = comm, local

    def table(self, row: Sequence[float], patient: bool) -> np.ndarray:
        send = np.asarray(row, dtype=np.float64)
        receive = np.empty((self._comm.size, send.size))
        if patient:
            complete(self._comm.Iallgather(send, receive))
        else:
            self._comm.Allgather(send, receive)
        return receive

    def barrier(self, patient: bool) -> None:
        _barrier(self._comm, patient)

    def fence(self, patient: bool) -> None:
        _barrier(self._local, patient)

    def look_after(self) -> None: ...

    def free(self) -> None: ...


class SharedMeeting:
    """Ranks of an island leave their rows in a window, and sleep until the last has come; their heads talk MPI.

    Who waits looks every second whether those for whom it waits are still there.
    """

    through_mpi = False

    def __init__(self, local: MPI.Comm, heads: MPI.Comm, islands: list[int], name: int):
        self._heads, self._size = heads, len(islands)
        self._several = len(set(islands)) > 1
        ranks = [[r for r, name in enumerate(islands) if name == k] for k in dict.fromkeys(islands)]
        self._sizes = [len(of) for of in ranks]
        self._place = np.argsort([r for of in ranks for r in of])  # of each rank in the order of the islands
        self._memory = Window(local, torch.uint8, _core.Meeting.bytes(local.size, _NUMBERS), common=True)
        address = self._memory.views[0].data_ptr()
        self._here = _core.Meeting(
            address, local.size, local.rank, _NUMBERS, spins(local), local.allgather(name)
        )
        self._here.fence()
        self._here.look_after()

    def table(self, row: Sequence[float], patient: bool) -> np.ndarray:
        rows: np.ndarray = self._here.table(row)
        if not self._several:
            return rows
        every = np.empty((self._size, rows.shape[1]))
        if self._heads != MPI.COMM_NULL:
            counts = [n * rows.shape[1] for n in self._sizes]
            if patient:
                complete(self._heads.Iallgatherv(rows, [every, counts]))
            else:
                self._heads.Allgatherv(rows, [every, counts])
        self._here.share(every)
        return every[self._place]

    def barrier(self, patient: bool) -> None:
        self._here.fence()
        if self._several:
            if self._heads != MPI.COMM_NULL:
                _barrier(self._heads, patient)
            self._here.fence()

    def fence(self, patient: bool) -> None:
        self._here.fence()

    def look_after(self) -> None:
        self._here.look_after()

    def free(self) -> None:
        self._memory.free()


def spins(local: MPI.Comm) -> bool:
    """Whether those who wait may keep their cores for a moment: where each has one for itself. Collective."""
    cores = local.allgather(os.sched_getaffinity(0))
    return len(set().union(*cores)) >= local.size


def _barrier(comm: MPI.Comm, patient: bool) -> None:
    if patient:
        complete(comm.Ibarrier())
    else:
        comm.Barrier()

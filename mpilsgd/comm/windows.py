"""Memory that the ranks of a node share."""

from __future__ import annotations

import os
import sys

import torch

from mpilsgd.comm.mpi import MPI, here

ALIGN = 64  # bytes: a cache line, and what vector loads like


class Window:
    """A one-dimensional tensor a rank, readable and writable by all ranks of an island (MPI-3 shared window).

    Args:
        comm: the island; its ranks share memory (or it has one rank, and the memory is private).
        dtype, numel: of this rank's tensor; `numel` may differ between ranks.
        common: True makes one tensor, on rank 0 of `comm`, for all (`numel` must then be equal everywhere).

    Attributes:
        views: every rank's tensor (`common`: the one tensor, for every rank).
        mine: this rank's.

    A tensor's first touch is its owner's, so its pages lie near its owner. Collective over `comm`, as is `free`.
    """

    def __init__(self, comm: MPI.Comm, dtype: torch.dtype, numel: int, common: bool = False):
        self.common = common
        self._win: MPI.Win | None = None
        itemsize = torch.empty((), dtype=dtype).element_size()
        if comm.size == 1:
            self.views = [torch.zeros(numel, dtype=dtype)]
            self.mine = self.views[0]
            return
        nbytes = 0 if common and comm.rank else -(-numel * itemsize // ALIGN) * ALIGN
        assert isinstance(comm, MPI.Intracomm)
        info = MPI.Info.Create()
        info.Set("alloc_shared_noncontig", "true")
        self._win = MPI.Win.Allocate_shared(max(nbytes, ALIGN), 1, info, comm)
        info.Free()
        self._win.Lock_all(MPI.MODE_NOCHECK)
        if common:
            self.views = [_tensor(self._win, 0, dtype, numel)] * comm.size
        else:
            counts = comm.allgather(numel)
            self.views = [_tensor(self._win, r, dtype, n) for r, n in enumerate(counts)]
        self.mine = self.views[comm.rank]
        if not (common and comm.rank):
            self.mine.zero_()
        self.sync()
        comm.Barrier()
        self.sync()

    @property
    def nbytes(self) -> int:
        """Bytes of this rank's tensor."""
        return self.mine.numel() * self.mine.element_size()

    def sync(self) -> None:
        """Orders this rank's loads and stores in the window around a barrier (MPI's memory barrier)."""
        if self._win is not None:
            self._win.Sync()

    def free(self) -> None:
        """Gives the memory back. No tensor may point into it any more."""
        self.views = []
        self.mine = torch.empty(0)
        if self._win is not None:
            self._win.Unlock_all()
            self._win.Free()
            self._win = None


def free_shared_memory() -> int:
    """Bytes left for shared windows on this node (the free space of /dev/shm, where MPI puts them)."""
    if not here.rank.is_process:  # they share all their memory
        return sys.maxsize
    try:
        status = os.statvfs("/dev/shm")
    except OSError:
        return 0
    return status.f_bavail * status.f_frsize


def _tensor(win: MPI.Win, rank: int, dtype: torch.dtype, numel: int) -> torch.Tensor:
    if numel == 0:
        return torch.empty(0, dtype=dtype)
    memory, _ = win.Shared_query(rank)
    return torch.frombuffer(memory, dtype=dtype, count=numel)

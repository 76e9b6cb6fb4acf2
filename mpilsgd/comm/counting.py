"""Counting the steps of all workers, and a thread that lets MPI serve one-sided operations meanwhile."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np

from mpilsgd.comm.mpi import MPI, here
from mpilsgd.comm.onesided import Board, expose
from mpilsgd.comm.waiting import clock, give_way

_AHEAD = 64  # counts under way at most
_NEAR = 4  # a total is near where so many times the steps that all may have taken meanwhile would bring it
_POLL = 5e-4  # seconds between two looks of the progress thread


class Counter:
    """Counts the steps of all workers of a level.

    On an island every step is one atomic addition. Across islands each counts for itself and hands its count on when
    all its workers may have taken a step; who so makes the total cross a multiple of `every` tells all ranks.
    """

    COUNT, SEEN = range(2)  # on the island
    TOTAL, CROSSED = range(2)  # on the first rank of all, on every rank

    def __init__(self, level: Any, every: int | None = None):
        self._island = Board(level.channel.local, 2, True)
        self._all = Board(level.comm, 2, False) if level.n_islands > 1 else None
        self._level, self._size, self._batch = level, level.size, len(level.local_ranks)
        self._every = every
        # of batches of steps that are on their way to all islands: when each was sent, and what tells the total before
        self._pending: deque[tuple[float, Callable[[bool], int | None]]] = deque()
        # totals, each with a time when no more were taken: the first and last it learned of; and when it last read
        self._first: tuple[int, float] | None = None
        self._known, self._looked = (0, 0.0), clock()

    def add(self) -> None:
        """Counts a step of this worker."""
        give_way()
        before = self._island.add(0, self.COUNT, 1)
        if self._all is not None and (before + 1) % self._batch == 0:
            self._pending.append((clock(), self._all.begin_to_add(0, self.TOTAL, self._batch)))
            self.hand_on(self._every is not None)

    def hand_on(self, wait: bool) -> None:
        """Learns what became of the steps that were counted. Unless told to, it does not wait for them to come to all
        islands: much else may be on its way there before. Rounds by the total wait, as they come when it is reached."""
        while self._pending:
            assert self._all is not None
            sent, tell = self._pending[0]
            old = tell(wait or len(self._pending) > _AHEAD)
            if old is None:
                return
            self._pending.popleft()
            total = old + self._batch
            self._learn(total, sent)
            self._island.raise_to(0, self.SEEN, total)
            if self._every is not None and total // self._every > old // self._every:
                for rank in range(self._size):
                    self._all.raise_to(rank, self.CROSSED, total)

    def _learn(self, total: int, when: float) -> None:
        if total > self._known[0]:
            self._known = total, when
            self._first = self._first or self._known

    def _since(self) -> float:
        """The steps that all may have taken since what is known: as many on each island as are pending here, or as the
        mean rate says, as this worker may be slow or have paused. Infinity before there is a rate."""
        known, when = self._known
        first, begun = self._first or self._known
        if when <= begun:
            return math.inf
        pending = len(self._pending) * self._batch * self._level.n_islands
        return max(pending, (known - first) / (when - begun) * (clock() - when))

    def shift(self, steps: int) -> None:
        """Counts so many more, or fewer: those of a state that was loaded. Collective, with `add` by nobody."""
        if self._all is None:
            self._island.add(0, self.COUNT, steps)
        else:
            self.hand_on(True)
            self._all.add(0, self.TOTAL, steps)
        self._level.barrier()
        if self._all is not None:  # what was known of another total
            self._first, self._known = None, (0, 0.0)
            self._island.write(0, self.SEEN, self._all.read(0, self.TOTAL))
            self._all.write(self._level.rank, self.CROSSED, 0)
        self._level.barrier()

    def read(self, near: int | None = None) -> int:
        """The total, as far as it is known on this island; close to `near` as far as it is known at all."""
        give_way()
        if self._all is None:
            return self._island.read(0, self.COUNT)
        before, self._looked = self._looked, clock()
        seen = max(self._island.read(0, self.SEEN), self._all.peek(self.CROSSED))
        self._learn(seen, before)  # it may have come right after the last look
        silent = self._island.read(0, self.COUNT) == 0  # nobody here takes steps, or not yet
        may_be = seen + _NEAR * (self._size + self._since())
        if near is not None and seen < near and (silent or near <= may_be):
            self.hand_on(True)
            seen = self._all.read(0, self.TOTAL)
            self._island.raise_to(0, self.SEEN, seen)
        return seen

    def free(self) -> None:
        if self._all is not None:
            self.hand_on(True)
            self._all.free()
        self._island.free()


class Progress:
    """A thread that lets MPI serve the others' one-sided operations while this rank computes."""

    def __init__(self, comm: MPI.Comm):
        self._comm = comm.Dup()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._poll, name="mpilsgd progress", daemon=True)
        self._thread.start()

    def _poll(self) -> None:
        while not self._end.wait(_POLL):
            self._comm.Iprobe(MPI.ANY_SOURCE, MPI.ANY_TAG)

    def free(self) -> None:
        """Collective."""
        self._end.set()
        self._thread.join()
        self._comm.Free()


def thread_problem() -> str | None:
    """Why a second thread cannot talk MPI here; None if it can."""
    if MPI.Query_thread() >= MPI.THREAD_MULTIPLE:
        return None
    return (
        "MPI was started without MPI_THREAD_MULTIPLE, and a second thread has to talk MPI here: leave "
        "mpi4py.rc.threads and mpi4py.rc.thread_level as they are, or use an MPI that gives it"
    )


_measured: dict[tuple[int, ...], bool] = {}


def progresses_alone(comm: MPI.Comm, homes: list[int]) -> bool:
    """Whether one-sided operations on another island's memory complete while its owner is not in MPI.

    homes: the first rank of every island. Measured once between the first and the last of them; True where there is one
    island only, or one process. Collective over `comm`.
    """
    if len(homes) == 1 or not here.rank.is_process:
        return True
    group = comm.Get_group()
    everyone = MPI.COMM_WORLD.Get_group()
    key = tuple(MPI.Group.Translate_ranks(group, [homes[0], homes[-1]], everyone))
    group.Free()
    everyone.Free()
    if not comm.allreduce(key in _measured, MPI.LAND):
        memory, one, result = (np.array([v], np.int64) for v in (0, 1, 0))
        win = expose(memory, comm)
        comm.Barrier()
        taken = 0.0
        if comm.rank == homes[0]:
            time.sleep(_NAP)
        elif comm.rank == homes[-1]:
            time.sleep(_NAP / 5)  # until the other one sleeps
            start = time.perf_counter()
            win.Fetch_and_op(one, result, homes[0], 0, MPI.SUM)
            win.Flush(homes[0])
            taken = time.perf_counter() - start
        taken = comm.bcast(taken, root=homes[-1])
        win.Unlock_all()
        win.Free()
        _measured[key] = taken < _NAP / 5
    return bool(comm.allreduce(_measured[key], MPI.LAND))


_NAP = 0.05

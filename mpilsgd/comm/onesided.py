"""One-sided operations: words that all ranks may change atomically, turns, a counter of steps, progress."""

from __future__ import annotations

import contextlib
import importlib
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
from mpi4py import MPI

from mpilsgd.comm.waiting import wait_until

_core: Any = None
with contextlib.suppress(ImportError):
    _core = importlib.import_module("mpilsgd._core")

_POLL = 5e-4  # seconds between two looks of the progress thread


@contextlib.contextmanager
def one_sided(what: str) -> Iterator[None]:
    """Says in words that an MPI lacks what asynchronous methods are built on."""
    try:
        yield
    except (MPI.Exception, NotImplementedError) as error:
        raise RuntimeError(
            f"{what} does not work with this MPI ({error}), and asynchronous methods need it: use MPICH or Open MPI "
            "(there, OMPI_MCA_osc=^ucx if ucx is the trouble), or asynchronous=False"
        ) from None


def expose(memory: Any, comm: MPI.Comm) -> MPI.Win:
    """A window of bytes over memory of each rank's own, open to all. Collective."""
    assert isinstance(comm, MPI.Intracomm)
    with one_sided("Win.Create"):
        win = MPI.Win.Create(memory, 1, comm=comm)
        _check_model(win)
        win.Lock_all()
    return win


def _check_model(win: MPI.Win) -> None:
    if win.model != MPI.WIN_UNIFIED:
        raise NotImplementedError("it keeps two copies of a window's memory")


class Board:
    """A few int64 words on every rank, at first 0, that any rank of the communicator may change atomically.

    Where all ranks share memory, the processor's atomic operations on a shared window; else MPI's passive-target ones,
    each complete when it returns, for which the owner must enter MPI from time to time (see `Progress`).
    Collective: creation and `free`.
    """

    def __init__(self, comm: MPI.Comm, words: int, shared: bool):
        assert isinstance(comm, MPI.Intracomm)
        self._addresses: list[int] = []
        with one_sided("Win.Allocate"):
            if shared and _core is not None:
                self._win = MPI.Win.Allocate_shared(8 * words, 8, comm=comm)
                self._addresses = [self._win.Shared_query(r)[0].address for r in range(comm.size)]
            else:
                self._win = MPI.Win.Allocate(8 * words, 8, comm=comm)
            _check_model(self._win)
            self._win.Lock_all()
        if words:
            np.asarray(self._win.tomemory(), dtype=np.uint8)[:] = 0
        self._win.Sync()
        comm.Barrier()
        self._win.Sync()

    def _fetch(self, rank: int, word: int, value: int, op: MPI.Op) -> int:
        given, result = np.array([value], np.int64), np.empty(1, np.int64)
        self._win.Fetch_and_op(given, result, rank, word, op)
        self._win.Flush(rank)
        return int(result[0])

    def add(self, rank: int, word: int, value: int) -> int:
        """Adds; returns what was there before."""
        if self._addresses:
            return _core.word_add(self._addresses[rank] + 8 * word, value)
        return self._fetch(rank, word, value, MPI.SUM)

    def read(self, rank: int, word: int) -> int:
        if self._addresses:
            return _core.word_load(self._addresses[rank] + 8 * word)
        return self._fetch(rank, word, 0, MPI.NO_OP)

    def peek(self, word: int) -> int:
        """This rank's own word, as it lies in its memory: what others have changed, soon."""
        self._win.Sync()
        return int(np.frombuffer(self._win.tomemory(), np.int64)[word])  # type: ignore[call-overload]

    def write(self, rank: int, word: int, value: int) -> None:
        if self._addresses:
            _core.word_swap(self._addresses[rank] + 8 * word, value)
        else:
            self._fetch(rank, word, value, MPI.REPLACE)

    def raise_to(self, rank: int, word: int, value: int) -> None:
        """The larger of the word and the value."""
        if not self._addresses:
            self._fetch(rank, word, value, MPI.MAX)
        while self._addresses and (now := self.read(rank, word)) < value:
            self.exchange(rank, word, now, value)

    def exchange(self, rank: int, word: int, expected: int, value: int) -> bool:
        """Writes the value if the word is as expected; whether it was."""
        if self._addresses:
            return _core.word_exchange(self._addresses[rank] + 8 * word, expected, value) == expected
        given, expect, result = (np.array([v], np.int64) for v in (value, expected, 0))
        self._win.Compare_and_swap(given, expect, result, rank, word)
        self._win.Flush(rank)
        return int(result[0]) == expected

    def sync(self) -> None:
        """Orders this rank's other loads and stores around the operations before and after."""
        self._win.Sync()

    def free(self) -> None:
        self._win.Unlock_all()
        self._win.Free()


class Turns:
    """Whose turn it is at each of several places: one rank after the other, in the order of tickets.

    Tickets are drawn (free order), or given: ticket k p + i is worker i's k-th turn in round robin since all last
    met. A rank that rests is passed over there.

    Args: level: the ranks; homes: the rank that keeps the words of each place.
    """

    NEXT, SERVING, TICKS, RESTING = range(4)

    def __init__(self, level: Any, homes: list[int]):
        self.board = Board(level.comm, 4, level.n_islands == 1)
        self._rank, self._size, self.homes = level.rank, level.size, homes
        self._round_robin = [0] * len(homes)  # turns taken since all last met

    def take(self, place: int, ticket: int | None, round_robin: bool) -> tuple[int, float]:
        """Waits for this rank's turn; its ticket and the seconds waited."""
        board, home = self.board, self.homes[place]
        if round_robin:
            ticket = self._round_robin[place] * self._size + self._rank
            self._round_robin[place] += 1
        elif ticket is None:
            ticket = board.add(home, self.NEXT, 1)
        mine = ticket
        waited = wait_until(lambda: board.read(home, self.SERVING) == mine)
        board.sync()
        return ticket, waited

    def tick(self, place: int) -> int:
        """Counts the updates of a place, by who has the turn; the number before."""
        return self.board.add(self.homes[place], self.TICKS, 1)

    def ticks(self, place: int) -> int:
        """The updates of a place so far."""
        return self.board.read(self.homes[place], self.TICKS)

    def set_ticks(self, place: int, updates: int) -> None:
        self.board.write(self.homes[place], self.TICKS, updates)

    def pass_on(self, place: int, ticket: int, round_robin: bool) -> None:
        """Ends this rank's turn."""
        self.board.sync()
        if round_robin:
            self._advance(place, ticket)
        else:
            self.board.add(self.homes[place], self.SERVING, 1)

    def _advance(self, place: int, ticket: int) -> None:
        """From a ticket to the next one whose rank does not rest. Who rests and who passes on may both come here."""
        home = self.homes[place]
        for now in range(ticket, ticket + self._size):
            if not self.board.exchange(home, self.SERVING, now, now + 1):
                return  # another rank did
            if not self.board.read((now + 1) % self._size, self.RESTING):
                return

    def rest(self) -> None:
        """This rank takes no turns until all have met (round robin)."""
        self.board.write(self._rank, self.RESTING, 1)
        for place, home in enumerate(self.homes):
            serving = self.board.read(home, self.SERVING)
            if serving % self._size == self._rank:
                self._advance(place, serving)

    def wake(self, round_robin: bool) -> None:
        """All have met: round robin begins anew with rank 0. A barrier must follow."""
        self.board.write(self._rank, self.RESTING, 0)
        if round_robin:
            self._round_robin = [0] * len(self.homes)
            if self._rank in self.homes:
                self.board.write(self._rank, self.SERVING, 0)

    def free(self) -> None:
        self.board.free()


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

    def add(self) -> None:
        """Counts a step of this worker."""
        before = self._island.add(0, self.COUNT, 1)
        if self._all is not None and (before + 1) % self._batch == 0:
            handed = self._batch
            old = self._all.add(0, self.TOTAL, handed)
            self._island.raise_to(0, self.SEEN, old + handed)
            if self._every is not None and (old + handed) // self._every > old // self._every:
                for rank in range(self._size):
                    self._all.raise_to(rank, self.CROSSED, old + handed)

    def shift(self, steps: int) -> None:
        """Counts so many more, or fewer: those of a state that was loaded. Collective, with `add` by nobody."""
        if self._all is None:
            self._island.add(0, self.COUNT, steps)
        else:
            self._all.add(0, self.TOTAL, steps)
        self._level.barrier()
        if self._all is not None:  # what was known of another total
            self._island.write(0, self.SEEN, self._all.read(0, self.TOTAL))
            self._all.write(self._level.rank, self.CROSSED, 0)
        self._level.barrier()

    def read(self, near: int | None = None) -> int:
        """The total, as far as it is known on this island; close to `near` as far as it is known at all."""
        if self._all is None:
            return self._island.read(0, self.COUNT)
        seen = max(self._island.read(0, self.SEEN), self._all.peek(self.CROSSED))
        silent = self._island.read(0, self.COUNT) == 0  # nobody here takes steps, or not yet
        if near is not None and seen < near and (silent or near <= seen + 4 * self._size):
            seen = self._all.read(0, self.TOTAL)
            self._island.raise_to(0, self.SEEN, seen)
        return seen

    def free(self) -> None:
        if self._all is not None:
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
    island only. Collective over `comm`.
    """
    if len(homes) == 1:
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

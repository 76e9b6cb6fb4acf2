"""One-sided operations: words that all ranks may change atomically, turns, a counter of steps, progress."""

from __future__ import annotations

import contextlib
import importlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from mpilsgd.comm.meeting import spins
from mpilsgd.comm.mpi import MPI, here
from mpilsgd.comm.waiting import wait_until

_LOOK = 1.0  # seconds between two looks at the others
_PIECE = 1 << 30  # bytes an operation: counts are C ints
_core: Any = None
with contextlib.suppress(ImportError):
    _core = importlib.import_module("mpilsgd._core")


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
        self._asleep = (
            shared and here.rank.is_process and hasattr(_core, "word_await")
        )  # whether waiting needs no polls
        self._spins = self._asleep and spins(comm)
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

    def begin_to_add(self, rank: int, word: int, value: int) -> Callable[[bool], int | None]:
        """Adds, and does not wait for it: it may come behind much else that is on its way there.

        Returns what gives the number that was there before, or None if it is not known yet; given True, it waits.
        """
        if self._addresses or not here.rank.is_process:
            before = self.add(rank, word, value)
            return lambda wait: before
        given, result = np.array([value], np.int64), np.empty(1, np.int64)
        kind = 1, MPI.INT64_T  # said three times: Open MPI wants the same type everywhere
        # the request keeps both arrays until it is done
        request = self._win.Rget_accumulate([given, *kind], [result, *kind], rank, [word, *kind], MPI.SUM)

        def done(wait: bool) -> int | None:
            if wait:
                request.Wait()
            elif not request.Test():
                return None
            return int(result[0])

        return done

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

    def wait_for(self, rank: int, word: int, value: int, sleepers: int, look: Callable[[], None]) -> float:
        """Until the word has a value, of which `tell` tells; the seconds that took.

        sleepers: a word beside it, for this. look: called every second.
        """
        if not self._asleep:
            return wait_until(lambda: self.read(rank, word) == value)
        start, at = time.perf_counter(), self._addresses[rank]
        while not _core.word_await(at + 8 * word, value, at + 8 * sleepers, self._spins, _LOOK):
            look()
        return time.perf_counter() - start

    def tell(self, rank: int, word: int, value: int, sleepers: int) -> None:
        """Wakes those who wait for this value of a word, which has been written."""
        if self._asleep:
            at = self._addresses[rank]
            _core.word_wake(at + 8 * word, value, at + 8 * sleepers)

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


def transfer(win: MPI.Win, rank: int, vector: torch.Tensor, operation: Any, at: int = 0) -> None:
    """Gets or puts a vector that begins `at` so many bytes in the rank's part of a window; complete on return."""
    data = vector.view(torch.uint8).numpy()
    for start in range(0, data.size, _PIECE):
        piece = data[start : start + _PIECE]
        operation(win, [piece, MPI.BYTE], rank, [at + start, piece.size, MPI.BYTE])
    win.Flush(rank)


class Turns:
    """Whose turn it is at each of several places: one rank after the other, in the order of tickets.

    Tickets are drawn (free order), or given: ticket k p + i is worker i's k-th turn in round robin since all last
    met. A rank that rests is passed over there.

    Args: level: the ranks; homes: the rank that keeps the words of each place.
    """

    NEXT, SERVING, TICKS, RESTING, SLEEPERS = range(5)

    def __init__(self, level: Any, homes: list[int]):
        self.board, self._look = Board(level.comm, 5, level.n_islands == 1), level.channel.meeting.look_after
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
        waited = board.wait_for(home, self.SERVING, ticket, self.SLEEPERS, self._look)
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
            home = self.homes[place]
            now = self.board.add(home, self.SERVING, 1) + 1
            self.board.tell(home, self.SERVING, now, self.SLEEPERS)

    def _advance(self, place: int, ticket: int) -> None:
        """From a ticket to the next one whose rank does not rest. Who rests and who passes on may both come here."""
        home = self.homes[place]
        for now in range(ticket, ticket + self._size):
            if not self.board.exchange(home, self.SERVING, now, now + 1):
                return  # another rank did
            self.board.tell(home, self.SERVING, now + 1, self.SLEEPERS)
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

"""Requests and messages among tasks of one process, by the names and meanings that mpi4py gives them.

Whoever waits gives the baton away, and whoever looks whether something has come may.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mpilsgd.comm.mpi import here
from mpilsgd.comm.waiting import give_way

if TYPE_CHECKING:
    from mpilsgd.comm.tasks import Comm

ANY_SOURCE, ANY_TAG = -2, -1


class Request:
    """Done when it is true; `finish` is then done once, by whoever asks first."""

    cancelled = False

    def __init__(
        self, true: Callable[[], bool], what: Callable[[], str], begun: Callable[[], float] | None = None
    ):
        self._true, self._what, self._begun = true, what, begun
        self.finish: Callable[[], None] | None = None

    def _done(self) -> bool:
        done = self.cancelled or self._true()
        if done and self.finish is not None:
            self.finish()
            self.finish = None
        return done

    def Test(self) -> bool:
        give_way()
        return self._done()

    def Wait(self, status: Status | None = None) -> None:
        here.task.baton.wait(self._done, self._what, None, self._begun)
        if status is not None:
            status.cancelled = self.cancelled

    def Cancel(self) -> None: ...

    @staticmethod
    def Testall(requests: Sequence[Request]) -> bool:
        give_way()
        return all([request._done() for request in requests])

    @staticmethod
    def Waitall(requests: Sequence[Request]) -> None:
        for request in requests:
            request.Wait()


class Sent:
    """A message on its way.

    synchronous: its bytes leave when it is taken, and only its announcement at once.

    Attributes: taken: by its receiver; begun, left, came: when its bytes began to move, have left, have come; shown:
    when the receiver can see that there is one.
    """

    taken = False

    def __init__(self, comm: Comm, dest: int, tag: int, data: np.ndarray, synchronous: bool):
        self.source, self.tag, self.data, self._synchronous = comm.rank, tag, data, synchronous
        self.home, self.dest = comm.members.ranks[comm.rank], comm.members.ranks[dest]
        self.baton = here.task.baton
        self._move(0 if synchronous else data.size)
        self.shown = self.came
        for receive in comm.members.posted[dest]:
            if self.fits(receive.source, receive.tag):
                comm.members.posted[dest].remove(receive)
                receive.take(self)
                return
        comm.members.sent[dest].append(self)

    def fits(self, source: int, tag: int) -> bool:
        return source in (self.source, ANY_SOURCE) and tag in (self.tag, ANY_TAG)

    def what(self) -> str:
        return f"a message of {self.data.size} bytes (tag {self.tag}) that rank {self.dest} has not taken"

    def _move(self, nbytes: int) -> None:
        self.begun = self.baton.now
        self.left, self.came = self.baton.costs.message(self.home, self.dest, nbytes)

    def has_left(self) -> bool:
        return bool(self.baton.now >= self.left)

    def has_come(self) -> bool:
        return self.taken and bool(self.baton.now >= self.came)

    def is_shown(self) -> bool:
        return bool(self.baton.now >= self.shown)

    def Recv(self, buffer: Any) -> None:
        _copy(self.data, as_bytes(buffer))
        self.take()

    def take(self) -> None:
        self.taken = True
        if self._synchronous:
            self._move(self.data.size)


class Receive(Request):
    def __init__(self, comm: Comm, source: int, tag: int, into: np.ndarray):
        self.source, self.tag, self._into = source, tag, into
        self._sent: Sent | None = None
        ranks = comm.members.ranks
        who = "any rank" if source == ANY_SOURCE else f"rank {ranks[source]}"
        super().__init__(self._has_come, lambda: f"a message of {who} (tag {tag})", self._since)
        self._posted = comm.members.posted[comm.rank]
        sent = comm._first(source, tag)
        if sent is None:
            self._posted.append(self)
        else:
            comm.members.sent[comm.rank].remove(sent)
            self.take(sent)

    def take(self, sent: Sent) -> None:
        sent.Recv(self._into)
        self._sent = sent

    def _has_come(self) -> bool:
        return self._sent is not None and self._sent.has_come()

    def _since(self) -> float:
        return math.inf if self._sent is None else self._sent.begun

    def Cancel(self) -> None:
        if self._sent is None:
            self._posted.remove(self)
            self.cancelled = True


class Status:
    cancelled = False

    def Is_cancelled(self) -> bool:
        return self.cancelled


def as_bytes(buffer: Any) -> np.ndarray:
    """Of a buffer as mpi4py takes it: an array, [array, BYTE], [None, 0, BYTE], or None."""
    array = buffer[0] if isinstance(buffer, list | tuple) else buffer
    return np.empty(0, np.uint8) if array is None else np.asarray(array).reshape(-1).view(np.uint8)


def _copy(data: np.ndarray, into: np.ndarray) -> None:
    if data.size > into.size:
        raise RuntimeError(f"a message of {data.size} bytes came where there is room for {into.size}")
    into[: data.size] = data

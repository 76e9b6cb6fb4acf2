"""Requests and messages among tasks of one process, by the names and meanings that mpi4py gives them.

Whoever waits gives the baton away, and whoever looks whether something has come may.
"""

from __future__ import annotations

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

    def __init__(self, true: Callable[[], bool], what: Callable[[], str]):
        self._true, self._what = true, what
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
        here.task.baton.wait(self._done, self._what, None)
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
    """A message that has not been received."""

    taken = False

    def __init__(self, comm: Comm, dest: int, tag: int, data: np.ndarray):
        self.source, self.tag, self.data = comm.rank, tag, data
        self.dest = comm.members.ranks[dest]
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

    def Recv(self, buffer: Any) -> None:
        _copy(self.data, as_bytes(buffer))
        self.taken = True


class Receive(Request):
    def __init__(self, comm: Comm, source: int, tag: int, into: np.ndarray):
        self.source, self.tag, self._into, self._came = source, tag, into, False
        ranks = comm.members.ranks
        who = "any rank" if source == ANY_SOURCE else f"rank {ranks[source]}"
        super().__init__(lambda: self._came, lambda: f"a message of {who} (tag {tag})")
        self._posted = comm.members.posted[comm.rank]
        sent = comm._first(source, tag)
        if sent is None:
            self._posted.append(self)
        else:
            comm.members.sent[comm.rank].remove(sent)
            self.take(sent)

    def take(self, sent: Sent) -> None:
        sent.Recv(self._into)
        self._came = True

    def Cancel(self) -> None:
        if not self._came:
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

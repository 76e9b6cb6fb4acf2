"""Communicators of ranks that are tasks of one process: what mpilsgd asks of mpi4py's, without MPI."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mpilsgd.comm.mpi import here
from mpilsgd.comm.task_requests import ANY_SOURCE, ANY_TAG, Receive, Request, Sent, as_bytes
from mpilsgd.comm.task_windows import SUM, Memory
from mpilsgd.comm.waiting import give_way

UNDEFINED = -32766
_PLAIN = (int, float, bool, str, type(None))


class _Meeting:
    """One collective operation of a communicator: what each rank has brought."""

    def __init__(self, name: str, size: int):
        self.name, self.given, self.left = name, dict[int, Any](), size
        self.made: dict[Any, Any] = {}
        self.begun = 0.0
        self.end: float | None = None  # None: those who are needed have not come


class Members:
    """What the ranks of a communicator have in common. ranks: in the world."""

    def __init__(self, ranks: Sequence[int]):
        self.ranks = list(ranks)
        self.size = len(self.ranks)
        self.meetings: dict[int, _Meeting] = {}
        self.sent: list[list[Sent]] = [[] for _ in ranks]  # by the receiver, in the order of sending
        self.posted: list[list[Receive]] = [[] for _ in ranks]


class Comm:
    """A communicator as its rank `rank` holds it."""

    def __init__(self, members: Members, rank: int):
        self.members, self.rank, self.size = members, rank, members.size
        self._calls = 0

    # Collective operations

    def _meet(self, name: str, value: Any, needed: Sequence[int] | None = None) -> tuple[_Meeting, Request]:
        """Brings a value; the request is done when those of the needed ranks (None: all) are there."""
        number, self._calls = self._calls, self._calls + 1
        meetings, ranks = self.members.meetings, self.members.ranks
        meeting = meetings.setdefault(number, _Meeting(name, self.size))
        if meeting.name != name:
            first = min(meeting.given)
            raise RuntimeError(
                f"rank {ranks[self.rank]} comes to {name} and rank {ranks[first]} to {meeting.name}: collective calls "
                "must come in the same order on every rank"
            )
        meeting.given[self.rank] = value
        meeting.left -= 1
        if not meeting.left:
            del meetings[number]
        given, wanted = meeting.given, range(self.size) if needed is None else needed
        baton = here.task.baton
        if meeting.end is None and (self.rank in wanted if needed else not meeting.left):
            sizes = {ranks[r]: _size(item) for r, item in given.items() if r in wanted or not needed}
            meeting.begun, meeting.end = baton.now, baton.costs.collective(name, ranks, sizes)

        def what() -> str:
            missing = ", ".join(str(ranks[r]) for r in wanted if r not in given)
            return f"{name}, to which rank(s) {missing} of {ranks} have not come"

        def true() -> bool:
            return not wanted or (meeting.end is not None and baton.now >= meeting.end)

        return meeting, Request(true, what, lambda: meeting.begun)

    def _all(self, name: str, value: Any, needed: Sequence[int] | None = None) -> dict[int, Any]:
        meeting, request = self._meet(name, value, needed)
        request.Wait()
        return meeting.given

    def allgather(self, item: Any) -> list[Any]:
        return self._gathered("allgather", item)

    def _gathered(self, name: str, item: Any) -> list[Any]:
        given = self._all(name, _pickled(item))
        return [_unpickled(given[r]) for r in range(self.size)]

    def gather(self, item: Any, root: int = 0) -> list[Any] | None:
        given = self._all("gather", _pickled(item), None if self.rank == root else ())
        return [_unpickled(given[r]) for r in range(self.size)] if self.rank == root else None

    def bcast(self, item: Any, root: int = 0) -> Any:
        given = self._all("bcast", _pickled(item) if self.rank == root else None, (root,))
        return item if self.rank == root else _unpickled(given[root])

    def allreduce(self, item: Any, op: Any = None) -> Any:
        first, *others = self._gathered("allreduce", item)
        for other in others:
            first = (op or SUM)(first, other)
        return first

    def Bcast(self, buffer: Any, root: int = 0) -> None:
        data = as_bytes(buffer)
        given = self._all("Bcast", data.copy() if self.rank == root else None, (root,))
        if self.rank != root:
            data[:] = given[root]

    def Barrier(self) -> None:
        self._all("Barrier", None)

    def Ibarrier(self) -> Request:
        return self._meet("Ibarrier", None)[1]

    def Allgather(self, send: Any, receive: Any) -> None:
        self._collect("Allgather", send, receive, lambda given: given).Wait()

    def Iallgather(self, send: Any, receive: Any) -> Request:
        return self._collect("Iallgather", send, receive, lambda given: given)

    def Allreduce(self, send: Any, receive: Any, op: Any = None) -> None:
        receive[:] = self.allreduce(send, op)

    def _collect(
        self, name: str, send: Any, receive: Any, part: Callable[[np.ndarray], np.ndarray]
    ) -> Request:
        into = as_bytes(receive).reshape(self.size, -1)
        meeting, request = self._meet(name, as_bytes(send).copy())

        def finish() -> None:
            for r in range(self.size):
                into[r] = part(meeting.given[r])

        request.finish = finish
        return request

    def Split(self, color: int = 0, key: int = 0) -> Comm | None:
        meeting, request = self._meet("Split", (color, key))
        request.Wait()
        if color == UNDEFINED:
            return None
        ranks = sorted((k, r) for r, (c, k) in meeting.given.items() if c == color)
        own = [r for _, r in ranks]
        if color not in meeting.made:
            meeting.made[color] = Members([self.members.ranks[r] for r in own])
        return Comm(meeting.made[color], own.index(self.rank))

    def Split_type(self, kind: int, key: int = 0) -> Comm | None:
        return self.Split(here.rank.node, key)  # type: ignore[attr-defined]

    def Dup(self) -> Comm:
        made = self.Split(0, self.rank)
        assert made is not None
        return made

    def Free(self) -> None: ...

    def Get_attr(self, key: int) -> None:
        return None

    def Abort(self, code: int = 0) -> None:
        raise SystemExit(code)

    # Messages

    def send(self, item: Any, dest: int, tag: int = 0) -> None:
        self.Isend(np.frombuffer(pickle.dumps(item), np.uint8), dest, tag)

    def recv(self, source: int = ANY_SOURCE, tag: int = ANY_TAG) -> Any:
        wanted = Request(lambda: self._shown(source, tag) is not None, lambda: f"a message of rank {source}")
        wanted.Wait()
        sent = self._shown(source, tag)
        assert sent is not None
        self.members.sent[self.rank].remove(sent)
        sent.take()
        return pickle.loads(sent.data.tobytes())

    def Isend(self, buffer: Any, dest: int, tag: int = 0) -> Request:
        sent = Sent(self, dest, tag, as_bytes(buffer).copy(), synchronous=False)
        return Request(sent.has_left, sent.what, lambda: sent.begun)

    def Issend(self, buffer: Any, dest: int, tag: int = 0) -> Request:
        sent = Sent(self, dest, tag, as_bytes(buffer), synchronous=True)
        return Request(sent.has_come, sent.what, lambda: sent.begun)

    def Irecv(self, buffer: Any, source: int, tag: int = 0) -> Request:
        return Receive(self, source, tag, as_bytes(buffer))

    def Recv(self, buffer: Any, source: int, tag: int = 0) -> None:
        self.Irecv(buffer, source, tag).Wait()

    def _first(self, source: int, tag: int) -> Sent | None:
        return next((sent for sent in self.members.sent[self.rank] if sent.fits(source, tag)), None)

    def _shown(self, source: int, tag: int) -> Sent | None:
        sent = self._first(source, tag)
        return sent if sent is not None and sent.is_shown() else None

    def Iprobe(self, source: int, tag: int) -> bool:
        give_way()
        return self._shown(source, tag) is not None

    def Improbe(self, source: int, tag: int = -1) -> Sent | None:
        give_way()
        found = self._shown(source, tag)
        if found is not None:
            self.members.sent[self.rank].remove(found)
        return found


def _size(item: Any) -> int:
    """Bytes that travel. The memory of a window stays where it is."""
    if isinstance(item, np.ndarray):
        return 0 if isinstance(item, Memory) else item.nbytes
    return len(item) if isinstance(item, bytes) else 8


def _pickled(item: Any) -> Any:
    """As it goes to other ranks, which get a copy of their own."""
    return item if type(item) in _PLAIN else pickle.dumps(item)


def _unpickled(item: Any) -> Any:
    return pickle.loads(item) if isinstance(item, bytes) else item

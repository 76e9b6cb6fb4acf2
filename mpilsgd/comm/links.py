"""The edges of a tree: messages that nobody waits for, of which one at most is under way on each."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from mpilsgd.comm.mpi import MPI
from mpilsgd.comm.waiting import wait_until

_PIECE = 1 << 30  # bytes a message: MPI counts are C ints
_LONGEST = 64  # a sender whose messages are not taken waits so many periods at most
_MISSES = 3  # times in a row that the last message was not taken, before it sends half as often
Memory = np.ndarray  # of bytes


def tag_problem(comm: MPI.Comm, tags: int) -> str | None:
    """Why `Links` cannot have so many."""
    most = comm.Get_attr(MPI.TAG_UB) or tags
    return None if tags <= most else f"{tags // 2} tree nodes take {tags} message tags; this MPI has {most}"


class Links:
    """This rank's ends of a tree's edges, and the memory of the messages under way.

    Args:
        level: all ranks; newest: of the messages that have come the newest is taken, else all in their order, of which
            two may lie at a receiver.
        tags: how many there are in the tree, one for each direction of each edge.

    Collective: `deliver`, `free`.
    """

    def __init__(self, level: Any, newest: bool, tags: int):
        self._level, self._comm = level, level.comm
        self._newest, self._last_tag = newest, tags
        self._outboxes: list[Outbox] = []
        self._inboxes: list[Inbox] = []
        self._slots: dict[int, Slot] = {}
        self._made: list[Memory] = []
        self._told: list[MPI.Request] = []

    def out(self, rank: int, tag: int) -> Outbox | Slot:
        if rank == self._comm.rank:
            return self._slot(tag)
        self._outboxes.append(Outbox(self._comm, rank, tag))
        return self._outboxes[-1]

    def into(self, rank: int, tag: int, nbytes: int) -> Inbox | Slot:
        if rank == self._comm.rank:
            return self._slot(tag)
        self._inboxes.append(Inbox(self._comm, rank, tag, nbytes, self._newest))
        return self._inboxes[-1]

    def _slot(self, tag: int) -> Slot:
        return self._slots.setdefault(tag, Slot(1 if self._newest else 2))

    def fresh(self, nbytes: int) -> Memory:
        """Memory for a message, which may go to several: none that is under way."""
        busy = {id(box.memory) for box in self._outboxes}
        for memory in self._made:
            if id(memory) not in busy and memory.size == nbytes:
                return memory
        self._made.append(np.empty(nbytes, np.uint8))
        return self._made[-1]

    def rest(self) -> None:
        """Tells all neighbours that this rank sends and takes no more until `deliver`."""
        self._told = [
            self._comm.Isend([None, 0, MPI.BYTE], box.rank, self._last_tag) for box in self._outboxes
        ]

    def rests(self, rank: int) -> bool:
        return self._comm.Iprobe(rank, self._last_tag)

    def deliver(self) -> None:
        """Returns when every message that was sent has arrived; of too many on an edge the last. Nobody sends."""
        for box in self._inboxes if self._told else ():
            self._comm.Recv([None, 0, MPI.BYTE], box.rank, self._last_tag)
        MPI.Request.Waitall(self._told)
        self._told = []
        rows = self._comm.allgather([(box.tag, box.sent) for box in self._outboxes])
        sent = dict(pair for row in rows for pair in row)
        boxes, outboxes = self._inboxes, self._outboxes
        wait_until(lambda: all([b.collect(sent[b.tag]) for b in boxes] + [b.ready() for b in outboxes]))
        self._comm.Barrier()

    def free(self) -> None:
        for box in self._inboxes:
            box.cancel()
        self._inboxes, self._outboxes, self._slots, self._made = [], [], {}, []


class Outbox:
    """One direction of an edge, at its sender.

    A send is synchronous (`Issend`): it is complete when the receiver has begun to take it, so no MPI can pile up
    messages for a receiver that is slow. Its memory must stay as it is until then.
    """

    def __init__(self, comm: MPI.Comm, rank: int, tag: int):
        self._comm, self.rank, self.tag = comm, rank, tag
        self._requests: list[MPI.Request] = []
        self.memory: Memory | None = None  # under way
        self.sent = 0

    def ready(self) -> bool:
        """Whether nothing is under way."""
        if self.memory is not None and MPI.Request.Testall(self._requests):
            self.memory, self._requests = None, []
        return self.memory is None

    def send(self, memory: Memory) -> None:
        assert self.memory is None
        self.memory = memory
        self._requests = [self._comm.Issend([p, MPI.BYTE], self.rank, self.tag) for p in _pieces(memory)]
        self.sent += 1


class Inbox:
    """One direction of an edge, at its receiver: room for a message that lies here and the next, which is received.

    newest: the next one takes the place of the one that lies here; else both lie here, and none is received.
    """

    def __init__(self, comm: MPI.Comm, rank: int, tag: int, nbytes: int, newest: bool):
        self._comm, self.rank, self.tag = comm, rank, tag
        self._newest = newest
        self._free = [np.empty(nbytes, np.uint8) for _ in range(2)]
        self._lies: collections.deque[Memory] = collections.deque()
        self._requests: list[MPI.Request] = []
        self._coming: Memory | None = None
        self.received = 0
        self._post()

    def _post(self) -> None:
        if self._coming is None and self._free:
            self._coming = self._free.pop()
            pieces = _pieces(self._coming)
            self._requests = [self._comm.Irecv([p, MPI.BYTE], self.rank, self.tag) for p in pieces]

    def has(self) -> bool:
        """Whether a message lies here."""
        while self._coming is not None and MPI.Request.Testall(self._requests):
            if self._newest and self._lies:
                self._free.append(self._lies.popleft())
            self._lies.append(self._coming)
            self._coming = None
            self.received += 1
            self._post()
        return bool(self._lies)

    def message(self) -> Memory:
        """The oldest that lies here; good until `release` or `has`."""
        return self._lies[0]

    def release(self) -> None:
        """It was taken, or is not wanted: its room is free for the next."""
        self._free.append(self._lies.popleft())
        self._post()

    def collect(self, sent: int) -> bool:
        """Whether all that was sent has arrived; old ones make room."""
        self.has()
        if self.received < sent and self._coming is None:
            self.release()
        return self.received == sent

    def lying(self) -> list[Memory]:
        return list(self._lies)

    def put(self, messages: Sequence[Memory]) -> None:
        """These lie here, and nothing else."""
        self.cancel()
        while self._lies:
            self._free.append(self._lies.popleft())
        for message in messages:
            self._lies.append(self._free.pop())
            self._lies[-1][:] = message
        self._post()

    def cancel(self) -> None:
        """No message is waited for any more."""
        if self._coming is None:
            return
        for request in self._requests:
            request.Cancel()
        MPI.Request.Waitall(self._requests)
        self._free.append(self._coming)
        self._coming = None


class Slot:
    """Both ends of one direction of an edge within a rank; `room` messages may lie there, newer ones push out older."""

    memory = None  # copied: nothing stays under way

    def __init__(self, room: int):
        self._lies: collections.deque[Memory] = collections.deque(maxlen=room)
        self.sent = 0

    def ready(self) -> bool:
        return True

    def send(self, memory: Memory) -> None:
        self._lies.append(memory.copy())
        self.sent += 1

    def has(self) -> bool:
        return bool(self._lies)

    def message(self) -> Memory:
        return self._lies[0]

    def release(self) -> None:
        self._lies.popleft()

    def lying(self) -> list[Memory]:
        return list(self._lies)

    def put(self, messages: Sequence[Memory]) -> None:
        self._lies.clear()
        self._lies.extend(messages)


@dataclasses.dataclass
class Edge:
    """An edge as one of its ends sees it.

    above: whether the other end is the parent; rank: where it is; narrow: whether messages are rounded; send_every,
    take_every: steps between the messages of this end and of the other; stride: of its own, every how many-th is sent.
    """

    out: Outbox | Slot
    into: Inbox | Slot
    above: bool
    rank: int
    narrow: bool  # messages travel in the topology's across_dtype
    send_every: int
    take_every: int
    stride: int = 1
    misses: int = 0  # in a row

    def gets_through(self) -> bool:
        """Whether a message that is due can be sent. Where several cannot, the next ones will be further apart."""
        if self.out.ready():
            self.stride, self.misses = max(1, self.stride // 2), 0
            return True
        self.misses += 1
        if self.misses % _MISSES == 0:
            self.stride = min(2 * self.stride, _LONGEST)
        return False


def _pieces(memory: Memory) -> Iterator[Memory]:
    return (memory[a : a + _PIECE] for a in range(0, memory.size, _PIECE))

"""Windows of ranks that are tasks of one process: memory that they all see anyway."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mpilsgd.comm.mpi import here
from mpilsgd.comm.task_requests import as_bytes
from mpilsgd.comm.waiting import give_way

if TYPE_CHECKING:
    from mpilsgd.comm.tasks import Comm

_ALIGN = 64  # bytes


class Memory(np.ndarray):
    """Bytes that begin at a cache line."""

    @property
    def address(self) -> int:
        return int(self.ctypes.data)


def _memory(nbytes: int) -> Memory:
    whole = np.zeros(nbytes + _ALIGN, np.uint8)
    start = -whole.ctypes.data % _ALIGN
    return whole[start : start + nbytes].view(Memory)


class Win:
    """Memory of every rank that all see."""

    model = 0

    def __init__(self, comm: Comm, unit: int, memory: Memory):
        given = comm._all("a window", memory)
        self._memories = [given[r] for r in range(comm.size)]
        self._own, self._unit = memory, unit
        self._ranks, self._me = comm.members.ranks, comm.members.ranks[comm.rank]
        self._ends: dict[int, float] = {}  # of the operations under way, by the target

    @classmethod
    def Allocate_shared(cls, nbytes: int, unit: int, info: Any = None, comm: Any = None) -> Win:
        return cls(comm, unit, _memory(nbytes))

    @classmethod
    def Allocate(cls, nbytes: int, unit: int, info: Any = None, comm: Any = None) -> Win:
        return cls(comm, unit, _memory(nbytes))

    @classmethod
    def Create(cls, memory: Any, unit: int, info: Any = None, comm: Any = None) -> Win:
        return cls(comm, unit, as_bytes(memory).view(Memory))

    def Shared_query(self, rank: int) -> tuple[Memory, int]:
        return self._memories[rank], self._unit

    def tomemory(self) -> Memory:
        return self._own

    def _word(self, rank: int, word: int) -> np.ndarray:
        return self._memories[rank][8 * word : 8 * word + 8].view(np.ndarray).view(np.int64)

    def Fetch_and_op(self, given: np.ndarray, result: np.ndarray, rank: int, word: int, op: Any) -> None:
        self._begin(rank, 8, 8)
        place = self._word(rank, word)
        result[:] = place
        place[:] = op(place, given)

    def Compare_and_swap(self, given: Any, expected: Any, result: Any, rank: int, word: int) -> None:
        self._begin(rank, 16, 8)
        place = self._word(rank, word)
        result[:] = place
        if place == expected:
            place[:] = given

    def Get(self, buffer: Any, rank: int, target: Sequence[Any]) -> None:
        start, size, _ = target
        self._begin(rank, 0, size)
        as_bytes(buffer)[:] = self._memories[rank][start : start + size]

    def Put(self, buffer: Any, rank: int, target: Sequence[Any]) -> None:
        start, size, _ = target
        self._begin(rank, size, 0)
        self._memories[rank][start : start + size] = as_bytes(buffer)

    def _begin(self, rank: int, there: int, back: int) -> None:
        """An operation that takes so many bytes there and back; it is done at once, and complete after `Flush`."""
        end = here.task.baton.costs.access(self._me, self._ranks[rank], there, back)
        self._ends[rank] = max(end, self._ends.get(rank, 0.0))

    def Sync(self) -> None:
        give_way()

    def Flush(self, rank: int) -> None:
        here.task.baton.reach(self._ends.pop(rank, 0.0))

    def Lock_all(self, mode: int = 0) -> None: ...

    def Unlock_all(self) -> None: ...

    def Free(self) -> None: ...


def SUM(a: Any, b: Any) -> Any:
    return a + b


def MAX(a: Any, b: Any) -> Any:
    return np.maximum(a, b)


def LOR(a: Any, b: Any) -> bool:
    return bool(a) or bool(b)


def LAND(a: Any, b: Any) -> bool:
    return bool(a) and bool(b)


def REPLACE(a: Any, b: Any) -> Any:
    return b


def NO_OP(a: Any, b: Any) -> Any:
    return a


class Info:
    @classmethod
    def Create(cls) -> Info:
        return cls()

    def Set(self, key: str, value: str) -> None: ...

    def Free(self) -> None: ...

"""Pinned memory of the host that the ranks of a node share: the way between devices that cannot reach each other."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch

from mpilsgd import devices, kernels
from mpilsgd.comm import Window
from mpilsgd.transport.devices import together

SLOT = 1 << 23  # bytes: of a vector what is under way to the host while others read what went before
SLOTS = 2


def to_the_end(turn: Callable[[int], tuple[int, int]], parts: Iterable[int]) -> Iterator[tuple[int, int]]:
    """What each part gives. Who is interrupted between two takes part in the rest first, as the others wait for it."""
    todo = deque(parts)
    try:
        while todo:
            yield turn(todo.popleft())
    except BaseException:
        while todo:
            turn(todo.popleft())
        raise


class Stage:
    """Two slots that the devices of all ranks of `comm`, which lie on one node, write and read. Each rank is an island.

    They take turns: some write into a slot, all meet, some read. Streams cannot wait here for those of other processes.
    So before it meets the others a host waits for its own: then what it writes can be read, and what it has read in
    the turn before can be overwritten in the next one. While some still read a slot, others fill the next one.

    meet: returns when all ranks have called it. Collective, as is all that follows; a RuntimeError on all ranks where
    one cannot have it.
    """

    def __init__(self, comm: Any, place: torch.device, meet: Callable[[], None]):
        self._comm, self._place, self._meet, self._turns = comm, place, meet, 0
        self._slot, self._pinned = SLOT, devices.Pinned(place)
        self._window = Window(comm, torch.uint8, SLOTS * SLOT, common=True)
        try:
            together(comm, lambda: self._pinned.pin(self._window.views[0]))
        except RuntimeError:
            self.free()
            raise

    def passed(self, vector: torch.Tensor, home: int) -> Iterator[tuple[int, int]]:
        """Rank `home`'s vector to all; gives the parts, (start, stop), each when it is there."""
        step = self._slot // vector.element_size()

        def part(a: int) -> tuple[int, int]:
            b = min(a + step, vector.numel())
            here, to = ([], [(0, vector[a:b])]) if self._comm.rank != home else ([(0, vector[a:b])], [])
            self._turn(here, to)
            return a, b

        return to_the_end(part, range(0, vector.numel(), step))

    def sums(self, vector: torch.Tensor) -> Iterator[tuple[int, int]]:
        """vector <- the sum of all ranks' vectors, in the order of the ranks; gives the parts, each when it is there.

        Every rank sums a slice of each part, on its device.
        """
        n, me = self._comm.size, self._comm.rank
        step = self._slot // n // vector.element_size()

        def summed(a: int) -> tuple[int, int]:
            part = vector[a : a + step]
            whole = part.numel()
            low, high = (min(k * -(-whole // n), whole) for k in (me, me + 1))
            came, own = part.new_empty((n, high - low)), part.new_empty(high - low)
            self._turn([(me * whole, part)], [(k * whole + low, came[k]) for k in range(n)])
            if high > low:
                kernels.total(own, list(came))
            self._turn([(low, own)], [(0, part)])
            return a, a + whole

        return to_the_end(summed, range(0, vector.numel(), step))

    def _turn(
        self, written: Sequence[tuple[int, torch.Tensor]], read: Sequence[tuple[int, torch.Tensor]]
    ) -> None:
        """Vectors, and at which element of the slot they are written or read."""
        slot = self._window.views[0].data_ptr() + self._turns % SLOTS * self._slot
        for k, x in written:
            devices.copy(self._place, slot + k * x.element_size(), x.data_ptr(), x.nbytes)
        devices.finish(self._place)
        self._meet()
        for k, x in read:
            devices.copy(self._place, x.data_ptr(), slot + k * x.element_size(), x.nbytes)
        self._turns += 1

    def free(self) -> None:
        """Nobody's stream may have anything to do with it any more."""
        try:
            together(self._comm, self._pinned.free)
        finally:
            self._window.free()

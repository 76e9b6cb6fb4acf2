"""Vectors in device memory that the ranks of a node map into their address spaces (CUDA IPC)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch

from mpilsgd import devices
from mpilsgd.comm import Channel, Topology, Window, here

_T = TypeVar("_T")


class DeviceWindow:
    """As `comm.Window`, on devices: a rank's kernels read and write the vectors of all ranks of its island where they
    lie. Collective over `island`, as is `free`.
    """

    def __init__(
        self, island: Any, place: torch.device, dtype: torch.dtype, numel: int, common: bool = False
    ):
        self.common, self._island, self._place = common, island, place
        self._own: devices.Memory | None = None
        self._mapped: dict[int, devices.Mapped] = {}
        self.views: list[torch.Tensor] = []
        there = together(island, lambda: self._allot(dtype, numel))
        together(island, lambda: self._map(there, dtype))
        self.mine = self.views[island.rank]

    def _allot(self, dtype: torch.dtype, numel: int) -> tuple[Any, int]:
        """This rank's memory, as the others are told of it."""
        if self.common and self._island.rank:
            return None, numel
        self._own = devices.Memory(self._place, max(numel * dtype.itemsize, 1))
        devices.finish(self._place)  # zeros, before another rank writes there
        # tasks of one process see all its memory
        return self._own.handle() if here.rank.is_process else self._own.address, numel

    def _map(self, there: list[tuple[Any, int]], dtype: torch.dtype) -> None:
        for rank, (told, numel) in enumerate(there):
            if self.common and rank:
                self.views.append(self.views[0])
                continue
            if rank == self._island.rank and self._own is not None:
                address = self._own.address
            elif isinstance(told, int):
                address = told
            else:
                self._mapped[rank] = devices.Mapped(self._place, told)
                address = self._mapped[rank].address
            self.views.append(devices.vector(self._place, address, dtype, numel))

    def free(self) -> None:
        """Nobody's stream may have anything to do with it any more."""
        self.views, self.mine = [], torch.empty(0)
        for mapped in self._mapped.values():
            mapped.free()
        self._island.Barrier()  # unmapped everywhere
        if self._own is not None:
            self._own.free()
        self._mapped, self._own = {}, None


class DeviceWindows:
    """The verbs of `SharedWindows` on devices that reach each other."""

    def __init__(self, island: Channel, place: torch.device):
        self._island, self._place = island, place
        self._windows: list[Any] = []
        self._orders: list[Order] = []

    def vector(self, dtype: torch.dtype, numel: int, host: bool = False) -> Any:
        return self._keep(self._island.local, dtype, numel, host)

    def common(self, level: Channel, dtype: torch.dtype, numel: int, host: bool = False) -> Any:
        return self._keep(level.local, dtype, numel, host, True)

    def _keep(self, comm: Any, dtype: torch.dtype, numel: int, host: bool, common: bool = False) -> Any:
        if host:
            self._windows.append(Window(comm, dtype, numel, common))
        else:
            self._windows.append(DeviceWindow(comm, self._place, dtype, numel, common))
        return self._windows[-1]

    def order(self, level: Channel) -> Order:
        self._orders.append(Order(level, self._place))
        return self._orders[-1]

    def free(self) -> None:
        devices.finish(self._place)
        self._island.local.Barrier()
        for order in self._orders:
            order.free()
        for window in self._windows:
            window.free()
        self._windows, self._orders = [], []


class Order:
    """What the streams of a level's ranks on an island do before a meeting comes before what they do after it.

    Each rank leaves a mark in its stream before the meeting, and all streams wait for the others' marks after it; no
    host waits for a stream. There are two marks a rank, taken in turns: nobody comes to the next meeting but one before
    all have left this one, so no mark is moved before all wait for it.
    """

    def __init__(self, level: Channel, place: torch.device):
        self._own = [devices.Mark(place) for _ in range(2)]
        self._others: list[list[devices.Mark]] = [[], []]
        self._turn = 0
        local = level.local
        if here.rank.is_process:
            told = local.allgather([mark.handle() for mark in self._own])
        else:
            told = local.allgather(self._own)
        for rank, marks in enumerate(told):
            for k, mark in enumerate(marks) if rank != local.rank else ():
                self._others[k].append(devices.Mark.of(place, mark) if isinstance(mark, bytes) else mark)

    def before(self, through_mpi: bool) -> None:
        self._own[self._turn].here()

    def after(self, through_mpi: bool) -> None:
        for mark in self._others[self._turn]:
            mark.awaited()
        self._turn = 1 - self._turn

    def free(self) -> None:
        self._own, self._others = [], [[], []]


def together(comm: Any, do: Callable[[], _T]) -> list[_T]:
    """What each rank's `do` gives; if one fails, a RuntimeError on all. Collective."""
    given: _T | None = None
    error = None
    try:
        given = do()
    except (MemoryError, RuntimeError) as failure:
        error = f"rank {comm.rank} of the node: {failure}"
    told = comm.allgather((error, given))
    errors = [error for error, _ in told if error is not None]
    if errors:
        raise RuntimeError("; ".join(errors))
    return [given for _, given in told]


_REACH: WeakKeyDictionary[Topology, str | None] = WeakKeyDictionary()


def unreachable(topology: Topology, place: torch.device) -> str | None:
    """Why this node's ranks cannot read each other's device memory; None if they can. Collective over the node.

    It is tried, once a topology: what the driver says is not enough, as a container may keep processes apart.
    """
    if topology not in _REACH:
        try:
            window = DeviceWindow(topology.node, place, torch.int64, 2)
        except RuntimeError as error:
            _REACH[topology] = str(error)
        else:
            window.mine.fill_(topology.node.rank)
            devices.finish(place)
            topology.node.Barrier()
            seen = [int(view.cpu()[1]) for view in window.views]
            right = all(topology.node.allgather(seen == list(range(topology.node.size))))
            _REACH[topology] = None if right else "they read other values there than were written"
            window.free()
    return _REACH[topology]

"""Vectors in device memory that the ranks of a node map into their address spaces (CUDA IPC)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch

from mpilsgd import devices, kernels
from mpilsgd.comm import Channel, Topology, Window

_T = TypeVar("_T")


class DeviceWindow:
    """As `comm.Window`, on devices: a rank's kernels read and write the vectors of all ranks of its island where they
    lie. Collective over `island`, as is `free`. A RuntimeError on all its ranks if it cannot be had on one.
    """

    def __init__(
        self, island: Any, place: torch.device, dtype: torch.dtype, numel: int, common: bool = False
    ):
        self.common, self._island, self._place = common, island, place
        self._own: devices.Memory | None = None
        self._mapped: list[devices.Mapped] = []
        self.views: list[torch.Tensor] = []
        try:
            there = together(island, lambda: self._allot(dtype, numel))
            together(island, lambda: self._map(there, dtype))
        except RuntimeError:
            self.free()
            raise
        self.mine = self.views[island.rank]

    def _allot(self, dtype: torch.dtype, numel: int) -> tuple[bytes, int]:
        """This rank's memory, as the others are told of it."""
        if self.common and self._island.rank:
            return b"", numel
        self._own = devices.Memory(self._place, max(numel * dtype.itemsize, 1))
        devices.finish(self._place)  # zeros, before another rank writes there
        return self._own.handle(), numel

    def _map(self, there: list[tuple[bytes, int]], dtype: torch.dtype) -> None:
        for rank, (handle, numel) in enumerate(there):
            if self.common and rank:
                self.views.append(self.views[0])
                continue
            if rank == self._island.rank and self._own is not None:
                address = self._own.address
            else:
                self._mapped.append(devices.Mapped(self._place, handle))
                address = self._mapped[-1].address
            self.views.append(devices.vector(self._place, address, dtype, numel))

    def sync(self) -> None:
        """Streams are ordered by their marks."""

    def free(self) -> None:
        """Nobody's stream may have anything to do with it any more."""
        self.views, self.mine = [], torch.empty(0)
        mapped, self._mapped, own, self._own = self._mapped, [], self._own, None

        def unmap() -> None:
            for one in mapped:
                one.free()

        try:
            together(self._island, unmap)
        finally:
            if own is not None:
                own.free()


class DeviceWindows:
    """The verbs of `SharedWindows` on devices that reach each other."""

    def __init__(self, island: Channel, place: torch.device):
        self._island, self._place = island, place
        self._windows: list[Any] = []
        self._orders: list[Any] = []

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
        self._orders.append(Order(level.local, self._place, self._windows))
        return self._orders[-1]

    def turns(self, level: Channel) -> TurnOrder:
        self._orders.append(TurnOrder(level.local, self._place, 1))
        return self._orders[-1]

    def free(self) -> None:
        together(self._island.local, lambda: devices.finish_all(self._place))
        for order in self._orders:
            order.free()
        for window in self._windows:
            window.free()
        self._windows, self._orders = [], []


class Marks:
    """So many marks of every rank of an island, for which the others' streams can wait. Collective, as is `free`."""

    def __init__(self, local: Any, place: torch.device, count: int):
        self._local = local
        self._own: list[devices.Mark] = []
        self._others: list[list[devices.Mark]] = [[] for _ in range(count)]
        told = together(local, lambda: self._leave(place))
        together(local, lambda: self._meet(place, told))

    def _leave(self, place: torch.device) -> list[bytes]:
        self._own = [devices.Mark(place) for _ in self._others]
        return [mark.handle() for mark in self._own]

    def _meet(self, place: torch.device, told: list[list[bytes]]) -> None:
        for rank, handles in enumerate(told):
            for k, handle in enumerate(handles) if rank != self._local.rank else ():
                self._others[k].append(devices.Mark.of(place, handle))

    def free(self) -> None:
        self._others = [[] for _ in self._others]
        self._local.Barrier()  # let go everywhere
        self._own = []


class TurnOrder(Marks):
    """What a rank's stream does in its turn comes after what the others' streams did in theirs; no host waits.

    One mark a rank is enough. A stream waits for a mark as it is when it is told to, whatever becomes of it later; and
    a mark is moved in its owner's turn alone, when nobody else asks. All others' are asked for: the last one's comes
    after those before it, but who that was is not known where turns are free.
    """

    def begins(self) -> None:
        for mark in self._others[0]:
            mark.awaited()

    def ends(self) -> None:
        self._own[0].here()


class Order(Marks):
    """What the streams of a level's ranks on an island do before a meeting comes before what they do after it.

    Each rank leaves a mark in its stream before the meeting, and all streams wait for the others' marks after it; no
    host waits for a stream. There are two marks a rank, taken in turns: nobody comes to the next meeting but one before
    all have left this one, so no mark is moved before all wait for it. windows: those in the host's memory are
    synchronised, too, as `Window` asks for it.
    """

    def __init__(self, local: Any, place: torch.device, windows: list[Any]):
        super().__init__(local, place, 2)
        self._windows, self._turn = windows, 0

    def before(self, through_mpi: bool) -> None:
        self._own[self._turn].here()
        self._sync(through_mpi)

    def after(self, through_mpi: bool) -> None:
        self._sync(through_mpi)
        for mark in self._others[self._turn]:
            mark.awaited()
        self._turn = 1 - self._turn

    def _sync(self, through_mpi: bool) -> None:
        for window in self._windows if through_mpi else ():
            if isinstance(window, Window):
                window.sync()


def together(comm: Any, do: Callable[[], _T]) -> list[_T]:
    """What each rank's `do` gives; if one fails, a RuntimeError on all. Collective."""
    given: Any = None
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


_found: WeakKeyDictionary[Topology, dict[torch.device, str | None]] = WeakKeyDictionary()


def unreachable(topology: Topology, place: torch.device) -> str | None:
    """Why this node's ranks cannot read each other's device memory; None if they can. Collective over the node.

    It is tried, once a topology and device: what the driver says is not enough, as a container may keep processes
    apart, and events may not be shared where memory is.
    """
    known = _found.setdefault(topology, {})
    if not all(topology.node.allgather(place in known)):
        try:
            _try(topology.node, place)
            known[place] = None
        except RuntimeError as error:
            known[place] = str(error)
    return known[place]


def _try(node: Any, place: torch.device) -> None:
    """A kernel reads what the others' streams have written. A RuntimeError on all ranks if it does not."""
    window = DeviceWindow(node, place, torch.float32, 64)
    try:
        order = Order(node, place, [])
        window.mine.fill_(node.rank + 1)
        order.before(False)
        node.Barrier()
        order.after(False)

        def read() -> None:
            total = torch.empty_like(window.mine)
            kernels.total(total, window.views)
            if float(total[-1]) != node.size * (node.size + 1) / 2:
                raise RuntimeError("they read other values there than were written")

        try:
            together(node, read)
        finally:
            order.free()
    finally:
        window.free()

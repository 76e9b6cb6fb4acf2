"""How flat vectors travel: read in place within an island, sent once an island between islands.

An *island* is a set of ranks that share windows: a node, or a single rank where memory cannot be shared
(messages asked for, /dev/shm too small, CUDA tensors). Everything else follows from that one notion.
"""

from __future__ import annotations

import dataclasses
import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from mpi4py import MPI

from mpilsgd.comm.topology import Topology
from mpilsgd.comm.waiting import complete
from mpilsgd.comm.windows import Window, free_shared_memory

_PIECE = 1 << 22  # bytes a message at most: those of a chunk follow each other, and MPI's counts are C ints
_CHUNK = 1 << 24  # bytes that are received before they are used, while the next ones come
_SMALLEST, _PIECES = 1 << 16, 16  # bytes a message at least; messages of a short vector


class SharedMemoryWarning(UserWarning):
    """Shared windows do not fit into /dev/shm; messages are used."""


@dataclasses.dataclass
class Traffic:
    """Bytes that this rank read from other workers' memory or received from them."""

    group: int = 0
    across: int = 0


class Fabric:
    """The islands and levels over which one method exchanges its vectors.

    Args:
        topology: who the workers are; its communicators are duplicated, so methods never mix messages.
        nbytes: shared memory that this rank will ask for; where a node has less than the sum, its ranks
            become islands of one and a `SharedMemoryWarning` says so.
        shareable: False where the vectors cannot lie in a window (CUDA).

    Attributes: island (communicator), world and group (`Level`), traffic.
    Collective over the world, as is `free`.
    """

    def __init__(self, topology: Topology, nbytes: int, shareable: bool = True):
        node = topology.node
        need = node.allreduce(nbytes)
        room = node.bcast(free_shared_memory())
        shared = node.allreduce(shareable and topology.shared, MPI.LAND) and node.size > 1
        if shared and need > room:
            shared = False
            if node.rank == 0:
                warnings.warn(
                    f"{need / 1e6:.0f} MB of shared windows do not fit into the {room / 1e6:.0f} MB that "
                    "/dev/shm has left on this node: its workers exchange messages instead (slower)",
                    SharedMemoryWarning,
                    stacklevel=5,
                )
        self.agree = topology.agree
        self._across_dtype = topology.across_dtype
        rank = topology.world.rank
        self.traffic = Traffic()
        self.island = topology.world.Split(node.bcast(rank) if shared else rank, key=rank)
        color = self.island.bcast(rank)
        mates = topology.groups[topology.group_index]
        seats = topology.world.allgather((color, self.island.rank))
        self._windows: list[Window] = []
        self.world = Level(self, topology.world, seats, set(mates), list(range(topology.world.size)))
        self.group = Level(self, topology.group, [seats[r] for r in mates], set(mates), mates)

    def wire(self, dtype: torch.dtype) -> torch.dtype:
        """The type in which a vector travels between islands."""
        narrow = self._across_dtype
        return dtype if narrow is None or narrow.itemsize >= dtype.itemsize else narrow

    def window(self, dtype: torch.dtype, numel: int, device: torch.device) -> Window:
        """A vector a rank, visible to the island. Collective over the island."""
        return self._keep(Window(self.island, dtype, numel), device)

    def common(self, level: Level, dtype: torch.dtype, numel: int, device: torch.device) -> Window:
        """One vector for those of the level on this island. Collective over them."""
        return self._keep(Window(level.local, dtype, numel, common=True), device)

    def _keep(self, window: Window, device: torch.device) -> Window:
        if device.type != "cpu":  # the island is this rank alone
            window.mine = window.mine.to(device)
            window.views = [window.mine]
        self._windows.append(window)
        return window

    def sync(self) -> None:
        """MPI's memory barrier on every window; belongs on both sides of a collective that orders accesses."""
        for window in self._windows:
            window.sync()

    def free(self) -> None:
        """Frees windows and communicators."""
        for window in self._windows:
            window.free()
        self._windows = []
        for level in (self.group, self.world):
            level.free()
        self.island.Free()


class Level:
    """The workers of one kind of exchange: those of a group, or of the world.

    Attributes:
        comm: their communicator; local: those on this island; heads: the first of every island (null elsewhere);
            heads_ranks: their ranks in `comm`; island: the index of this one among the islands.
        world_ranks: their ranks in the world; n_islands; local_ranks: the ranks in `comm` of those on this island.
        seats: their rank in their own island, the index into `Window.views`.
        patient: table, fence and allreduce leave the core to others while they wait, as a thread beside the computing
            should; the same on all ranks, as MPI does not match blocking and nonblocking collectives.
    """

    patient = False

    def __init__(
        self,
        fabric: Fabric,
        comm: MPI.Comm,
        seats: Sequence[tuple[int, int]],
        mates: set[int],
        world_ranks: list[int],
    ):
        self._fabric = fabric
        self._mates = mates
        self.comm = comm.Dup()
        colors = [color for color, _ in seats]
        self.seats = [seat for _, seat in seats]
        self.world_ranks = world_ranks
        mine = colors[comm.rank]
        self.local_ranks = [r for r, color in enumerate(colors) if color == mine]
        islands = list(dict.fromkeys(colors))  # by their first rank, like the ranks of `heads`
        self._island = [islands.index(color) for color in colors]
        self.n_islands = len(islands)
        self.island = self._island[comm.rank]
        self.heads_ranks = [self._island.index(k) for k in range(self.n_islands)]
        self.local = self.comm.Split(self._island[comm.rank], key=comm.rank)
        self.heads = self.comm.Split(0 if self.local.rank == 0 else MPI.UNDEFINED, key=comm.rank)

    @property
    def rank(self) -> int:
        return self.comm.rank

    @property
    def size(self) -> int:
        return self.comm.size

    def table(self, row: Sequence[float]) -> np.ndarray:
        """Every rank's row of numbers, the same (size, len(row)) table on every rank.

        Doubles as the barrier between accesses to each other's windows. Numbers are compared after they
        have been gathered, by the same code on every rank: MPI's MIN and MINLOC disagree about a NaN.
        """
        send = np.asarray(row, dtype=np.float64)
        receive = np.empty((self.size, send.size))
        self._fabric.sync()
        if self.patient:
            complete(self.comm.Iallgather(send, receive))
        else:
            self.comm.Allgather(send, receive)
        self._fabric.sync()
        return receive

    def combine(self, row: np.ndarray) -> np.ndarray:
        """Sums every rank's row of float64 numbers, in place; a barrier like `table`."""
        self._fabric.sync()
        self.comm.Allreduce(MPI.IN_PLACE, row, MPI.SUM)
        self._fabric.sync()
        return row

    def barrier(self) -> None:
        """All of the level have come here; what they stored before it is seen after it."""
        self._fabric.sync()
        self.comm.Barrier()
        self._fabric.sync()

    def fence(self) -> None:
        """Barrier among those of the level on this island; their stores before it are seen after it."""
        self._fabric.sync()
        if self.patient:
            complete(self.local.Ibarrier())
        else:
            self.local.Barrier()
        self._fabric.sync()

    def bring(self, window: Window, owner: int, landing: Window | None, exact: bool = False) -> torch.Tensor:
        """The whole vector of rank `owner`, readable here; see `coming`. Collective over the level."""
        vector, parts = self.coming(window, owner, landing, exact)
        exhaust(parts)
        return vector

    def coming(
        self, window: Window, owner: int, landing: Window | None, exact: bool = False
    ) -> tuple[torch.Tensor, Iterator[tuple[int, int]]]:
        """The vector of rank `owner` (where it lies on its own island, in `landing` elsewhere), and its parts, (start,
        stop), each as soon as it can be read here, while the next ones are under way. exact: in its own type.

        Collective over the level, to the end of the parts; the owner must not change its vector before the next
        barrier. One copy travels to each island, not one to each rank.
        """
        home = self._island[owner]
        here = self.island == home
        if here:
            vector = window.views[0 if window.common else self.seats[owner]]
        else:
            assert landing is not None
            vector = landing.views[0][: window.mine.numel()]
        wire = vector.dtype if exact else self._fabric.wire(vector.dtype)
        received = owner != self.rank and (here or self.heads != MPI.COMM_NULL)
        itemsize = (vector if here else wire).itemsize
        self._count(owner, vector.numel() * itemsize if received else 0)
        if self.n_islands == 1:
            return vector, iter([(0, vector.numel())])
        return vector, self._parts(vector, home, wire)

    def _parts(self, vector: torch.Tensor, home: int, wire: torch.dtype) -> Iterator[tuple[int, int]]:
        chunks: Iterator[tuple[int, int]] = _cuts(vector.numel(), _CHUNK // wire.itemsize)
        if self.heads != MPI.COMM_NULL:
            chunks = _pass_along(self.heads, vector, home, wire, chunks)
        for part in chunks:
            if self.island != home:
                self.fence()
            yield part

    def allreduce(self, total: Window, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Sums several islands' common vectors from `start` to `stop`; gives the parts, (start, stop), each when its
        sum can be read here, while the next ones are summed. Collective over the level, to the end of the parts.
        """
        self.fence()
        vector = total.views[0]
        wire, n = self._fabric.wire(vector.dtype), self.n_islands
        parts: Iterator[tuple[int, int]]
        parts = ((start + a, start + b) for a, b in _cuts(stop - start, _CHUNK // wire.itemsize))
        if self.heads != MPI.COMM_NULL:
            nbytes = 2 * (n - 1) * (stop - start) * wire.itemsize // n
            if set(self.world_ranks) - self._mates:
                self._fabric.traffic.across += nbytes
            else:
                self._fabric.traffic.group += nbytes
            parts = _sums(self.heads, vector, wire, parts, self._wait)
        for part in parts:
            self.fence()
            yield part

    def _wait(self, request: MPI.Request) -> None:
        if self.patient:
            complete(request)
        else:
            request.Wait()

    def count_local(self, nbytes: int) -> None:
        """Notes that this rank read `nbytes` of every other vector of the level on this island."""
        for r in self.local_ranks:
            self._count(r, 0 if r == self.rank else nbytes)

    def _count(self, owner: int, nbytes: int) -> None:
        if self.world_ranks[owner] in self._mates:
            self._fabric.traffic.group += nbytes
        else:
            self._fabric.traffic.across += nbytes

    def free(self) -> None:
        for comm in (self.heads, self.local, self.comm):
            if comm != MPI.COMM_NULL:
                comm.Free()


def exhaust(parts: Iterable[Any]) -> None:
    """To the end."""
    for _ in parts:
        pass


def _cuts(numel: int, most: int) -> Iterator[tuple[int, int]]:
    """Consecutive parts of at most so many elements."""
    return ((a, min(a + most, numel)) for a in range(0, numel, most))


def _pass_along(
    heads: MPI.Comm, vector: torch.Tensor, home: int, wire: torch.dtype, chunks: Iterator[tuple[int, int]]
) -> Iterator[tuple[int, int]]:
    """Rank `home`'s vector to all, in the type `wire`, along a chain of the ranks; gives the chunks that are there.

    In pieces, of which each goes on as soon as it has come: every rank receives the vector once and sends it once, at
    the same time.
    """
    n, place = heads.size, (heads.rank - home) % heads.size
    before, after = (heads.rank - 1) % n, (heads.rank + 1) % n
    size = min(max(-(-vector.numel() * wire.itemsize // _PIECES), _SMALLEST), _PIECE) // wire.itemsize
    travels, direct = vector, wire is vector.dtype and vector.is_cpu
    if not direct:
        travels = torch.empty(vector.numel(), dtype=wire, pin_memory=not vector.is_cpu)
    every = [(a, b, list(travels[a:b].split(size))) for a, b in chunks]
    coming = [
        [heads.Irecv([_bytes(piece), MPI.BYTE], before) for piece in pieces if place] for *_, pieces in every
    ]
    going = []
    for (a, b, pieces), requests in zip(every, coming, strict=True):
        if not (place or direct):
            travels[a:b].copy_(vector[a:b])
        for k, piece in enumerate(pieces):
            if place:
                requests[k].Wait()
            if place < n - 1:
                going.append(heads.Isend([_bytes(piece), MPI.BYTE], after))
        if place and not direct:
            vector[a:b].copy_(travels[a:b])
        yield a, b
    MPI.Request.Waitall(going)


def _sums(
    heads: MPI.Comm,
    vector: torch.Tensor,
    wire: torch.dtype,
    parts: Iterator[tuple[int, int]],
    wait: Callable[[MPI.Request], None],
) -> Iterator[tuple[int, int]]:
    """vector <- the sum of all ranks' vectors, each value in the type `wire` on its way there and on its way back.

    Every rank sums a slice of each part, in the vectors' own type and in the order of the ranks, and sends the sum to
    all: 2 (n-1)/n of the vector go out and come in, and all ranks hold the same bits. The slices of the next part are
    under way while this one is summed, and its sums while the one before is used.
    """

    def scatter(a: int, b: int) -> tuple[Any, ...]:
        share = -(-(b - a) // heads.size)
        sent, received = (
            torch.zeros(heads.size, share, dtype=wire, pin_memory=not vector.is_cpu) for _ in range(2)
        )
        sent.view(-1)[: b - a].copy_(vector[a:b])
        request = heads.Ialltoall([_bytes(sent), MPI.BYTE], [_bytes(received), MPI.BYTE])
        return request, a, b, sent, received

    def gather(
        request: MPI.Request, a: int, b: int, sent: torch.Tensor, received: torch.Tensor
    ) -> tuple[Any, ...]:
        wait(request)
        own = received[0].to(vector.dtype)
        for other in received[1:]:
            own += other
        rounded = own.to(wire)
        request = heads.Iallgather([_bytes(rounded), MPI.BYTE], [_bytes(sent), MPI.BYTE])
        return request, a, b, sent, rounded

    def use(request: MPI.Request, a: int, b: int, sent: torch.Tensor, _: torch.Tensor) -> tuple[int, int]:
        wait(request)
        vector[a:b].copy_(sent.view(-1)[: b - a])
        return a, b

    scattered = gathered = None
    for part in itertools.chain(parts, (None, None)):
        ready, ahead = gathered, None if part is None else scatter(*part)
        gathered = None if scattered is None else gather(*scattered)
        scattered = ahead
        if ready is not None:
            yield use(*ready)


def _bytes(vector: torch.Tensor) -> np.ndarray:
    return vector.view(-1).view(torch.uint8).numpy()

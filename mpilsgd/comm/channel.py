"""Communicators for one kind of exchange, and what travels over them between islands.

An *island* is a set of ranks that see each other's vectors: a node, or a single rank where memory cannot be shared.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from mpilsgd.comm.meeting import meeting
from mpilsgd.comm.mpi import MPI

_PIECE = 1 << 22  # bytes a message at most: those of a chunk follow each other, and MPI's counts are C ints
_CHUNK = 1 << 24  # bytes that are received before they are used, while the next ones come
_SMALLEST, _PIECES = 1 << 16, 16  # bytes a message at least; messages of a short vector


class Channel:
    """The communicators of some workers: a group's, or the world's. Collective: creation and `free`.

    Args: comm: of the workers, duplicated here; islands: for each of its ranks the name of its island; name: of this
    rank in the world.

    Attributes:
        comm, local, heads: all of them; those on this island; the first of every island (null elsewhere).
        local_ranks: the ranks in `comm` of those on this island; heads_ranks: of the first of every island.
        island_of: of each rank the index of its island; island: of this one; n_islands.
        meeting: where all meet.
    """

    def __init__(self, comm: MPI.Comm, islands: Sequence[int], name: int):
        self.comm = comm.Dup()
        names = list(dict.fromkeys(islands))  # by their first rank, like the ranks of `heads`
        self.island_of = [names.index(name) for name in islands]
        self.island, self.n_islands = self.island_of[comm.rank], len(names)
        self.local_ranks = [r for r, k in enumerate(self.island_of) if k == self.island]
        self.heads_ranks = [self.island_of.index(k) for k in range(self.n_islands)]
        self.local = self.comm.Split(self.island, key=comm.rank)
        self.heads = self.comm.Split(0 if self.local.rank == 0 else MPI.UNDEFINED, key=comm.rank)
        self.meeting = meeting(self.comm, self.local, self.heads, self.island_of, name)

    @property
    def is_head(self) -> bool:
        return self.heads != MPI.COMM_NULL

    def free(self) -> None:
        self.meeting.free()
        for comm in (self.heads, self.local, self.comm):
            if comm != MPI.COMM_NULL:
                comm.Free()

    def broadcast(self, vector: torch.Tensor, island: int) -> None:
        """A vector in this rank's memory, from the first rank of one island to that of each. Collective over heads."""
        data = vector.view(torch.uint8).numpy()
        for start in range(0, data.size, 1 << 30):  # counts are C ints
            self.heads.Bcast([data[start : start + (1 << 30)], MPI.BYTE], root=island)


def cuts(numel: int, itemsize: int) -> Iterator[tuple[int, int]]:
    """Consecutive parts of a vector that are used one after the other."""
    most = _CHUNK // itemsize
    return ((a, min(a + most, numel)) for a in range(0, numel, most))


def pass_along(
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


def sums(
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

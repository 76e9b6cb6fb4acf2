"""Communicators for one kind of exchange, and what travels over them between islands.

An *island* is a set of ranks that see each other's vectors: a node, or a single rank where memory cannot be shared.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch

from mpilsgd.comm.meeting import meeting
from mpilsgd.comm.mpi import MPI

_PIECE = 1 << 22  # bytes a message at most: those of a chunk follow each other, and MPI's counts are C ints
_LEAST, _MOST = 1 << 20, 1 << 24  # bytes that are received before they are used, while the next ones come
_SMALLEST = 1 << 16  # bytes a message at least
_PIECES = 16  # messages of a vector, for each rank that passes it on


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


def chunk_bytes(nbytes: int, ranks: int) -> int:
    """Bytes of a vector that are used at once: as the link is idle for the first and the last ones, a sixteenth of it,
    but enough for a message of each rank."""
    return max(min(max(-(-nbytes // _PIECES), _LEAST), _MOST), ranks * _SMALLEST)


def cuts(numel: int, wire: Any, ranks: int) -> Iterator[tuple[int, int]]:
    """Consecutive parts of a vector that are used one after the other, as they travel between so many ranks."""
    most = wire.most(chunk_bytes(wire.nbytes(numel), ranks))
    return ((a, min(a + most, numel)) for a in range(0, numel, most))


def slices(a: int, b: int, parts: int, wire: Any) -> list[tuple[int, int]]:
    """Of a part of a vector the slices, one for each of those who sum it."""
    share = -(-(b - a) // parts)
    share = -(-share // wire.block) * wire.block
    return [(min(a + k * share, b), min(a + (k + 1) * share, b)) for k in range(parts)]


def piece_bytes(nbytes: int, ranks: int) -> int:
    """Bytes a message of a vector that goes along a chain: all those that pass it on delay it by a sixteenth in all, or
    each by a short message."""
    return min(max(-(-nbytes // (_PIECES * max(ranks - 2, 1))), _SMALLEST), _PIECE)


class Posted:
    """Requests that are under way. Inside, whatever happens, they are done before what they read and write may go."""

    def __init__(self) -> None:
        self._all: list[MPI.Request] = []

    def add(self, request: MPI.Request) -> MPI.Request:
        self._all.append(request)
        return request

    def __enter__(self) -> Posted:
        return self

    def __exit__(self, error: Any, *_: Any) -> None:
        if error is not None:
            self.finish()

    def finish(self) -> None:
        MPI.Request.Waitall(self._all)

    def forget(self, requests: Iterable[MPI.Request]) -> None:
        """They are done."""
        done = {id(request) for request in requests}
        self._all = [request for request in self._all if id(request) not in done]


def pass_along(
    heads: MPI.Comm,
    vector: torch.Tensor,
    home: int,
    wire: Any,
    chunks: Iterator[tuple[int, int]],
    base: torch.Tensor | None = None,
    mapped: bool = False,
) -> Iterator[tuple[int, int]]:
    """Rank `home`'s vector to all, as `wire` has it, along a chain of the ranks; gives the chunks that are there.

    In pieces, of which each goes on as soon as it has come: every rank receives the vector once and sends it once, at
    the same time. base: what all know of it, and then know better; in few bits only the change since then travels.
    mapped: the vector is in another process' memory.
    """
    n, place = heads.size, (heads.rank - home) % heads.size
    before, after = (heads.rank - 1) % n, (heads.rank + 1) % n
    size = wire.most(piece_bytes(wire.nbytes(vector.numel()), n))
    direct, at = wire.direct(vector, mapped), wire.nbytes
    travels = vector.view(torch.uint8) if direct else wire.staging(vector, at(vector.numel()))
    wire.settle(travels)
    parts = list(chunks)
    with Posted() as posted:

        def receive(i: int, j: int) -> Any:
            piece = memory_of(travels[at(i) : at(j)], wire.reaches)
            return posted.add(heads.Irecv(piece, before)) if place else None

        pieces = [(i, min(i + size, b)) for a, b in parts for i in range(a, b, size)]
        todo = deque((i, j, receive(i, j)) for i, j in pieces)
        sent: dict[int, Any] = {}

        def pass_on(to: int) -> None:
            while todo and todo[0][0] < to:
                i, j, coming = todo[0]
                piece = travels[at(i) : at(j)]
                if place:
                    coming.Wait()
                elif not direct and i not in sent:  # while the one before is under way
                    wire.encode(vector[i:j], piece, base=None if base is None else base[i:j])
                    wire.settle(piece)
                if place < n - 1 and i not in sent:  # after an interrupt, which may come here once it is
                    sent[i] = posted.add(heads.Isend(memory_of(piece, wire.reaches), after))
                todo.popleft()

        try:
            for a, b in parts:
                pass_on(b)
                codes, known = travels[at(a) : at(b)], None if base is None else base[a:b]
                out = vector[a:b] if place and not direct else None
                if out is not None or known is not None:
                    wire.decode(codes, out, base=known, follow=known is not None)
                yield a, b
        except BaseException:  # an interrupt: the others wait for the rest
            pass_on(vector.numel())
            raise
        posted.finish()


def sums(
    heads: MPI.Comm,
    vector: torch.Tensor,
    wire: Any,
    parts: Iterator[tuple[int, int]],
    wait: Callable[[MPI.Request], None],
    change: Any = None,
) -> Iterator[tuple[int, int]]:
    """vector <- the sum of all ranks' vectors, each value as `wire` has it on its way there and on its way back.

    Every rank sums a slice of each part, in the vectors' own type and in the order of the ranks, and sends the sum to
    all: 2 (n-1)/n of the vector go out and come in, and all ranks hold the same bits. The slices of the next part are
    under way while this one is summed, and its sums while the one before is used.

    change: in few bits, what is kept from one sum to the next (`Change`); a rank's own values stay exact in its slice.
    """
    me = heads.rank

    def kept(a: int, b: int, weight: str) -> dict[str, Any]:
        return {} if change is None else {"base": change.of(a, b), "weight": getattr(change, weight)}

    def residual(a: int, b: int) -> dict[str, Any]:
        return {} if change is None else {"residual": change.residual[a:b]}

    # slices lie side by side, so MPI may send from the vector itself, and when that is done receive the sums into it
    direct = change is None and wire.direct(vector) and not wire.reaches

    def rooms(every: list[tuple[int, int]]) -> list[torch.Tensor]:
        """What slices travel in."""
        sizes = [wire.nbytes(high - low) for low, high in every]
        whole = wire.staging(vector, sum(sizes))
        return list(whole.split(sizes))

    def exchange(sent: list[torch.Tensor], received: list[torch.Tensor]) -> list[MPI.Request]:
        """Messages between all pairs: of them all that MPIs can do with devices' memory can be said."""
        if wire.reaches:
            wire.settle(vector)
        n = heads.size
        before, after = (
            [(me + step * j) % n for j in range(1, n)] for step in (-1, 1)
        )  # not all to one at once
        coming = [posted.add(heads.Irecv(memory_of(received[k], wire.reaches), k)) for k in before]
        return coming + [posted.add(heads.Isend(memory_of(sent[k], wire.reaches), k)) for k in after]

    def finish(requests: list[MPI.Request]) -> None:
        for request in requests:
            wait(request)
        posted.forget(requests)

    def scatter(a: int, b: int) -> tuple[Any, ...]:
        every = slices(a, b, heads.size, wire)
        received = rooms([every[me] if k != me or not direct else (0, 0) for k in range(heads.size)])
        if direct:
            sent = [vector[low:high].view(torch.uint8) for low, high in every]
            received[me] = sent[me]
            return exchange(sent, received), a, b, sent, received, every
        sent = rooms(every)
        for k, (low, high) in enumerate(every):
            if not (wire.coded and k == me):
                codes = received[me] if k == me else sent[k]
                wire.encode(vector[low:high], codes, **kept(low, high, "weight"), **residual(low, high))
        return exchange(sent, received), a, b, sent, received, every

    def gather(requests: list[MPI.Request], a: int, b: int, *of: Any) -> tuple[Any, ...]:
        sent, received, every = of
        finish(requests)
        low, high = every[me]
        own = vector[low:high].clone()
        if wire.coded and change.base is not None:
            own.sub_(change.of(low, high), alpha=change.weight)
        for k, codes in enumerate(received):
            if not (wire.coded and k == me):
                wire.decode(codes, own, add=wire.coded or k > 0)
        wire.encode(own, sent[me], **residual(low, high))
        return exchange([sent[me]] * heads.size, sent), a, b, sent, every

    def use(requests: list[MPI.Request], a: int, b: int, sent: Any, every: Any) -> tuple[int, int]:
        finish(requests)
        follow = change is not None and change.follow
        for (low, high), codes in zip(every, sent, strict=True) if not direct else ():
            wire.decode(codes, vector[low:high], follow=follow, **kept(low, high, "count"))
        return a, b

    scattered = gathered = None
    with Posted() as posted:
        for part in itertools.chain(parts, (None, None)):
            ready, ahead = gathered, None if part is None else scatter(*part)
            gathered = None if scattered is None else gather(*scattered)
            scattered = ahead
            if ready is not None:
                yield use(*ready)


def memory_of(vector: torch.Tensor, on_device: bool) -> Any:
    """As MPI takes it."""
    if on_device:
        return [MPI.memory.fromaddress(vector.data_ptr(), vector.numel() * vector.element_size()), MPI.BYTE]
    return [vector.view(-1).view(torch.uint8).numpy(), MPI.BYTE]

"""A vector in shards that lie and travel in few bits: as what has changed in them since all last knew the same."""

from __future__ import annotations

from typing import Any

import torch

from mpilsgd.comm.mpi import MPI
from mpilsgd.comm.onesided import expose, transfer

_HEAD = 64  # bytes before the codes: three whole numbers
_VISITS = 4  # of each worker, at least, before the base moves


class Coded:
    """One vector's shards, each at its island as codes of c - b; every rank knows the base b in full.

    In its turn a rank fetches the codes, works on c = b + what they say, and puts those of c - b + e in their place;
    what they lack is its next e (error feedback). So that c - b stays small the base moves, b <- b + what the codes
    say, when all have come by since it last did: these codes stay for the others to follow when they next come, and the
    next ones begin in a second place. At a shard lie: how often its base has moved, its updates since, how many ranks
    have followed.

    Args: wire: of the vector's type `kind`, in codes; spans: the elements of each island's shard. Collective.
    """

    def __init__(self, fabric: Any, wire: Any, kind: torch.dtype, spans: list[tuple[int, int]]):
        self._level = level = fabric.world
        self._wire, self._kind, self._spans = wire, kind, spans
        wide = torch.promote_types(kind, torch.float32)
        self.base, self.residual = (torch.zeros(spans[-1][1], dtype=wide) for _ in range(2))
        self.moves = torch.zeros(
            len(spans), dtype=torch.int64
        )  # of the base of each shard, as it is known here
        self._room = -(-max(wire.nbytes(b - a) for a, b in spans) // 8) * 8
        self._codes = torch.zeros(self._room, dtype=torch.uint8)
        self.window = fabric.place.common(level.channel, torch.uint8, _HEAD + 2 * self._room, host=True)
        first = level.local_ranks[0] == level.rank
        if first:
            self.window.mine[:24].view(torch.int64)[2] = level.size
        memory = self.window.mine.numpy() if first else MPI.BOTTOM
        self._remote = expose(memory, level.comm)
        self._head = 0, 0, 0
        self.fetched = 0  # bytes, from other islands

    def open(self, k: int) -> torch.Tensor:
        """The k-th shard, in this rank's turn."""
        a, b = self._spans[k]
        base, codes = self.base[a:b], self._codes[: self._wire.nbytes(b - a)]
        head = torch.zeros(3, dtype=torch.int64)
        self._move(k, None, head.view(torch.uint8), MPI.Win.Get)
        moves, updates, come = map(int, head)
        if moves > self.moves[k]:
            self._move(k, moves - 1, codes, MPI.Win.Get)
            self._follow(k, codes)
            come += 1
        vector = torch.empty(b - a, dtype=self._kind).copy_(base)
        if updates:
            self._move(k, moves, codes, MPI.Win.Get)
            self._wire.decode(codes, vector, base=base)
        self._head = moves, updates, come
        return vector

    def close(self, k: int, vector: torch.Tensor) -> None:
        """What has become of it; its turn ends."""
        a, b = self._spans[k]
        codes, (moves, updates, come) = self._codes[: self._wire.nbytes(b - a)], self._head
        self._wire.encode(vector, codes, residual=self.residual[a:b], base=self.base[a:b])
        self._move(k, moves, codes, MPI.Win.Put)
        updates += 1
        if come == self._level.size and updates >= _VISITS * self._level.size:
            self._follow(k, codes)
            moves, updates, come = moves + 1, 0, 1
        head = torch.tensor([moves, updates, come])
        self._move(k, None, head.view(torch.uint8), MPI.Win.Put)
        if k == self._level.channel.island:
            self._remote.Sync()

    def _follow(self, k: int, codes: torch.Tensor) -> None:
        a, b = self._spans[k]
        self._wire.decode(codes, None, base=self.base[a:b], follow=True)
        self.moves[k] += 1

    def _place(self, moves: int) -> int:
        return _HEAD + moves % 2 * self._room

    def _move(self, k: int, moves: int | None, part: torch.Tensor, operation: Any) -> None:
        """The codes after so many moves of the base, or the head (None), to here or from here."""
        at = 0 if moves is None else self._place(moves)
        if k != self._level.channel.island:
            transfer(self._remote, self._level.channel.heads_ranks[k], part, operation, at)
            self.fetched += part.numel() * (operation is MPI.Win.Get)
            return
        self.window.sync()
        lies = self.window.views[0][at : at + part.numel()]
        if operation is MPI.Win.Get:
            part.copy_(lies)
        else:
            lies.copy_(part)
        self.window.sync()

    def collect(self, vector: torch.Tensor) -> None:
        """All of it. Collective over the heads; nobody may be in a turn, and nobody's base moves."""
        channel = self._level.channel
        for k, (a, b) in enumerate(self._spans):
            data = self.window.mine.clone()
            channel.broadcast(data, k)
            moves, updates, _ = map(int, data[:24].view(torch.int64))
            base, size = self.base[a:b].clone(), self._wire.nbytes(b - a)
            if moves > self.moves[k]:
                at = self._place(moves - 1)
                self._wire.decode(data[at : at + size], None, base=base, follow=True)
            vector[a:b].copy_(base)
            if updates:
                at = self._place(moves)
                self._wire.decode(data[at : at + size], vector[a:b], base=base)

    def free(self) -> None:
        """The codes are freed with the fabric, afterwards."""
        self._remote.Unlock_all()
        self._remote.Free()

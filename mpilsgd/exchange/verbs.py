"""What an exchange does to the workers and to a centre: written once, for a round of all and for one worker's turn."""

from __future__ import annotations

import abc
from collections.abc import Hashable, Iterator, Mapping
from typing import Any

import torch

from mpilsgd import bound, kernels
from mpilsgd.exchange.base import Exchange, convex, follow
from mpilsgd.exchange.vectors import Vector, accumulation_dtype


class Verbs(Exchange):
    """Verbs for x and vectors per="all". This rank works on what it has `here` of a span, for all its `peers`.

    Attributes in an exchange: t (its step); fit (whether x is finite: else this worker writes nothing and takes the
    centre over); seed (of the rounding by chance); total (whether what the peers bring has to be added up across
    islands).
    """

    fit = True
    t = seed = 0
    total = False

    @abc.abstractmethod
    def here(self, d: torch.dtype, start: int, stop: int) -> tuple[int, int]:
        """Which of the elements from start to stop this rank works on."""

    def peers(self, d: torch.dtype, a: int, b: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """These elements of the finite workers that are served here, and of the others."""
        x = [self.x[d].mine[a:b]]
        return (x, []) if self.fit else ([], x)

    def those(self) -> Hashable:
        """What tells one set of peers from another."""
        return self.fit

    def of(self, v: Mapping[torch.dtype, Any], d: torch.dtype, a: int, b: int) -> torch.Tensor:
        """These elements of a vector."""
        return (self.x[d].mine if v is self.x or v is self.m.x else v[d])[a:b]

    def added(self, whole: torch.Tensor, start: int, stop: int, name: str) -> Iterator[tuple[int, int]]:
        """Sums over the islands; the parts that this rank works on, each as soon as its sum is there. name: of sums
        that follow each other."""
        return iter(())

    def fence(self) -> None: ...

    def barrier(self) -> None: ...

    def seen(self, nbytes: int) -> None:
        """So many bytes of each peer were read."""

    def trim(self, broken: list[torch.Tensor], c: torch.Tensor) -> None:
        """Workers that are not finite take the centre over."""
        for x in broken:
            x.copy_(c)

    def spans(self, d: torch.dtype) -> tuple[tuple[int, int], tuple[int, int]]:
        """The parameters, and what lies behind them."""
        edge, n = min(self.m.edge[d], self.m.n[d]), self.m.n[d]
        return (0, edge), (edge, n)

    def part(self, d: torch.dtype) -> tuple[tuple[int, int], tuple[int, int]]:
        """What of the spans `each` and `copy` go by."""
        return self.spans(d)

    def summed(
        self, z: Vector, d: torch.dtype, start: int, stop: int, alpha: float = 0.0
    ) -> Iterator[tuple[int, int, torch.Tensor]]:
        """Parts of sum_i (x_i - z), with their places; alpha: x_i <- x_i - alpha (x_i - z) in the same pass."""
        a, b = self.here(d, start, stop)
        peers, kind = self.peers(d, a, b)[0], accumulation_dtype(d)
        self.seen((b - a) * d.itemsize)
        whole = self.m.scratch[kind].views[0] if self.total else None
        sums = self.of(z, d, a, b).new_empty(b - a, dtype=kind) if whole is None else whole[a:b]
        if peers:
            kernels.elastic_sum(sums, self.of(z, d, a, b), peers, alpha, seed=self.seed)
        else:
            sums.zero_()
        if whole is None:
            yield a, b, sums
        for a, b in () if whole is None else self.added(whole, start, stop, f"x - {z.name} {d}"):
            yield a, b, whole[a:b]  # type: ignore[index]

    def elastic(self, c: Vector, alpha: float, rate: float, gauss_seidel: bool = False) -> None:
        """d_i = x_i - c;  x_i <- x_i - alpha d_i;  c <- c + rate sum_i d_i.  gauss_seidel: c first, then x_i toward it.

        A worker that is not finite adds nothing, and takes c over.
        """
        if self.total:
            for d in self.x:
                for start, stop, moves, r in convex(self.m, d, alpha, rate):
                    self._elastic(c, d, start, stop, moves, r, gauss_seidel)
                self.fence()
        else:
            key = "elastic", c.name, alpha, rate, gauss_seidel, self.those()
            for move, broken, part, nbytes in self.once(
                key, lambda: list(self._moves(c, alpha, rate, gauss_seidel))
            ):
                self.seen(nbytes)
                if move is not None:
                    move(seed=self.seed)
                if broken:
                    self.trim(broken, part)
        self.barrier()

    def _moves(self, c: Vector, alpha: float, rate: float, seidel: bool) -> Iterator[tuple[Any, ...]]:
        """For every span what moves c and the finite workers here, the others, this part of c, and a vector's bytes."""
        for d in self.x:
            for start, stop, moves, r in convex(self.m, d, alpha, rate):
                a, b = self.here(d, start, stop)
                part, (peers, broken) = self.of(c, d, a, b), self.peers(d, a, b)
                move = bound.elastic(part, peers, moves, r, seidel) if peers else None
                yield move, broken, part, (b - a) * d.itemsize

    def _elastic(
        self, c: Vector, d: torch.dtype, start: int, stop: int, alpha: float, rate: float, seidel: bool
    ) -> None:
        for a, b, sums in self.summed(c, d, start, stop, 0.0 if seidel else alpha):
            part, (peers, broken) = self.of(c, d, a, b), self.peers(d, a, b)
            kernels.elastic_apply(part, peers if seidel else [], sums, alpha * seidel, rate, seed=self.seed)
            self.trim(broken, part)

    def follow(self, z: Vector, c: Vector, rate: float) -> None:
        """z <- z + rate (c - z)."""
        for d in self.x if self.fit else ():
            for span in self.spans(d):
                a, b = self.here(d, *span)
                follow(self.of(z, d, a, b), self.of(c, d, a, b), rate)

    def each(self, *vectors: Any, broken: bool = False) -> Iterator[list[torch.Tensor]]:
        """What this rank has here of the parameters' part of each, for arithmetic of one's own, dtype by dtype.

        A worker's own vector is meant where all hold the same, as x after `mean`, or in its turn. A worker that is not
        finite gets nothing, unless it asks for it: see `fit` and `copy`.
        """
        for d in self.x if self.fit or broken else ():
            a, b = self.here(d, *self.part(d)[0])
            yield [self.of(v, d, a, b) for v in vectors]
        self.fence()

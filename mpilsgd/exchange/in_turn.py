"""The exchange of one worker with a centre that belongs to nobody: each in its turn, no one waits for the others."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch

from mpilsgd import kernels
from mpilsgd.comm import Shard, Shards
from mpilsgd.exchange.base import Exchange, convex, follow
from mpilsgd.exchange.vectors import Vector, load, save, shapes

if TYPE_CHECKING:
    from mpilsgd.exchange.method import Method


class InTurn(Exchange):
    """Vectors per="all" lie in shards, one an island; a visit to all of them is one exchange, atomic a shard.

    The rule's `exchange(r)` runs once a shard, whose part of every vector its verbs work on. Attributes there: fit
    (whether this worker is finite: else it writes nothing and takes the centre over), updates (of this shard so far).
    """

    verbs = frozenset({"elastic", "push", "follow", "each", "copy", "statistics"})
    always_ordered = True
    fit = True

    def __init__(self, method: Method):
        super().__init__(method)
        self._shard: Shard | None = None

    def allocate(self, vectors: list[Vector]) -> None:
        super().allocate([v for v in vectors if v.per != "all"])
        m = self.m
        kinds = {v.name: {d: v.kind(d) for d in m.x} for v in vectors if v.per == "all"}
        self._shards = Shards(m.fabric, m.n, kinds, m.device)
        # of each shard: its updates when this worker last read it
        self._last_update = [0] * self._shards.count
        for v in vectors:
            if v.per == "all":
                v.memory = {d: window.mine for d, window in self._shards.own[v.name].items()}

    def fill(self, vector: Vector) -> None:
        if vector.per != "all":
            super().fill(vector)
        elif self._head():
            for d, v in vector.items():
                a, b = self._shards.span(d)
                v.copy_(self.m.x[d].mine[a:b])

    def _head(self) -> bool:
        world = self.m.fabric.world
        return world.local_ranks[0] == world.rank

    # A visit

    def run(self) -> None:
        m = self.m
        with m.iterates():
            self.fit = m.is_finite()
            if not self.fit:
                m.begin_anew()
            self.exchange_x()

    def exchange_x(self) -> None:
        """The exchange of x as it is held now."""
        self.visit()

    def visit(self, timed: bool = True) -> None:
        """The rule at each shard, in this worker's turn; time and bytes are counted, the order noted or repeated."""
        m, shards, course = self.m, self._shards, self.m.course
        start, waited, moved = time.perf_counter(), shards.waited, shards.moved
        seen = [0] * shards.count
        with contextlib.closing(shards.visit(course.repeat(), course.round_robin)) as turns:
            for self._shard in turns:
                seen[self._shard.index] = self._shard.ticket
                self._count(self._shard.index)
                m.exchange(self)
        course.note(seen)
        m.metrics.rounds += 1
        if timed:
            m.metrics.t_comm += time.perf_counter() - start
            m.metrics.t_wait += shards.waited - waited
        m.fabric.traffic.across += shards.moved - moved
        for d in m.n:
            first, last = shards.span(d)
            m.fabric.traffic.group += (last - first) * d.itemsize
        m.count_traffic()

    def _count(self, k: int) -> None:
        """Counts this update of a shard, and how many others were since this worker read it."""
        turns, metrics = self._shards.turns, self.m.metrics
        if not self.fit:
            self._last_update[k] = turns.ticks(k)
            return
        self.updates = turns.tick(k)
        if k == 0:
            stale = self.updates - self._last_update[0]
            metrics.staleness[stale] = metrics.staleness.get(stale, 0) + 1
        self._last_update[k] = self.updates + 1

    def _here(self, d: torch.dtype, low: int, high: int) -> tuple[int, int]:
        """What of a span lies in the shard."""
        assert self._shard is not None
        first, last = self._shard.spans[d]
        return max(first, low), max(first, low, min(last, high))

    def _of(self, v: Mapping[torch.dtype, torch.Tensor], d: torch.dtype, low: int, high: int) -> torch.Tensor:
        """The elements of a vector, which lie in the shard."""
        assert self._shard is not None
        if isinstance(v, Vector) and v.per == "all":
            first = self._shard.spans[d][0]
            return self._shard.vectors[v.name][d][low - first : high - first]
        return v[d][low:high]

    def _x(self, d: torch.dtype, low: int, high: int) -> torch.Tensor:
        return self.m.x[d].mine[low:high]

    # The verbs

    def elastic(self, c: Vector, alpha: float, rate: float, gauss_seidel: bool = False) -> None:
        """d = x - c;  x <- x - alpha d;  c <- c + rate d.  gauss_seidel: c first, then x toward it."""
        if not self.fit:
            self._take_over(c)
            return
        for d in self.m.x:
            for start, stop, a, r in convex(self.m, d, alpha, rate):
                low, high = self._here(d, start, stop)
                kernels.elastic(
                    self._of(c, d, low, high),
                    [self._x(d, low, high)],
                    a,
                    r,
                    gauss_seidel=gauss_seidel,
                    seed=self.updates,
                )

    def push(self, c: Vector, anchor: Vector, velocity: Vector | None = None, momentum: float = 0.0) -> None:
        """c <- c + (x - a);  x <- c;  a <- x.  With u: u <- momentum u + (x - a);  c <- c + u;  x <- c + momentum u."""
        if not self.fit:
            self._take_over(c, velocity, momentum)
        for d in self.m.x:
            edge, n = self.m.edge[d], self.m.n[d]
            for start, stop, buffers in ((0, edge, False), (edge, n, True)):
                low, high = self._here(d, start, stop)
                x, a = self._x(d, low, high), anchor[d][low:high]
                if not self.fit:
                    a.copy_(x)
                elif buffers:
                    kernels.push(self._of(c, d, low, high), x, a, 1.0 / self.m.p)
                else:
                    u = None if velocity is None else self._of(velocity, d, low, high)
                    kernels.push(self._of(c, d, low, high), x, a, 1.0, u, momentum)

    def follow(self, z: Vector, c: Vector, rate: float) -> None:
        """z <- z + rate (c - z)."""
        for d in self.m.x if self.fit else ():
            low, high = self._here(d, 0, self.m.n[d])
            follow(self._of(z, d, low, high), self._of(c, d, low, high), rate)

    def each(self, *vectors: Any, broken: bool = False) -> Iterator[list[torch.Tensor]]:
        """What of the parameters' part of each vector lies in the shard, for arithmetic of one's own.

        A worker that is not finite gets nothing, unless it asks for it: see `fit` and `copy`.
        """
        for d in self.m.x if self.fit or broken else ():
            low, high = self._here(d, 0, self.m.edge[d])
            yield [self._x(d, low, high) if v is self.m.x else self._of(v, d, low, high) for v in vectors]

    def statistics(self, c: Vector) -> None:
        """What lies behind the parameters: c <- c + (x - c)/p;  x <- c."""
        for d in self.m.x if self.fit else ():
            low, high = self._here(d, self.m.edge[d], self.m.n[d])
            x, part = self._x(d, low, high), self._of(c, d, low, high)
            kernels.elastic(part, [x], 0.0, 1.0 / self.m.p)
            x.copy_(part)

    def _take_over(self, c: Vector, velocity: Vector | None = None, momentum: float = 0.0) -> None:
        """x <- c [+ momentum u]: what a worker starts anew from must be finite."""
        for d in self.m.x:
            low, high = self._here(d, 0, self.m.n[d])
            x = self._x(d, low, high).copy_(self._of(c, d, low, high))
            if velocity is not None:
                x.add_(self._of(velocity, d, low, high), alpha=momentum)
            if not kernels.check(x):
                self.m.refuse_if_all(set(self.m.workers))

    def copy(self, c: Vector) -> None:
        """x <- c."""
        self._take_over(c)

    # The life of the exchange

    def stepped(self) -> None:
        super().stepped()
        self.m.before = {}
        self.m.course.count(self.m.t)

    def rests(self) -> None:
        if self.m.course.round_robin:
            self._shards.turns.rest()

    def wakes(self) -> None:
        if self.m.course.round_robin:
            self._shards.turns.wake(True)
            self.m.fabric.world.barrier()

    def whole(self, vector: Vector) -> Iterator[tuple[torch.dtype, torch.Tensor]]:
        for d in self.m.x:
            kind = vector.kind(d)
            yield d, self._shards.collect(vector.name, d, self.m.scratch.get(kind))[: self.m.n[d]]
            self.m.fabric.world.barrier()  # dtypes take turns in the scratch

    def state(self) -> dict[str, Any]:
        last = {"last_update": list(self._last_update), "residuals": save(self._shards.residuals)}
        ticks = self._shards.turns.ticks(self.m.fabric.world.channel.island) if self._head() else 0
        return {**last, "ticks": ticks}

    def misfit(self, state: dict[str, Any]) -> str | None:
        residuals = shapes({"": self._shards.residuals}) == shapes({"": state["residuals"]})
        if len(state["last_update"]) == self._shards.count and residuals:
            return None
        return "the state was saved by ranks that lay otherwise on nodes: the parts of the centre do not fit"

    def load(self, state: dict[str, Any]) -> None:
        self._last_update = list(state["last_update"])
        load(self._shards.residuals, state["residuals"])
        if self._head():
            for of in self._shards.own.values():
                for window in of.values():
                    window.sync()
            self._shards.turns.set_ticks(self.m.fabric.world.channel.island, state["ticks"])

    def free(self) -> None:
        if hasattr(self, "_shards"):
            self._shards.free()
            del self._shards

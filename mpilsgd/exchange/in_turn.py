"""The exchange of one worker with a centre that belongs to nobody: each in its turn, no one waits for the others."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any

import torch

from mpilsgd import kernels
from mpilsgd.comm import Shard, Shards, reads, seconds
from mpilsgd.exchange.base import follow
from mpilsgd.exchange.vectors import Vector, load, save, shapes
from mpilsgd.exchange.verbs import Verbs


class InTurn(Verbs):
    """Vectors per="all" lie in shards, one an island; a visit to all of them is one exchange, atomic a shard.

    The rule's `exchange(r)` runs once a shard, whose part of every vector its verbs work on. Attributes there: fit
    (whether this worker is finite: else it writes nothing and takes the centre over), updates (of this shard so far).
    """

    verbs = frozenset({"elastic", "push", "follow", "each", "copy", "statistics"})
    always_ordered = True
    _shard: Shard

    def hosted(self, nbytes: int, wide: int) -> float:
        """The shards of several islands; an only one lies where x does."""
        if self.m.topology.node.size == self.m.p:
            return 0.0
        shards = [v for v in self.m.vectors.values() if v.per == "all"]
        return sum(wide if v.wide else nbytes for v in shards) / self.m.topology.node.size

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
        else:
            self._shards.start(vector.name, {d: self.m.x[d].mine[: self.m.n[d]] for d in vector})

    def those(self) -> Hashable:
        return self.fit, self._shard.index

    def once(self, key: Hashable, make: Callable[[], Any]) -> Any:
        return make() if self._shards.copies else super().once(key, make)

    def _head(self) -> bool:
        world = self.m.fabric.world
        return world.local_ranks[0] == world.rank

    # A visit

    def run(self) -> None:
        m = self.m
        with m.iterates():
            self.fit, self.t = m.is_finite(), m.t
            if not self.fit:
                m.begin_anew()
            self.begin()

    def begin(self) -> None:
        """The exchange of x as it is held now."""
        self.visit()

    def visit(self, timed: bool = True) -> None:
        """The rule at each shard, in this worker's turn; time and bytes are counted, the order noted or repeated."""
        m, shards, course = self.m, self._shards, self.m.course
        start, waited, moved = seconds(), shards.waited, shards.moved
        seen = [0] * shards.count
        spans = {d: shards.span(d) for d in m.n}
        near = sum((last - first) * d.itemsize for d, (first, last) in spans.items())
        with contextlib.closing(shards.visit(course.repeat(), course.round_robin)) as turns:
            for self._shard in turns:
                seen[self._shard.index] = self._shard.ticket
                self._count(self._shard.index)
                if self._shard.index == m.fabric.world.channel.island:
                    reads(near)
                m.exchange(self)
        course.note(seen)
        m.metrics.rounds += 1
        if timed:
            m.metrics.t_comm += seconds() - start
            m.metrics.t_wait += shards.waited - waited
        m.fabric.traffic.across += shards.moved - moved
        m.fabric.traffic.group += near
        m.count_traffic()

    def _count(self, k: int) -> None:
        """Counts this update of a shard, and how many others were since this worker read it."""
        turns, metrics = self._shards.turns, self.m.metrics
        if not self.fit:
            self._last_update[k] = turns.ticks(k)
            return
        self.updates = self.seed = turns.tick(k)
        if k == 0:
            stale = self.updates - self._last_update[0]
            metrics.staleness[stale] = metrics.staleness.get(stale, 0) + 1
        self._last_update[k] = self.updates + 1

    def here(self, d: torch.dtype, start: int, stop: int) -> tuple[int, int]:
        first, last = self._shard.spans[d]
        return max(first, start), max(first, start, min(last, stop))

    def of(self, v: Mapping[torch.dtype, Any], d: torch.dtype, a: int, b: int) -> torch.Tensor:
        if not isinstance(v, Vector) or v.per != "all":
            return super().of(v, d, a, b)
        first = self._shard.spans[d][0]
        return self._shard.vectors[v.name][d][a - first : b - first]

    def trim(self, broken: list[torch.Tensor], c: torch.Tensor) -> None:
        super().trim(broken, c)
        if not all(map(kernels.check, broken)):  # what a worker starts anew from must be finite
            self.m.refuse_if_all(set(self.m.workers))

    # The verbs of a turn alone

    def push(self, c: Vector, anchor: Vector, velocity: Vector | None = None, momentum: float = 0.0) -> None:
        """c <- c + (x - a);  x <- c;  a <- x.  With u: u <- momentum u + (x - a);  c <- c + u;  x <- c + momentum u."""
        for d in self.x:
            for span, u, rate in zip(self.spans(d), (velocity, None), (1.0, 1 / self.m.p), strict=True):
                a, b = self.here(d, *span)
                part, x, received = self.of(c, d, a, b), self.of(self.x, d, a, b), anchor[d][a:b]
                moved = None if u is None else self.of(u, d, a, b)
                if self.fit:
                    kernels.push(part, x, received, rate, moved, momentum if u is not None else 0.0)
                    continue
                self.trim([x], part if moved is None else part.add(moved, alpha=momentum))
                received.copy_(x)

    def statistics(self, c: Vector) -> None:
        """What lies behind the parameters: c <- c + (x - c)/p;  x <- c."""
        for d in self.x if self.fit else ():
            a, b = self.here(d, *self.spans(d)[1])
            x, part = self.of(self.x, d, a, b), self.of(c, d, a, b)
            follow(part, x, 1 / self.m.p)
            x.copy_(part)

    def copy(self, c: Vector) -> None:
        """x <- c."""
        for d in self.x:
            for span in self.spans(d):
                a, b = self.here(d, *span)
                self.trim([self.of(self.x, d, a, b)], self.of(c, d, a, b))

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

"""The exchange in which all meet: nobody goes on before the last has come."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from mpilsgd import kernels
from mpilsgd.comm import seconds
from mpilsgd.exchange.clocks import ALL, Due, TwoPeriods
from mpilsgd.exchange.leaders import Leaders
from mpilsgd.exchange.rows import ROUND, Row, Rows, checked
from mpilsgd.exchange.vectors import NOTHING, Span, Vector
from mpilsgd.transport import Level, Stream

if TYPE_CHECKING:
    from mpilsgd.exchange.method import Method


class Together(Leaders):
    """Rounds of all workers, or of a group's. Every rank works on its slice of all the vectors of its island.

    Where the clock goes by the total of steps (asynchronous Leader SGD), each joins a round at its next step, whatever
    its own count. Attributes in a round: rows (of those who met), due, updates (rounds of the centre so far).
    """

    verbs = frozenset({"mean", "elastic", "push", "pull", "keep", "follow", "each", "copy", "only"})

    def __init__(self, method: Method):
        super().__init__(method)
        self.rows: Rows | None = None
        self._part = 0, 1
        self.due: Due = ALL
        self._mates: Rows | None = None
        self._everyone: Rows | None = None
        # by the total of steps: that at which the last round was due
        self.joined = -1 if self.m.clock.first else 0

    @property
    def by_total(self) -> bool:
        return self.m.clock.by_total

    # When

    def is_due(self) -> bool:
        m = self.m
        if not self.by_total:
            return bool(m.clock.due(m.t))
        due, course = m.clock.after(self.joined), m.course
        return course.upcoming() == [m.t, due] if course.replays else course.total() >= due

    def run(self) -> None:
        """The round that is due; by the total of steps, all that are."""
        if not self.by_total:
            self.exchange(ROUND)
        while self.by_total and self.is_due():
            self.joined = self.m.clock.after(self.joined)
            self.m.course.repeat()
            self.m.course.note([self.m.t, self.joined])
            self.exchange(ROUND)

    def stepped(self) -> None:
        if self.m.course is not None:
            self.m.course.count(self.m.t)
        super().stepped()

    def stamp(self) -> int:
        if self.m.clock.looks:
            return self.m.metrics.rounds
        return self.joined if self.by_total else self.m.t

    def catch_up(self, rows: Rows) -> None:
        """All rest: the clocks of those who ran out of data go on from the furthest."""
        if self.by_total:
            self.joined = int(max(rows.stamp))
        elif not self.m.clock.looks:
            self.m.t = int(max(rows.stamp))
        behind = {r for r, flag in enumerate(rows.behind) if flag}
        if behind:  # their learning rates may have been other ones
            self.m.copy_from(min(set(range(len(rows.behind))) - behind), behind)
        self.m.behind = False

    def state(self) -> dict[str, Any]:
        return {**super().state(), "joined": self.joined}

    def load(self, state: dict[str, Any]) -> None:
        super().load(state)
        self.joined = state["joined"]

    # The meeting

    def meet(self, purpose: float) -> Rows | None:
        m, clock = self.m, self.m.clock
        clock.begins()
        row, mates = m.row(purpose, self.stamp()), None
        if isinstance(clock, TwoPeriods) and m.topology.n_groups > 1:
            mates = self._gate(m.fabric.group, row)
            if mates.round is not None:
                self.joined, self.due = mates.round, clock.due(mates.round)
                everyone = self._gate(m.fabric.world, row) if self.due.world else None
                self._hold(mates if self.due.group else None, everyone)
                return None
        everyone = self._gate(m.fabric.world, row)
        if everyone.round is None:
            return everyone
        self.joined = everyone.round
        self.due = clock.due(everyone.round) if isinstance(clock, TwoPeriods) else ALL
        # a group at rest takes part in a global round, but has no business of its own
        self._hold(
            everyone if self.due.group and mates is None else None, everyone if self.due.world else None
        )
        return None

    def _gate(self, level: Level, row: Row) -> Rows:
        start = seconds()
        table = level.table(row)
        self.waited += seconds() - start
        return checked(table)

    def _hold(self, mates: Rows | None, everyone: Rows | None) -> None:
        m = self.m
        self._mates, self._everyone = mates, everyone
        self.level, rows = (m.fabric.world, everyone) if everyone is not None else (m.fabric.group, mates)
        assert rows is not None
        self.rows, self.bad = rows, rows.broken()
        self.t = self.seed = self.joined
        self._part = 0, 1
        self.total = self.level.n_islands > 1
        self.came = rows.came
        m.metrics.rounds += 1
        if m.guard == "x":
            m.set_back(self.bad)
        m.exchange(self)
        if m.guard == "x" and self.bad and m.fresh:  # buffers that are not exchanged may be broken, too
            m.copy_from(min(set(range(m.p)) - self.bad), self.bad, rest=True)
        m.clock.held(self)
        self.updates += 1

    def learn(self, numbers: list[float]) -> np.ndarray:
        """In a round of all: what each of those tells who came for it and are finite, a row each. Collective."""
        assert self.rows is not None
        table = self.level.table(numbers)
        counts = (np.array(self.rows.purpose) == ROUND) & (np.array(self.rows.fit) != 0)
        return table[counts] if counts.any() else table

    # The verbs

    def mean(
        self,
        vectors: Any = None,
        counted: np.ndarray | None = None,
        keep: bool = False,
        about: Vector | None = None,
    ) -> None:
        """Replaces every worker's vector by the mean over those that count (by default the finite ones).

        vectors: x, or the gradients, with which the float buffers go. keep: `before` is x as it was, for `copy`.
        about: a wide vector per="all" that x is near of: where x crosses nodes in few bits, as the difference from it
        (else from the last mean).
        """
        if keep:
            self.m.keep_x()
            self.fence()  # others write into x
        m = self.m
        if vectors is None:
            near: Any = about or {}
            spans = [
                Span(w, *span, f"x {d}", near.get(d)) for d, w in self.x.items() for span in self._joint(d)
            ]
        else:
            spans = [Span(w, 0, w.mine.numel(), f"g {d}", NOTHING) for d, w in vectors.items()]
            spans += [Span(w, m.edge[d], m.n[d], f"x {d}") for d, w in m.x.items() if m.edge[d] < m.n[d]]
        assert self.rows is not None
        fit = self.rows.fit if counted is None else counted
        m.mean_over(spans, {r for r, c in enumerate(fit) if c})

    def only(self, k: int, parts: int) -> None:
        """`mean`, `each` and `copy` go by the k-th part of the parameters in this round; what lies behind goes with the
        last.
        """
        self._part = k, parts

    def part(self, d: torch.dtype) -> tuple[tuple[int, int], tuple[int, int]]:
        (_, edge), (_, n) = self.spans(d)
        k, parts = self._part
        return (edge * k // parts, edge * (k + 1) // parts), (edge if k == parts - 1 else n, n)

    def _joint(self, d: torch.dtype) -> list[tuple[int, int]]:
        """The part's spans, adjacent ones as one."""
        (a, b), (edge, n) = self.part(d)
        return [(a, n)] if b == edge else [(a, b), (edge, n)][: 1 + (edge < n)]

    def here(self, d: torch.dtype, start: int, stop: int) -> tuple[int, int]:
        return self.level.share(start, stop)

    def those(self) -> Hashable:
        return self.level is self.m.fabric.world, frozenset(self.bad)

    def peers(self, d: torch.dtype, a: int, b: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        every = {r: self.x[d].views[self.level.seats[r]][a:b] for r in self.level.local_ranks}
        broken = self.bad.intersection(every)
        return [v for r, v in every.items() if r not in broken], [every[r] for r in broken]

    def added(self, whole: torch.Tensor, start: int, stop: int, name: str) -> Iterator[tuple[int, int]]:
        return (self.level.share(*part) for part in self.level.allreduce(whole, start, stop, Stream(name)))

    def seen(self, nbytes: int) -> None:
        self.level.count_local(nbytes)

    def fence(self) -> None:
        self.level.fence()

    def barrier(self) -> None:
        self.level.barrier()

    def push(self, c: Vector, anchor: Vector, velocity: Vector | None = None, momentum: float = 0.0) -> None:
        """c <- c + sum_i (x_i - a);  x_i <- c;  a <- x_i.

        With u: u <- momentum u + sum_i (x_i - a);  c <- c + u;  x_i <- c + momentum u;  a <- x_i.
        Buffers move by the mean of the workers' moves.
        """
        for d, window in self.x.items():
            for span, u, rate in zip(
                self.spans(d), (velocity, None), (1.0, 1 / self.level.size), strict=True
            ):
                for a, b, sums in self.summed(anchor, d, *span):
                    step = c[d][a:b] if u is None else u[d][a:b].mul_(momentum)
                    kernels.elastic_apply(step, [], sums, 0.0, rate, seed=self.seed)
                    if u is not None:
                        c[d][a:b].add_(step)
            self.fence()
            x = window.mine[: len(c[d])].copy_(c[d])
            if velocity is not None:
                x.add_(velocity[d], alpha=momentum)
            anchor[d].copy_(x)
        self.barrier()

    def copy(self, c: Vector, keep: float = 0.0) -> None:
        """x_i <- c, or keep x_i + (1 - keep) c with x_i as `mean` kept it.

        What lies behind the parameters goes the other way: c takes the workers' mean.
        """
        broken = self.level.rank in self.bad
        for d, window in self.x.items():
            (a, b), (edge, n) = self.part(d)
            if broken:  # in all its parts
                a, b = 0, edge
            x = window.mine[a:b].copy_(c[d][a:b])
            if keep and not broken:
                x.lerp_(self.m.before[d][a:b], keep)
            if self.level.is_head or self.level.local_ranks[0] == self.level.rank:
                c[d][edge:n].copy_(window.mine[edge:n])
        self.m.before = {}
        self.barrier()

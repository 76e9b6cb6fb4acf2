"""Exchanges that go on behind the steps: a thread finishes them while the worker computes."""

from __future__ import annotations

import time
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

import torch

from mpilsgd import kernels
from mpilsgd.comm import Background
from mpilsgd.exchange.base import Exchange, convex
from mpilsgd.exchange.in_turn import InTurn
from mpilsgd.exchange.rows import ROUND, Row, Rows
from mpilsgd.exchange.together import Together
from mpilsgd.exchange.vectors import Vector, accumulation_dtype, load, save

if TYPE_CHECKING:
    from mpilsgd.exchange.method import Method


class Behind(Exchange):
    """One exchange at a time is under way. Its verb is `elastic`, in two halves: the worker's, and the centre's."""

    verbs = frozenset({"elastic"})
    private = True

    def __init__(self, method: Method):
        super().__init__(method)
        self._exchanging: Future[None] | None = None
        self._thread: Background | None = None
        self._difference: dict[torch.dtype, torch.Tensor] = {}  # D = x - c, in a half type's wider one

    def open(self) -> None:
        self._thread = Background("mpilsgd overlap", self.m.device)
        self.m.fabric.world.patient = True

    def submit(self, do: Any, given: Any) -> None:
        assert self._thread is not None
        self._exchanging = self._thread.submit(do, given)

    def settle(self) -> None:
        if self._exchanging is None:
            return
        start, m = time.perf_counter(), self.m
        try:
            self._exchanging.result()
        finally:
            if self._exchanging.done():  # and not this wait interrupted
                self._exchanging = None
        waited = time.perf_counter() - start
        m.metrics.t_comm += waited
        m.metrics.t_wait += waited
        m.count_traffic()

    def pull_by_difference(self, alpha: float) -> None:
        """x <- x - alpha D; what lies behind the parameters by a convex rate."""
        for d, w in self.m.x.items():
            for start, stop, a, _ in convex(self.m, d, alpha, 0.0):
                kernels.elastic_apply(
                    w.mine[start:stop], [], self._difference[d][start:stop], 0.0, -a, seed=self.m.t
                )
        self.m.flat.touched()

    def free(self) -> None:
        if self._thread is not None:
            self._thread.end()
            self._thread = None
        super().free()
        self._difference = {}


class BehindTogether(Behind, Together):
    """Rounds of all, whose second half, the centre's, goes on behind the steps: by the same equations, as a step needs
    c_t, not c_{t+1}. No worker waits for a round that takes less than a period, or for a worker less than one behind.
    """

    c: Vector
    alpha: float
    rate: float

    def sizes(self, nbytes: int, wide: int) -> int:
        return wide

    def allocate(self, vectors: list[Vector]) -> None:
        super().allocate(vectors)
        m = self.m
        self._windows = {d: m.fabric.place.vector(accumulation_dtype(d), n) for d, n in m.n.items()}
        self._difference = {d: w.mine for d, w in self._windows.items()}

    def run(self) -> None:
        """D <- x - c, x <- x - alpha D; no worker waits for the others' D, only for those of the round before."""
        self.settle()
        m, start = self.m, time.perf_counter()
        with m.iterates():
            fit = self._begin(moves=True)
            self.submit(self._finish, m.row(ROUND, self.stamp(), fit))
            m.metrics.t_comm += time.perf_counter() - start
            if not fit:
                self.settle()
                self._take_centre()
        m.metrics.rounds += 1

    def _begin(self, moves: bool) -> bool:
        """Takes D before the worker is announced; whether it is finite. moves: x goes by it at once."""
        fit, self._moves = self.m.is_fit(), moves
        self.m.exchange(_Half(self, fit))
        return fit

    def meet(self, purpose: float) -> Rows | None:
        m = self.m
        fit = self._begin(moves=False)
        rows = self._gate(m.fabric.world, m.row(purpose, self.stamp(), fit))
        if rows.round is None:
            return rows
        self._add(rows)
        if fit:
            self.pull_by_difference(self.alpha)
        else:
            self._take_centre()
        m.metrics.rounds += 1
        return None

    def _finish(self, row: Row) -> None:
        self._add(self._gate(self.m.fabric.world, row))

    def _add(self, rows: Rows) -> None:
        """c <- c + rate sum_i D^i, over the workers that are finite."""
        m, level = self.m, self.m.fabric.world
        self.level, self.bad = level, set()
        m.refuse_if_all(rows.broken())
        for d, window in self._windows.items():
            kind = window.mine.dtype
            for start, stop, _, rate in convex(m, d, 0.0, self.rate):
                a, b = level.share(start, stop)
                level.count_local((b - a) * kind.itemsize)
                views = [window.views[level.seats[r]][a:b] for r in level.local_ranks if rows.fit[r]]
                alone = level.n_islands == 1
                whole = None if alone else m.scratch[kind].views[0]
                total = window.mine.new_empty(b - a) if whole is None else whole[a:b]
                if views:
                    kernels.total(total, views)
                else:
                    total.zero_()
                if whole is None:
                    kernels.elastic_apply(self.c[d][a:b], [], total, 0.0, rate, seed=rows.round or 0)
                    continue
                for piece in level.allreduce(whole, start, stop):
                    p, q = level.share(*piece)
                    kernels.elastic_apply(self.c[d][p:q], [], whole[p:q], 0.0, rate, seed=rows.round or 0)
            level.fence()

    def _take_centre(self) -> None:
        self.m.begin_anew()
        for d, w in self.m.x.items():
            w.mine[: self.m.n[d]].copy_(self.c[d])


class _Half:
    """What a rule is given: its `elastic` is the worker's half of a round, and says what the other half will be."""

    def __init__(self, r: BehindTogether, fit: bool):
        self._r, self._fit = r, fit

    def elastic(self, c: Vector, alpha: float, rate: float, gauss_seidel: bool = False) -> None:
        r, m = self._r, self._r.m
        r.c, r.alpha, r.rate = c, alpha, rate
        for d, w in r._windows.items() if self._fit else ():
            for start, stop, a, _ in convex(m, d, alpha, rate):
                span = slice(start, stop)
                kernels.elastic_sum(
                    w.mine[span], c[d][span], [m.x[d].mine[span]], a if r._moves else 0.0, seed=m.t
                )


class BehindInTurn(Behind, InTurn):
    """A worker's exchange with the centre goes on while it computes (thesis, section 2.2): at the end of the period
    x <- x - alpha D, with D = x - c as it was at the start."""

    def __init__(self, method: Method):
        super().__init__(method)
        self._pending = False
        self._sent: dict[torch.dtype, torch.Tensor] = {}

    def allocate(self, vectors: list[Vector]) -> None:
        super().allocate(vectors)
        for d, n in self.m.n.items():
            self._difference[d] = torch.zeros(n, dtype=accumulation_dtype(d), device=self.m.device)

    def exchange_x(self) -> None:
        """Starts the exchange; a worker that is not finite takes the centre over at once."""
        if not self.fit:
            self.visit()
            return
        self._sent = {d: w.mine[: self.m.n[d]].clone() for d, w in self.m.x.items()}
        self._pending = True
        self.submit(self._visit_behind, None)

    def _visit_behind(self, _: Any) -> None:
        self.visit(timed=False)
        self._sent = {}

    def elastic(self, c: Vector, alpha: float, rate: float, gauss_seidel: bool = False) -> None:
        if not self.fit:
            self._take_over(c)
            return
        self.alpha = alpha
        for d in self.m.x:
            for start, stop, _, r in convex(self.m, d, alpha, rate):
                low, high = self._here(d, start, stop)
                part, difference = self._of(c, d, low, high), self._difference[d][low:high]
                kernels.elastic_sum(difference, part, [self._sent[d][low:high]], 0.0)
                kernels.elastic_apply(part, [], difference, 0.0, r, seed=self.updates)

    def stepped(self) -> None:
        if self._pending and self.is_due():  # the period is over
            self.settle()
            self._pending = False
            with self.m.iterates():
                self.pull_by_difference(self.alpha)
        super().stepped()

    def state(self) -> dict[str, Any]:
        pending = {"difference": save(self._difference), "alpha": self.alpha} if self._pending else None
        return {**super().state(), "pending": pending}

    def load(self, state: dict[str, Any]) -> None:
        super().load(state)
        self._pending = state["pending"] is not None
        if self._pending:
            load(self._difference, state["pending"]["difference"])
            self.alpha = state["pending"]["alpha"]


BEHIND: dict[type[Exchange], type[Exchange]] = {Together: BehindTogether, InTurn: BehindInTurn}

"""Exchanges that go on behind the steps: a thread makes them of a copy of x, while the worker computes."""

from __future__ import annotations

import abc
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import torch

from mpilsgd import kernels
from mpilsgd.comm import Background, result, seconds
from mpilsgd.exchange.base import Exchange, convex
from mpilsgd.exchange.in_turn import InTurn
from mpilsgd.exchange.rows import ROUND, Rows
from mpilsgd.exchange.together import Together
from mpilsgd.exchange.vectors import Vector, accumulation_dtype, save
from mpilsgd.transport.messages import Private


class Behind(Exchange):
    """One exchange at a time is under way. `x` is the copy, which the verbs go by."""

    verbs = frozenset({"elastic"})
    private = True
    _exchanging: Future[None] | None = None
    _thread: Background | None = None

    def open(self) -> None:
        self._thread = Background("mpilsgd overlap", self.m.device)
        self.m.fabric.world.patient = True

    def copy_x(self) -> None:
        for d, n in self.m.n.items():
            self.x[d].mine.copy_(self.m.x[d].mine[:n])

    def submit(self, do: Callable[[Any], None], given: Any) -> None:
        assert self._thread is not None
        self._exchanging = self._thread.submit(do, given)

    def settle(self) -> None:
        if self._exchanging is None:
            return
        start, m = seconds(), self.m
        try:
            result(self._exchanging)
        finally:
            if self._exchanging.done():  # and not this wait interrupted
                self._exchanging = None
                assert self._thread is not None
                self._thread.join()
        waited = seconds() - start
        m.metrics.t_comm += waited
        m.metrics.t_wait += waited
        m.count_traffic()

    def free(self) -> None:
        if self._thread is not None:
            self._thread.end()
            self._thread = None
        super().free()


class BehindAll(Behind, Together):
    """Rounds of all, of the copies that lie where x does: no worker waits for a round that takes less than a period, or
    for a worker less than one behind."""

    c: Vector

    def sizes(self, nbytes: int, wide: int) -> int:
        return nbytes

    def allocate(self, vectors: list[Vector]) -> None:
        super().allocate(vectors)
        self.x = {d: self.m.fabric.place.vector(d, n) for d, n in self.m.n.items()}

    def run(self) -> None:
        self.settle()
        m, start = self.m, seconds()
        with m.iterates():
            fit = self._begin()
            self.submit(self._gather, m.row(ROUND, self.stamp(), fit))
            m.metrics.t_comm += seconds() - start
            if not fit:
                self.settle()
                self._take_centre()
        m.metrics.rounds += 1

    @abc.abstractmethod
    def _begin(self) -> bool:
        """This worker's part before it is announced; whether it is finite."""

    @abc.abstractmethod
    def _round(self, rows: Rows) -> None: ...

    def _gather(self, row: Any) -> None:
        rows = self._gate(self.m.fabric.world, row)
        self._enter(rows)
        self._round(rows)

    def _enter(self, rows: Rows) -> None:
        self.level, self.rows, self.bad = self.m.fabric.world, rows, rows.broken()
        self.t = self.seed = rows.round or 0
        self.total = self.level.n_islands > 1
        self.m.refuse_if_all(self.bad)

    def _take_centre(self) -> None:
        self.m.begin_anew()
        for d, n in self.m.n.items():
            self.m.x[d].mine[:n].copy_(self.c[d])


class BehindTogether(BehindAll):
    """x moves at once, as it needs c_t only; c_{t+1} comes from the copies of x_t, behind the steps."""

    rate: float

    def _begin(self) -> bool:
        """The worker's half: c is read, which the others then change."""
        fit = self.m.is_fit()
        self.copy_x()
        self.m.exchange(_Half(self, fit))
        return fit

    def meet(self, purpose: float) -> Rows | None:
        m = self.m
        fit = self._begin()
        rows = self._gate(m.fabric.world, m.row(purpose, self.stamp(), fit))
        if rows.round is None:
            for d, n in m.n.items():
                m.x[d].mine[:n].copy_(self.x[d].mine)
            return rows
        self._enter(rows)
        self._round(rows)
        if not fit:
            self._take_centre()
        m.metrics.rounds += 1
        return None

    def _round(self, rows: Rows) -> None:
        self.elastic(self.c, 0.0, self.rate)

    def barrier(self) -> None:
        """Of this island, whose c and copies are read next, unless it has been fenced. x is not written."""
        if not self.total:
            self.fence()


class _Half:
    """What a rule is given: its `elastic` is the worker's half of a round, and says what the other half will be."""

    def __init__(self, r: BehindTogether, fit: bool):
        self._r, self._fit = r, fit

    def elastic(self, c: Vector, alpha: float, rate: float, gauss_seidel: bool = False) -> None:
        """x <- x - alpha (x - c)."""
        m, self._r.c, self._r.rate = self._r.m, c, rate
        for d, w in m.x.items() if self._fit else ():
            for start, stop, a, _ in convex(m, d, alpha, rate):
                kernels.pull(w.mine[start:stop], c[d][start:stop], a, seed=m.t)


class BehindInTurn(Behind, InTurn):
    """A worker's exchange with the centre goes on while it computes (thesis, section 2.2): at the end of the period x
    moves as its copy did, x <- x - alpha D, with D = x - c as it was at the start."""

    _pending = False

    def allocate(self, vectors: list[Vector]) -> None:
        super().allocate(vectors)
        self.x = {d: Private(d, n, self.m.device) for d, n in self.m.n.items()}
        self._sent: dict[torch.dtype, torch.Tensor] = {}
        self._moved: dict[torch.dtype, torch.Tensor] = {}  # by the copy, of a half type in a wider one

    def begin(self) -> None:
        self.copy_x()
        self._sent = {d: copy.mine.clone() for d, copy in self.x.items()} if self.fit else {}
        self._pending = True
        self.submit(self._visit_behind, None)
        if not self.fit:
            self._end()

    def _visit_behind(self, _: Any) -> None:
        self.visit(timed=False)
        for d, sent in self._sent.items():
            moved = self.x[d].mine.to(accumulation_dtype(d))
            kernels.iterate(moved, sent.to(moved.dtype), 1.0, -1.0)
            self._moved[d] = moved

    def land(self) -> None:
        if self._pending:
            self._end()

    def _end(self) -> None:
        self.settle()
        self._pending, self._sent = False, {}  # not sooner: the thread's stream reads it until then
        for d, copy in self.x.items():
            x = self.m.x[d].mine[: self.m.n[d]]
            if self.fit:
                kernels.elastic_apply(x, [], self._moved[d], 0.0, 1.0, seed=self.m.t)
            else:
                x.copy_(copy.mine)
        self._moved = {}
        self.m.flat.touched()

    def stepped(self) -> None:
        if self._pending and self.is_due():  # the period is over
            with torch.no_grad(), self.m.iterates():
                self._end()
        super().stepped()

    def state(self) -> dict[str, Any]:
        return {**super().state(), "moved": save(self._moved) if self._pending else None}

    def misfit(self, state: dict[str, Any]) -> str | None:
        return super().misfit(state) if "moved" in state else "the state is of another version of mpilsgd"

    def load(self, state: dict[str, Any]) -> None:
        super().load(state)
        self._pending, self.fit = state["moved"] is not None, True
        self._moved = {d: state["moved"][str(d)].to(self.m.device).clone() for d in self.x if self._pending}

    def free(self) -> None:
        super().free()
        self._sent, self._moved = {}, {}


BEHIND: dict[type[Exchange], type[Exchange]] = {Together: BehindTogether, InTurn: BehindInTurn}

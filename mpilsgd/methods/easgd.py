"""Elastic averaging SGD: the workers and a centre variable pull on each other."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np
import torch

from mpilsgd import kernels
from mpilsgd.comm import Background, Shard, Topology, Window, thread_problem
from mpilsgd.methods.arguments import choice, number, whole
from mpilsgd.methods.averaging import accumulation_dtype, share
from mpilsgd.methods.base import ROUND
from mpilsgd.methods.centered import Centered
from mpilsgd.methods.course import course_problems, course_settings
from mpilsgd.methods.wrapped import gradient_at_x


class EASGD(Centered):
    """Elastic averaging SGD; with `MSGD` as the worker's optimizer it is EAMSGD.

    Jacobi, at the steps t (from 0, before the step) that are multiples of tau; all right-hand sides at time t:

        x^i_{t+1} = x^i_t - eta g^i(x^i_t) - alpha (x^i_t - c_t)
        c_{t+1}   = (1 - beta) c_t + beta (1/p) sum_i x^i_t

    Gauss-Seidel, after the step that makes t a multiple of tau (the pull that opens the next period is done at once):

        c <- c + (beta/p) sum_i (x^i - c);    x^i <- x^i - alpha (x^i - c)

    Args:
        center_rate: beta >= 0 (DOWNPOUR is the Gauss-Seidel form with alpha = 1, beta = p).
        moving_rate: alpha, in [-1, 2]; default beta/p (elastic symmetry). Below 0 it may be optimal: thesis 5.1.3.
        period: tau >= 1.
        form: "jacobi" or "gauss-seidel".
        asynchronous: True: no worker waits for the others. Each exchanges with the centre by its own clock, alone
            and in one piece, where the synchronous form exchanges with all (Algorithms 1 and 2):
            x <- x - alpha (x - c), c <- c + (beta/p) (x - c), both from the old values (Jacobi).
        overlap: with Jacobi: a thread exchanges while the next period computes. Synchronous: by the same equations, as
            a step needs c_t, not c_{t+1}; no worker waits for a round that takes less than a period, or for a worker
            that is less than a period behind; one set back to the centre waits for that. `metrics.rounds` counts
            those begun. Takes a vector more a worker, D = x - c. Asynchronous, section 2.2: at the end of the period
            x <- x - alpha D, with D as it was at the start; two vectors more a worker. D is float32 for half types.
        order: of the workers' exchanges: "free" or "round-robin" (worker 0's whole step, then worker 1's, ...).
        record, replay: a file to write the order of a free run to, one whose run is repeated bit for bit.
        optimizer, topology, init, buffers, model and errors: see `Method`.

    The centre is one copy a node; each rank works on its slice of it and of its node's workers, in one pass. It
    starts at the common start, or at the workers' mean with init="different". A worker found non-finite is set
    back to the centre.

    Source: thesis (2.3)-(2.6), Algorithms 1 and 2, (6.2)-(6.3).
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        topology: Topology | None = None,
        *,
        center_rate: float = 0.9,
        moving_rate: float | None = None,
        period: int = 10,
        form: str = "jacobi",
        asynchronous: bool = False,
        overlap: bool = False,
        order: str = "free",
        record: str | None = None,
        replay: str | None = None,
        init: str = "same",
        buffers: str = "average",
        model: torch.nn.Module | None = None,
    ):
        topology, made = (Topology(), True) if topology is None else (topology, False)
        p = topology.world.size
        problems = [number("center_rate", center_rate, 0.0), whole("period", period)]
        problems.append(choice("form", form, ("jacobi", "gauss-seidel")))
        if moving_rate is not None:
            problems.append(number("moving_rate", moving_rate, -1.0, 2.0))
        elif problems[0] is None:
            moving_rate = center_rate / p
        problems.append(choice("asynchronous", asynchronous, (False, True)))
        problems.append(choice("overlap", overlap, (False, True)))
        if overlap and form == "gauss-seidel":
            problems.append('overlap needs form="jacobi", not "gauss-seidel"')
        if overlap:
            problems.append(thread_problem())
        problems += course_problems(asynchronous, order, record, replay)
        self.center_rate, self.period, self.form = center_rate, period, form
        self.asynchronous, self.overlap = asynchronous, overlap
        self._thread: Background | None = None
        self._exchanging: Future[None] | None = None  # "overlap": the exchange under way
        self._difference: dict[torch.dtype, torch.Tensor] = {}  # ... and its D, in a half type's wider one
        self._pending = False
        self._c: dict[torch.dtype, Window] = {}
        self._d: dict[torch.dtype, Window] = {}  # ... where the synchronous form's node sees it
        self.moving_rate = 0.0 if moving_rate is None else moving_rate  # refused below
        super().__init__(
            optimizer,
            topology,
            init=init,
            buffers=buffers,
            model=model,
            problems=problems,
            settings=dict(
                center_rate=center_rate,
                moving_rate=moving_rate,
                period=period,
                form=form,
                asynchronous=asynchronous,
                overlap=overlap,
                **course_settings(order, record, replay),
            ),
            vectors=1.0,
            wide=1 if overlap and not asynchronous else 0,
            course=(order, record, replay) if asynchronous else None,
        )
        self._owns_topology = made
        if overlap:
            self._thread = Background("mpilsgd overlap", self.flat.parameters[0].device)
        if asynchronous:
            self._open_centre(init)
            self._start_alone(init)
            return
        device = self.flat.parameters[0].device
        world = self.fabric.world
        self._c = {d: self.fabric.common(world, d, w.mine.numel(), device) for d, w in self._x.items()}
        for d in self._x if overlap else ():
            self._d[d] = self.fabric.window(accumulation_dtype(d), self._n[d], device)
            self._difference[d] = self._d[d].mine
        world.patient = overlap
        with torch.no_grad():
            self._start_centre(init)
        self.fabric.traffic.group = self.fabric.traffic.across = 0

    def _start_centre(self, init: str) -> None:
        own = {d: w.mine.clone() for d, w in self._x.items()} if init == "different" else {}
        if own:
            self.fabric.world.table([0.0])
            self._average([(w, 0, w.mine.numel()) for w in self._x.values()], np.ones(self.fabric.world.size))
        if self.fabric.world.local.rank == 0:
            for d, w in self._x.items():
                self._c[d].mine.copy_(w.mine)
        self.fabric.world.table([0.0])
        for d, x in own.items():
            self._x[d].mine.copy_(x)
            if self.form == "gauss-seidel":  # the pull that opens the first period
                kernels.pull(self._x[d].mine[: self._n[d]], self._c[d].mine[: self._n[d]], self.moving_rate)

    def _start_alone(self, init: str) -> None:
        with torch.no_grad(), self._iterates():
            if self.form == "gauss-seidel" and init == "different":  # the pull that opens the first period
                for d, c in self._collected():
                    x = self._x[d].mine[: self._n[d]]
                    kernels.pull(x, c[: x.numel()].to(x.device), self.moving_rate)
        if self.overlap:
            for d, w in self._x.items():
                self._difference[d] = torch.zeros_like(w.mine[: self._n[d]], dtype=accumulation_dtype(d))

    def _acts_on_gradient(self) -> bool:
        return self.form == "jacobi" and self.t % self.period == 0

    def _before(self, loss: Any) -> None:
        self._due = self._acts_on_gradient()

    def _local_step(self, closure: Any) -> Any:
        if not self._due:
            return super()._local_step(closure)
        with torch.no_grad(), gradient_at_x(self.optimizer):
            if self.asynchronous:
                self._visit()
            elif self.overlap:
                self._open_round()
            else:
                self._exchange()
            return super()._local_step(closure)

    def _after(self, loss: Any) -> None:
        if self.t % self.period:
            return
        if self.form == "gauss-seidel":
            self._visit() if self.asynchronous else self._exchange()
        elif self._pending:
            self._apply_difference()

    # Asynchronous

    def _visit(self) -> None:
        with self._iterates():
            fit = self._fit()
            if self.overlap and fit:
                self._send()
                return
            with self._visiting() as shards:
                for shard in shards:
                    if fit:
                        self._move(shard)
                    else:
                        self._start_anew(shard)

    def _move(self, shard: Shard) -> None:
        seidel, rate = self.form == "gauss-seidel", self.center_rate / self.topology.world.size
        for part in self._parts(shard):
            kernels.elastic(part.c, [part.x], self.moving_rate, rate, gauss_seidel=seidel)
        self._updates(shard)

    def _send(self) -> None:
        """Starts the exchange of x as it is now."""
        sent = {d: w.mine[: self._n[d]].clone() for d, w in self._x.items()}
        self._pending = True
        assert self._thread is not None
        self._exchanging = self._thread.submit(self._exchange_copy, sent)

    def _exchange_copy(self, sent: dict[torch.dtype, torch.Tensor]) -> None:
        rate = self.center_rate / self.topology.world.size
        with self._visiting(timed=False) as shards:
            for shard in shards:
                for d, low, high, _, c, _ in self._parts(shard):
                    difference = self._difference[d][low:high]
                    kernels.elastic_sum(difference, c, [sent[d][low:high]], 0.0)
                    kernels.elastic_apply(c, [], difference, 0.0, rate)
                self._updates(shard)

    def settle(self) -> None:
        if self._exchanging is not None:
            start = time.perf_counter()
            try:
                self._exchanging.result()
            finally:
                if self._exchanging.done():  # and not this wait interrupted
                    self._exchanging = None
            waited = time.perf_counter() - start
            m, traffic = self.metrics, self.fabric.traffic
            m.t_comm += waited
            m.t_wait += waited
            m.bytes_group, m.bytes_across = traffic.group, traffic.across

    def _apply_difference(self) -> None:
        self.settle()
        self._pending = False
        with self._iterates():
            self._pull_by_difference()

    def _pull_by_difference(self) -> None:
        """x <- x - alpha D"""
        for d, w in self._x.items():
            kernels.elastic_apply(w.mine[: self._n[d]], [], self._difference[d], 0.0, -self.moving_rate)

    # Synchronous

    def _round(self, table: np.ndarray) -> None:
        if self.overlap:
            self._follow_round(table)
            return
        level = self.fabric.world
        seidel = self.form == "gauss-seidel"
        alpha, rate = self.moving_rate, self.center_rate / level.size
        # those that are not finite add nothing to the centre, and start anew from it
        bad = {r for r, row in enumerate(table) if not row[4]}
        self._set_back(bad)
        for d, window in self._x.items():
            whole = (0, self._n[d])
            c, peers, broken = self._slices(d, whole, bad)
            level.count_local(c.numel() * window.mine.element_size())
            if level.n_islands == 1:
                kernels.elastic(c, peers, alpha, rate, gauss_seidel=seidel)
                for view in broken:
                    view.copy_(c)
            else:
                total = self._scratch[accumulation_dtype(d)].views[0][slice(*share(level, *whole))]
                if peers:
                    kernels.elastic_sum(total, c, peers, 0.0 if seidel else alpha)
                else:
                    total.zero_()
                self._add_sum(d, bad)
            level.fence()
        if level.rank in bad:  # buffers that are not exchanged may be broken, too
            for d, window in self._x.items():
                window.mine[self._n[d] :].copy_(self._c[d].mine[self._n[d] :])
        level.barrier()
        self.metrics.rounds += 1

    def _add_sum(self, d: torch.dtype, bad: set[int]) -> None:
        """The centre takes all islands' sum, part by part, while the next part is summed."""
        level, scratch = self.fabric.world, self._scratch[accumulation_dtype(d)]
        seidel = self.form == "gauss-seidel"
        alpha, rate = self.moving_rate if seidel else 0.0, self.center_rate / level.size
        for part in level.allreduce(scratch, 0, self._n[d]):
            c, peers, broken = self._slices(d, part, bad)
            total = scratch.views[0][slice(*share(level, *part))]
            kernels.elastic_apply(c, peers if seidel else [], total, alpha, rate)
            for view in broken:
                view.copy_(c)

    def _slices(
        self, d: torch.dtype, part: tuple[int, int], bad: set[int]
    ) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
        """This rank's slice of a part of the centre, of this island's finite workers, and of its others."""
        level, views = self.fabric.world, self._x[d].views
        a, b = share(level, *part)
        every = {r: views[level.seats[r]][a:b] for r in level.local_ranks}
        finite = [view for r, view in every.items() if r not in bad]
        return self._c[d].mine[a:b], finite, [every[r] for r in every if r in bad]

    # Synchronous, with overlap: a round begins with each worker's own part, and is finished by threads

    def _open_round(self) -> None:
        """D <- x - c, x <- x - alpha D; no worker waits for the others' D, only for those of the round before."""
        self.settle()
        start = time.perf_counter()
        with self._iterates():
            row = self._row(ROUND)
            assert self._thread is not None
            self._exchanging = self._thread.submit(self._finish_round, row)
            self.metrics.t_comm += time.perf_counter() - start
            if not row[4]:
                self.settle()
                self._take_centre()
        self.metrics.rounds += 1

    def _row(self, purpose: float) -> list[float]:
        """With overlap D is taken before the worker is announced; one that rests is pulled only if a round comes."""
        row = super()._row(purpose)
        for d, w in self._d.items() if row[4] else ():
            n, alpha = self._n[d], self.moving_rate if purpose == ROUND else 0.0
            kernels.elastic_sum(w.mine, self._c[d].mine[:n], [self._x[d].mine[:n]], alpha)
        return row

    def _take_centre(self) -> None:
        self._begin_anew()
        for d, w in self._x.items():
            w.mine.copy_(self._c[d].mine)

    def _finish_round(self, row: Sequence[float]) -> None:
        self._add_differences(self._gate(self.fabric.world, row))

    def _add_differences(self, table: np.ndarray) -> None:
        """c <- c + (beta/p) sum_i D^i, over the workers that are finite."""
        level = self.fabric.world
        self._refuse_if_all({r for r, row in enumerate(table) if not row[4]})
        for d, window in self._d.items():
            a, b = share(level, 0, self._n[d])
            level.count_local((b - a) * window.mine.element_size())
            differences = [window.views[level.seats[r]][a:b] for r in level.local_ranks if table[r][4]]
            alone = level.n_islands == 1
            kind, device = window.mine.dtype, window.mine.device
            total = (
                torch.empty(b - a, dtype=kind, device=device) if alone else self._scratch[kind].views[0][a:b]
            )
            if differences:
                kernels.total(total, differences)
            else:
                total.zero_()
            if alone:
                c = self._c[d].mine[a:b]
                kernels.elastic_apply(c, [], total, 0.0, self.center_rate / level.size)
            else:
                self._add_sum(d, set())
            level.fence()

    def _follow_round(self, table: np.ndarray) -> None:
        """Of a worker that rests."""
        self._add_differences(table)
        if table[self.fabric.world.rank][4]:
            self._pull_by_difference()
        else:
            self._take_centre()
        self.metrics.rounds += 1

    def _set_centre(self) -> None:
        if self.asynchronous:
            super()._set_centre()
            return
        square = 0.0
        for d, window in self._x.items():
            square += float(torch.dist(window.mine[: self._n[d]], self._c[d].mine[: self._n[d]])) ** 2
            window.mine[: self._n[d]].copy_(self._c[d].mine[: self._n[d]])
        self.metrics.distance = square**0.5

    def _extra(self) -> dict[str, Any]:
        if self.asynchronous:
            self.settle()
            pending = {str(d): v.clone() for d, v in self._difference.items()} if self._pending else None
            return {**super()._extra(), "pending": pending}
        return {"center": {str(d): c.mine.clone() for d, c in self._c.items()}}

    def _load_extra(self, own: dict[str, Any]) -> None:
        if self.asynchronous:
            super()._load_extra(own)
            self._pending = own["pending"] is not None
            for d, v in self._difference.items() if self._pending else ():
                v.copy_(own["pending"][str(d)])
            return
        for d, c in self._c.items():
            a, b = share(self.fabric.world, 0, c.mine.numel())
            if self.overlap:  # the next round reads all of it before anyone is waited for
                a, b = 0, c.mine.numel()
            c.mine[a:b].copy_(own["center"][str(d)][a:b])

    def _free(self) -> None:
        super()._free()
        self._c, self._d, self._difference = {}, {}, {}
        if self._thread is not None:
            self._thread.end()

"""DOWNPOUR: workers push what they moved into a centre, and go on from it."""

from __future__ import annotations

import numbers
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch

from mpilsgd import kernels
from mpilsgd.comm import Shard, Topology, Window, exhaust
from mpilsgd.methods.arguments import choice, number, whole
from mpilsgd.methods.averaging import accumulation_dtype, follow, share
from mpilsgd.methods.centered import Centered
from mpilsgd.methods.course import course_problems, course_settings


class Downpour(Centered):
    """DOWNPOUR, with momentum (MDOWNPOUR) or averages of the centre (ADOWNPOUR, MVADOWNPOUR).

    After the step that makes t a multiple of tau, where a is what the worker last received and x - a = v what its
    steps, one gradient value each, have added since:

        c <- c + (x - a);    x <- c;    a <- c

    With momentum delta (tau = 1): u <- delta u + (x - a);  c <- c + u;  x <- c + delta u;  a <- x.
    Averages, on the centre's own clock k (its updates, from 0): z_0 = c_0, z_{k+1} = z_k + a_{k+1} (c_k - z_k).

    Args:
        period: tau >= 1.
        momentum: delta in [0, 1), on the centre; needs period=1.
        average: None; "running": a_{k+1} = 1/(k+1), so z is the mean of all centres; or a rate in (0, 1]. What
            `center()` shows.
        asynchronous: False: all workers push at once, c <- c + sum_i (x^i - a), one tick of the clock. It is EASGD's
            Gauss-Seidel form with alpha = 1, beta = p.
        order, record, replay: as for `EASGD`.
        optimizer, topology, init, buffers, model and errors: see `Method`.

    One vector more a worker (a) and the centre's, one each a node (asynchronous: in all). The worker's momentum,
    if its optimizer has one, stays its own. BatchNorm statistics move by the mean of the workers' moves, not by their
    sum. A worker found non-finite pushes nothing and goes on from the centre. With init="different" the centre starts
    at the workers' mean, and each worker goes on from it.

    Source: thesis, Algorithms 3 to 5 and the list of methods at the head of chapter 4.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        topology: Topology | None = None,
        *,
        period: int = 1,
        momentum: float = 0.0,
        average: str | float | None = None,
        asynchronous: bool = True,
        order: str = "free",
        record: str | None = None,
        replay: str | None = None,
        init: str = "same",
        buffers: str = "average",
        model: torch.nn.Module | None = None,
    ):
        problems = [whole("period", period), number("momentum", momentum, 0.0, 1.0)]
        if problems[1] is None and momentum == 1:
            problems.append("momentum must be less than 1")
        if not any(problems) and momentum and period > 1:
            problems.append(f"momentum is the centre's and needs period=1, not {period}")
        rate = isinstance(average, numbers.Real) and not isinstance(average, bool) and 0 < average <= 1
        if average not in (None, "running") and not rate:
            problems.append(f'average must be None, "running" or a rate in (0, 1], not {average!r}')
        problems.append(choice("asynchronous", asynchronous, (False, True)))
        problems += course_problems(asynchronous, order, record, replay)
        self.period, self.momentum, self.average, self.asynchronous = period, momentum, average, asynchronous
        self._anchor: dict[torch.dtype, torch.Tensor] = {}  # a
        self._common: dict[str, dict[torch.dtype, Window]] = {}  # synchronous: a copy a node
        super().__init__(
            optimizer,
            topology,
            init=init,
            buffers=buffers,
            model=model,
            problems=problems,
            settings=dict(
                period=period,
                momentum=momentum,
                average=average,
                asynchronous=asynchronous,
                **course_settings(order, record, replay),
            ),
            vectors=1.0 + bool(momentum) + (average is not None),
            course=(order, record, replay) if asynchronous else None,
        )
        names = ["c", *(["u"] if momentum else []), *(["z"] if average is not None else [])]
        with torch.no_grad():
            if asynchronous:
                also, wide = ("u",) if momentum else (), ("z",) if average is not None else ()
                self._open_centre(init, also, wide)
                self._receive(self._collected())
                if average is not None and self._shards is not None:
                    self._start_average(self._shards.own)
            else:
                self._start_together(init, names)
        self.fabric.traffic.group = self.fabric.traffic.across = 0

    # What both forms do

    def _receive(self, centre: Iterable[tuple[torch.dtype, torch.Tensor]]) -> None:
        """x <- c; a <- x, at the start."""
        with self._iterates():
            for d, c in centre:
                self._x[d].mine[: self._n[d]].copy_(c[: self._n[d]])
            self._anchor = {d: w.mine[: self._n[d]].clone() for d, w in self._x.items()}

    def _start_average(self, windows: Mapping[str, Mapping[torch.dtype, Window]]) -> None:
        world = self.fabric.world
        world.table([0.0])
        if world.local.rank == 0:
            for d, z in windows["z"].items():
                z.mine.copy_(windows["c"][d].mine)
        world.table([0.0])

    def _follow(self, z: torch.Tensor, c: torch.Tensor, clock: int) -> None:
        """The average takes in the centre as it is before its update."""
        follow(z, c, 1.0 / (clock + 1) if self.average == "running" else float(self.average or 0.0))

    def _after(self, loss: Any) -> None:
        if self.t % self.period == 0:
            self._visit() if self.asynchronous else self._exchange()

    # Asynchronous

    def _visit(self) -> None:
        with self._iterates():
            fit = self._fit()
            with self._visiting() as shards:
                for shard in shards:
                    if fit:
                        self._push(shard)
                    else:
                        self._start_anew(shard)

    def _push(self, shard: Shard) -> None:
        clock = self._updates(shard)
        if self.average is not None:
            for part in self._parts(shard):
                self._follow(part.vectors["z"], part.c, clock)
        for d, low, high, x, c, vectors in self._parts(shard, "parameters"):
            kernels.push(c, x, self._anchor[d][low:high], 1.0, vectors.get("u"), self.momentum)
        for d, low, high, x, c, _ in self._parts(shard, "buffers"):
            kernels.push(c, x, self._anchor[d][low:high], 1.0 / self.topology.world.size)

    def _start_anew(self, shard: Shard) -> None:
        super()._start_anew(shard)
        for d, low, high, x, _, vectors in self._parts(shard):
            if self.momentum:  # 0 for buffers
                x.add_(vectors["u"], alpha=self.momentum)
                self._refuse_broken(x)
            self._anchor[d][low:high].copy_(x)

    # All together

    def _start_together(self, init: str, names: list[str]) -> None:
        device, world = self.flat.parameters[0].device, self.fabric.world
        for name in names:
            kinds = {d: accumulation_dtype(d) if name == "z" else d for d in self._x}
            self._common[name] = {
                d: self.fabric.common(world, kinds[d], w.mine.numel(), device) for d, w in self._x.items()
            }
        with self._iterates():
            world.table([0.0])
            if init == "different":
                self._average([(w, 0, w.mine.numel()) for w in self._x.values()], np.ones(world.size))
            if world.local.rank == 0:
                for d, w in self._x.items():
                    self._common["c"][d].mine.copy_(w.mine)
            world.table([0.0])
        if self.average is not None:
            self._start_average(self._common)
        self._receive((d, c.views[0]) for d, c in self._common["c"].items())
        self._clock = 0

    def _round(self, table: np.ndarray) -> None:
        world = self.fabric.world
        bad = {r for r, row in enumerate(table) if not row[4]}
        self._set_back(bad)
        for d, window in self._x.items():
            edge, n = self.flat.n_parameters[d], self._n[d]
            world.count_local((share(world, 0, n)[1] - share(world, 0, n)[0]) * window.mine.element_size())
            for start, stop in ((0, edge), (edge, n)):
                if start < stop:
                    self._add_moves(d, start, stop, bad)
            world.fence()
            x = window.mine[:n]
            x.copy_(self._common["c"][d].mine[:n])
            if self.momentum:
                x.add_(self._common["u"][d].mine[:n], alpha=self.momentum)
            self._anchor[d].copy_(x)
        world.barrier()
        self._clock += 1
        self.metrics.rounds += 1

    def _add_moves(self, d: torch.dtype, start: int, stop: int, bad: set[int]) -> None:
        """c <- c + sum_i (x^i - a), with momentum by way of u: this rank's slice. All a are the same."""
        world, window = self.fabric.world, self._x[d]
        a, b = share(world, start, stop)
        c = self._common["c"][d].mine[a:b]
        if self.average is not None:
            self._follow(self._common["z"][d].mine[a:b], c, self._clock)
        peers = [window.views[world.seats[r]][a:b] for r in world.local_ranks if r not in bad]
        if world.n_islands == 1:
            total = torch.zeros_like(c, dtype=accumulation_dtype(d))
        else:
            scratch = self._scratch[accumulation_dtype(d)]
            total = scratch.views[0][a:b]
        if peers:
            kernels.elastic_sum(total, self._anchor[d][a:b], peers, 0.0)
        else:
            total.zero_()
        if world.n_islands > 1:
            exhaust(world.allreduce(scratch, start, stop))
        if start == self.flat.n_parameters[d]:
            kernels.elastic_apply(c, [], total, 0.0, 1.0 / world.size)
        elif self.momentum:
            u = self._common["u"][d].mine[a:b].mul_(self.momentum)
            kernels.elastic_apply(u, [], total, 0.0, 1.0)
            c.add_(u)
        else:
            kernels.elastic_apply(c, [], total, 0.0, 1.0)

    # The centre

    def _shown_centre(self) -> str:
        return "c" if self.average is None else "z"

    def _set_centre(self) -> None:
        if self.asynchronous:
            super()._set_centre()
            return
        for d, w in self._x.items():
            w.mine[: self._n[d]].copy_(self._common[self._shown_centre()][d].mine[: self._n[d]])

    def _extra(self) -> dict[str, Any]:
        own: dict[str, Any] = {"anchor": {str(d): v.clone() for d, v in self._anchor.items()}}
        if self.asynchronous:
            return {**own, **super()._extra()}
        common = {n: {str(d): w.mine.clone() for d, w in of.items()} for n, of in self._common.items()}
        return {**own, "common": common, "clock": self._clock}

    def _load_extra(self, own: dict[str, Any]) -> None:
        for d, v in self._anchor.items():
            v.copy_(own["anchor"][str(d)])
        if self.asynchronous:
            super()._load_extra(own)
            return
        self._clock = own["clock"]
        for name, of in self._common.items():
            for d, w in of.items():
                a, b = share(self.fabric.world, 0, w.mine.numel())
                w.mine[a:b].copy_(own["common"][name][str(d)][a:b])

    def _free(self) -> None:
        super()._free()
        self._common, self._anchor = {}, {}

"""Elastic averaging SGD: the workers and a centre variable pull on each other."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch

from mpilsgd.exchange import (
    ROUND_COST,
    SHARE,
    Adaptive,
    Every,
    InTurn,
    Method,
    Together,
    Vector,
    choice,
    flag,
    number,
    pacing,
    thread_problem,
    whole,
)


class EASGD(Method):
    """Elastic averaging SGD; with `MSGD` as the worker's optimizer it is EAMSGD.

    Jacobi, at the steps t (from 0, before the step) that are multiples of tau; all right-hand sides at time t:

        x^i_{t+1} = x^i_t - eta g^i(x^i_t) - alpha (x^i_t - c_t)
        c_{t+1}   = (1 - beta) c_t + beta (1/p) sum_i x^i_t

    Gauss-Seidel, after the step that makes t a multiple of tau (the pull that opens the next period is done at once):

        c <- c + (beta/p) sum_i (x^i - c);    x^i <- x^i - alpha (x^i - c)

    DOWNPOUR is the Gauss-Seidel form with alpha = 1, beta = p. alpha below 0 may be optimal: thesis 5.1.3.

    `asynchronous`: each worker exchanges with the centre by its own clock, alone and in one piece, where the
    synchronous form exchanges with all (Algorithms 1 and 2): x <- x - alpha (x - c), c <- c + (beta/p) (x - c), both
    from the old values (Jacobi).

    `overlap`: synchronous, by the same equations; no worker waits for a round that takes less than a period, or for a
    worker that is less than a period behind. `metrics.rounds` counts those begun. One vector more a worker.
    Asynchronous, section 2.2: at the end of the period x <- x - alpha D, with D = x - c as it was at the start; two
    vectors more a worker.

    `period="adaptive"` (workers that meet): the shortest period at which exchanges take at most `share` of the time, by
    the seconds of the last rounds; it grows twofold a round at most. If the workers' distance to the centre, a step and
    relative to x, has grown in each of four rounds running, by a tenth or more, it is halved, and may grow again by a
    tenth a round.

    The centre is one copy a node; each rank works on its slice of it and of its node's workers, in one pass. It
    starts at the common start, or at the workers' mean with init="different". A worker found non-finite is set
    back to the centre.

    Source: thesis (2.3)-(2.6), Algorithms 1 and 2, (6.2)-(6.3).
    """

    center_rate: float = number(
        0.9, 0, help="beta: rate at which the centre moves to the mean of the workers"
    )
    moving_rate: float | None = number(
        None, -1, 2, help="alpha: rate at which a worker moves to the centre (null: center_rate / ranks)"
    )
    period: int | str = whole(
        10,
        word="adaptive",
        help="steps between exchanges; adaptive: as few as keep exchanges under a share of the time",
    )
    share: float = SHARE
    round_cost: float | None = ROUND_COST
    form: str = choice(
        "jacobi",
        "gauss-seidel",
        help="jacobi: workers and centre move at once; gauss-seidel: the centre moves first",
    )
    asynchronous: bool = flag(False, help="true: no worker waits for the others")
    overlap: bool = flag(
        False, help="go on computing while the exchange with the centre is under way (form jacobi)"
    )

    exchanges = {False: Together, True: InTurn}  # noqa: RUF012

    def declare(self) -> Iterable[str | None]:
        self.c = self.vector("c", per="all", start="mean")
        if self.moving_rate is None:
            self.moving_rate = self.center_rate / self.p
        yield pacing(self)
        if self.overlap and self.form == "gauss-seidel":
            yield 'overlap needs form="jacobi", not "gauss-seidel"'
        if self.overlap:
            yield thread_problem()

    def clock_of(self) -> Every:
        if isinstance(self.period, str):
            return Adaptive(self, first=self.form == "jacobi")
        return Every(self.period, first=self.form == "jacobi")

    def start(self, r: Any) -> None:
        if self.form == "gauss-seidel":  # the pull that opens the first period
            r.take(self.c, self.moving_rate)

    def exchange(self, r: Any) -> None:
        if self.adaptive:
            self.metrics.distance = self._distance()
        r.elastic(self.c, self.moving_rate, self.center_rate / self.p, self.form == "gauss-seidel")

    def _distance(self) -> float:
        """Of x to the centre."""
        parts = [(w.mine[: self.edge[d]], self.c[d][: self.edge[d]]) for d, w in self.x.items()]
        return math.hypot(*(float(torch.dist(x, c.to(x.dtype))) for x, c in parts))

    def shown_centre(self) -> Vector:
        return self.c

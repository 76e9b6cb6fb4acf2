"""DOWNPOUR: workers push what they moved into a centre, and go on from it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from mpilsgd.exchange import (
    Every,
    InTurn,
    Method,
    Together,
    Vector,
    anything,
    flag,
    number,
    number_problem,
    whole,
)


def _average_problem(name: str, value: Any) -> str | None:
    fits = value is None or value == "running" or not number_problem(name, value, 0, 1, above=True)
    return None if fits else f'{name} must be None, "running" or a rate in (0, 1], not {value!r}'


class Downpour(Method):
    """DOWNPOUR, with momentum (MDOWNPOUR) or averages of the centre (ADOWNPOUR, MVADOWNPOUR).

    After the step that makes t a multiple of tau, where a is what the worker last received and x - a = v what its
    steps, one gradient value each, have added since:

        c <- c + (x - a);    x <- c;    a <- c

    With momentum delta (tau = 1): u <- delta u + (x - a);  c <- c + u;  x <- c + delta u;  a <- x.
    Averages, on the centre's own clock k (its updates, from 0): z_0 = c_0, z_{k+1} = z_k + a_{k+1} (c_k - z_k).

    Synchronous all workers push at once, c <- c + sum_i (x^i - a), one tick of the clock: EASGD's Gauss-Seidel form
    with alpha = 1, beta = p.

    One vector more a worker (a) and the centre's, one each a node (asynchronous: in all). The worker's momentum,
    if its optimizer has one, stays its own. BatchNorm statistics move by the mean of the workers' moves, not by their
    sum. A worker found non-finite pushes nothing and goes on from the centre. With init="different" the centre starts
    at the workers' mean, and each worker goes on from it.

    Source: thesis, Algorithms 3 to 5 and the list of methods at the head of chapter 4.
    """

    period: int = whole(1, help="steps between exchanges")
    momentum: float = number(0.0, 0, 1, help="momentum of the centre, below 1; above 0 it needs period 1")
    average: str | float | None = anything(
        None,
        _average_problem,
        'None, "running" or a rate in (0, 1]',
        help="what center() shows: null (the centre), running (its mean over time) or the rate of a moving average",
    )
    asynchronous: bool = flag(True, help="true: workers push as they come; false: all at once")

    exchanges = {False: Together, True: InTurn}  # noqa: RUF012

    def declare(self) -> Iterable[str | None]:
        self.c = self.vector("c", per="all", start="mean")
        self.anchor = self.vector("anchor")
        self.u = self.vector("u", per="all") if self.momentum else None
        self.z = self.vector("z", per="all", start="mean", wide=True) if self.average is not None else None
        if self.momentum == 1:
            yield "momentum must be less than 1"
        if self.momentum and self.period > 1:
            yield f"momentum is the centre's and needs period=1, not {self.period}"

    def clock_of(self) -> Every:
        return Every(self.period)

    def start(self, r: Any) -> None:
        r.take(self.c)
        for d, a in self.anchor.items():  # what was received: between nodes c may be rounded
            a.copy_(self.x[d].mine[: len(a)])

    def exchange(self, r: Any) -> None:
        if self.z is not None:
            r.follow(self.z, self.c, 1.0 / (r.updates + 1) if self.average == "running" else self.average)
        r.push(self.c, self.anchor, self.u, self.momentum)

    def shown_centre(self) -> Vector:
        return self.c if self.z is None else self.z

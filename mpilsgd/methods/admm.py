"""ADMM: the alternating direction method of multipliers, one worker after the other or as they come."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from mpilsgd.exchange import REQUIRED, Every, InTurn, Method, Vector, flag, number


class ADMM(Method):
    """ADMM with the gradient step linearised, each worker with multipliers lambda^i (scaled by 1/rho).

    Every step of worker i, one exchange with the centre c:

        lambda <- lambda - (x - c)
        x' = (x - eta g(x) + eta rho (lambda + c)) / (1 + eta rho)
        c  <- c + ((x' - lambda) - (x - lambda_old)) / p,  so that c = (1/p) sum_i (x^i - lambda^i)

    The wrapped optimizer gives x - eta g(x); eta is its lr, one for all parameters. ADMM may be unstable where EASGD is
    not (thesis 3.3). Two vectors more a worker (lambda, and what x - lambda was when it last wrote) and one in all (c).
    BatchNorm statistics have no multipliers: c <- c + (x - c)/p, x <- c. A worker found non-finite writes nothing:
    x <- c and lambda <- x - (what it last wrote), so that c stays the mean.

    Source: thesis (3.51)-(3.54).
    """

    rho: float = number(REQUIRED, 0, above=True, help="penalty on the distance to the centre")
    asynchronous: bool = flag(
        False, help="false: the workers take turns, as the thesis has it; true: as they come"
    )

    exchanges = {False: InTurn, True: InTurn}  # noqa: RUF012

    def declare(self) -> Iterable[str | None]:
        self.c = self.vector("c", per="all", start="mean")
        self.multipliers = self.vector("multipliers")
        self.written = self.vector("written", start="x")  # x - lambda, as the centre knows it
        yield self._rate_problem()

    def _rate_problem(self) -> str | None:
        if any("lr" not in group for group in self.param_groups):
            return "the optimizer needs a learning rate lr: ADMM's eta"
        rates = {float(group["lr"]) for group in self.param_groups}
        return f"ADMM takes one lr for all parameters, not {sorted(rates)}" if len(rates) > 1 else None

    def clock_of(self) -> Every:
        return Every(1)

    def before_step(self) -> None:
        wrong = self._rate_problem()  # a schedule may have changed it
        if wrong is not None:
            raise ValueError(wrong)
        self.weight = float(self.param_groups[0]["lr"]) * self.rho
        self.keep_x()

    def exchange(self, r: Any) -> None:
        if not r.fit:
            r.copy(self.c)
            for x, multipliers, written in r.each(self.x, self.multipliers, self.written, broken=True):
                multipliers.copy_(x - written)
            return
        every = (self.x, self.before, self.multipliers, self.written, self.c)
        for y, x, multipliers, written, c in r.each(*every):
            multipliers.sub_(x).add_(c)
            y.add_(multipliers + c, alpha=self.weight).div_(1 + self.weight)
            now = y - multipliers
            c.add_(now - written, alpha=1 / self.p)
            written.copy_(now)
        r.statistics(self.c)

    def shown_centre(self) -> Vector:
        return self.c

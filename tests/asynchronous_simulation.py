"""The asynchronous methods in round-robin order, sequentially and in NumPy, written from the papers: the oracle.

Worker 0 takes its whole step, then worker 1, and so on; then t grows by one. A worker's step is, in this order: the
gradient at its point, `before_step`, its own optimizer, `after_step`. An exchange is one of the two.

Asynchronous LSGD in this order is the synchronous one: see `round_robin_lsgd` and `LSGD` in simulation.py.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from simulation import Matrix, Simulation

Vector = NDArray[np.float64]


class RoundRobin(Simulation):
    """Workers that take turns, and do not talk."""

    def step(self) -> None:
        for i in range(self.workers):
            self.x[i] = self.problem.visit(self.x[i], i, self.t)
            point = self.points()[i]
            loss, gradient = self.problem.gradient(point, i, self.t)
            self.loss = loss if self.losses is None else self.losses(i, self.t)
            self.before_step(i, self.t)
            self.x[i] += self._own_change(i, gradient + self.local.weight_decay * point)
            self.after_step(i, self.t + 1)
        self.t += 1

    def before_step(self, i: int, t: int) -> None:
        """Worker i has its gradient and t steps behind it."""

    def after_step(self, i: int, t: int) -> None:
        """Worker i has moved by its own optimizer; t counts that step, too."""

    def _own_change(self, i: int, gradient: Vector) -> Vector:
        local, rate = self.local, self.local.rate(self.t)
        if local.kind == "sgd":
            return -rate * gradient
        if local.kind == "momentum":
            self.v[i] = local.momentum * self.v[i] + gradient
            return -rate * (gradient + local.momentum * self.v[i] if local.nesterov else self.v[i])
        self.v[i] = local.momentum * self.v[i] - rate * gradient
        return self.v[i].copy()


class EASGD(RoundRobin):
    """Thesis, Algorithms 1 and 2; (3.55)-(3.56) at τ = 1; 2.2 (overlap); (6.2)-(6.3) one worker at a time.

    jacobi: when τ divides t, x ← x − α (x − c), c ← c + β/p (x − c), then the step with the gradient at the x before.
    overlap: x moves only at the period's end, by the difference that was taken at its beginning.
    gauss-seidel: a period is x ← x − α (x − c), then τ steps, then c ← c + β/p (x − c).
    """

    def __init__(
        self,
        *args: object,
        center_rate: float = 0.9,
        moving_rate: float | None = None,
        period: int = 10,
        form: str = "jacobi",
        overlap: bool = False,
        **options: object,
    ):
        super().__init__(*args, **options)  # type: ignore[arg-type]
        self.rate = center_rate / self.workers
        self.moving_rate = self.rate if moving_rate is None else moving_rate
        self.period, self.form, self.overlap = period, form, overlap
        self.c: Vector = self.x.mean(0)
        self.difference: Matrix = np.zeros_like(self.x)
        if form == "gauss-seidel":
            self.x = self.x - self.moving_rate * (self.x - self.c)

    def center(self) -> Vector:
        return self.c

    def before_step(self, i: int, t: int) -> None:
        if self.form == "jacobi" and t % self.period == 0:
            self.difference[i] = self.x[i] - self.c
            self.c = self.c + self.rate * self.difference[i]
            if not self.overlap:
                self.x[i] -= self.moving_rate * self.difference[i]

    def after_step(self, i: int, t: int) -> None:
        if t % self.period:
            return
        if self.form == "gauss-seidel":
            self.c = self.c + self.rate * (self.x[i] - self.c)
            self.x[i] -= self.moving_rate * (self.x[i] - self.c)
        elif self.overlap:
            self.x[i] -= self.moving_rate * self.difference[i]


class Downpour(RoundRobin):
    """Thesis, Algorithm 3 (DOWNPOUR), 4 and 5 (MDOWNPOUR), and the averages of the centre on the master's clock.

    After every τ steps a worker's accumulated change u is added, v ← δv + u, c ← c + v, and c + δv is what it goes on
    from; not asynchronous: the sum of all u is, and all receive. c starts at the mean.
    average: z ← z + a_k (c_k − z) at push k (from 0), with the centre before it; a_k = 1/(k+1) ("running": ADOWNPOUR)
    or a constant (MVADOWNPOUR).
    statistics: so many last values are no parameters but BatchNorm statistics: the mean of what p workers add, no δ.
    """

    def __init__(
        self,
        *args: object,
        period: int = 1,
        momentum: float = 0.0,
        average: str | float | None = None,
        asynchronous: bool = True,
        statistics: int = 0,
        **options: object,
    ):
        super().__init__(*args, **options)  # type: ignore[arg-type]
        self.period, self.average, self.asynchronous = period, average, asynchronous
        parameters = np.arange(self.x.shape[1]) < self.x.shape[1] - statistics
        self.momentum = momentum * parameters
        self.weights = np.where(parameters, 1.0, 1 / self.workers)
        self.c: Vector = self.x.mean(0)
        self.velocity: Vector = np.zeros_like(self.c)
        self.z: Vector = self.c
        self.k = 0
        self.x = np.stack([self.c] * self.workers)
        self.received: Matrix = self.x.copy()

    def center(self) -> Vector:
        return self.c if self.average is None else self.z

    def unpushed(self) -> Matrix:
        return self.x - self.received

    def after_step(self, i: int, t: int) -> None:
        if t % self.period:
            return
        if self.asynchronous:
            self._push(self.unpushed()[i], [i])
        elif i == self.workers - 1:
            self._push(self.wire.total(self.unpushed(), "c"), range(self.workers))

    def _push(self, change: Vector, receivers: Sequence[int]) -> None:
        if self.average is not None:
            rate = 1 / (self.k + 1) if self.average == "running" else float(self.average)
            self.z = self.z + rate * (self.c - self.z)
        self.k += 1
        self.velocity = self.momentum * self.velocity + self.weights * change
        self.c = self.c + self.velocity
        for i in receivers:
            self.x[i] = self.received[i] = self.c + self.momentum * self.velocity


class DiLoCo(RoundRobin):
    """Asynchronous Local SGD, Algorithm 3 with c = 0 (delayed Nesterov), one worker at a time.

    g = a - x; s ← s + g; c ← c - lr g/p; at every p-th arrival u ← μu + s/p, c ← c - lr μu, s ← 0; x, a ← c.
    statistics: so many last values are BatchNorm statistics: c ← c + (x - c)/p, x ← c.
    """

    def __init__(
        self,
        *args: object,
        outer_lr: float = 0.7,
        outer_momentum: float = 0.9,
        period: int = 100,
        statistics: int = 0,
        **options: object,
    ):
        super().__init__(*args, **options)  # type: ignore[arg-type]
        self.lr, self.momentum, self.period = outer_lr, outer_momentum, period
        self.parameters = np.arange(self.x.shape[1]) < self.x.shape[1] - statistics
        self.c: Vector = self.x.mean(0)
        self.x = np.stack([self.c] * self.workers)
        self.received, self.arrivals = self.x.copy(), 0
        self.s, self.u = np.zeros_like(self.c), np.zeros_like(self.c)

    def center(self) -> Vector:
        return self.c

    def after_step(self, i: int, t: int) -> None:
        if t % self.period:
            return
        g = self.received[i] - self.x[i]
        self.s = self.s + g
        c, self.arrivals = self.c - self.lr * g / self.workers, self.arrivals + 1
        if self.arrivals % self.workers == 0:
            self.u = self.momentum * self.u + self.s / self.workers
            c, self.s = c - self.lr * self.momentum * self.u, np.zeros_like(self.s)
        self.c = np.where(self.parameters, c, self.c + (self.x[i] - self.c) / self.workers)
        self.x[i] = self.received[i] = self.c


class ADMM(RoundRobin):
    """Thesis (3.52)-(3.54), λ divided by ρ; y is where the worker's own step leads (x − η g).

    λ ← λ − (x − c); x ← (y + ηρ (λ + c))/(1 + ηρ), c ← mean of all x − λ.
    statistics: so many last values are BatchNorm statistics, without λ: c ← c + (x − c)/p, x ← c.
    """

    def __init__(self, *args: object, rho: float, statistics: int = 0, **options: object):
        super().__init__(*args, **options)  # type: ignore[arg-type]
        self.rho = rho
        self.parameters = np.arange(self.x.shape[1]) < self.x.shape[1] - statistics
        self.dual: Matrix = np.zeros_like(self.x)
        self.c: Vector = self.x.mean(0)

    def center(self) -> Vector:
        return self.c

    def before_step(self, i: int, t: int) -> None:
        self.dual[i] -= np.where(self.parameters, self.x[i] - self.c, 0)

    def after_step(self, i: int, t: int) -> None:
        step = self.local.rate(t - 1) * self.rho
        moved = (self.x[i] + step * (self.dual[i] + self.c)) / (1 + step)
        statistics = self.c + (self.x[i] - self.c) / self.workers
        self.x[i] = np.where(self.parameters, moved, statistics)
        self.c = np.where(self.parameters, (self.x - self.dual).mean(0), statistics)


class WaitFreeLSGD(RoundRobin):
    """Leader SGD toward what the others have published: no paper's.

    When τ or τ_G divides t after its step, a worker publishes its score and its x, and is pulled to the best published
    x of its group (τ) and of all (τ_G), both by the simultaneous update of `LSGD`. Ties go to the lowest rank.
    """

    def __init__(
        self,
        *args: object,
        groups: Sequence[Sequence[int]],
        pull: float = 0.1,
        global_pull: float | None = None,
        period: int = 64,
        global_period: int | None = None,
        loss_window: int = 10,
        sequential: bool = False,
        score: Callable[[int, Vector], float] | None = None,
        **options: object,
    ):
        super().__init__(*args, **options)  # type: ignore[arg-type]
        self.groups = [list(group) for group in groups]
        self.pull = pull
        self.global_pull = pull if global_pull is None else global_pull
        self.period = period
        self.global_period = 2 * period if global_period is None else global_period
        self.sequential, self.score = sequential, score
        self.windows: list[deque[float]] = [deque(maxlen=loss_window) for _ in range(self.workers)]
        self.published: dict[int, tuple[float, Matrix]] = {}  # as each worker sees it

    def before_step(self, i: int, t: int) -> None:
        self.windows[i].append(self.loss)

    def after_step(self, i: int, t: int) -> None:
        due, due_global = t % self.period == 0, t % self.global_period == 0
        if not (due or due_global):
            return
        x = self.x[i].copy()
        score = self.score(i, x) if self.score else sum(self.windows[i]) / len(self.windows[i])
        self.published[i] = score, self.wire.published(x, i, self.workers)
        if due:
            self.x[i] -= self.pull * (x - self._best(i, next(g for g in self.groups if i in g), x))
        if due_global:
            base = self.x[i] if self.sequential else x
            self.x[i] -= self.global_pull * (base - self._best(i, range(self.workers), base))

    def _best(self, i: int, members: Sequence[int], otherwise: Vector) -> Vector:
        """The best published x; `otherwise`, so that the pull is zero, if there is none."""
        scores = [(self.published[j][0], j) for j in members if j in self.published]
        finite = [(score, j) for score, j in scores if math.isfinite(score)]
        return self.published[min(finite)[1]][1][i] if finite else otherwise

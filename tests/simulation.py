"""Every synchronous method again, sequentially and in NumPy, written from the papers: the oracle of the tests.

All workers stand in one array, x[i] is worker i's iterate. A step is, in this order:

1. every worker takes loss and gradient at its point (the look-ahead x + δv for Nesterov momentum, else x);
2. `before` gives what the exchange adds, from time-t values (EASGD's Jacobi form; LSGD with the step);
3. the workers' own optimizers move x, then the exchange's terms are added; t grows by one;
4. `after` exchanges from the new values (LSGD's Algorithm 1, local SGD, EASGD's Gauss-Seidel form).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from problems import Problem

Matrix = NDArray[np.float64]
Losses = Callable[[int, int], float]  # (worker, t) -> the loss it reports


@dataclass(frozen=True)
class Local:
    """A worker's own optimizer.

    kind: "sgd"; "momentum", as torch has it (buffer ← δ buffer + g, x ← x − η buffer; nesterov: x ← x − η (g + δ
    buffer)); "msgd", the thesis' (v ← δv − ηg, x ← x + v; nesterov: g at x + δv (2.5), else at x (2.6)).
    lr: η, a number or a function of t. weight_decay: w in g ← g + w·(the point where the gradient is taken).
    """

    kind: str = "sgd"
    lr: float | Callable[[int], float] = 0.1
    momentum: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0

    def rate(self, t: int) -> float:
        return self.lr(t) if callable(self.lr) else self.lr

    def lookahead(self) -> float:
        """How much of v lies between the iterate and the point of the gradient."""
        return self.momentum if self.kind == "msgd" and self.nesterov else 0.0


class Exact:
    """What crosses between nodes comes as it is. Rows are the workers'."""

    def total(self, rows: Matrix, name: str, about: NDArray[np.float64] | None = None) -> NDArray[np.float64]:
        """The sum of differences; about: of vectors, which all know to be near it."""
        total: NDArray[np.float64] = rows.sum(0)
        return total

    def mean(self, rows: Matrix) -> NDArray[np.float64]:
        """Of vectors that are near the last mean."""
        mean: NDArray[np.float64] = rows.mean(0)
        return mean

    def leader(self, rows: Matrix, i: int, name: str) -> Matrix:
        """What each worker sees of worker i's vector."""
        return np.stack([rows[i]] * len(rows))

    def published(self, x: NDArray[np.float64], i: int, workers: int) -> Matrix:
        """What each worker sees of the vector that worker i publishes."""
        return np.stack([x] * workers)


class Simulation:
    """Workers that do not talk: x ← x − η g, each for itself."""

    def __init__(
        self, problem: Problem, workers: int, local: Local, *, same: bool = True, losses: Losses | None = None
    ):
        self.problem = problem
        self.local = local
        self.workers = workers
        self.wire = Exact()
        self.losses = losses
        self.x: Matrix = np.stack([problem.start(0 if same else i) for i in range(workers)])
        self.v: Matrix = np.zeros_like(self.x)
        self.t = 0

    def points(self) -> Matrix:
        """What the models hold, and where the gradients are taken."""
        return self.x + self.local.lookahead() * self.v

    def center(self) -> NDArray[np.float64]:
        """The mean of all workers."""
        return self.x.mean(0)

    def run(self, steps: int) -> Simulation:
        for _ in range(steps):
            self.step()
        return self

    def step(self) -> None:
        self.x = np.stack([self.problem.visit(x, i, self.t) for i, x in enumerate(self.x)])
        points = self.points()
        results = [self.problem.gradient(point, i, self.t) for i, point in enumerate(points)]
        losses = [loss for loss, _ in results]
        if self.losses is not None:
            losses = [self.losses(i, self.t) for i in range(self.workers)]
        raw = np.stack([gradient for _, gradient in results])
        gradients = self.gradients(raw) + self.local.weight_decay * points
        terms = self.before(losses)
        moved = self._own_step(gradients)
        moving = self.moving(raw)
        self.x = np.where(moving[:, None], moved, self.x) + terms
        self.t += 1
        self.after(losses)

    def gradients(self, gradients: Matrix) -> Matrix:
        return gradients

    def moving(self, gradients: Matrix) -> NDArray[np.bool_]:
        """Which workers take their own step."""
        return np.ones(self.workers, dtype=bool)

    def before(self, losses: Sequence[float]) -> Matrix:
        return np.zeros_like(self.x)

    def after(self, losses: Sequence[float]) -> None:
        pass

    def _own_step(self, gradients: Matrix) -> Matrix:
        local, rate = self.local, self.local.rate(self.t)
        if local.kind == "sgd":
            return self.x - rate * gradients
        if local.kind == "momentum":
            self.v = gradients.copy() if self.t == 0 else local.momentum * self.v + gradients
            direction = gradients + local.momentum * self.v if local.nesterov else self.v
            return self.x - rate * direction
        self.v = local.momentum * self.v - rate * gradients
        return self.x + self.v


class AllreduceSGD(Simulation):
    """Mini-batch SGD: every worker's step uses the mean gradient."""

    def gradients(self, gradients: Matrix) -> Matrix:
        return np.broadcast_to(self.wire.total(gradients, "g") / self.workers, gradients.shape)


def in_fragment(problem: Problem, size: int, buffers: int, k: int, fragments: int) -> NDArray[np.bool_]:
    """Which values the k-th fragment has: equal parts of the flat vector, in which tensors begin at cache lines."""
    at, places = 0, [np.arange(0)]
    for shape in problem.shapes:
        numel = math.prod(shape)
        if sum(map(len, places)) + numel > size - buffers:
            break
        places.append(at + np.arange(numel))
        at += -(-numel // 8) * 8
    place = np.concatenate(places)
    mask = (at * k // fragments <= place) & (place < at * (k + 1) // fragments)
    return np.concatenate([mask, np.full(size - len(mask), k == fragments - 1)])  # buffers go with the last


class DiLoCo(Simulation):
    """DiLoCo, Algorithm 1, with torch's Nesterov momentum as the outer optimizer; fragments: see Streaming DiLoCo.

    g = c - mean x; u ← μu + g; c ← c - lr (g + μu); x ← m x + (1 - m) c, of a fragment every period/P steps.
    overlap: x takes c over so many steps later.
    statistics: so many last values are no parameters but BatchNorm statistics: their mean.
    """

    def __init__(
        self,
        *args: object,
        outer_lr: float = 0.7,
        outer_momentum: float = 0.9,
        outer: object = None,
        period: int = 100,
        fragments: int = 1,
        mixing: float = 0.0,
        overlap: int = 0,
        statistics: int = 0,
        **options: object,
    ):
        super().__init__(*args, **options)  # type: ignore[arg-type]
        self.lr, self.momentum, self.period, self.mixing = outer_lr, outer_momentum, period, mixing
        self.fragments, self.parameters = fragments, self.x.shape[1] - statistics
        self.c = self.x.mean(0)
        self.u = np.zeros_like(self.c)
        self.x = np.stack([self.c] * self.workers)
        self.overlap, self.landing = overlap, {}

    def center(self) -> NDArray[np.float64]:
        return self.c

    def after(self, losses: Sequence[float]) -> None:
        if self.t in self.landing:
            self._land(self.landing.pop(self.t))
        k, odd = divmod(self.t * self.fragments, self.period)
        if odd:
            return
        mask = in_fragment(
            self.problem, len(self.c), len(self.c) - self.parameters, (k - 1) % self.fragments, self.fragments
        )
        numbers = np.arange(len(self.c)) < self.parameters
        mean = self.wire.total(self.x, f"x {k % self.fragments}", self.c) / self.workers
        g = self.c - mean
        u = self.momentum * self.u + g
        c = np.where(numbers, self.c - self.lr * (g + self.momentum * u), mean)
        self.u, self.c = np.where(mask, u, self.u), np.where(mask, c, self.c)
        if self.overlap:
            self.landing[self.t + self.overlap] = mask
        else:
            self._land(mask)

    def _land(self, mask: NDArray[np.bool_]) -> None:
        numbers = np.arange(len(self.c)) < self.parameters
        mixed = np.where(numbers, self.mixing * self.x + (1 - self.mixing) * self.c, self.c)
        self.x = np.where(mask, mixed, self.x)


class LocalSGD(Simulation):
    """Stich, Algorithm 1, and Zhang & Li, Algorithm 1: x ← mean of all x after the steps of `period`.

    period: every so many steps; a set of step numbers t+1; a callable of t+1; None: never.
    until_grad_norm: a worker whose ‖g‖² is not above it takes no step more; when this is so of all, they average.
    a: with a number, the centre is Σ_t w_t mean_i x_t^i / Σ_t w_t over t = 0 … T−1, w_t = (a + t)².
    """

    def __init__(
        self,
        *args: object,
        period: int | Collection[int] | Callable[[int], bool] | None = None,
        until_grad_norm: float | None = None,
        a: float | None = None,
        **options: object,
    ):
        super().__init__(*args, **options)  # type: ignore[arg-type]
        self.period = period
        self.until_grad_norm = until_grad_norm
        self.a = a
        self.sum = np.zeros_like(self.x[0])
        self.weight = 0.0
        self.rounds = 0
        self.waiting = np.zeros(self.workers, dtype=bool)

    def center(self) -> NDArray[np.float64]:
        return self.x.mean(0) if self.a is None or self.weight == 0 else self.sum / self.weight

    def moving(self, gradients: Matrix) -> NDArray[np.bool_]:
        if self.until_grad_norm is not None:
            self.waiting |= (gradients**2).sum(1) <= self.until_grad_norm
        return ~self.waiting

    def before(self, losses: Sequence[float]) -> Matrix:
        if self.a is not None:
            weight = (self.a + self.t) ** 2
            self.sum = self.sum + weight * self.x.mean(0)
            self.weight += weight
        return np.zeros_like(self.x)

    def due(self) -> bool:
        if self.until_grad_norm is not None:
            return bool(self.waiting.all())
        if self.period is None:
            return False
        if callable(self.period):
            return self.period(self.t)
        if isinstance(self.period, int):
            return self.t % self.period == 0
        return self.t in self.period

    def after(self, losses: Sequence[float]) -> None:
        if self.due():
            self.x = np.broadcast_to(self.wire.mean(self.x), self.x.shape).copy()
            self.waiting[:] = False
            self.rounds += 1


class LSGD(Simulation):
    """Leader SGD: Algorithm 1 ("after_step"), §3.1.2 ("with_step") and Eq. 3 with a stale leader ("every_step").

    x ← x − λ (x − x̃) − λ_G (x − x̂): x̃ is the best worker of the group, x̂ the best of all, by the mean of the
    last `loss_window` losses; ties go to the lowest rank, and who has a non-finite mean never leads. Where both are
    due they are one simultaneous update; sequential: first the local pull, then the global, as Algorithm 1 prints it.
    score: (worker, its x) -> number, in place of the loss window. `elections` holds (t, local leaders, global leader).
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
        when: str = "after_step",
        sequential: bool = False,
        score: Callable[[int, NDArray[np.float64]], float] | None = None,
        **options: object,
    ):
        super().__init__(*args, **options)  # type: ignore[arg-type]
        self.groups = [list(group) for group in groups]
        self.pull = pull
        self.global_pull = pull if global_pull is None else global_pull
        self.period = period
        self.global_period = 2 * period if global_period is None else global_period
        self.when = when
        self.sequential = sequential
        self.score = score
        self.windows: list[deque[float]] = [deque(maxlen=loss_window) for _ in range(self.workers)]
        self.local_leader: list[Matrix | None] = [None] * len(self.groups)
        self.global_leader: Matrix | None = None  # as each worker sees it
        self.elections: list[tuple[int, list[int | None] | None, int | None]] = []

    def _elect(self, members: Sequence[int]) -> int | None:
        best: tuple[float, int] | None = None
        for i in sorted(members):
            value = self.score(i, self.x[i]) if self.score else sum(self.windows[i]) / len(self.windows[i])
            if math.isfinite(value) and (best is None or value < best[0]):
                best = (value, i)
        return None if best is None else best[1]

    def _round(self, clock: int) -> tuple[bool, bool]:
        """Elect the leaders that are due at `clock` and copy them; which of the two were due."""
        due, due_global = clock % self.period == 0, clock % self.global_period == 0
        local: list[int | None] | None = None
        best: int | None = None
        if due_global:
            best = self._elect(range(self.workers))
            self.global_leader = None if best is None else self.wire.leader(self.x, best, "far")
        if due:
            local = [self._elect(group) for group in self.groups]
            if len(local) == 1 and due_global and self.when != "every_step":  # one leader, which comes once
                self.local_leader = [self.global_leader]
            else:
                self.local_leader = [
                    None if i is None else self.wire.leader(self.x, i, f"near {j}")
                    for j, i in enumerate(local)
                ]
        if due or due_global:
            self.elections.append((clock, local, best))
        return due, due_global

    def _terms(self, with_local: bool, with_global: bool) -> Matrix:
        total = np.zeros_like(self.x)
        for group, leader in zip(self.groups, self.local_leader, strict=True):
            for i in group:
                pull = np.zeros_like(self.x[i])
                if with_local and leader is not None:
                    pull = -self.pull * (self.x[i] - leader[i])
                if with_global and self.global_leader is not None:
                    # Sequential: x' = x + pull, then x'' = x' − λ_G (x' − x̂).
                    base = self.x[i] + pull if self.sequential else self.x[i]
                    pull = pull - self.global_pull * (base - self.global_leader[i])
                total[i] = pull
        return total

    def before(self, losses: Sequence[float]) -> Matrix:
        for window, loss in zip(self.windows, losses, strict=True):
            window.append(loss)
        if self.when == "after_step":
            return np.zeros_like(self.x)
        due = self._round(self.t)
        return self._terms(True, True) if self.when == "every_step" else self._terms(*due)

    def after(self, losses: Sequence[float]) -> None:
        if self.when == "after_step":
            self.x = self.x + self._terms(*self._round(self.t))


class EASGD(Simulation):
    """Synchronous elastic averaging, (2.3)-(2.4) at the steps with t = 0 mod τ, or the Gauss-Seidel form (6.3).

    jacobi: x_{t+1} = step(x_t) − α (x_t − c_t), c_{t+1} = c_t + β/p Σ (x_t − c_t), time-t values on the right.
    gauss-seidel: a period is x ← x − α (x − c), then τ steps, then c ← c + β/p Σ (x − c).
    The centre starts at the workers' mean (which is their common start where they have one).
    """

    def __init__(
        self,
        *args: object,
        center_rate: float = 0.9,
        moving_rate: float | None = None,
        period: int = 10,
        form: str = "jacobi",
        **options: object,
    ):
        super().__init__(*args, **options)  # type: ignore[arg-type]
        self.center_rate = center_rate
        self.moving_rate = center_rate / self.workers if moving_rate is None else moving_rate
        self.period = period
        self.form = form
        self.c: NDArray[np.float64] = self.x.mean(0)
        if form == "gauss-seidel":
            self.x = self.x - self.moving_rate * (self.x - self.c)

    def center(self) -> NDArray[np.float64]:
        return self.c

    def before(self, losses: Sequence[float]) -> Matrix:
        if self.form != "jacobi" or self.t % self.period:
            return np.zeros_like(self.x)
        difference = self.x - self.c
        self.c = self.c + self.center_rate / self.workers * self.wire.total(difference, "c")
        return -self.moving_rate * difference

    def after(self, losses: Sequence[float]) -> None:
        if self.form == "gauss-seidel" and self.t % self.period == 0:
            self.c = self.c + self.center_rate / self.workers * self.wire.total(self.x - self.c, "c")
            self.x = self.x - self.moving_rate * (self.x - self.c)


def round_robin_lsgd(
    problem: Problem,
    groups: Sequence[Sequence[int]],
    rate: float,
    pulls: tuple[float, float],
    periods: tuple[int, int],
    steps: int,
) -> Matrix:
    """Algorithm 1 as it is printed (nlτ for nmτ): one worker after another, a round when n·l·τ divides Σ t."""
    workers = sum(len(group) for group in groups)
    x = np.stack([problem.start(0)] * workers)
    clocks = [0] * workers
    last = [math.inf] * workers
    for turn in range(workers * steps):
        i = turn % workers
        last[i], gradient = problem.gradient(x[i], i, clocks[i])
        x[i] = x[i] - rate * gradient
        clocks[i] += 1
        total = sum(clocks)
        if total % (workers * periods[0]) == 0:
            for group in groups:
                leader = x[min(group, key=lambda j: last[j])].copy()
                x[list(group)] -= pulls[0] * (x[list(group)] - leader)
        if total % (workers * periods[1]) == 0:
            leader = x[min(range(workers), key=lambda j: last[j])].copy()
            x -= pulls[1] * (x - leader)
    return x

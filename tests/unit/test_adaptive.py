"""Periods that follow what is measured: the fit, LocalSGD against a sequential controller, shares, resumed runs."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from mpilsgd import EASGD, LSGD, LocalSGD, Topology, in_process
from mpilsgd.exchange.adaptive import START, Adaptive, points
from mpilsgd.exchange.decay import Decay, best_period, fitted

P = 4
Array = np.ndarray


class Degenerate:
    """Least squares, or least fourth powers, whose optimal sets meet: few rows a worker, of many dimensions."""

    def __init__(self, power: int, workers: int = P, rows: int = 6, dimensions: int = 48):
        random = np.random.default_rng(3)
        scales = np.geomspace(1, 0.15, rows)[:, None]
        self.power = power
        self.a = [np.linalg.qr(random.normal(size=(dimensions, rows)))[0].T * scales for _ in range(workers)]
        goal = random.normal(size=dimensions)
        self.b = [a @ goal for a in self.a]
        self.every_a, self.every_b = np.stack(self.a), np.stack(self.b)
        self.lr = 0.7 if power == 2 else 0.07
        self.start = np.zeros(dimensions)

    def gradient(self, i: int, x: Array) -> Array:
        error = self.a[i] @ x - self.b[i]
        return self.a[i].T @ error ** (self.power - 1)

    def square(self, x: Array) -> float:
        """|grad f|^2 of the mean of all."""
        mean = sum(self.gradient(i, x) for i in range(len(self.a))) / len(self.a)
        return float(np.square(mean).sum())


def a_round(problem: Degenerate, x: Array, period: int) -> tuple[Array, Array]:
    """The mean after so many local steps, and the mean of the workers' |grad f_i|^2 at each of them."""
    squares, x = np.zeros(period), np.tile(x, (len(problem.a), 1))
    for t in range(period):
        error = np.einsum("ird,id->ir", problem.every_a, x) - problem.every_b
        g = np.einsum("ird,ir->id", problem.every_a, error ** (problem.power - 1))
        squares[t] = np.square(g).sum() / len(problem.a)
        x = x - problem.lr * g
    return x.mean(0), squares


def oracle_best(at: Array, squares: Array, cost: float, longest: float) -> float:
    """The period of least cost by a search, of the better one of two fits by polyfit."""

    def line(x: Array) -> tuple[float, float]:
        (slope, _), (error,), *_ = np.polyfit(x, np.log(squares), 1, full=True)
        return -slope, error

    rate, error = line(at)
    fits = [(*line(np.log1p(a * at)), a) for a in np.logspace(-6, 3, 109)]
    power, least, a = min(fits, key=lambda fit: fit[1])
    low, high = 1.0, longest
    for _ in range(6):
        t = np.linspace(low, high, 2001)
        if least < 0.9 * error and power > 1.01 and len(at) >= 4:
            sums = 1 - (1 + a * t) ** (1 - power)
        else:
            sums = -np.expm1(-rate * t)
        k = int(np.argmin((cost + t) / sums))
        low, high = t[max(k - 1, 0)], t[min(k + 1, 2000)]
    return (low + high) / 2


def simulated(problem: Degenerate, cost: float, steps: int) -> tuple[Array, list[list[int]]]:
    """The controller, sequentially: x after a number of steps, and the periods."""
    x, t, wanted, period, periods = problem.start, 0, float(START), START, [[0, START]]
    while t + period <= steps:
        x, squares = a_round(problem, x, period)
        t += period
        at = points(period)
        best = oracle_best(at.astype(float), squares[at], cost, 9 * cost)
        wanted = math.sqrt(wanted * min(best, 4 * period))
        before, period = period, max(1, round(wanted))
        if period != before:
            periods.append([t, period])
    return x, periods


class Worker:
    """A worker of a problem under a method."""

    def __init__(
        self, problem: Degenerate, method: Any = LocalSGD, groups: int | None = None, **options: Any
    ):
        self.topology = Topology(group_size=groups)
        self.rank, self.problem = self.topology.world.rank, problem
        self.x = torch.nn.Parameter(torch.tensor(problem.start))
        self.opt = method(
            torch.optim.SGD([self.x], lr=problem.lr), self.topology, period="adaptive", **options
        )

    def step(self, count: int = 1) -> Worker:
        for _ in range(count):
            own = self.x.detach().numpy()
            self.x.grad = torch.tensor(self.problem.gradient(self.rank, own))
            self.opt.step(loss=float(np.square(own).sum()))
        return self


@pytest.mark.parametrize(
    "decay", [Decay(0.3), Decay(0.002), Decay(3.0, 0.1), Decay(1.7, 10.0), Decay(2.4, 0.01)], ids=str
)
def test_a_decay_is_found(decay: Decay) -> None:
    t = np.arange(24.0) * 3
    h = (1 + decay.scale * t) ** -decay.rate if decay.scale else np.exp(-decay.rate * t)
    found = fitted(t, 7 * h)
    assert bool(found.scale) == bool(decay.scale)
    assert found.rate == pytest.approx(decay.rate, rel=0.2)
    for cost in (3.0, 300.0):
        assert best_period(found, cost, 1e6) == pytest.approx(oracle_best(t, 7 * h, cost, 1e4), rel=0.02)


def test_noise_is_no_decay() -> None:
    periods = []
    for seed in range(20):
        squares = np.random.default_rng(seed).gamma(4.0, size=24)
        periods.append(best_period(fitted(np.arange(24.0), squares), 10.0, 190.0))
    assert np.mean(np.array(periods) == 190) >= 0.8
    rising = fitted(np.arange(24.0), np.exp(np.arange(24.0)))
    assert rising.rate == 0 and best_period(rising, 10.0, 190.0) == 190


@pytest.mark.parametrize("power", [2, 4])
@pytest.mark.parametrize("nodes", [1, 2])
def test_equals_the_sequential_controller(power: int, nodes: int) -> None:
    problem, steps = Degenerate(power), 250

    def worker() -> tuple[Array, list[list[int]], int]:
        w = Worker(problem, round_cost=40.0).step(steps)
        with w.opt.center():
            return w.x.detach().numpy().copy(), w.opt.metrics.periods, w.opt.metrics.rounds

    x, periods = simulated(problem, 40.0, steps)
    results = in_process(worker, P, nodes=nodes)
    assert len(periods) > 3
    for _, told, rounds in results:
        assert told == periods and rounds >= len(periods) - 1
    end = periods[-1]
    while end[0] + end[1] <= steps:
        end = [sum(end), end[1]]
    assert end[0] <= steps
    if end[0] == steps:
        assert abs(results[0][0] - x).max() < 1e-12


@pytest.mark.parametrize(("power", "cost"), [(2, 3.0), (2, 30.0), (4, 3.0), (4, 10.0)])
def test_costs_little_more_than_the_best_fixed_period(power: int, cost: float) -> None:
    """The sum of C_c a round and C_g a step until |grad f|^2 is a 100th of what it was."""
    problem = Degenerate(power)
    goal = 1e-2 * problem.square(problem.start)

    def fixed(period: int, most: float) -> float:
        x, spent = problem.start, 0.0
        while problem.square(x) > goal and spent < most:
            x, _ = a_round(problem, x, period)
            spent += cost + period
        return spent

    def worker() -> float:
        w = Worker(problem, round_cost=cost)
        metrics = w.opt.metrics
        while True:
            rounds = metrics.rounds
            while metrics.rounds == rounds:
                w.step()
            if problem.square(w.x.detach().numpy()) <= goal:
                return cost * metrics.rounds + w.opt.t

    spent = in_process(worker, P)
    best = math.inf
    for period in np.unique(np.geomspace(1, 100, 12).astype(int)):
        best = min(best, fixed(int(period), min(best, 1e5)))
    assert max(spent) == min(spent) <= 1.15 * best


METHODS: dict[str, tuple[Any, dict[str, Any]]] = {
    "LocalSGD": (LocalSGD, {}),
    "LocalSGD-quadratic": (LocalSGD, {"average": "quadratic", "a": 3.0}),
    "EASGD": (EASGD, {}),
    "EASGD-gauss-seidel": (EASGD, {"form": "gauss-seidel"}),
    "LSGD": (LSGD, {"groups": 2}),
    "LSGD-with-step": (LSGD, {"groups": 2, "when": "with_step", "global_period": 3}),
    "LSGD-every-step": (LSGD, {"when": "every_step"}),
}
by_method = pytest.mark.parametrize("name", METHODS)


@by_method
def test_one_period_for_all(name: str) -> None:
    """By measured times, also where some run out of data and rest in the others' rounds."""
    method, options = METHODS[name]

    def worker() -> list[Any]:
        w = Worker(Degenerate(2), method, **options)
        told = []
        for leg in range(3):
            w.step(30 + 10 * ((w.rank + leg) % P))
            with w.opt.center():
                told.append((w.opt.t, w.opt.clock.period, w.opt.pace["last"], w.opt.metrics.periods[-3:]))
        assert w.opt.metrics.period == w.opt.clock.period > 0
        return told

    told = in_process(worker, P, nodes=2, seed=len(name))
    assert all(other == told[0] for other in told[1:])


@by_method
def test_goes_on_from_its_state(name: str) -> None:
    """Bit for bit, where the costs are given."""
    method, options = METHODS[name]
    saved: dict[int, Any] = {}

    def run(first: int, then: int, again: bool) -> Any:
        def worker() -> Any:
            w = Worker(Degenerate(4), method, round_cost=20.0, **options)
            if again:
                w.opt.load_state_dict(saved[w.rank][0])
                w.x.data.copy_(saved[w.rank][1])
            w.step(first)
            if then:
                saved[w.rank] = w.opt.state_dict(), w.x.detach().clone()
                w.step(then)
            return w.x.detach().numpy().copy(), w.opt.metrics.periods, w.opt.metrics.rounds

        return in_process(worker, P)

    whole, rest = run(61, 60, False), run(60, 0, True)
    for (x, periods, rounds), (y, others, count) in zip(whole, rest, strict=True):
        assert (x == y).all() and periods == others and rounds == count


@pytest.mark.parametrize("name", ["EASGD", "EASGD-gauss-seidel", "LSGD"])
def test_a_share_of_the_time(name: str) -> None:
    method, options = METHODS[name]

    def worker() -> tuple[int, int]:
        w = Worker(Degenerate(2), method, round_cost=10.0, share=0.2, **options).step(300)
        return w.opt.clock.period, w.opt.metrics.rounds

    periods = in_process(worker, P)
    assert {period for period, _ in periods} == {40}


def test_a_period_at_most_doubles_and_ends_where_rounds_take_a_tenth() -> None:
    """Of gradients that do not decay."""

    def worker() -> list[int]:
        topology = Topology()
        x = torch.nn.Parameter(torch.zeros(3))
        opt = LocalSGD(torch.optim.SGD([x], lr=0.1), topology, period="adaptive", round_cost=10.0)
        x.grad = torch.ones(3)
        for _ in range(1200):
            opt.step()
        return [period for _, period in opt.metrics.periods]

    for periods in in_process(worker, P):
        assert periods[:4] == [8, 16, 32, 54]
        assert periods == sorted(periods) and 85 <= periods[-1] <= 90  # 10 steps of 100


def test_workers_that_go_apart_meet_more_often() -> None:
    class Kept:
        pace = Adaptive.fresh()
        round_cost, share = 1000.0, 0.05

    clock, periods = Adaptive(Kept()), []  # type: ignore[arg-type]
    for k in range(20):
        row = np.array([[1.0, 1.0, 0.1 * 1.2**k * clock.period]])
        wanted, limit = clock._decided(row, clock.period)
        Kept.pace.update(wanted=wanted, limit=limit, period=max(1, round(min(wanted, limit))))
        periods.append(clock.period)
    assert periods[:4] == [16, 32, 64, 128] and periods[4] == 64 and min(periods[5:]) < 32


def test_wrong_settings() -> None:
    wrong: list[tuple[Any, dict[str, Any], str]] = [
        (LocalSGD, {"period": "never"}, r"a callable, 'adaptive' or None, not 'never'"),
        (EASGD, {"period": "adaptiv"}, "a whole number of at least 1 or 'adaptive', not 'adaptiv'"),
        (LSGD, {"period": ""}, "a whole number of at least 1 or 'adaptive', not ''"),
        (LSGD, {"period": 0}, "period must be"),
        (EASGD, {"period": "adaptive", "asynchronous": True}, "not with asynchronous or overlap"),
        (EASGD, {"period": "adaptive", "overlap": True}, "not with asynchronous or overlap"),
        (LSGD, {"period": "adaptive", "asynchronous": "wait-free"}, "not with asynchronous"),
        (LocalSGD, {"period": "adaptive", "until_grad_norm": 0.1}, "give one"),
        (LocalSGD, {"period": "adaptive", "average": "quadratic"}, "needs a number a > 0"),
        *(
            (method, {"share": v}, "share must be")
            for method in (LocalSGD, EASGD, LSGD)
            for v in (0, 1.0, "x")
        ),
        *(
            (method, {"round_cost": v}, "round_cost must be")
            for method in (LocalSGD, EASGD)
            for v in (0, math.nan)
        ),
    ]

    def worker() -> None:
        for method, options, match in wrong:
            x = torch.nn.Parameter(torch.zeros(3))
            with pytest.raises(ValueError, match=match):
                method(torch.optim.SGD([x], lr=0.1), Topology(), **options)

    in_process(worker, 1)


def test_a_closure() -> None:
    """Its gradient is there before the step is taken."""

    def worker() -> list[list[int]]:
        problem = Degenerate(2)
        w = Worker(problem, round_cost=40.0)

        def closure() -> float:
            w.x.grad = torch.tensor(problem.gradient(w.rank, w.x.detach().numpy()))
            return 0.0

        for _ in range(60):
            w.opt.step(closure)
        return w.opt.metrics.periods

    _, periods = simulated(Degenerate(2), 40.0, 60)
    assert in_process(worker, P)[0] == periods

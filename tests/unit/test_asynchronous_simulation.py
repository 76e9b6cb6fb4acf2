"""The oracle of the asynchronous methods against the papers' equations and numbers: no MPI, none of mpilsgd's code."""

from __future__ import annotations

import math
from typing import Any

import asynchronous_simulation as turns
import numpy as np
import pytest
import simulation as together
from numpy.typing import NDArray
from problems import Quadratic, TanhNet
from simulation import Local, Simulation

SGD = Local(lr=0.1)
DECAY = Local(lr=0.1, weight_decay=0.05)
NESTEROV = Local("msgd", lr=0.05, momentum=0.8, nesterov=True, weight_decay=0.02)
LOCALS = {
    "SGD": DECAY,
    "torch momentum": Local("momentum", lr=0.05, momentum=0.7, weight_decay=0.02),
    "torch nesterov": Local("momentum", lr=0.05, momentum=0.7, nesterov=True, weight_decay=0.02),
    "MSGD nesterov": NESTEROV,
    "MSGD heavy ball": Local("msgd", lr=0.05, momentum=0.7),
}
Array = NDArray[np.float64]
by_local = pytest.mark.parametrize("name", LOCALS)


def assert_close(a: Any, b: Any, tolerance: float = 1e-12) -> None:
    scale = max(float(np.linalg.norm(b)), 1e-300)
    assert float(np.linalg.norm(np.asarray(a) - np.asarray(b))) <= tolerance * scale


def gradient(x: Array, i: int, t: int) -> Array:
    return TanhNet().gradient(x, i, t)[1]


@by_local
def test_turns_without_exchange_are_independent_workers(name: str) -> None:
    local, options = LOCALS[name], {"same": False}
    plain = Simulation(TanhNet(), 3, local, **options).run(12).x
    assert_close(turns.RoundRobin(TanhNet(), 3, local, **options).run(12).x, plain)
    for extra in ({"form": "jacobi"}, {"form": "gauss-seidel"}, {"overlap": True}):
        method = turns.EASGD(TanhNet(), 3, local, center_rate=0, period=2, **extra, **options)
        assert_close(method.run(12).x, plain)
    groups = [[0, 1], [2]]
    assert_close(
        turns.WaitFreeLSGD(TanhNet(), 3, local, groups=groups, pull=0, period=1, **options).run(12).x, plain
    )


def test_easgd_is_3_55_and_3_56() -> None:
    """One worker a tick of the global clock, β = pα, time-t values on the right."""
    p, eta, alpha = 3, 0.1, 0.2
    method = turns.EASGD(TanhNet(), p, SGD, same=False, center_rate=p * alpha, period=1)
    x, c = method.x.copy(), method.c
    for t in range(p * 9):
        i = t % p
        x[i], c = (
            x[i] - eta * gradient(x[i], i, t // p) - alpha * (x[i] - c),
            c + alpha * (x[i] - c),
        )
        if i == p - 1:
            method.step()
            assert_close(method.x, x)
            assert_close(method.c, c)


@pytest.mark.parametrize("period", [1, 3])
def test_eamsgd_is_algorithm_2(period: int) -> None:
    p, eta, alpha, delta = 3, 0.05, 0.2, 0.8
    local = Local("msgd", lr=eta, momentum=delta, nesterov=True)
    method = turns.EASGD(TanhNet(), p, local, center_rate=p * alpha, period=period)
    workers, c = method.x.copy(), method.c
    v = np.zeros_like(workers)
    for t in range(8):
        for i in range(p):
            x = workers[i].copy()
            if t % period == 0:
                workers[i] = workers[i] - alpha * (x - c)
                c = c + alpha * (x - c)
            v[i] = delta * v[i] - eta * gradient(x + delta * v[i], i, t)
            workers[i] = workers[i] + v[i]
        method.step()
        assert_close(method.x, workers)
        assert_close(method.c, c)


def test_easgd_conserves_the_sum() -> None:
    for extra in ({"period": 1}, {"period": 2}):
        method = turns.EASGD(Quadratic(0.0), 4, SGD, same=False, center_rate=0.6, **extra)
        before = method.x.sum(0) + method.c
        assert_close(method.run(9).x.sum(0) + method.c, before)
        assert_close(method.run(400).x, np.tile(before / 5, (4, 1)))


@by_local
def test_one_worker_in_turns_is_one_worker_together(name: str) -> None:
    for options in ({"period": 3}, {"period": 2, "form": "gauss-seidel"}, {"period": 1, "moving_rate": 0.3}):
        options |= {"center_rate": 0.4}
        one = turns.EASGD(TanhNet(), 1, LOCALS[name], **options).run(9)
        other = together.EASGD(TanhNet(), 1, LOCALS[name], **options).run(9)
        assert_close(one.x, other.x)
        assert_close(one.center(), other.center())


@by_local
def test_overlap_at_every_step_is_no_overlap(name: str) -> None:
    """Thesis 2.2: it realizes the Jacobi form; with τ > 1 the difference comes τ steps later."""
    options = {"same": False, "center_rate": 0.6}
    plain = turns.EASGD(TanhNet(), 3, LOCALS[name], period=1, **options).run(9)
    overlapped = turns.EASGD(TanhNet(), 3, LOCALS[name], period=1, overlap=True, **options).run(9)
    assert_close(overlapped.x, plain.x)
    assert_close(overlapped.c, plain.c)
    late = turns.EASGD(TanhNet(), 3, LOCALS[name], period=3, overlap=True, **options)
    alone = Simulation(TanhNet(), 3, LOCALS[name], same=False)
    difference = late.x - late.c
    difference[1:] = 0  # worker 0's turn is the first: it met the centre's start
    assert_close(late.run(2).x, alone.run(2).x)
    assert_close(late.run(1).x[0], alone.run(1).x[0] - 0.2 * difference[0])


@pytest.mark.parametrize("period", [1, 3])
@by_local
def test_synchronous_downpour_is_gauss_seidel(name: str, period: int) -> None:
    """α = 1, β = p."""
    p, local = 3, LOCALS[name]
    for same in (True, False):
        method = turns.Downpour(TanhNet(), p, local, period=period, asynchronous=False, same=same)
        options = {"center_rate": float(p), "moving_rate": 1.0, "form": "gauss-seidel"}
        other = together.EASGD(TanhNet(), p, local, period=period, same=same, **options)
        for _ in range(8):
            method.step()
            other.step()
            assert_close(method.x, other.x)
            assert_close(method.center(), other.center())


def test_synchronous_downpour_is_minibatch_with_step_p_eta() -> None:
    method = turns.Downpour(TanhNet(), 4, Local(lr=0.03), asynchronous=False).run(12)
    batch = together.AllreduceSGD(TanhNet(), 4, Local(lr=0.12)).run(12)
    assert_close(method.x, batch.x)
    assert_close(method.center(), batch.center())


def test_synchronous_mdownpour_is_minibatch_msgd() -> None:
    """δ on the centre, τ = 1: MSGD with step pη on the mean gradient, at the look-ahead."""
    method = turns.Downpour(TanhNet(), 3, Local(lr=0.03), momentum=0.7, asynchronous=False).run(12)
    batch = together.AllreduceSGD(
        TanhNet(), 3, Local("msgd", lr=0.09, momentum=0.7, nesterov=True)
    ).run(12)  # fmt: skip
    assert_close(method.center(), batch.center())
    assert_close(method.x, batch.points())


@pytest.mark.parametrize("period", [1, 3])
def test_downpour_is_algorithm_3(period: int) -> None:
    """As it is printed, where a push comes at the beginning of the worker's next step, and the first is empty."""
    p, eta = 3, 0.1
    method = turns.Downpour(TanhNet(), p, SGD, period=period)
    x, c = method.x.copy(), method.c
    v = np.zeros_like(x)
    for t in range(10):
        seen = np.zeros_like(x)
        for i in range(p):
            if t % period == 0:
                c = c + v[i]
                x[i] = c
                v[i] = 0
            seen[i] = x[i]
            g = gradient(x[i], i, t)
            x[i] = x[i] - eta * g
            v[i] = v[i] - eta * g
        assert_close(method.x, seen)  # where the gradients are taken
        method.step()


def test_mdownpour_is_algorithms_4_and_5() -> None:
    p, eta, delta = 3, 0.05, 0.8
    method = turns.Downpour(TanhNet(), p, Local(lr=eta), momentum=delta)
    c = method.c
    v, held = np.zeros_like(c), method.x.copy()
    for t in range(9):
        for i in range(p):
            v = delta * v - eta * gradient(held[i], i, t)
            c = c + v
            held[i] = c + delta * v
        method.step()
        assert_close(method.x, held)
        assert_close(method.center(), c)


@pytest.mark.parametrize("period", [1, 3])
def test_downpour_loses_no_gradient(period: int) -> None:
    """x̃ + Σ v = x̃₀ − η Σ g, over all gradients taken."""
    method = turns.Downpour(TanhNet(), 3, SGD, period=period)
    expected = method.c
    for t in range(10):
        # Worker i's gradient is at the x it holds before its turn: the turns of others do not touch it.
        expected = expected - 0.1 * np.sum([gradient(x, i, t) for i, x in enumerate(method.x)], axis=0)
        method.step()
        assert_close(method.c + method.unpushed().sum(0), expected)


@by_local
def test_downpour_of_one_worker(name: str) -> None:
    """Pushes alone are the local optimizer; with momentum on the centre they are MSGD."""
    local = LOCALS[name]
    plain = Simulation(TanhNet(), 1, local).run(9).x
    for period in (1, 3):
        for asynchronous in (True, False):
            method = turns.Downpour(TanhNet(), 1, local, period=period, asynchronous=asynchronous).run(9)
            assert_close(method.x, plain)
            assert_close(method.center(), plain[0])
    msgd = Simulation(TanhNet(), 1, NESTEROV).run(9)
    method = turns.Downpour(TanhNet(), 1, Local(lr=0.05, weight_decay=0.02), momentum=0.8).run(9)
    assert_close(method.center(), msgd.x[0])
    assert_close(method.x, msgd.points())


def test_averages_of_the_centre_on_its_own_clock() -> None:
    """z_{k+1} = (1 − a) z_k + a c_k: the mean of c_0 … c_k, or a moving average; every push is a tick."""

    class Watched(turns.Downpour):
        def _push(self, change: Array, receivers: Any) -> None:
            self.history = [*getattr(self, "history", []), self.c]
            super()._push(change, receivers)

    for asynchronous, ticks in ((True, 9), (False, 3)):
        options = {"period": 2, "asynchronous": asynchronous}
        running = Watched(TanhNet(), 3, SGD, average="running", **options).run(6)
        assert len(running.history) == running.k == ticks
        assert_close(running.center(), np.mean(running.history, axis=0))
        moving = Watched(TanhNet(), 3, SGD, average=0.25, **options).run(6)
        weights = [0.25 * 0.75 ** (ticks - 1 - k) for k in range(ticks)]
        start = 0.75**ticks * moving.history[0]  # z_0 = x̃_0
        assert_close(moving.center(), start + np.tensordot(weights, moving.history, 1))


def sweep(method: Any, names: tuple[str, ...]) -> Array:
    """The linear map of one round-robin sweep (all workers once) on the state that `names` hold."""
    shapes = [np.shape(getattr(method, name)) for name in names]
    cuts = np.cumsum([math.prod(shape) for shape in shapes])
    columns = []
    for unit in np.eye(cuts[-1]):
        for name, shape, piece in zip(names, shapes, np.split(unit, cuts[:-1]), strict=True):
            setattr(method, name, piece.reshape(shape).copy())
        method.step()
        columns.append(np.concatenate([np.ravel(getattr(method, name)) for name in names]))
    return np.stack(columns, axis=1)


def radius(matrix: Array) -> float:
    return float(np.abs(np.linalg.eigvals(matrix)).max())


def test_admm_is_3_52_to_3_54() -> None:
    p, eta, rho = 3, 0.1, 1.5
    method = turns.ADMM(TanhNet(), p, SGD, same=False, rho=rho)
    x, c = method.x.copy(), method.c
    dual = np.zeros_like(x)
    for t in range(p * 7):
        i = t % p
        dual[i] = dual[i] - (x[i] - c)
        x[i] = (x[i] - eta * gradient(x[i], i, t // p) + eta * rho * (dual[i] + c)) / (1 + eta * rho)
        c = sum(x[j] - dual[j] for j in range(p)) / p
    method.run(7)
    assert_close(method.x, x)
    assert_close(method.dual, dual)
    assert_close(method.c, c)


def test_admm_is_the_thesis_matrices() -> None:
    """F = x²/2, p = 2: the three linear maps of a turn as they are printed."""
    eta, rho, p = 0.3, 1.7, 2
    r = eta * rho
    product = np.eye(5)
    for i in range(p):
        first, second, third = np.eye(5), np.eye(5), np.eye(5)
        first[2 * i, [2 * i + 1, 4]] = -1, 1
        second[2 * i + 1, [2 * i, 2 * i + 1, 4]] = r / (1 + r), (1 - eta) / (1 + r), r / (1 + r)
        third[4] = -1 / p, 1 / p, -1 / p, 1 / p, 0
        product = third @ second @ first @ product
    method = turns.ADMM(Quadratic(1.0, size=1), p, Local(lr=eta), rho=rho)
    order = [0, 2, 1, 3, 4]  # (λ¹, x¹, λ², x², c) of (λ¹, λ², x¹, x², c)
    assert_close(product[np.ix_(order, order)], sweep(method, ("dual", "x", "c")))


def test_stability_numbers_of_3_3() -> None:
    """p = 3, η = .001, ρ = 2.5: a sweep of ADMM grows, one of EASGD (α = ηρ) does not."""
    problem, local = Quadratic(1.0, size=1), Local(lr=0.001)
    admm = radius(sweep(turns.ADMM(problem, 3, local, rho=2.5), ("dual", "x", "c")))
    assert round(admm, 7) == 1.0009739
    easgd = turns.EASGD(problem, 3, local, center_rate=3 * 0.0025, period=1)
    assert round(radius(sweep(easgd, ("x", "c"))), 5) == 0.99927


def test_stability_of_easgd_in_turns() -> None:
    """Stable for α up to (4 − 2η)/(4 − η); with one worker not beyond."""
    for p, eta in ((1, 0.5), (2, 1.0), (3, 1.5)):
        for factor in (0.98, 1.02):
            alpha = factor * (4 - 2 * eta) / (4 - eta)
            method = turns.EASGD(Quadratic(1.0, size=1), p, Local(lr=eta), center_rate=p * alpha, period=1)
            size = radius(sweep(method, ("x", "c")))
            assert size < 1 if factor < 1 else p > 1 or size > 1


def test_wait_free_one_worker_and_equal_workers_are_sgd() -> None:
    options = {"period": 1, "pull": 0.4, "global_period": 2}
    plain = Simulation(TanhNet(equal=True), 1, NESTEROV).run(9).x
    one = turns.WaitFreeLSGD(TanhNet(equal=True), 1, NESTEROV, groups=[[0]], **options)
    assert_close(one.run(9).x, plain)
    # Equal workers: the published x of one who has not taken its turn is a step old, so only ties of rank lead.
    first = turns.WaitFreeLSGD(
        TanhNet(equal=True), 3, NESTEROV, groups=[[0, 1, 2]], losses=lambda i, t: 1.0, **options
    )
    assert_close(first.run(9).x, np.tile(plain, (3, 1)))


def test_wait_free_by_hand() -> None:
    """Two groups; worker 0 meets what 1 and 2 published a sweep before, worker 2 what the others just did."""
    scores = {0: [3.0, 1.0], 1: [1.0, 2.0], 2: [2.0, math.nan]}
    options = {"groups": [[0, 1], [2]], "period": 1, "global_period": 2, "loss_window": 1}
    method = turns.WaitFreeLSGD(
        Quadratic(0.0),
        3,
        SGD,
        same=False,
        pull=0.5,
        global_pull=0.25,
        losses=lambda i, t: scores[i][t],
        **options,
    )
    a, b, c = method.x.copy()
    method.step()  # 0 sees itself alone; 1 leads its group; 2 is alone
    assert_close(method.x, [a, b, c])
    method.step()
    # 0 and what 1 published the last time both have score 1: the lowest rank leads, in the group and of all.
    # 1 (score 2) is pulled to 0 by both pulls, 2 (no score) to 0 by the global one alone.
    assert_close(method.x, [a, b - 0.75 * (b - a), c - 0.25 * (c - a)])


def test_consensus_is_a_fixed_point() -> None:
    problem = Quadratic(0.0)
    for method in (
        *(
            turns.EASGD(problem, 3, SGD, period=2, **o)
            for o in ({}, {"overlap": True}, {"form": "gauss-seidel"})
        ),
        turns.Downpour(problem, 3, SGD, period=2, average="running"),
        turns.Downpour(problem, 3, SGD, momentum=0.9, asynchronous=False),
        turns.ADMM(problem, 3, SGD, rho=0.7),
        turns.WaitFreeLSGD(problem, 3, SGD, groups=[[0, 1], [2]], period=2),
    ):
        method.run(8)
        assert_close(method.x, np.tile(problem.start(0), (3, 1)))
        assert_close(method.center(), problem.start(0))

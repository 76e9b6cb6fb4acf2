"""The oracle against itself and against closed forms: no MPI, none of mpilsgd's code."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from problems import (
    Accumulated,
    Buffered,
    LeastSquares,
    Problem,
    Quadratic,
    Sinc,
    TanhNet,
    fill,
    flatten,
    state_of,
)
from simulation import EASGD, LSGD, AllreduceSGD, Local, LocalSGD, Simulation, round_robin_lsgd

PROBLEMS: list[Problem] = [LeastSquares(), TanhNet(), Quadratic(0.7, optimum=1.0), Sinc(), Buffered()]
SGD = Local(lr=0.1)
NESTEROV = Local("msgd", lr=0.05, momentum=0.8, nesterov=True)


def assert_close(a: np.ndarray, b: np.ndarray, tolerance: float = 1e-12) -> None:
    scale = max(float(np.linalg.norm(b)), 1e-300)
    assert float(np.linalg.norm(np.asarray(a) - np.asarray(b))) <= tolerance * scale


@pytest.mark.parametrize("problem", [*PROBLEMS, Accumulated(TanhNet(), 3)], ids=lambda p: type(p).__name__)
def test_gradients_by_hand_are_torch_s(problem: Problem) -> None:
    for worker in range(3):
        x = problem.start(worker) if isinstance(problem, Sinc) else problem.start(worker) + 0.1
        model = problem.build(torch.float64, x)
        loss = problem.loss(model, worker, 5)
        loss.backward()
        value, gradient = problem.gradient(problem.visit(x, worker, 5), worker, 5)
        parameters = list(model.parameters())
        got = flatten([p.grad for p in parameters if p.grad is not None])
        assert math.isclose(value, loss.item(), rel_tol=1e-12)
        assert_close(got, gradient[: got.size], 1e-11)
        assert not gradient[got.size :].any()
        assert_close(flatten(state_of(model)), problem.visit(x, worker, 5))
        fill(state_of(model), x)
        assert np.array_equal(flatten(state_of(model)), x)


@pytest.mark.parametrize("nesterov", [False, True])
def test_torch_momentum(nesterov: bool) -> None:
    problem = TanhNet()
    local = Local("momentum", lr=0.1, momentum=0.7, nesterov=nesterov, weight_decay=0.02)
    simulation = Simulation(problem, 2, local, same=False).run(12)
    for worker in range(2):
        model = problem.build(torch.float64, problem.start(worker))
        optimizer = torch.optim.SGD(
            model.parameters(), lr=0.1, momentum=0.7, nesterov=nesterov, weight_decay=0.02
        )
        for t in range(12):
            optimizer.zero_grad()
            problem.loss(model, worker, t).backward()
            optimizer.step()
        assert_close(flatten(list(model.parameters())), simulation.x[worker])


def test_thesis_momentum_is_torch_s_where_they_agree() -> None:
    """Heavy ball is torch's momentum at a constant rate; torch's nesterov walks on the look-ahead points."""
    heavy = Simulation(LeastSquares(), 2, Local("msgd", lr=0.05, momentum=0.8)).run(15)
    assert_close(heavy.x, Simulation(LeastSquares(), 2, Local("momentum", lr=0.05, momentum=0.8)).run(15).x)
    ahead = Simulation(LeastSquares(), 2, NESTEROV).run(15)
    torchs = Simulation(LeastSquares(), 2, Local("momentum", lr=0.05, momentum=0.8, nesterov=True)).run(15)
    assert_close(ahead.points(), torchs.x)


@pytest.mark.parametrize("problem", [LeastSquares(), TanhNet()], ids=["convex", "non-convex"])
def test_one_worker_is_sgd(problem: Problem) -> None:
    plain = Simulation(problem, 1, SGD).run(20).x
    assert_close(AllreduceSGD(problem, 1, SGD).run(20).x, plain)
    assert_close(LocalSGD(problem, 1, SGD, period=3).run(20).x, plain)
    for when in ("after_step", "with_step"):
        assert_close(LSGD(problem, 1, SGD, groups=[[0]], pull=0.4, period=2, when=when).run(20).x, plain)
    assert_close(
        LSGD(problem, 1, SGD, groups=[[0]], period=1, global_period=1, when="every_step").run(20).x, plain
    )


def test_no_pull_is_independent_workers() -> None:
    plain = Simulation(TanhNet(), 3, SGD, same=False).run(20).x
    for when in ("after_step", "with_step", "every_step"):
        method = LSGD(TanhNet(), 3, SGD, same=False, groups=[[0, 1], [2]], pull=0, period=1, when=when)
        assert_close(method.run(20).x, plain)
    for form in ("jacobi", "gauss-seidel"):
        method = EASGD(TanhNet(), 3, SGD, same=False, center_rate=0, period=2, form=form)
        assert_close(method.run(20).x, plain)


@pytest.mark.parametrize("form", ["jacobi", "gauss-seidel"])
def test_without_momentum_eamsgd_is_easgd(form: str) -> None:
    options = {"same": False, "period": 3, "form": form}
    without = EASGD(TanhNet(), 3, Local("msgd", lr=0.1, nesterov=True, weight_decay=0.1), **options).run(20)
    assert_close(without.x, EASGD(TanhNet(), 3, Local(lr=0.1, weight_decay=0.1), **options).run(20).x)


@pytest.mark.parametrize("when", ["after_step", "with_step"])
def test_the_leader_takes_a_plain_step(when: str) -> None:
    method = LSGD(TanhNet(), 4, SGD, groups=[range(4)], period=2, global_period=4, loss_window=3, when=when)
    elections = 0
    for _ in range(12):
        x, t = method.x, method.t
        method.step()
        if len(method.elections) > elections:
            elections = len(method.elections)
            leaders = method.elections[-1][1]
            assert leaders is not None and leaders[0] is not None
            i = leaders[0]
            assert_close(method.x[i], x[i] - 0.1 * TanhNet().gradient(x[i], i, t)[1])
    assert elections == 6


@pytest.mark.parametrize("local", [SGD, NESTEROV], ids=["SGD", "MSGD"])
def test_equal_workers_stay_sgd(local: Local) -> None:
    problem = TanhNet(equal=True)
    plain = Simulation(problem, 4, local).run(15).x
    for when in ("after_step", "with_step"):
        method = LSGD(
            problem, 4, local, groups=[[0, 1], [2, 3]], period=1, pull=0.3, global_pull=0.2, when=when
        )
        assert_close(method.run(15).x, plain)
    assert_close(LocalSGD(problem, 4, local, period=2).run(15).x, plain)
    assert_close(AllreduceSGD(problem, 4, local).run(15).x, plain)


@pytest.mark.parametrize("when", ["after_step", "with_step", "every_step"])
def test_groups_of_one_and_one_group(when: str) -> None:
    """Groups of one with λ_G are one group with λ, and in one group λ + λ_G adds."""

    def run(groups: list[list[int]], pull: float, global_pull: float) -> np.ndarray:
        options = {"pull": pull, "global_pull": global_pull, "period": 3, "global_period": 3, "when": when}
        return LSGD(TanhNet(), 4, SGD, same=False, groups=groups, **options).run(17).x

    one = run([[0, 1, 2, 3]], 0.35, 0.0)
    if when != "every_step":  # there a worker alone in its group is pulled to its own stale copy
        assert_close(run([[0], [1], [2], [3]], 0.9, 0.35), one)
    assert_close(run([[0], [1], [2], [3]], 0.0, 0.35), one)
    assert_close(run([[0, 1, 2, 3]], 0.2, 0.15), one)


def test_sequential_is_one_update_with_other_rates() -> None:
    common = {"same": False, "groups": [[0, 1], [2, 3]], "period": 2, "global_period": 2}
    sequential = LSGD(TanhNet(), 4, SGD, pull=0.4, global_pull=0.3, sequential=True, **common).run(11)
    assert_close(sequential.x, LSGD(TanhNet(), 4, SGD, pull=0.4 * 0.7, global_pull=0.3, **common).run(11).x)


def test_algorithm_1_in_round_robin_is_lock_step() -> None:
    groups = [[0, 1], [2]]
    printed = round_robin_lsgd(TanhNet(), groups, 0.1, (0.3, 0.2), (2, 4), 13)
    options = {"pull": 0.3, "global_pull": 0.2, "period": 2, "global_period": 4, "loss_window": 1}
    method = LSGD(TanhNet(), 3, SGD, groups=groups, sequential=True, **options)
    assert_close(method.run(13).x, printed)


def test_leaders_ties_and_non_finite_losses() -> None:
    table = {0: [1, math.nan, 1, 1], 1: [1, 1, 1, 0.5], 2: [-math.inf, 2, 1, 3]}
    options = {"groups": [[0, 1], [2]], "period": 1, "global_period": 1, "loss_window": 1}
    method = LSGD(Quadratic(), 3, SGD, losses=lambda worker, t: table[worker][t], **options).run(4)
    assert [(local, best) for _, local, best in method.elections] == [
        ([0, None], 0),
        ([1, 2], 1),
        ([0, 2], 0),
        ([1, 2], 1),
    ]


def test_zero_gradient_conserves_the_sum() -> None:
    """EASGD with β = pα: Σ x + x̃ stays; and everything contracts to one point."""
    method = EASGD(Quadratic(0.0), 4, SGD, same=False, center_rate=0.6, period=2)
    before = method.x.sum(0) + method.c
    method.run(9)
    assert_close(method.x.sum(0) + method.c, before)
    assert_close(method.run(500).x, np.tile(before / 5, (4, 1)), 1e-12)


def test_consensus_is_a_fixed_point() -> None:
    problem = Quadratic(0.0)
    start = np.tile(problem.start(0), (3, 1))
    for method in (
        AllreduceSGD(problem, 3, SGD),
        LocalSGD(problem, 3, SGD, period=2),
        *(
            LSGD(problem, 3, SGD, groups=[[0, 1], [2]], period=2, when=w)
            for w in ("after_step", "every_step")
        ),
        *(EASGD(problem, 3, SGD, period=2, form=form) for form in ("jacobi", "gauss-seidel")),
    ):
        method.run(10)
        assert_close(method.x, start)
        assert_close(method.center(), start[0])


@pytest.mark.parametrize("period", [1, 3])
def test_gauss_seidel_1_1_is_local_sgd(period: int) -> None:
    options = {"center_rate": 1.0, "moving_rate": 1.0, "period": period, "form": "gauss-seidel"}
    elastic = EASGD(TanhNet(), 3, SGD, **options)
    local = LocalSGD(TanhNet(), 3, SGD, period=period)
    for _ in range(4):
        assert_close(elastic.run(period).center(), local.run(period).center())


def test_synchronous_downpour_is_minibatch_with_step_p_eta() -> None:
    """Gauss-Seidel(α = 1, β = p) at τ = 1; its updates are (6.1)."""
    workers, problem = 4, TanhNet()
    method = EASGD(
        problem, workers, Local(lr=0.03), center_rate=4.0, moving_rate=1.0, period=1, form="gauss-seidel"
    )
    batch = AllreduceSGD(problem, workers, Local(lr=0.12))
    center = problem.start(0)
    for t in range(20):
        steps = [-0.03 * problem.gradient(center, i, t)[1] for i in range(workers)]
        center = center + np.sum(steps, axis=0)
        method.step()
        batch.step()
        assert_close(method.center(), center)
        assert_close(method.center(), batch.center())


def test_local_sgd_identities() -> None:
    every = LocalSGD(TanhNet(), 3, SGD, period=1)
    assert_close(every.run(15).x, AllreduceSGD(TanhNet(), 3, SGD).run(15).x)
    by_set = LocalSGD(TanhNet(), 3, SGD, period={3, 6, 9}).run(10)
    assert_close(by_set.x, LocalSGD(TanhNet(), 3, SGD, period=3).run(10).x)
    assert_close(by_set.x, LocalSGD(TanhNet(), 3, SGD, period=lambda t: t % 3 == 0).run(10).x)
    method = LocalSGD(TanhNet(), 3, SGD, period=4)
    for t in range(10):
        gradient = np.mean([TanhNet().gradient(x, i, t)[1] for i, x in enumerate(method.x)], axis=0)
        expected = method.x.mean(0) - 0.1 * gradient
        method.step()
        assert_close(method.x.mean(0), expected)


def test_quadratic_weights() -> None:
    method = LocalSGD(TanhNet(), 3, SGD, period=2, a=4.0)
    history = []
    for _ in range(9):
        history.append(method.x.mean(0))
        method.step()
    weights = [(4.0 + t) ** 2 for t in range(9)]
    assert_close(method.center(), np.average(history, axis=0, weights=weights))


def test_until_grad_norm() -> None:
    """T = ∞ in one dimension each: a worker stops at ‖g‖² ≤ ε; all stopped: the mean; all below at once: frozen."""
    problem = LeastSquares(full=True)
    method = LocalSGD(problem, 2, Local(lr=0.3), until_grad_norm=1e-3)
    for _ in range(400):
        x = method.x
        norms = [float(np.sum(problem.gradient(x[i], i, 0)[1] ** 2)) for i in range(2)]
        rounds = method.rounds
        method.step()
        if method.rounds > rounds:
            assert max(norms) <= 1e-3
            assert_close(method.x, np.tile(x.mean(0), (2, 1)))
    assert method.rounds > 1
    flat = LocalSGD(Quadratic(), 2, Local(lr=0.3), same=False, until_grad_norm=1e-3).run(200)
    frozen = flat.x
    assert float(np.sum(frozen[0] ** 2)) <= 1e-3
    assert np.array_equal(flat.run(5).x, frozen)


def test_center_of_synchronous_easgd_in_closed_form() -> None:
    """Thesis Lemma 3.1.1 without noise: x̃_t = γ^t x̃_0 + (γ^t − φ^t)/(γ − φ) α u_0."""
    p, h, eta, alpha = 4, 0.8, 0.3, 0.1
    method = EASGD(Quadratic(h), p, Local(lr=eta), same=False, center_rate=p * alpha, period=1)
    x, center = method.x, method.c
    a, c2 = eta * h + (p + 1) * alpha, eta * h * p * alpha
    root = math.sqrt(a * a - 4 * c2)
    gamma, phi = 1 - (a - root) / 2, 1 - (a + root) / 2
    u = (x - alpha / (1 - p * alpha - phi) * center).sum(0)
    for t in range(1, 25):
        method.step()
        expected = gamma**t * center + (gamma**t - phi**t) / (gamma - phi) * alpha * u
        assert_close(method.c, expected, 1e-10)


def test_stability_of_synchronous_downpour() -> None:
    """Gauss-Seidel on x²/2 with β = 16: α = 1 is stable for η < 1/8 alone, α = .9 for no η."""

    def size(alpha: float, eta: float) -> float:
        options = {"center_rate": 16.0, "moving_rate": alpha, "period": 1, "form": "gauss-seidel"}
        method = EASGD(Quadratic(), 16, Local(lr=eta), **options)
        for _ in range(800):
            method.step()
            if np.linalg.norm(method.center()) > 1e6:
                break
        return float(np.linalg.norm(method.center()))

    start = float(np.linalg.norm(Quadratic().start(0)))
    assert size(1.0, 0.124) < 0.01 * start
    assert size(1.0, 0.126) > 100 * start
    assert all(size(0.9, eta) > start for eta in np.linspace(0.001, 1.999, 60))


def test_sinc_numbers_of_the_leader_paper() -> None:
    """LSGD §6: LGD −0.2172 (the leader from step 23 on, all four by step 100); EAGD's centre −0.0912, limit −0.0913."""
    problem = Sinc()
    lgd = LSGD(
        problem, 4, SGD, same=False, groups=[range(4)], pull=0.1, global_pull=0.0, period=1, when="with_step",
        score=lambda worker, x: problem.value(x),
    )  # fmt: skip
    values = []
    for _ in range(100):
        lgd.step()
        values.append([round(problem.value(x), 4) for x in lgd.x])
    reached = [min(row) == -0.2172 for row in values]
    assert reached.index(True) + 1 == 23 and all(reached[22:])
    assert values[-1] == [-0.2172] * 4

    eagd = EASGD(problem, 4, SGD, same=False, center_rate=0.43, period=1)
    eagd.run(94)
    for _ in range(95, 101):
        eagd.step()
        assert round(problem.value(eagd.center()), 4) == -0.0912
    assert round(problem.value(eagd.run(900).center()), 4) == -0.0913

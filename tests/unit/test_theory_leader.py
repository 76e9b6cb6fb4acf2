"""Leader SGD's theorems: bounds against exact expectations, angles against sampled leaders, stationary points."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from mpilsgd import theory

M, BIG = 0.5, 2.0
SHAPE = {"convexity": M, "smoothness": BIG}


def bowl(x: np.ndarray) -> np.ndarray:
    """Curvature m below 0, M above: strongly convex, not quadratic; its minimum is 0 at 0."""
    return np.where(x < 0, M, BIG) * x * x / 2


def slope(x: np.ndarray) -> np.ndarray:
    return np.where(x < 0, M, BIG) * x


def test_theorem_1_bounds_the_expected_step() -> None:
    sigma, nu = 0.7, 0.5
    most_lr = theory.leader_lr_edge(smoothness=BIG, nu=nu)
    most_pull = theory.leader_pull_edge(**SHAPE)
    x, z = np.meshgrid(np.linspace(-3, 3, 25), np.linspace(-3, 3, 25))
    spread = np.sqrt(sigma**2 + nu * slope(x) ** 2)
    tightest = np.inf
    for lr, pull in itertools.product(most_lr * np.array([0.1, 1]), most_pull * np.array([0, 0.3, 1])):
        moved = [x - lr * (slope(x) + s * spread) - pull * (x - z) for s in (-1, 1)]
        expected = (bowl(moved[0]) + bowl(moved[1])) / 2
        bound = theory.leader_step(bowl(x), bowl(z), lr, pull, **SHAPE, sigma=sigma, nu=nu)
        assert (expected <= bound + 1e-12).all()
        tightest = min(tightest, (bound - expected).min())
    assert tightest < 0.05
    # erratum 14: the third condition follows
    lam = most_pull / most_lr
    assert most_lr * np.sqrt(lam) <= 1 / (BIG / M * np.sqrt(2 * M))


def test_the_limit_is_the_fixed_point_of_the_step() -> None:
    lr, pull, sigma = 0.1, 0.05, 0.7
    gap = theory.leader_limit(lr, pull, **SHAPE, sigma=sigma)
    assert theory.leader_step(gap, gap, lr, pull, **SHAPE, sigma=sigma) == pytest.approx(gap)
    # a leader that is worse by the excess of Lemma 17
    gap = theory.leader_limit(lr, pull, **SHAPE, sigma=sigma, workers=9, loss_sigma=0.2)
    excess = theory.stochastic_leader_excess(9, 0.2)
    assert excess == pytest.approx(4 * 3 * 0.2)
    after = theory.leader_step(gap, gap + excess, lr, pull, **SHAPE, sigma=sigma)
    assert after == pytest.approx(gap)


def test_theorem_2_bounds_where_a_stale_leader_holds_a_worker() -> None:
    z, lam = np.meshgrid(np.linspace(-3, 3, 31), np.array([0.01, 0.3, 2.0, 30.0]))
    w = np.where(z < 0, lam * z / (M + lam), lam * z / (BIG + lam))  # slope(w) + lam (w - z) = 0
    np.testing.assert_allclose(slope(w) + lam * (w - z), 0, atol=1e-12)
    gap = theory.stale_leader_gap(bowl(z), lam, convexity=M)
    distance = theory.stale_leader_distance(np.abs(z), lam, convexity=M)
    assert (bowl(w) <= gap + 1e-12).all() and (np.abs(w) <= distance + 1e-12).all()
    assert (distance[0] < np.abs(z[0]) + 1e-12).all()


def test_stochastic_leaders_stay_below_their_bounds() -> None:
    rng = np.random.default_rng(0)
    values, sigma = np.array([0.0, 0.3, 0.5, 2.0, 2.5]), 0.6
    seen = values + sigma * rng.choice([-1.0, 1.0], (20_000, 5))
    chosen = values[seen.argmin(axis=1)]
    assert 0.1 < chosen.mean() < theory.stochastic_leader_excess(5, sigma)
    for a in (0.3, 2.0, 5.0):
        assert (chosen >= a).mean() <= theory.wrong_leader_probability(a, 5, sigma) <= 1
    # a case that comes near: one of many is better, and rarely looks so
    p, gap = 1000, 3.0
    many = np.where(np.arange(p) > 0, gap, 0.0)
    losses = many + rng.standard_normal((300, p))
    excess = many[losses.argmin(axis=1)].mean()
    assert 1 < excess < theory.stochastic_leader_excess(p, 1.0)
    assert theory.wrong_leader_probability(10, 4, 1.0) == pytest.approx(0.16)


def test_the_leader_descends_only_with_room_for_its_pull() -> None:
    lr, pull = np.meshgrid(np.linspace(0.02, 1.02, 51), np.linspace(0.01, 1.21, 13))
    start = x = np.full(lr.shape, 1.0)
    worst = np.zeros(lr.shape)
    for _ in range(400):  # f = M x^2 / 2, pulled to its stale copy at every step
        x = np.clip(x - lr * BIG * x - pull * (x - start), -1e6, 1e6)
        worst = np.maximum(worst, np.abs(x))
    assert np.array_equal(worst <= 1 + 1e-9, theory.leader_descends(lr, pull, smoothness=BIG))
    # the printed eta < 2 / M alone
    assert theory.leader_descends(0.95, 0.0, smoothness=BIG)
    assert not theory.leader_descends(0.95, 0.5, smoothness=BIG)


def test_the_gradients_of_a_descent_sum_below_its_fall() -> None:
    for lr in (0.1, 0.5, 0.9):
        x, total = np.array(2.0), 0.0
        start = bowl(x)
        for _ in range(50):
            total += slope(x) ** 2
            x = x - lr * slope(x)
            assert total <= theory.leader_gradient_sum(start - bowl(x), lr, smoothness=BIG) + 1e-12


HESSIAN = np.diag([1.0, 3.0, 40.0])


def leaders(x: np.ndarray, hessian: np.ndarray, count: int) -> np.ndarray:
    """Points spread evenly over E = {z: f(z) <= f(x)}."""
    rng = np.random.default_rng(7)
    u = rng.standard_normal((count, len(x)))
    u *= rng.random((count, 1)) ** (1 / len(x)) / np.linalg.norm(u, axis=1, keepdims=True)
    return np.sqrt(x @ hessian @ x) * u / np.sqrt(np.diag(hessian))


def test_angle_improves_is_the_comparison_of_two_angles() -> None:
    x = np.array([1.0, -0.5, 0.4])
    z = leaders(x, HESSIAN, 500) * 1.2

    def angle(u: np.ndarray, v: np.ndarray) -> np.ndarray:
        return np.arccos((u * v).sum(-1) / np.linalg.norm(u, axis=-1) / np.linalg.norm(v, axis=-1))

    for lam in (0.1, 3.0):
        step = -(x @ HESSIAN + lam * (x - z))
        want = angle(step, -x) <= angle(-x @ HESSIAN, -x)
        want &= ((z @ HESSIAN) * z).sum(1) <= x @ HESSIAN @ x
        found = theory.angle_improves(x, z, lam, HESSIAN)
        assert 50 < found.sum() < 450 and np.array_equal(found, want)


def test_theorem_6_at_least_half_of_the_leaders_improve_at_a_small_pull() -> None:
    rng = np.random.default_rng(2)
    points = rng.standard_normal((4, 3))
    for x, share in zip(points, theory.small_pull_share(points, HESSIAN), strict=True):
        z = leaders(x, HESSIAN, 20_000)
        found = theory.angle_improves(x, z, 1e-7, HESSIAN).mean()
        assert 0.5 <= share <= 1
        assert abs(found - share) < 4 * np.sqrt(0.25 / 20_000)
        # the improvement sets grow as lambda falls
        larger = [theory.angle_improves(x, z, lam, HESSIAN) for lam in (10.0, 1.0, 1e-2)]
        assert all((a <= b).all() for a, b in itertools.pairwise(larger))


def test_theorem_7_half_of_the_leaders_improve_at_every_pull() -> None:
    kappa = 3000.0
    r = float(theory.largest_angle_ratio(kappa))
    assert r / np.sqrt(kappa) + r**1.5 / kappa**0.25 == pytest.approx(1)
    assert 2 * kappa / (kappa + 1) < r
    hessian = np.diag([1.0, 20.0, kappa])
    # between the worst direction (Lemma 26) and an eigenvector every cosine occurs: bisect
    low, high = np.sqrt(kappa), 10 * kappa
    for _ in range(80):
        middle = (low + high) / 2
        c = theory.newton_cosine(np.array([middle, 0.0, 1.0]), hessian)
        low, high = (middle, high) if c < 0.999 * r / np.sqrt(kappa) else (low, middle)
    x = np.array([low, 0.0, 1.0])
    cosine = theory.newton_cosine(x, hessian)
    assert cosine == pytest.approx(0.999 * r / np.sqrt(kappa))
    z = leaders(x, hessian, 4000)
    z[z @ x > 0] *= -1  # the half E_2
    for lam in (1e-3, 0.1, 1.0, 1e2, 1e6):
        assert theory.angle_improves(x, z, lam, hessian).all()
    # Proposition 27
    flat = z - np.outer(z @ x / (x @ x), x)
    inside = ((flat @ hessian) * flat).sum(1) <= x @ hessian @ x
    squares = (flat[inside] ** 2).sum(1)
    assert inside.any() and squares.max() <= theory.farthest_level_point(kappa, cosine) * (x @ x)


def test_the_worst_direction_and_the_least_condition_number() -> None:
    kappa = 50.0
    turn = np.linspace(1e-3, np.pi / 2 - 1e-3, 20_001)
    cosine = theory.newton_cosine(np.stack([np.cos(turn), np.sin(turn)], -1), np.diag([1, kappa]))
    assert cosine.min() == pytest.approx(2 / (np.sqrt(kappa) + 1 / np.sqrt(kappa)), rel=1e-6)
    assert theory.largest_angle_ratio((2 + np.sqrt(2)) ** 4) == pytest.approx(2)


@pytest.mark.parametrize("lam", [0.05, 0.4, 1.0])
def test_elastic_averaging_has_a_stationary_point_that_is_none_of_f(lam: float) -> None:
    y = float(theory.elastic_trap(lam))
    assert y >= 1 and lam * y == pytest.approx(np.exp(1 - y))
    points = np.array([[-y], [y]])
    of_f = theory.two_slopes(points)[1]
    workers, centre = theory.elastic_objective_gradient(points, np.zeros(1), of_f, lam)
    np.testing.assert_allclose(workers, 0, atol=1e-12)
    np.testing.assert_allclose(centre, 0, atol=1e-12)
    assert np.abs(of_f).min() > 1e-3 and theory.two_slopes(0.0)[1] == pytest.approx(1)
    # not one of Leader SGD, whichever leads
    led = theory.leader_objective_gradient(points, np.array([0.0, 1.0]), of_f, lam)
    assert np.abs(led).max() > 1e-3


def test_proposition_8_has_a_function_with_two_continuous_derivatives() -> None:
    for at in (-1.0, 1.0):
        h = 1e-4
        x = at + h * np.arange(-3, 4)
        f, slope_ = theory.two_slopes(x)
        assert f[3] == pytest.approx(1) and slope_[3] == pytest.approx(-at)
        np.testing.assert_allclose(np.gradient(f, x)[1:-1], slope_[1:-1], atol=1e-6)
        curvature = np.diff(slope_) / h
        np.testing.assert_allclose(curvature, 1, atol=0.02)
    # in degree 6 the seven conditions are singular
    k = np.arange(7)
    value, first, second = k**0, k, k * (k - 1)
    sign = (-1.0) ** k
    rows = [value, first, second, value * sign, -first * sign, second * sign, k == 1]
    assert np.linalg.matrix_rank(np.array(rows, float)) == 6
    inner = np.linspace(-0.99, 0.99, 2001)
    f, slope_ = theory.two_slopes(inner)
    np.testing.assert_allclose(np.gradient(f, inner)[1:-1], slope_[1:-1], atol=1e-4)


def test_a_stationary_point_of_leader_sgd_has_a_stationary_leader() -> None:
    """f = (1 - x^2)^2 / 4 + x / 10 on three workers; gradient descent on the leader's objective ends in one."""
    lam = 0.05

    def f(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return (1 - x[..., 0] ** 2) ** 2 / 4 + x[..., 0] / 10, (x**2 - 1) * x + 0.1

    x = np.array([[1.4], [0.9], [-0.4]])
    for _ in range(4000):
        x = x - 0.1 * theory.leader_objective_gradient(x, *f(x), lam)
    gradient = theory.leader_objective_gradient(x, *f(x), lam)
    values, of_f = f(x)
    assert np.abs(gradient).max() < 1e-10
    assert np.abs(of_f[values.argmin()]).max() < 1e-10
    assert np.abs(of_f).max() > 1e-2  # the others are not at stationary points of f


def test_theorem_4_fails_when_the_leader_is_differentiated() -> None:
    """f' = lam at x_1 and -lam at x_2 = x_1 + 1: the sum over workers is stationary, yet no worker is."""
    lam = 0.3
    x1, x2 = 0.0, 1.0

    # a quartic-free bump: f(x) = lam x (1 - x) - 0.05 (1 - x) (3 x^2 - 2 x^3 ends flat), so that f(x_1) < f(x_2)
    def f(x: float) -> float:
        rise = 3 * x**2 - 2 * x**3
        return lam * x * (1 - x) + 0.05 * rise

    def objective(a: float, b: float) -> float:
        leader = a if f(a) < f(b) else b
        return f(a) + f(b) + lam / 2 * ((a - leader) ** 2 + (b - leader) ** 2)

    h = 1e-5
    total = [
        (objective(x1 + h, x2) - objective(x1 - h, x2)) / (2 * h),
        (objective(x1, x2 + h) - objective(x1, x2 - h)) / (2 * h),
    ]
    assert f(x1) < f(x2)
    np.testing.assert_allclose(total, 0, atol=1e-8)
    slopes = np.array([[(f(v + h) - f(v - h)) / (2 * h)] for v in (x1, x2)])
    np.testing.assert_allclose(slopes[:, 0], [lam, -lam], atol=1e-8)
    held = theory.leader_objective_gradient(np.array([[x1], [x2]]), [f(x1), f(x2)], slopes, lam)
    np.testing.assert_allclose(held[:, 0], [lam, 0], atol=1e-8)

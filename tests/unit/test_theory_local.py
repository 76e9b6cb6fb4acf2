"""Stich's bound and step sizes; Zhang and Li's rates and periods."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import minimize_scalar
from scipy.special import lambertw

from mpilsgd import theory


def test_the_shift_keeps_the_first_step_small_enough() -> None:
    mu, big = np.array([0.1, 1.0, 2.0]), np.array([3.0, 1.0, 50.0])
    a = theory.local_sgd_shift(7, convexity=mu, smoothness=big)
    assert (theory.local_sgd_lr(0, a, convexity=mu) <= 1 / (4 * big) + 1e-15).all()
    # Lemma 3.3 uses eta_t <= 2 eta_(t + H)
    ahead = theory.local_sgd_lr(np.arange(50)[:, None] + 7, a, convexity=mu)
    assert (theory.local_sgd_lr(np.arange(50)[:, None], a, convexity=mu) <= 2 * ahead).all()
    # the printed max(4 kappa, H / mu) is below both
    assert (4 * big / mu < a).all()
    assert theory.local_sgd_shift(1000, convexity=1, smoothness=2) == 1000


def test_the_weights_sum() -> None:
    for steps, a in ((1, 3.5), (7, 3.5), (100, 64.0)):
        assert theory.local_sgd_weight_sum(steps, a) == pytest.approx(((a + np.arange(steps)) ** 2).sum())
    assert theory.local_sgd_weight_sum(40, 2) >= 40**3 / 3


def test_the_gap_counts_from_zero() -> None:
    assert theory.local_sgd_gap([10, 13, 20]) == 10
    assert theory.local_sgd_gap(range(4, 41, 4)) == 4
    assert theory.local_sgd_gap([20, 2, 8]) == 12
    for bad in ([], [0, 5]):
        with pytest.raises(ValueError, match="averages"):
            theory.local_sgd_gap(bad)


def test_local_sgd_stays_below_its_bound_and_its_deviation() -> None:
    """f_i(x) = (x - s_i)^2 mu / 2 with s_i = +-1, so sigma = mu and G as large as the run's own."""
    mu, workers, period, steps, runs = 0.8, 4, 5, 200, 500
    a = float(theory.local_sgd_shift(period, convexity=mu, smoothness=mu))
    rng = np.random.default_rng(0)
    x = np.full((runs, workers), 3.0)
    mean = np.zeros(runs)
    gradient, apart = 0.0, []
    for t in range(steps):
        lr = float(theory.local_sgd_lr(t, a, convexity=mu))
        mean += (a + t) ** 2 * x.mean(1)
        apart.append((((x - x.mean(1, keepdims=True)) ** 2).mean(), lr))
        gradient = max(gradient, float(np.sqrt((mu * (np.abs(x) + 1)).max() ** 2)))
        x = x - lr * mu * (x - rng.choice([-1.0, 1.0], x.shape))
        if (t + 1) % period == 0:
            x[:] = x.mean(1, keepdims=True)
    mean /= theory.local_sgd_weight_sum(steps, a)
    terms = theory.local_sgd_bound(
        steps, workers, period, convexity=mu, smoothness=mu, distance=3.0, sigma=mu, gradient=gradient
    )
    assert (mu / 2 * mean**2).mean() < sum(terms)
    assert max(d for d, _ in apart) > 0
    assert theory.local_sgd_deviation(0.1, 5, gradient=6.0) == pytest.approx(36)
    for deviation, lr in apart:
        assert deviation <= theory.local_sgd_deviation(lr, period, gradient=gradient)


def test_the_terms_of_the_bound_scale_as_they_say() -> None:
    base = {"convexity": 0.5, "smoothness": 4.0, "distance": 2.0, "sigma": 1.5, "gradient": 3.0}
    start, noise, drift = theory.local_sgd_bound(1e6, 4, 10, **base)
    # by hand, T large: S = T^3 / 3
    assert start == pytest.approx(0.5 * 128**3 / (2 * 1e18 / 3) * 4, rel=1e-3)
    assert noise == pytest.approx(4 * 3 / (0.5 * 4 * 1e6) * 1.5**2, rel=1e-3)
    assert drift == pytest.approx(256 * 3 / (0.25 * 1e12) * 900 * 4, rel=1e-3)
    batch = theory.local_sgd_bound(1e6, 4, 10, **base, batch=2)
    assert batch[1] == pytest.approx(noise / 2) and batch[0] == start and batch[2] == drift
    with pytest.raises(ValueError, match=r"max\(16 smoothness / convexity, period\)"):
        theory.local_sgd_bound(100, 4, 10, **base, shift=100.0)


def test_the_longest_period_balances_drift_and_noise() -> None:
    base = {"convexity": 0.5, "smoothness": 4.0, "sigma": 1.5, "gradient": 3.0}
    h = theory.local_sgd_longest_period(1e6, 4, **base)
    assert 1 < h < 128
    _, noise, drift = theory.local_sgd_bound(1e6, 4, h, **base, distance=1.0)
    assert drift == pytest.approx(noise)
    assert theory.local_sgd_longest_period(1, 1e9, **base) == 1
    assert theory.local_sgd_longest_period(1e12, 4, **base) == 128  # then the shift must grow


def test_lemma_1_holds_along_a_run() -> None:
    """Two least-squares nodes with a common solution."""
    rng = np.random.default_rng(0)
    parts = [rng.standard_normal((3, 8)) for _ in range(2)]
    every = np.vstack(parts)
    big = [np.linalg.norm(a, 2) ** 2 for a in parts]
    mu = [np.linalg.svd(a, compute_uv=False)[-1] ** 2 for a in parts]
    lr = np.array([0.7 / b for b in big])
    alpha = theory.local_descent(lr, big)
    c = theory.affine_separation(parts)
    factor = theory.contraction(c, np.min(alpha * np.square(mu)))
    x = rng.standard_normal(8)  # S is the kernel of both

    def distance(y: np.ndarray) -> float:
        return float(np.linalg.norm(np.linalg.pinv(every) @ every @ y))

    start, squares = distance(x), []
    for n in range(1, 30):
        before, total, ends = distance(x), 0.0, []
        squares.append(np.linalg.norm(sum(a.T @ (a @ x) for a in parts) / 2) ** 2)
        for a, eta, weight in zip(parts, lr, alpha, strict=True):
            y = x.copy()
            for _ in range(4):
                g = a.T @ (a @ y)
                total += weight * g @ g / 2
                y = y - eta * g
            ends.append(y)
        x = sum(ends) / 2
        assert distance(x) ** 2 <= before**2 - total + 1e-12
        assert distance(x) <= factor * before
        assert min(squares) <= theory.least_gradient(n, start, alpha.min())


def test_two_lines_contract_slower_than_printed() -> None:
    angle = 0.2
    lines = np.array([[1.0, 0.0], [np.cos(angle), np.sin(angle)]])
    onto = sum(np.outer(v, v) for v in lines) / 2
    true = theory.spectral_radius(onto)
    c = theory.two_lines_separation(angle)
    assert true == pytest.approx(0.9900, abs=5e-5)
    assert np.sqrt(1 - 1 / c) == pytest.approx(0.9490, abs=5e-5)  # as printed: too small
    assert true < theory.contraction(c) < 1
    # c is the least constant; Lemma 6's is larger
    turn = np.linspace(0, np.pi, 20_001)
    points = np.stack([np.cos(turn), np.sin(turn)])
    normal = np.array([[-v[1], v[0]] for v in lines])
    mean = np.abs(normal @ points).mean(axis=0)
    assert (1 / mean).max() == pytest.approx(c, rel=1e-3) and (1 / mean).max() <= c * (1 + 1e-12)
    assert theory.affine_separation([normal[:1], normal[1:]]) == pytest.approx(2 / (1 - np.cos(angle)))
    assert theory.affine_separation([normal[:1], 3 * normal[:1]]) == pytest.approx(1)
    for bad in ([], [np.zeros((1, 2))]):
        with pytest.raises(ValueError, match="normals"):
            theory.affine_separation(bad)


@pytest.mark.parametrize(("lr", "period"), [(0.2, 10), (0.05, 4)])
def test_the_touching_disc_decays_with_the_cube(lr: float, period: int) -> None:
    q, rounds = (1 - 2 * lr) ** period, 20_000
    x, y = 1.0, 0.5
    for _ in range(rounds):  # T steps on a squared distance to a convex set leave q of the way to it
        reach = np.hypot(x, y - 1)
        over = max(reach - 1, 0.0) * (1 - q) / reach
        x, y = x - over * x / 2, y - (over * (y - 1) + (1 - q) * max(y, 0.0)) / 2
    reach = np.hypot(x, y - 1)
    push = max(reach - 1, 0.0) / reach
    gradient = np.array([push * x, push * (y - 1) + max(y, 0.0)])
    found = gradient @ gradient
    assert theory.tangent_gradient(rounds, lr, period) == pytest.approx(found, rel=0.02)


def test_the_best_period_under_linear_decay() -> None:
    exact = theory.linear_best_period(1e-4, 0.9)
    asymptotic = theory.linear_best_period_asymptotic(1e-4, 0.9)
    assert exact == pytest.approx(66.13, abs=5e-3) and asymptotic == pytest.approx(66.07, abs=5e-3)
    assert np.log(1 + np.log(1 / 0.9) / 1e-4) == pytest.approx(6.96, abs=5e-3)  # as printed
    # the formula with Lambert's function, where it does not underflow
    r, beta = np.array([0.5, 0.01, 2e-3]), np.array([[0.3], [0.9], [0.99]])
    lower = lambertw(-np.exp(-1.0) * beta ** (1 / r), -1).real
    want = (1 + lower) / np.log(beta) - 1 / r
    np.testing.assert_allclose(theory.linear_best_period(r, beta), want, rtol=1e-9)


@pytest.mark.parametrize("r", [1e-8, 1e-3, 0.3, 5.0, 1e4])
def test_the_best_periods_are_the_minima_of_the_costs(r: float) -> None:
    for beta in (0.1, 0.9, 0.9999):
        best = float(theory.linear_best_period(r, beta))
        near = best * np.array([0.9, 0.99, 1.0, 1.01, 1.1])
        assert theory.linear_cost(near, r, beta).argmin() == 2
        found = minimize_scalar(
            lambda t, beta=beta: float(theory.linear_cost(t, r, beta)),
            bounds=(best / 5, 5 * best),
            method="bounded",
        )
        assert best == pytest.approx(found.x, rel=1e-3)
    for a, beta in ((2.0, 3.0), (0.01, 1.5), (0.3, 1.05), (5.0, 7.0)):
        best = float(theory.power_best_period(r, a, beta))
        near = best * np.array([0.9, 0.99, 1.0, 1.01, 1.1])
        assert theory.power_cost(near, r, a, beta).argmin() == 2
        equation = r * ((1 + a * best) ** beta - 1), a * (beta + beta * r * best - 1)
        assert equation[0] == pytest.approx(equation[1], rel=1e-6)


def test_the_best_period_under_power_law_decay() -> None:
    assert theory.power_best_period_asymptotic(1e-8, 2, 3) == pytest.approx(367.90, abs=5e-3)
    assert theory.power_best_period(1e-8, 2, 3) == pytest.approx(367.90, abs=5e-3)
    r = 10.0 ** -np.arange(4, 15, 2)
    ratio = theory.power_best_period(r, 2, 3) / theory.power_best_period_asymptotic(r, 2, 3)
    assert (np.diff(np.abs(ratio - 1)) < 0).all() and ratio[-1] == pytest.approx(1, abs=1e-6)


def test_the_sums_of_the_decays() -> None:
    t = np.arange(12)
    assert theory.linear_decay_sum(12, 0.7) == pytest.approx((0.7**t).sum())
    assert theory.linear_decay_sum(np.inf, 0.7) == pytest.approx(1 / 0.3)
    found = theory.power_decay_sum(12, 0.4, 1.6)
    assert found == pytest.approx((1 / (1 + 0.4 * t) ** 1.6).sum())
    # the bound of the cost: below by the integral, so the cost is above
    assert theory.power_cost(12, 0.01, 0.4, 1.6) > (1 + 0.01 * 12) / found
    rounds = theory.rounds_bound(found, distance=2.0, descent=0.5, tolerance=1e-3)
    assert rounds == pytest.approx(4 / (0.5e-3 * found))


@pytest.mark.parametrize("order", [2, 3])
def test_the_decay_of_even_powers(order: int) -> None:
    lr, start, steps = 1e-4, 1.2, 40_000
    x = start
    for _ in range(steps):
        x -= lr * 2 * order * x ** (2 * order - 1)
    a, beta = theory.power_decay(order, lr, start)
    left = (x / start) ** (2 * (2 * order - 1))
    assert left == pytest.approx(float((1 + a * steps) ** -beta), rel=2e-3)
    assert left != pytest.approx(float((1 + a * steps) ** (-beta / 2)), rel=0.5)  # as printed

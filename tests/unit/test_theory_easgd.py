"""Lemma 3.1.1, its corollary, condition 3.4, Theorem 3.2.1 against the updates they describe."""

from __future__ import annotations

import numpy as np
import pytest

from mpilsgd import theory

SETTINGS = [(0.3, 0.9, 1), (0.5, 0.9, 4), (0.1, 1.5, 16), (1.7, 0.4, 4)]


def one_step(
    x: np.ndarray, c: np.ndarray, xi: np.ndarray, lr: float, moving: float, h: float
) -> tuple[np.ndarray, np.ndarray]:
    """The thesis' (3.5), (3.6); the workers are in the last axis."""
    apart = x - c[..., None]
    return x - lr * (h * x - xi) - moving * apart, c + moving * apart.sum(axis=-1)


@pytest.mark.parametrize("workers", [1, 4, 16])
def test_monte_carlo_agrees_with_lemma_3_1_1(workers: int) -> None:
    lr, rate, h, sigma, runs = 0.4, 0.9, 0.8, 1.5, 4000
    rng = np.random.default_rng(workers)
    x, c = np.full((runs, workers), 2.0), np.full(runs, -1.0)
    where = {"center_start": -1.0, "workers_start": 2.0}
    for t in range(1, 31):
        x, c = one_step(x, c, sigma * rng.standard_normal(x.shape), lr, rate / workers, h)
        if t not in (2, 5, 30):
            continue
        variance = theory.center_variance(t, lr, rate, workers, h, sigma=sigma)
        bias = theory.center_bias(t, lr, rate, workers, h, **where)
        assert abs(c.mean() - bias) < 4 * np.sqrt(variance / runs)
        # the fourth moment of a normal distribution gives the sample variance's standard deviation
        assert abs(c.var(ddof=1) - variance) < 4 * variance * np.sqrt(2 / (runs - 1))
        mse = theory.center_mse(t, lr, rate, workers, h, sigma=sigma, **where)
        squares = c**2
        assert abs(squares.mean() - mse) < 4 * squares.std() / np.sqrt(runs)


@pytest.mark.parametrize(("lr", "rate", "workers"), SETTINGS)
def test_bias_and_variance_are_those_of_the_recursion(lr: float, rate: float, workers: int) -> None:
    h, sigma = 0.9, 0.7
    start = np.arange(workers) + 0.5
    x, c = start.copy(), np.array(-1.3)
    size = workers + 1
    step = np.empty((size, size))  # the linear map of the updates, column by column
    for k in range(size):
        unit = np.eye(size)[k]
        moved = one_step(unit[:-1], np.array(unit[-1]), np.zeros(workers), lr, rate / workers, h)
        step[:, k] = [*moved[0], moved[1]]
    noise = np.diag([(lr * sigma) ** 2] * workers + [0.0])
    covariance = np.zeros((size, size))
    for t in range(12):
        bias = theory.center_bias(t, lr, rate, workers, h, center_start=-1.3, workers_start=start.mean())
        assert bias == pytest.approx(float(c), rel=1e-10)
        variance = theory.center_variance(t, lr, rate, workers, h, sigma=sigma)
        assert variance == pytest.approx(covariance[-1, -1], rel=1e-10, abs=1e-15)
        x, c = one_step(x, c, np.zeros(workers), lr, rate / workers, h)
        covariance = step @ covariance @ step.T + noise
    found = sorted(np.linalg.eigvals(step).real)
    gamma, phi = theory.easgd_eigenvalues(lr, rate, workers, h)
    assert found[0] == pytest.approx(phi) and found[-1] == pytest.approx(gamma)


def test_the_variance_with_a_factor_of_one_is_a_plain_sum() -> None:
    rate = 0.5
    lr = 2 - 2 * rate / (2 - rate)  # the edge of condition 3.4 for one worker
    assert theory.easgd_eigenvalues(lr, rate, 1)[1] == pytest.approx(-1)
    around = theory.center_variance(50, lr * (1 + np.arange(-8, 9) * 2.0**-52), rate, 1)
    further = theory.center_variance(50, lr * (1 + np.array([-1e-7, 1e-7])), rate, 1)
    np.testing.assert_allclose(around, further.mean(), rtol=1e-9)


def test_condition_3_4_is_the_edge_of_the_spectral_radius() -> None:
    rng = np.random.default_rng(3)
    lr, rate = rng.uniform(-0.5, 4, 4000), rng.uniform(-0.5, 4, 4000)
    for workers in (1, 2, 7):
        radius = theory.spectral_radius(theory.easgd_drift(lr, rate / workers, rate, workers))
        stable = theory.easgd_stable(lr, rate, workers)
        assert 200 < stable.sum() < 600
        assert np.array_equal(stable, radius < 1)


def test_the_error_is_infinite_where_the_map_diverges() -> None:
    lr, rate, steps = np.linspace(0.05, 3, 30), np.linspace(0.05, 3, 30)[:, None], np.array([10.0, np.inf])
    mse = theory.center_mse(steps[:, None, None], lr, rate, 4, sigma=10.0)
    assert mse.shape == (2, 30, 30) and np.isfinite(mse[0]).all() and not np.isnan(mse).any()
    assert np.array_equal(np.isfinite(mse[1]), theory.easgd_stable(lr, rate, 4))


def test_the_error_tends_to_the_corollary_as_workers_grow() -> None:
    lr, rate, h = np.array([0.2, 1.0, 1.9]), np.array([[0.3], [1.0], [1.6]]), 0.7
    limit = theory.many_workers_mse(lr, rate, h, sigma=1.3)
    gaps = [
        np.abs(p * theory.center_mse(np.inf, lr, rate, p, h, sigma=1.3) / limit - 1).max()
        for p in (1e3, 1e5, 1e7)
    ]
    assert gaps[0] > 1e-5 and gaps[2] < 1e-4 and gaps[1] < gaps[0] / 50 and gaps[2] < gaps[1] / 50


def test_the_asymptotic_variance_is_that_of_the_moments() -> None:
    lr, rate, workers = np.array([0.1, 0.9, 1.5]), 0.9, 6
    by_lemma = theory.center_variance(np.inf, lr, rate, workers, sigma=2.0)
    by_moments = theory.easgd_variance(lr, rate / workers, rate, workers, sigma=2.0)[2]
    np.testing.assert_allclose(by_lemma, by_moments, rtol=1e-12)
    np.testing.assert_allclose(by_lemma, theory.center_variance(10_000, lr, rate, workers, sigma=2.0))


def test_the_average_over_time_forgets_its_rates() -> None:
    a, noise, workers = np.array([[2.0, 0.5], [0.5, 1.0]]), np.array([[1.0, 0.3], [0.3, 0.5]]), 3
    want = theory.averaged_center_covariance(a, noise, workers)
    for lr, rate in ((0.2, 0.9), (0.5, 0.3)):
        # the spectral density at 0 of (y, c): (I - M)^-1 B Sigma B' (I - M)^-T
        eye = np.eye(2)
        step = np.block(
            [[eye - lr * a - rate / workers * eye, rate / workers * eye], [rate * eye, (1 - rate) * eye]]
        )
        response = np.linalg.inv(np.eye(4) - step)[:, :2] * lr
        found = response @ noise @ response.T / workers
        np.testing.assert_allclose(found[2:, 2:], want, rtol=1e-10)
    assert theory.averaged_center_covariance([[2.0]], [[9.0]], 4)[0, 0] == pytest.approx(9 / 4 / 4)


def test_theorem_3_2_1_bounds_a_simulation() -> None:
    """Many workers on f with curvature mu below 0 and L above: strongly convex, not quadratic."""
    mu, big, lr, moving, rate, workers, sigma = 0.5, 2.0, 0.3, 0.1, 0.4, 4, 0.6
    rng = np.random.default_rng(0)
    runs = 20_000
    x, c = np.full((runs, workers), 1.0), np.full(runs, 1.0)
    m = theory.convex_matrix(lr, moving, rate, convexity=mu, smoothness=big)
    for _ in range(15):
        before = np.array([(x.mean(1) ** 2).mean(), (x**2).mean(), (c**2).mean()])
        xi = sigma * rng.standard_normal(x.shape)
        apart = x - c[:, None]
        x, c = x - lr * (np.where(x < 0, mu, big) * x - xi) - moving * apart, c + rate * apart.mean(1)
        after = np.array([(x.mean(1) ** 2).mean(), (x**2).mean(), (c**2).mean()])
        bound = m @ before + (lr * sigma) ** 2 * np.array([1 / workers, 1, 0])
        assert (after <= bound * (1 + 4 * 2 / np.sqrt(runs))).all()


def test_theorem_3_2_1_eigenvalues_limit_and_edge() -> None:
    moving, rate = np.array([0.05, 0.3, 0.6]), np.array([[0.2], [0.9]])
    shape = {"convexity": 0.5, "smoothness": 2.0}
    edge = theory.convex_lr_edge(moving, **shape)
    lr = 0.7 * edge
    m = theory.convex_matrix(lr, moving, rate, **shape)
    found = np.sort(np.linalg.eigvals(m).real, axis=-1)
    np.testing.assert_allclose(
        found, np.sort(theory.convex_eigenvalues(lr, moving, rate, **shape)), atol=1e-12
    )
    assert (theory.spectral_radius(m) < 1).all() and (m >= 0).all()
    noise = (lr * 1.5)[..., None] ** 2 * np.array([1 / 8, 1, 0])
    fixed = np.linalg.solve(np.eye(3) - m, noise[..., None])[..., 0]
    mean, each = theory.convex_limit(lr, moving, 8, **shape, sigma=1.5)
    np.testing.assert_allclose(fixed, [np.stack([mean, each, mean], -1)] * 2, rtol=1e-10)
    # at the edge the first eigenvalue is 0; the other conditions are met there, for every mu and L
    mu, alpha, beta = np.linspace(0.01, 3, 40), 0.3, np.linspace(0.05, 1, 20)[:, None]
    edge = theory.convex_lr_edge(alpha, convexity=mu, smoothness=3.0)
    values = theory.convex_eigenvalues(edge, alpha, beta, convexity=mu, smoothness=3.0)
    np.testing.assert_allclose(values[..., 0], 0, atol=1e-12)
    assert (values[..., 1] < 1).all() and (values[..., 2] > -1).all()
    assert (edge <= 2 * (1 - alpha) / (mu + 3.0) * (1 + 1e-12)).all()

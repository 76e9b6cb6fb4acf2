"""Each drift and moment matrix against one step of its updates: by linearity, or with noise enumerated exactly."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest

from mpilsgd import theory


def linear_map(step: Callable[[np.ndarray], np.ndarray], size: int) -> np.ndarray:
    """The matrix of a linear update, column by column."""
    return np.stack([step(unit) for unit in np.eye(size)], axis=1)


def noises(workers: int, mean: float, deviation: float) -> np.ndarray:
    """All outcomes of independent two-point noises with this mean and deviation: second moments are exact."""
    return np.array(list(itertools.product([mean - deviation, mean + deviation], repeat=workers)))


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_easgd_drift(workers: int) -> None:
    lr, moving, rate, h = 0.3, -0.2, 0.8, 1.7

    def step(s: np.ndarray) -> np.ndarray:
        x, c = s[:-1], s[-1]
        return np.append(x - lr * h * x + moving * (c - x), c + rate * (x.mean() - c))

    m = theory.easgd_drift(lr, moving, rate, workers, h)
    np.testing.assert_allclose(m, linear_map(step, workers + 1), atol=1e-15)
    assert theory.easgd_radius(lr, moving, rate, workers, h) == pytest.approx(theory.spectral_radius(m))


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_eamsgd_drift(workers: int) -> None:
    lr, delta, moving, rate, h = 0.3, 0.7, 0.2, 0.8, 1.7

    def step(s: np.ndarray) -> np.ndarray:
        v, x, c = s[0:-1:2], s[1:-1:2], s[-1]
        after = delta * v - lr * h * (x + delta * v)
        state = np.empty_like(s)
        state[0:-1:2], state[1:-1:2] = after, x + after + moving * (c - x)
        state[-1] = c + rate * (x.mean() - c)
        return state

    m = theory.eamsgd_drift(lr, delta, moving, rate, workers, h)
    np.testing.assert_allclose(m, linear_map(step, 2 * workers + 1), atol=1e-15)
    # the corrected (5.21)
    e = lr * h
    d = delta * (1 - e)
    z = np.poly1d([1.0, 0.0])
    u = z**2 - (1 - e - moving + d) * z + d * (1 - moving)
    v = (d - z) * (1 - e - moving - z) * (1 - rate - z) + e * d * (1 - rate - z) - moving * rate * (d - z)
    at = 0.37
    determinant = np.linalg.det(m - at * np.eye(2 * workers + 1))
    assert determinant == pytest.approx(u(at) ** (workers - 1) * v(at))


def test_the_radius_does_not_depend_on_the_number_of_several_workers() -> None:
    lr, moving = np.linspace(0.1, 1.9, 7), np.linspace(-0.5, 0.5, 5)[:, None]
    for two, four in (
        (theory.easgd_drift(lr, moving, 0.9, 2), theory.easgd_drift(lr, moving, 0.9, 4)),
        (theory.eamsgd_drift(lr, 0.9, moving, 0.9, 2), theory.eamsgd_drift(lr, 0.9, moving, 0.9, 4)),
    ):
        np.testing.assert_allclose(theory.spectral_radius(two), theory.spectral_radius(four), rtol=1e-6)


def test_without_momentum_eamsgd_is_easgd() -> None:
    plain = theory.spectral_radius(theory.easgd_drift(0.3, 0.1, 0.9, 3))
    assert theory.spectral_radius(theory.eamsgd_drift(0.3, 0.0, 0.1, 0.9, 3)) == pytest.approx(plain)
    v2, _, x2 = theory.msgd_variance(0.3, 0.0)
    assert x2 == pytest.approx(theory.sgd_variance(0.3)) and v2 > 0
    rows = theory.gamma_msgd_moments(0.3, 0.0, 3)
    assert rows[1, 1] == pytest.approx(theory.gamma_sgd_rate(0.3, 3))


@pytest.mark.parametrize("nesterov", [True, False])
def test_msgd_moments(nesterov: bool) -> None:
    lr, delta, h, sigma, v, x = 0.3, 0.8, 1.4, 0.6, 0.7, -1.1
    xi = noises(1, 0.0, sigma)[:, 0]
    after = delta * v - lr * (h * (x + delta * v * nesterov) - xi)
    moved = x + after
    want = [(after**2).mean(), (after * moved).mean(), (moved**2).mean()]
    m = theory.msgd_moments(lr, delta, h, nesterov=nesterov)
    np.testing.assert_allclose(m @ [v * v, v * x, x * x] + (lr * sigma) ** 2, want, rtol=1e-12)


@pytest.mark.parametrize("nesterov", [True, False])
def test_msgd_variance_is_the_fixed_point_and_exists_where_stable(nesterov: bool) -> None:
    lr, delta = np.meshgrid(np.linspace(-0.4, 4.1, 46), np.linspace(-1.3, 1.27, 31))
    m = theory.msgd_moments(lr, delta, nesterov=nesterov)
    stable = theory.msgd_stable(lr, delta, nesterov=nesterov)
    assert np.array_equal(stable, theory.spectral_radius(m) < 1 - 1e-9)
    lr, delta, m = lr[stable], delta[stable], m[stable]
    noise = (lr * 1.2)[:, None] ** 2 * np.ones(3)
    fixed = np.linalg.solve(np.eye(3) - m, noise[..., None])[..., 0]
    found = np.stack(theory.msgd_variance(lr, delta, sigma=1.2, nesterov=nesterov), -1)
    np.testing.assert_allclose(found, fixed, rtol=1e-7)


def test_nesterov_keeps_its_variance_as_momentum_tends_to_one() -> None:
    e = 0.3
    assert theory.msgd_variance(e, 1.0)[2] == pytest.approx((2 - e) / (4 - 3 * e))
    assert theory.msgd_variance(e, 1 - 1e-9, nesterov=False)[2] > 1e6


@pytest.mark.parametrize("nesterov", [True, False])
def test_the_best_momentum_beats_a_grid(nesterov: bool) -> None:
    lr = np.array([0.05, 0.2, 0.6, 1.3, 2.5, 3.6])
    best = theory.msgd_best_momentum(lr / 0.6, 0.6, nesterov=nesterov)
    radius = theory.spectral_radius(theory.msgd_moments(lr / 0.6, best, 0.6, nesterov=nesterov))
    # a triple root: its numerical radius is off by the third root of rounding
    np.testing.assert_allclose(radius, (1 - np.sqrt(lr)) ** 2, atol=3e-5)
    grid = np.linspace(-6, 6, 4001)[:, None]
    on_grid = theory.spectral_radius(theory.msgd_moments(lr, grid, nesterov=nesterov)).min(axis=0)
    assert (on_grid >= radius - 3e-5).all() and (on_grid < radius + 0.01).all()


def test_easgd_moments() -> None:
    lr, moving, rate, h, sigma, workers = 0.4, 0.3, 0.8, 1.1, 0.9, 3
    x, c = np.array([0.3, -1.2, 2.0]), 0.6
    xi = noises(workers, 0.0, sigma)
    after = x - lr * (h * x - xi) + moving * (c - x)
    y, centre = after.mean(axis=1), c + rate * (x.mean() - c)
    want = [(y**2).mean(), y.mean() * centre, centre**2]
    m = theory.easgd_moments(lr, moving, rate, h)
    noise = np.array([(lr * sigma) ** 2 / workers, 0, 0])
    np.testing.assert_allclose(m @ [x.mean() ** 2, x.mean() * c, c * c] + noise, want, rtol=1e-12)


def test_easgd_variance_is_the_fixed_point_and_exists_where_stable() -> None:
    lr, moving, rate = np.meshgrid(np.linspace(0.1, 3, 23), np.linspace(-1.51, 1.5, 17), [0.4, 0.9, 1.7, 2.2])
    m = theory.easgd_moments(lr, moving, rate)
    stable = theory.reduced_easgd_stable(lr, moving, rate)
    assert 200 < stable.sum() < lr.size / 2
    assert not theory.reduced_easgd_stable(
        -lr, moving, -rate
    ).any()  # some of these are, but the range says no
    assert np.array_equal(stable, theory.spectral_radius(m) < 1 - 1e-9)
    lr, moving, rate, m = lr[stable], moving[stable], rate[stable], m[stable]
    noise = np.stack([(lr * 0.8) ** 2 / 5, 0 * lr, 0 * lr], -1)
    fixed = np.linalg.solve(np.eye(3) - m, noise[..., None])[..., 0]
    found = theory.easgd_variance(lr, moving, rate, 5, sigma=0.8)
    np.testing.assert_allclose(np.stack(found, -1), fixed, rtol=1e-6, atol=1e-12)
    assert np.array_equal(found[2] < found[0], rate < 1)


def test_gamma_sgd_rate() -> None:
    lr, shape, rate, workers = 0.4, 1.5, 2.0, 3
    xi = noises(workers, shape / rate, np.sqrt(shape) / rate)
    want = ((1 - lr * xi.mean(axis=1)) ** 2).mean()
    assert theory.gamma_sgd_rate(lr, workers, shape=shape, rate=rate) == pytest.approx(want)


def test_gamma_msgd_moments() -> None:
    lr, delta, shape, rate, workers, v, x = 0.4, 0.6, 1.5, 2.0, 3, 0.7, -1.1
    xi = noises(workers, shape / rate, np.sqrt(shape) / rate).mean(axis=1)
    after = delta * v - lr * xi * (x + delta * v)
    moved = x + after
    want = [(after**2).mean(), (moved**2).mean(), (after * moved).mean()]
    m = theory.gamma_msgd_moments(lr, delta, workers, shape=shape, rate=rate)
    np.testing.assert_allclose(m @ [v * v, x * x, v * x], want, rtol=1e-12)


@pytest.mark.parametrize("moving", [0.3, -0.2, None])
def test_gamma_easgd_moments(moving: float | None) -> None:
    lr, rate, shape, om, workers = 0.4, 0.8, 1.5, 2.0, 3
    alpha = rate / workers if moving is None else moving
    x, c = np.array([0.3, -1.2, 2.0]), 0.6
    xi = noises(workers, shape / om, np.sqrt(shape) / om)
    after, centre = x - lr * xi * x + alpha * (c - x), c + rate * (x.mean() - c)
    mean = after.mean(axis=1)
    want = [centre**2, (after**2).mean(), centre * mean.mean(), (mean**2).mean()]
    m = theory.gamma_easgd_moments(lr, moving, rate, workers, shape=shape, rate=om)
    np.testing.assert_allclose(m @ [c * c, (x**2).mean(), c * x.mean(), x.mean() ** 2], want, rtol=1e-12)


# shape = rate, the end of the figure's learning rates, least radius, its p and eta: Figures 5.15 to 5.18
LEAST = [
    (0.5, 1, 0.5742, 6, 0.3814),
    (1, 1, 0.4317, 7, 0.5225),
    (2, 1, 0.2945, 9, 0.6647),
    (10, 2, 0.0868, 29, 0.8929),
]


@pytest.mark.parametrize(("shape", "end", "radius", "workers", "lr"), LEAST)
def test_the_least_radius_of_easgd_over_a_grid(
    shape: float, end: float, radius: float, workers: int, lr: float
) -> None:
    etas, p = np.linspace(0, end, 1000)[:, None], np.arange(1, 65)  # the thesis' grid, as its digits show
    map_ = theory.spectral_radius(theory.gamma_easgd_moments(etas, None, 0.9, p, shape=shape, rate=shape))
    i, j = np.unravel_index(map_.argmin(), map_.shape)
    assert map_.shape == (1000, 64) and p[j] == workers
    assert round(etas[i, 0], 4) == lr
    assert round(map_.min(), 4) == radius


def test_the_least_radius_of_easgd_over_the_moving_rate() -> None:
    lr, moving = np.linspace(0, 1, 100)[:, None], np.linspace(-1, 1, 100)  # the thesis' grid again
    map_ = theory.spectral_radius(theory.gamma_easgd_moments(lr, moving, 0.9, 100))
    i, j = np.unravel_index(map_.argmin(), map_.shape)
    assert (round(map_.min(), 4), round(lr[i, 0], 4), round(moving[j], 4)) == (0.5024, 0.4343, 0.2525)


@pytest.mark.parametrize(("shape", "radius"), [(0.5, 0.6667), (1, 0.5), (2, 0.3333)])
def test_the_least_radius_of_momentum_sgd_is_without_momentum(shape: float, radius: float) -> None:
    law = {"shape": shape, "rate": shape}
    lr = theory.gamma_sgd_best_lr(**law)
    assert theory.gamma_sgd_rate(lr, **law) == pytest.approx(radius, abs=5e-5)
    momentum = np.linspace(-0.5, 0.5, 101)
    map_ = theory.spectral_radius(theory.gamma_msgd_moments(lr, momentum, **law))
    assert momentum[map_.argmin()] == pytest.approx(0, abs=1e-12)
    assert map_.min() == pytest.approx(radius, abs=5e-5)
    around = theory.gamma_sgd_rate(lr + np.array([-0.01, 0.01]), **law)
    assert (around > map_.min()).all()


@pytest.mark.parametrize("shape", [0.3, 0.5, 2.0])
def test_the_edge_for_many_workers(shape: float) -> None:
    law = {"shape": shape, "rate": 0.7}
    for moving, rate in ((0.2, 0.9), (0.6, 0.5), (0.9, 0.95)):
        edge = theory.gamma_easgd_lr_edge(moving, rate, **law)
        lr = edge * np.array([0.99, 1.01])
        radius = theory.spectral_radius(theory.gamma_easgd_moments(lr, moving, rate, 1e7, **law))
        assert radius[0] < 1 < radius[1]
    edges = theory.gamma_easgd_lr_edge(0.0, 0.9, **law), theory.gamma_easgd_lr_edge(1 - np.sqrt(0.5), 0.9)
    assert edges[0] == pytest.approx(2 * 0.7 / (shape + 1))
    assert edges[1] == pytest.approx(np.sqrt(0.5))
    grid = theory.gamma_easgd_lr_edge(np.linspace(0, 0.99, 991), 0.9)
    assert grid.max() == pytest.approx(np.sqrt(0.5), abs=1e-5) and grid.max() <= np.sqrt(0.5) + 1e-12


def test_the_double_well() -> None:
    rho, h = 0.4, 1e-4
    at = np.array([0.3, -0.7, 0.2])

    def objective(s: np.ndarray) -> np.ndarray:
        x, y, z = s[..., 0], s[..., 1], s[..., 2]
        return ((1 - x**2) ** 2 + (1 - y**2) ** 2) / 4 + rho / 2 * ((x - z) ** 2 + (y - z) ** 2)

    e = h * np.eye(3)
    plus = [[objective(at + e[i] + e[j]) - objective(at + e[i] - e[j]) for j in range(3)] for i in range(3)]
    minus = [[objective(at - e[i] + e[j]) - objective(at - e[i] - e[j]) for j in range(3)] for i in range(3)]
    numerical = (np.array(plus) - np.array(minus)) / (4 * h * h)
    np.testing.assert_allclose(theory.double_well_hessian(rho, 0.3, -0.7), numerical, atol=1e-6)
    split = float(theory.double_well_split(rho))
    around = [objective(np.array([split + s, -split, 0.0])) for s in (-h, h)]
    assert (around[1] - around[0]) / (2 * h) == pytest.approx(0, abs=1e-7)


def test_the_split_point_is_a_minimum_below_two_thirds() -> None:
    rho = np.linspace(0, 1, 201)
    x = theory.double_well_split(rho)
    least = np.linalg.eigvalsh(theory.double_well_hessian(rho, x, -x))[:, 0]
    inside = rho <= 2 / 3
    np.testing.assert_allclose(theory.double_well_least_eigenvalue(rho)[inside], least[inside], atol=1e-12)
    assert np.array_equal(least > 1e-12, (rho > 0) & (rho < 2 / 3))

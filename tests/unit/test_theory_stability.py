"""Where the round robin and the Gauss-Seidel form are stable, and the best moving rate, against their updates."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from mpilsgd import theory


def linear_map(step: Callable[[np.ndarray], np.ndarray], size: int) -> np.ndarray:
    return np.stack([step(unit) for unit in np.eye(size)], axis=1)


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_round_robin_easgd(workers: int) -> None:
    lr, moving = 0.3, 0.2

    def round_(s: np.ndarray) -> np.ndarray:
        x, c = s[:-1].copy(), s[-1]
        for i in range(workers):
            apart = x[i] - c
            x[i], c = x[i] - lr * x[i] - moving * apart, c + moving * apart
        return np.append(x, c)

    found = theory.round_robin_easgd(lr, moving, workers)
    np.testing.assert_allclose(found, linear_map(round_, workers + 1), atol=1e-15)


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_round_robin_admm(workers: int) -> None:
    lr, rho = 0.3, 2.5

    def round_(s: np.ndarray) -> np.ndarray:
        dual, x, c = s[0:-1:2].copy(), s[1:-1:2].copy(), s[-1]
        for i in range(workers):
            dual[i] = dual[i] - (x[i] - c)
            x[i] = (x[i] - lr * x[i] + lr * rho * (dual[i] + c)) / (1 + lr * rho)
            c = (x - dual).mean()
        state = np.empty_like(s)
        state[0:-1:2], state[1:-1:2], state[-1] = dual, x, c
        return state

    found = theory.round_robin_admm(lr, rho, workers)
    np.testing.assert_allclose(found, linear_map(round_, 2 * workers + 1), atol=1e-14)


def test_admm_is_unstable_where_easgd_is_stable() -> None:
    admm = theory.spectral_radius(theory.round_robin_admm(0.001, 2.5, 3))
    easgd = theory.spectral_radius(theory.round_robin_easgd(0.001, 0.001 * 2.5, 3))
    assert admm == pytest.approx(1.0009739, abs=5e-8)
    assert easgd == pytest.approx(0.99927, abs=5e-6)
    lr, rho = np.linspace(1e-4, 1e-2, 20), np.linspace(0.1, 10, 25)[:, None]
    map_ = theory.spectral_radius(theory.round_robin_admm(lr, rho, 3))
    assert map_.shape == (25, 20) and 0 < (map_ > 1 + 1e-9).sum() < map_.size
    assert (theory.spectral_radius(theory.round_robin_easgd(lr, lr * rho, 3)) < 1).all()


def test_the_edge_of_round_robin_easgd_is_sufficient_and_for_one_worker_exact() -> None:
    lr = np.linspace(0.05, 1.95, 20)
    edge = theory.round_robin_easgd_edge(lr)
    for workers in (1, 2, 3, 4):
        inside = theory.spectral_radius(theory.round_robin_easgd(lr, 0.999 * edge, workers))
        assert (inside < 1).all()
    for workers in (1, 3):  # an odd number of turns
        beyond = theory.spectral_radius(theory.round_robin_easgd(lr, 1.02 * edge, workers))
        assert (beyond > 1).all()
    # the erratum: not necessary for an even number
    even = theory.spectral_radius(theory.round_robin_easgd(lr, 1.02 * edge, 2))
    assert (even < 1).any()


def gauss_seidel_step(lr: float, moving: float, rate: float) -> Callable[[np.ndarray], np.ndarray]:
    def step(s: np.ndarray) -> np.ndarray:
        x, c = s[:-1], s[-1]
        half = x - moving * (x - c)
        after = half - lr * half
        return np.append(after, c + rate * (after.mean() - c))

    return step


def test_gauss_seidel_drift() -> None:
    for lr, moving, rate in ((0.3, 0.2, 0.9), (1.5, -0.4, 3.0)):
        found = theory.gauss_seidel_drift(lr, moving, rate)
        np.testing.assert_allclose(found, linear_map(gauss_seidel_step(lr, moving, rate), 2), atol=1e-15)


@pytest.mark.parametrize("workers", [1, 3])
def test_gauss_seidel_is_stable_where_its_updates_are(workers: int) -> None:
    rng = np.random.default_rng(workers)
    lr, moving, rate = rng.uniform(0, 5, 3000), rng.uniform(-2, 4, 3000), rng.uniform(0, 5, 3000)
    maps = np.array(
        [linear_map(gauss_seidel_step(*s), workers + 1) for s in zip(lr, moving, rate, strict=True)]
    )
    want = theory.spectral_radius(maps) < 1
    assert want.sum() > 300
    assert np.array_equal(theory.gauss_seidel_stable(lr, moving, rate, workers), want)
    low, high = theory.gauss_seidel_moving_rates(lr, rate, workers)
    assert np.array_equal((low < moving) & (moving < high), want)
    low, high = theory.gauss_seidel_lrs(moving, rate, workers)
    assert np.array_equal((low < lr) & (lr < high), want)


@pytest.mark.parametrize("workers", [1, 3])
def test_the_edges_of_gauss_seidel_where_a_factor_is_zero(workers: int) -> None:
    """At eta = 1, beta = 1 or alpha = 1 the ends are infinite or none."""
    one = np.array([0.25, 1.0, 1.75, 3.0])
    lr, moving, rate = np.meshgrid(one, np.array([-0.3, 0.5, 1.0, 1.6]), one)
    want = theory.gauss_seidel_stable(lr, moving, rate, workers)
    low, high = theory.gauss_seidel_moving_rates(lr, rate, workers)
    assert np.array_equal((low < moving) & (moving < high), want)
    low, high = theory.gauss_seidel_lrs(moving, rate, workers)
    assert np.array_equal((low < lr) & (lr < high), want)
    assert 0 < want.sum() < want.size


def test_several_workers_need_more_than_theorem_6_2_1() -> None:
    point = {"lr": 0.2, "moving_rate": 2.4, "center_rate": 0.9}
    assert theory.gauss_seidel_stable(**point, workers=1)
    assert not theory.gauss_seidel_stable(**point, workers=2)


def test_downpour_is_stable_below_one_eighth_and_alpha_below_one_nowhere() -> None:
    low, high = theory.gauss_seidel_lrs(1.0, 16, 16)
    assert (low, high) == (0, pytest.approx(1 / 8))
    assert np.isnan(theory.gauss_seidel_lrs(0.9, 16, 16)).all()
    lr = np.linspace(1e-3, 6, 6000)
    assert not theory.gauss_seidel_stable(lr, 0.9, 16, 16).any()
    inside = theory.spectral_radius(theory.gauss_seidel_drift(np.array([0.1249, 0.1251]), 1.0, 16))
    assert inside[0] < 1 < inside[1]


def test_the_best_moving_rate_beats_a_grid() -> None:
    rng = np.random.default_rng(1)
    lr, rate = rng.uniform(0.02, 4, 120), rng.uniform(0.02, 2.5, 120)
    grid = np.linspace(-8, 4, 8001)[:, None]
    for workers in (1, 2):
        best = theory.best_moving_rate(lr, rate, workers)
        radius = theory.easgd_radius(lr, best, rate, workers)
        on_grid = theory.easgd_radius(lr, grid, rate, workers).min(axis=0)
        assert (radius <= on_grid + 1e-7).all() and (radius > on_grid - 0.06).all()
    np.testing.assert_allclose(theory.best_moving_rate(lr, rate, 1), -((np.sqrt(rate) - np.sqrt(lr)) ** 2))
    np.testing.assert_allclose(theory.best_moving_rate(lr / 0.7, rate, 2, 0.7), best, atol=1e-12)


def test_the_best_moving_rate_of_the_erratum() -> None:
    lr, rate = 1.5, 0.9
    printed = -((np.sqrt(rate) - np.sqrt(lr)) ** 2)
    assert printed == pytest.approx(-0.0762, abs=5e-5)
    assert theory.easgd_radius(lr, printed, rate, 2) == pytest.approx(0.4238, abs=5e-5)
    best = theory.best_moving_rate(lr, rate, 2)
    assert best == pytest.approx(-0.1633, abs=5e-5)
    assert (lr - 1 + best) ** 2 == pytest.approx((1 - lr) * (1 - rate) - best)
    assert theory.easgd_radius(lr, best, rate, 2) == pytest.approx(0.3367, abs=5e-5)
    drift = theory.easgd_drift(lr, best, rate, 4)
    assert theory.spectral_radius(drift) == pytest.approx(0.3367, abs=5e-5)
    # beta >= eta_h: 0 is best, as long as beta + eta_h <= 2
    lr, rate = np.array([0.1, 0.5, 0.9]), np.array([0.9, 1.2, 1.0])
    assert np.abs(theory.best_moving_rate(lr, rate, 2)).max() < 1e-12
    # beyond that it is not
    best = theory.best_moving_rate(1.2, 1.7, 2)
    assert best == pytest.approx(-0.0434, abs=5e-5)
    assert theory.easgd_radius(1.2, best, 1.7, 2) == pytest.approx(0.4283, abs=5e-5)
    assert theory.easgd_radius(1.2, 0.0, 1.7, 2) == pytest.approx(0.7)


def test_the_unstable_workers_of_figure_5_3_leave_the_centre_alone() -> None:
    """Sum v = 0 is an eigenvector (v, 0) of factor 1 - alpha - eta_h = 1.3: the centre's part is 0."""
    lr, rate = 0.1, 0.9
    moving = theory.best_moving_rate(lr, rate, 1)
    drift = theory.easgd_drift(lr, moving, rate, 4)
    apart = np.array([1.0, -1.0, 0.0, 0.0, 0.0])
    np.testing.assert_allclose(drift @ apart, (1 - moving - lr) * apart, atol=1e-15)
    assert 1 - moving - lr == pytest.approx(1.3)

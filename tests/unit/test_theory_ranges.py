"""Every function of the theory: one call on arrays equals a loop over numbers, and its ranges have names."""

from __future__ import annotations

import inspect
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from mpilsgd import theory

CONVEX = {"convexity": 0.5, "smoothness": 2.0}
LAW = {"shape": 0.5, "rate": 0.7}
STICH = {**CONVEX, "sigma": 1.0, "gradient": 2.0}
DECAY = [0.2, 0.9]
A = np.diag([1.0, 5.0])

# name, arguments (lists are what is vectorised: each along an axis of its own), keyword arguments
CASES: list[tuple[str, list[Any], dict[str, Any]]] = [
    ("averaged_center_covariance", [np.eye(2), np.eye(2), [1, 4]], {}),
    ("best_moving_rate", [[0.3, 1.5], [0.4, 0.9, 1.7], [1, 2]], {}),
    ("center_bias", [[0, 3, np.inf], [0.3, 1.5], [0.4, 0.9], [1, 5]], {"workers_start": -2.0}),
    ("center_mse", [[0, 3, np.inf], [0.3, 2.5], [0.4, 0.9], [1, 5]], {"sigma": 2.0}),
    ("center_variance", [[0, 3, np.inf], [0.3, 2.5], [0.4, 0.9], [1, 5]], {"sigma": 2.0}),
    ("contraction", [[1.0, 5.0], [0.2, 1.0]], {}),
    ("convex_eigenvalues", [[0.1, 0.2], [0.1, 0.3], [0.4, 0.9]], CONVEX),
    ("convex_limit", [[0.05, 0.1], [0.1, 0.3], [1, 4]], CONVEX),
    ("convex_lr_edge", [[0.1, 0.3]], CONVEX),
    ("convex_matrix", [[0.1, 0.2], [0.1, 0.3], [0.4, 0.9]], CONVEX),
    ("double_well_hessian", [[0.1, 0.5], [0.3, -1], [2.0, 0.1]], {}),
    ("double_well_least_eigenvalue", [[0.0, 0.5, 1.0]], {}),
    ("double_well_split", [[0.0, 0.5, 1.0]], {}),
    ("eamsgd_drift", [[0.1, 0.5], [0.0, 0.9], [-0.1, 0.3], [0.4, 0.9], 3], {}),
    ("easgd_drift", [[0.1, 0.5], [-0.1, 0.3], [0.4, 0.9], 3], {}),
    ("easgd_eigenvalues", [[0.1, 0.5], [0.4, 0.9], [1, 7]], {}),
    ("easgd_moments", [[0.1, 0.5], [-0.1, 0.3], [0.4, 0.9]], {}),
    ("easgd_radius", [[0.1, 0.5], [-0.1, 0.3], [0.4, 0.9], [1, 3]], {}),
    ("easgd_stable", [[0.1, 1.5, 2.5], [0.4, 1.9], [1, 7]], {}),
    ("easgd_variance", [[0.1, 0.5], [-0.1, 0.3], [0.4, 0.9], [1, 3]], {}),
    ("elastic_trap", [[0.1, 1.0]], {}),
    ("farthest_level_point", [[1, 40], [0.2, 1.0]], {}),
    ("gamma_easgd_lr_edge", [[0, 0.5], [0.4, 0.9]], LAW),
    ("gamma_easgd_moments", [[0.1, 0.5], [-0.1, 0.3], [0.4, 0.9], [1, 3]], LAW),
    ("gamma_msgd_moments", [[0.1, 0.5], [-0.1, 0.9], [1, 3]], LAW),
    ("gamma_sgd_best_lr", [[1, 4]], LAW),
    ("gamma_sgd_rate", [[0.1, 0.5], [1, 4]], LAW),
    ("gauss_seidel_drift", [[0.1, 1.5], [0.1, 1.0], [0.9, 16]], {}),
    ("gauss_seidel_lrs", [[0.1, 1.0], [0.9, 16], [1, 4]], {}),
    ("gauss_seidel_moving_rates", [[0.1, 1.0, 3.0], [0.9, 16], [1, 4]], {}),
    ("gauss_seidel_stable", [[0.1, 1.5], [0.1, 1.0], [0.9, 16], [1, 4]], {}),
    ("largest_angle_ratio", [[1, 200, 1e6]], {}),
    ("leader_descends", [[0.1, 0.9], [0, 0.5]], {"smoothness": 2.0}),
    ("leader_gradient_sum", [[0.1, 2.0], [0.1, 0.9]], {"smoothness": 2.0}),
    ("leader_limit", [[0.05, 0.1], [0, 0.1]], {**CONVEX, "sigma": 1.0, "workers": 4, "loss_sigma": 0.1}),
    ("leader_lr_edge", [], {"smoothness": 2.0, "nu": 0.5}),
    ("leader_pull_edge", [], CONVEX),
    ("leader_step", [[0.5, 2], [0.1, 3], [0.05, 0.1], [0, 0.1]], {**CONVEX, "sigma": 1.0}),
    ("least_gradient", [[1, 50], [0.5, 2], [0.1, 1]], {}),
    ("linear_best_period", [[1e-6, 0.3], DECAY], {}),
    ("linear_best_period_asymptotic", [[1e-6, 0.3], DECAY], {}),
    ("linear_cost", [[1, 30], [0, 0.3], DECAY], {}),
    ("linear_decay_sum", [[1, np.inf], DECAY], {}),
    ("local_descent", [[0.1, 0.9], [1.0, 2.0]], {}),
    ("local_sgd_bound", [[10, 1000], [1, 8], [1, 50]], {**STICH, "distance": 3.0}),
    ("local_sgd_deviation", [[0.1, 0.2], [1, 50]], {"gradient": 2.0}),
    ("local_sgd_longest_period", [[10, 1e7], [1, 8]], STICH),
    ("local_sgd_lr", [[0, 7], [64, 100]], {"convexity": 0.5}),
    ("local_sgd_shift", [[1, 100]], CONVEX),
    ("local_sgd_weight_sum", [[1, 100], [3, 64]], {}),
    ("many_workers_mse", [[0.1, 1.5], [0.4, 1.9]], {"sigma": 2.0}),
    ("msgd_best_momentum", [[0.1, 1.0, 3.5]], {}),
    ("msgd_moments", [[0.1, 0.5], [-0.1, 0.9]], {}),
    ("msgd_stable", [[0.1, 5], [-0.1, 0.9]], {}),
    ("msgd_variance", [[0.1, 0.5], [-0.1, 0.9]], {}),
    ("newton_cosine", [np.array([1.0, 2.0]), A], {}),
    ("power_best_period", [[1e-6, 0.3], [0.1, 2.0], [1.2, 3.0]], {}),
    ("power_best_period_asymptotic", [[1e-6, 0.3], [0.1, 2.0], [1.2, 3.0]], {}),
    ("power_cost", [[1, 30], [0, 0.3], [0.1, 2.0], [1.2, 3.0]], {}),
    ("power_decay", [[2, 3], [0.1, 0.01], [-1.0, 2.0]], {}),
    ("power_decay_sum", [[1, 30], [0.1, 2.0], [1.2, 3.0]], {}),
    ("reduced_easgd_stable", [[0.1, 2.5], [-0.1, 0.3], [0.4, 1.9]], {}),
    ("round_robin_admm", [[0.1, 0.5], [0.5, 2.5], 3], {}),
    ("round_robin_easgd", [[0.1, 0.5], [0.5, -0.1], 3], {}),
    ("round_robin_easgd_edge", [[0, 0.5, 2]], {}),
    ("rounds_bound", [[0.5, 2.0]], {"distance": 1.0, "descent": 0.5, "tolerance": 0.1}),
    ("sgd_variance", [[0.1, 1.5], [1, 4]], {}),
    ("small_pull_share", [np.array([1.0, 2.0]), A], {}),
    ("spectral_radius", [np.stack([A, 2 * A])], {}),
    ("stale_leader_distance", [[0.5, 2.0], [0, 3.0]], {"convexity": 0.5}),
    ("stale_leader_gap", [[0.5, 2.0], [0, 3.0]], {"convexity": 0.5}),
    ("stochastic_leader_excess", [[1, 9], [0, 0.2]], {}),
    ("tangent_gradient", [[1, 100], [0.1, 0.4], [1, 10]], {}),
    ("two_lines_separation", [[0.1, np.pi / 2]], {}),
    ("two_slopes", [[-3, -1, 0.2, 1, 4]], {}),
    ("wrong_leader_probability", [[0.1, 5], [1, 9], [0, 0.2]], {}),
]

# those whose arguments are points or lists: their tests are with the others of their kind
ELSEWHERE = {
    "affine_separation",
    "angle_improves",
    "elastic_objective_gradient",
    "leader_objective_gradient",
    "local_sgd_gap",
}


def test_every_function_is_listed() -> None:
    assert sorted([name for name, _, _ in CASES] + list(ELSEWHERE)) == sorted(theory.__all__)


def parts(result: Any) -> list[np.ndarray]:
    return [np.asarray(part) for part in (result if isinstance(result, tuple) else (result,))]


@pytest.mark.parametrize(("name", "arguments", "options"), CASES, ids=[name for name, _, _ in CASES])
def test_one_call_equals_a_loop(name: str, arguments: list[Any], options: dict[str, Any]) -> None:
    function = getattr(theory, name)
    axes = [k for k, value in enumerate(arguments) if isinstance(value, list)]
    grid = list(arguments)
    for place, k in enumerate(axes):
        shape = [1] * len(axes)
        shape[place] = -1
        grid[k] = np.array(arguments[k]).reshape(shape)
    together = parts(function(*grid, **options))
    sizes = [len(arguments[k]) for k in axes]
    for index in np.ndindex(*sizes):
        alone = list(arguments)
        for place, k in enumerate(axes):
            alone[k] = arguments[k][index[place]]
        for part, single in zip(together, parts(function(*alone, **options)), strict=True):
            # a result that an axis does not touch has length 1 along it
            spot = tuple(min(i, n - 1) for i, n in zip(index, part.shape, strict=False))
            np.testing.assert_allclose(part[spot], single, rtol=1e-12, atol=1e-14)


def test_a_map_over_400_x_400_is_one_call() -> None:
    lr, moving = np.linspace(0.005, 2, 400), np.linspace(-1, 1, 400)[:, None]
    radius = theory.easgd_radius(lr, moving, 0.9, 2)
    assert radius.shape == (400, 400) and 0 < (radius < 1).sum() < radius.size
    few = theory.spectral_radius(theory.easgd_drift(lr[::40], moving[::40], 0.9, 2))
    np.testing.assert_allclose(radius[::40, ::40], few, rtol=1e-6)


OUTSIDE = [
    ("easgd_eigenvalues", (0.1, 0.0, 4), {}, "center_rate > 0"),
    ("easgd_eigenvalues", (0.1, 0.9, 0.5), {}, "workers >= 1"),
    ("easgd_stable", (0.1, 0.9, 0), {}, "workers >= 1"),
    ("easgd_stable", (0.1, 0.9, 1, -1.0), {}, "curvature > 0"),
    ("center_bias", (-1, 0.1, 0.9, 4), {}, "steps >= 0"),
    ("center_variance", (3, 0.1, 0.9, 4), {"sigma": -1.0}, "sigma >= 0"),
    ("many_workers_mse", (2.0, 0.9), {}, r"0 < lr < 2 / curvature"),
    ("many_workers_mse", (0.5, 2.0), {}, r"0 < center_rate < 2"),
    ("averaged_center_covariance", (-np.eye(2), np.eye(2), 1), {}, "positive definite"),
    ("convex_matrix", (0.9, 0.1, 0.5), CONVEX, r"lr <= 2 \(1 - moving_rate\)"),
    ("convex_matrix", (0.1, 1.0, 0.5), CONVEX, "moving_rate < 1"),
    ("convex_matrix", (0.1, 0.1, 1.5), CONVEX, "center_rate <= 1"),
    ("convex_matrix", (0.1, 0.1, 0.5), {"convexity": 3, "smoothness": 2}, "convexity <= smoothness"),
    ("convex_lr_edge", (1.0,), CONVEX, "moving_rate < 1"),
    ("convex_limit", (0.1, 0.1, 0), CONVEX, "workers >= 1"),
    ("convex_limit", (0.7, 0.1, 4), CONVEX, "convex_lr_edge"),
    ("round_robin_easgd", (0.1, 0.1, 0), {}, "workers"),
    ("round_robin_easgd", (0.1, 0.1, 2.0), {}, "whole number"),
    ("round_robin_easgd_edge", (2.1,), {}, "0 <= lr <= 2"),
    ("round_robin_admm", (-1.0, 2.0, 3), {}, "lr rho > -1"),
    ("sgd_variance", (2.0,), {}, "0 < lr < 2 / curvature"),
    ("msgd_variance", (0.5, 1.0), {"nesterov": False}, "-1 < delta_h < 1"),
    ("msgd_best_momentum", (4.0,), {}, "0 < lr < 4 / curvature"),
    ("msgd_moments", (0.1, 0.9, 0.0), {}, "curvature > 0"),
    ("easgd_variance", (0.1, 3.0, 0.9, 4), {}, r"\(2 - beta\)\(2 - eta_h\) > 2 alpha"),
    ("easgd_drift", (0.1, 0.1, 0.9, True), {}, "workers"),
    ("easgd_radius", (0.1, 0.1, 0.9, 0.0), {}, "workers >= 1"),
    ("best_moving_rate", (0.0, 0.9, 2), {}, "lr > 0"),
    ("best_moving_rate", (0.1, 0.0, 2), {}, "center_rate > 0"),
    ("gamma_sgd_rate", (0.1, 1), {"shape": 0.0}, "shape > 0"),
    ("gamma_easgd_moments", (0.1, 0.1, 0.9, 4), {"rate": -1}, "rate > 0"),
    ("gamma_easgd_lr_edge", (1.0, 0.5), {}, "moving_rate < 1"),
    ("gamma_easgd_lr_edge", (0.5, 1.0), {}, "center_rate < 1"),
    ("double_well_split", (1.1,), {}, "0 <= rho <= 1"),
    ("double_well_least_eigenvalue", (-0.1,), {}, "0 <= rho <= 1"),
    ("gauss_seidel_stable", (0.1, 0.1, 0.9, 0), {}, "workers >= 1"),
    ("gauss_seidel_moving_rates", (0.0, 0.9, 2), {}, "lr > 0"),
    ("gauss_seidel_lrs", (0.1, 0.0, 2), {}, "center_rate > 0"),
    ("local_sgd_shift", (0.5,), CONVEX, "period >= 1"),
    ("local_sgd_lr", (-1, 64), {"convexity": 1}, "step >= 0"),
    ("local_sgd_weight_sum", (0, 64), {}, "steps >= 1"),
    ("local_sgd_deviation", (0.0, 4), {"gradient": 1}, "lr > 0"),
    ("local_sgd_bound", (100, 0, 4), {**STICH, "distance": 1}, "workers >= 1"),
    ("local_sgd_longest_period", (100, 4), {**STICH, "gradient": 0}, "gradient > 0"),
    ("local_sgd_longest_period", (100, 4), {**STICH, "shift": 10}, "16 smoothness / convexity"),
    ("local_descent", (1.0, 2.0), {}, "0 < lr < 2 / smoothness"),
    ("least_gradient", (0, 1, 1), {}, "rounds >= 1"),
    ("contraction", (0.5,), {}, "separation >= 1"),
    ("contraction", (5, 1.5), {}, "conditioning <= 1"),
    ("two_lines_separation", (0.0,), {}, "0 < angle <= pi / 2"),
    ("tangent_gradient", (10, 0.5, 4), {}, "0 < lr < 1/2"),
    ("rounds_bound", (0.0,), {"distance": 1, "descent": 1, "tolerance": 1}, "decay_sum > 0"),
    ("rounds_bound", (1.0,), {"distance": 1, "descent": 1, "tolerance": 0}, "tolerance > 0"),
    ("linear_decay_sum", (0, 0.5), {}, "period > 0"),
    ("linear_cost", (1, -0.1, 0.5), {}, "cost_ratio >= 0"),
    ("linear_best_period", (0.0, 0.5), {}, "cost_ratio > 0"),
    ("linear_best_period", (0.1, 1.0), {}, "0 < decay < 1"),
    ("linear_best_period_asymptotic", (0.1, 1.0), {}, "0 < decay < 1"),
    ("power_decay", (1, 0.1, 1), {}, "order > 1"),
    ("power_decay", (2, 0.1, 0), {}, "start, not 0"),
    ("power_decay_sum", (0, 1, 2), {}, "period >= 1"),
    ("power_cost", (1, 0.1, 1, 1.0), {}, "exponent > 1"),
    ("power_best_period", (0.1, 0.0, 2), {}, "scale > 0"),
    ("power_best_period_asymptotic", (0.0, 1.0, 2), {}, "cost_ratio > 0"),
    ("leader_lr_edge", (), {"smoothness": 0}, "smoothness > 0"),
    ("leader_pull_edge", (), {"convexity": 3, "smoothness": 2}, "convexity <= smoothness"),
    ("leader_step", (1, 1, 0.3, 0.1), CONVEX, r"lr <= 1 / \(2 smoothness"),
    ("leader_step", (1, 1, 0.1, 0.2), CONVEX, r"pull <= convexity / \(2 smoothness\)"),
    ("leader_limit", (0.1, 0.1), {**CONVEX, "sigma": -1}, "sigma >= 0"),
    ("stale_leader_gap", (1, -1), {"convexity": 1}, "strength >= 0"),
    ("stale_leader_distance", (1, 1), {"convexity": 0}, "convexity > 0"),
    ("stochastic_leader_excess", (0, 1), {}, "workers >= 1"),
    ("wrong_leader_probability", (0, 4, 1), {}, "excess > 0"),
    ("leader_descends", (0.1, -0.1), {"smoothness": 1}, "pull >= 0"),
    ("leader_gradient_sum", (1, 1.0), {"smoothness": 2}, "0 < lr < 2 / smoothness"),
    ("newton_cosine", ([0.0, 0.0], A), {}, "x, not 0"),
    ("angle_improves", ([1.0, 1.0], [0.0, 0.0], -1.0, A), {}, "strength >= 0"),
    ("small_pull_share", ([1.0, 0.0], A), {}, "angle above 0"),
    ("largest_angle_ratio", (0.5,), {}, "kappa >= 1"),
    ("farthest_level_point", (4, 0.0), {}, "0 < cosine <= 1"),
    ("leader_objective_gradient", ([[0.0]], [0.0], [[0.0]], -1.0), {}, "strength >= 0"),
    ("elastic_objective_gradient", ([[0.0]], [0.0], [[0.0]], -1.0), {}, "strength >= 0"),
    ("elastic_trap", (1.5,), {}, "0 < strength <= 1"),
    ("spectral_radius", (np.ones(3),), {}, "square matrices"),
]


@pytest.mark.parametrize(("name", "arguments", "options", "range_"), OUTSIDE)
def test_a_value_outside_its_range_is_refused_by_name(
    name: str, arguments: tuple[Any, ...], options: dict[str, Any], range_: str
) -> None:
    with pytest.raises(ValueError, match=range_):
        getattr(theory, name)(*arguments, **options)


def test_every_function_with_a_range_says_so() -> None:
    any_number = {"double_well_hessian", "gauss_seidel_drift", "two_slopes"}
    for name in set(theory.__all__) - any_number:
        doc = inspect.getdoc(getattr(theory, name)) or ""
        assert "ValueError: " in doc or "Arguments, errors: " in doc, name


def test_the_units_are_those_of_the_thesis() -> None:
    """A unit curvature and unit noise, a standard normal input (5.2), Nesterov's momentum, and no more."""
    usual = {
        "curvature": 1.0,
        "sigma": 1.0,
        "shape": 0.5,
        "rate": 0.5,
        "nesterov": True,
        "center_start": 1.0,
        "workers_start": 1.0,
    }
    elsewhere = {"nu": 0.0, "batch": 1, "shift": None, "workers": 1, "loss_sigma": 0.0, "conditioning": 1.0}
    for name in theory.__all__:
        for parameter in inspect.signature(getattr(theory, name)).parameters.values():
            if parameter.default is parameter.empty or (name, parameter.name) == ("leader_step", "sigma"):
                continue
            assert parameter.default == (usual | elsewhere)[parameter.name], (name, parameter.name)


def test_the_refusal_shows_the_first_value_and_nan_is_outside() -> None:
    with pytest.raises(ValueError, match=r"needs 0 < decay < 1, not decay = 1\.5"):
        theory.linear_decay_sum(3, [0.5, 1.5, 2.5])
    with pytest.raises(ValueError, match="decay = nan"):
        theory.linear_decay_sum(3, np.nan)


def test_it_stands_alone() -> None:
    """It loads nothing of the package but itself, and scipy only when asked."""
    code = (
        "import sys, mpilsgd.theory\n"
        "mine = [m for m in sys.modules if m.startswith('mpilsgd.') and not m.startswith('mpilsgd.theory')]\n"
        "other = [m for m in ('scipy', 'torch', 'mpi4py') if m in sys.modules]\n"
        "assert not mine + other, (mine, other)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)

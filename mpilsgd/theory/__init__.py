"""The closed forms of the five papers, as corrected: stability, variance, rates, best settings.

Every function takes numbers or arrays that broadcast, and returns arrays: a map over a grid is one call. Matrices are
in the last two axes, for `spectral_radius`. Parameters outside a formula's range raise a ValueError that names the
range. `docs/theory.md` lists them by question. Where a docstring says so, scipy is needed.
"""

from mpilsgd.theory.additive import (
    eamsgd_drift,
    easgd_drift,
    easgd_moments,
    easgd_variance,
    reduced_easgd_stable,
)
from mpilsgd.theory.convex import (
    convex_eigenvalues,
    convex_limit,
    convex_lr_edge,
    convex_matrix,
)
from mpilsgd.theory.double_well import (
    double_well_hessian,
    double_well_least_eigenvalue,
    double_well_split,
)
from mpilsgd.theory.easgd import (
    averaged_center_covariance,
    center_bias,
    center_mse,
    center_variance,
    easgd_eigenvalues,
    easgd_stable,
    many_workers_mse,
)
from mpilsgd.theory.gauss_seidel import (
    gauss_seidel_drift,
    gauss_seidel_lrs,
    gauss_seidel_moving_rates,
    gauss_seidel_stable,
)
from mpilsgd.theory.leader import (
    leader_descends,
    leader_gradient_sum,
    leader_limit,
    leader_lr_edge,
    leader_pull_edge,
    leader_step,
    stale_leader_distance,
    stale_leader_gap,
    stochastic_leader_excess,
    wrong_leader_probability,
)
from mpilsgd.theory.leader_angle import (
    angle_improves,
    farthest_level_point,
    largest_angle_ratio,
    newton_cosine,
    small_pull_share,
)
from mpilsgd.theory.local import (
    local_sgd_bound,
    local_sgd_deviation,
    local_sgd_gap,
    local_sgd_longest_period,
    local_sgd_lr,
    local_sgd_shift,
    local_sgd_weight_sum,
)
from mpilsgd.theory.momentum import (
    msgd_best_momentum,
    msgd_moments,
    msgd_stable,
    msgd_variance,
    sgd_variance,
)
from mpilsgd.theory.moving_rate import (
    best_moving_rate,
    easgd_radius,
)
from mpilsgd.theory.multiplicative import (
    gamma_easgd_lr_edge,
    gamma_easgd_moments,
    gamma_msgd_moments,
    gamma_sgd_best_lr,
    gamma_sgd_rate,
)
from mpilsgd.theory.overparameterized import (
    affine_separation,
    contraction,
    least_gradient,
    local_descent,
    tangent_gradient,
    two_lines_separation,
)
from mpilsgd.theory.periods import (
    linear_best_period,
    linear_best_period_asymptotic,
    linear_cost,
    linear_decay_sum,
    power_best_period,
    power_best_period_asymptotic,
    power_cost,
    power_decay,
    power_decay_sum,
    rounds_bound,
)
from mpilsgd.theory.ranges import (
    spectral_radius,
)
from mpilsgd.theory.round_robin import (
    round_robin_admm,
    round_robin_easgd,
    round_robin_easgd_edge,
)
from mpilsgd.theory.stationary import (
    elastic_objective_gradient,
    elastic_trap,
    leader_objective_gradient,
    two_slopes,
)

__all__ = [
    "affine_separation",
    "angle_improves",
    "averaged_center_covariance",
    "best_moving_rate",
    "center_bias",
    "center_mse",
    "center_variance",
    "contraction",
    "convex_eigenvalues",
    "convex_limit",
    "convex_lr_edge",
    "convex_matrix",
    "double_well_hessian",
    "double_well_least_eigenvalue",
    "double_well_split",
    "eamsgd_drift",
    "easgd_drift",
    "easgd_eigenvalues",
    "easgd_moments",
    "easgd_radius",
    "easgd_stable",
    "easgd_variance",
    "elastic_objective_gradient",
    "elastic_trap",
    "farthest_level_point",
    "gamma_easgd_lr_edge",
    "gamma_easgd_moments",
    "gamma_msgd_moments",
    "gamma_sgd_best_lr",
    "gamma_sgd_rate",
    "gauss_seidel_drift",
    "gauss_seidel_lrs",
    "gauss_seidel_moving_rates",
    "gauss_seidel_stable",
    "largest_angle_ratio",
    "leader_descends",
    "leader_gradient_sum",
    "leader_limit",
    "leader_lr_edge",
    "leader_objective_gradient",
    "leader_pull_edge",
    "leader_step",
    "least_gradient",
    "linear_best_period",
    "linear_best_period_asymptotic",
    "linear_cost",
    "linear_decay_sum",
    "local_descent",
    "local_sgd_bound",
    "local_sgd_deviation",
    "local_sgd_gap",
    "local_sgd_longest_period",
    "local_sgd_lr",
    "local_sgd_shift",
    "local_sgd_weight_sum",
    "many_workers_mse",
    "msgd_best_momentum",
    "msgd_moments",
    "msgd_stable",
    "msgd_variance",
    "newton_cosine",
    "power_best_period",
    "power_best_period_asymptotic",
    "power_cost",
    "power_decay",
    "power_decay_sum",
    "reduced_easgd_stable",
    "round_robin_admm",
    "round_robin_easgd",
    "round_robin_easgd_edge",
    "rounds_bound",
    "sgd_variance",
    "small_pull_share",
    "spectral_radius",
    "stale_leader_distance",
    "stale_leader_gap",
    "stochastic_leader_excess",
    "tangent_gradient",
    "two_lines_separation",
    "two_slopes",
    "wrong_leader_probability",
]

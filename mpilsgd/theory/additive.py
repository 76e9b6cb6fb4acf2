"""EASGD and EAMSGD with additive noise, alpha and beta free of each other: moments, drift, the best moving rate.

    x^i <- x^i - eta (h x^i - xi^i) + alpha (c - x^i);    c <- c + beta (y - c);    y the workers' mean

What y and c do is the reduced system; the differences between workers shrink by 1 - alpha - eta h a step, which the
reduced system does not show.

The names: eta `lr`, delta `momentum`, alpha `moving_rate`, beta `center_rate`, p `workers`, h `curvature`. Source:
thesis 5.1.3.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from mpilsgd.theory.ranges import Array, floats, need, stacked, whole_workers


def easgd_moments(
    lr: ArrayLike, moving_rate: ArrayLike, center_rate: ArrayLike, curvature: ArrayLike = 1.0
) -> Array:
    """The matrix of one step of (E y^2, E y c, E c^2); the noise adds eta^2 sigma^2 / p to the first.

            | k^2      2 alpha k                   alpha^2          |
        M = | k beta   k (1 - beta) + alpha beta   alpha (1 - beta) |    k = 1 - eta h - alpha
            | beta^2   2 beta (1 - beta)           (1 - beta)^2     |

    Arguments (they broadcast): `lr`, `moving_rate`, `center_rate` any; `curvature` h > 0.

    ValueError: `curvature` outside its range. Source: thesis (5.12).
    """
    e, a, b = _scaled(lr, moving_rate, center_rate, curvature)
    k = 1 - e - a
    return stacked(
        [
            [k * k, 2 * a * k, a * a],
            [k * b, k * (1 - b) + a * b, a * (1 - b)],
            [b * b, 2 * b * (1 - b), (1 - b) ** 2],
        ]
    )


def reduced_easgd_stable(
    lr: ArrayLike, moving_rate: ArrayLike, center_rate: ArrayLike, curvature: ArrayLike = 1.0
) -> Array:
    """Whether the reduced system is stable, which for one worker is the whole of it.

        eta_h > 0,  beta > 0,  (2 - beta)(2 - eta_h) > 2 alpha,  0 < alpha + beta + eta_h - beta eta_h < 2

    Several workers need |1 - alpha - eta_h| < 1 besides.

    Arguments, errors: `easgd_moments`. Source: thesis (5.15); it is necessary, too.
    """
    e, a, b = _scaled(lr, moving_rate, center_rate, curvature)
    both = a + b + e - b * e
    return (e > 0) & (b > 0) & ((2 - b) * (2 - e) > 2 * a) & (both > 0) & (both < 2)


def easgd_variance(
    lr: ArrayLike,
    moving_rate: ArrayLike,
    center_rate: ArrayLike,
    workers: ArrayLike,
    curvature: ArrayLike = 1.0,
    *,
    sigma: ArrayLike = 1.0,
) -> tuple[Array, Array, Array]:
    """The asymptotic moments E y^2, E y c, E c^2 of the workers' mean y and the centre c.

        ((2 - beta)(1 - beta) eta_h + beta (2 - alpha - beta),  beta ((2 - beta)(1 - eta_h) - alpha),
         -beta (1 - beta) eta_h + beta (2 - alpha - beta))
        times eta^2 sigma^2 / (p eta_h ((2 - beta)(2 - eta_h) - 2 alpha)(alpha + beta + eta_h (1 - beta)))

    The centre's is below the mean's for beta < 1, above it for beta > 1.

    Arguments (they broadcast): `lr`, `moving_rate`, `center_rate` where `reduced_easgd_stable`; `workers` p >= 1;
    `curvature` h > 0; `sigma` >= 0.

    ValueError: an argument outside its range. Source: thesis (5.13), (5.14).
    """
    p, sigma, eta = floats(workers, sigma, lr)
    need("workers >= 1", p >= 1, workers=p)
    need("sigma >= 0", sigma >= 0, sigma=sigma)
    e, a, b = _scaled(lr, moving_rate, center_rate, curvature)
    stable = reduced_easgd_stable(lr, moving_rate, center_rate, curvature)
    need(
        "lr > 0, center_rate > 0, (2 - beta)(2 - eta_h) > 2 alpha, 0 < alpha + beta + eta_h (1 - beta) < 2",
        stable,
        eta_h=e,
        alpha=a,
        beta=b,
    )
    scale = (eta * sigma) ** 2 / (p * e * ((2 - b) * (2 - e) - 2 * a) * (a + b + e * (1 - b)))
    common = b * (2 - a - b)
    return (
        ((2 - b) * (1 - b) * e + common) * scale,
        b * ((2 - b) * (1 - e) - a) * scale,
        (common - b * (1 - b) * e) * scale,
    )


def easgd_drift(
    lr: ArrayLike,
    moving_rate: ArrayLike,
    center_rate: ArrayLike,
    workers: int,
    curvature: ArrayLike = 1.0,
) -> Array:
    """The matrix of one step of the expected (x^1, ..., x^p, c).

        x^i <- (1 - alpha - eta h) x^i + alpha c;    c <- (1 - beta) c + (beta / p) sum_i x^i

    Its eigenvalues: 1 - alpha - eta_h, p - 1 times, and the two roots of (1 - beta - z)(1 - alpha - eta_h - z) =
    alpha beta; so all p > 1 have one radius.

    Arguments: `lr`, `moving_rate`, `center_rate` any and `curvature` h > 0, arrays that broadcast; `workers` p >= 1,
    one int.

    Erratum to Fig. 5.3: in exact arithmetic the centre never sees the unstable eigenvectors (v, 0), sum v = 0; only the
    workers diverge, the centre's blow-up there is rounding.

    ValueError: an argument outside its range. Source: thesis (5.18).
    """
    p = whole_workers(workers)
    e, a, b = _scaled(lr, moving_rate, center_rate, curvature)
    worker = [[1 - a - e if j == i else 0.0 for j in range(p)] + [a] for i in range(p)]
    return stacked([*worker, [b / p] * p + [1 - b]])


def eamsgd_drift(
    lr: ArrayLike,
    momentum: ArrayLike,
    moving_rate: ArrayLike,
    center_rate: ArrayLike,
    workers: int,
    curvature: ArrayLike = 1.0,
) -> Array:
    """The matrix of one step of the expected (v^1, x^1, ..., v^p, x^p, c) of EAMSGD with Nesterov momentum.

        v^i <- delta_h v^i - eta_h x^i;  x^i <- delta_h v^i + (1 - eta_h - alpha) x^i + alpha c
        c <- (1 - beta) c + (beta / p) sum_i x^i;    eta_h = eta h,  delta_h = delta (1 - eta_h)

    Its characteristic polynomial is u(z)^(p-1) v(z), with u(z) = z^2 - (1 - eta_h - alpha + delta_h) z +
    delta_h (1 - alpha) and v(z) = (delta_h - z)(1 - eta_h - alpha - z)(1 - beta - z) + eta_h delta_h (1 - beta - z) -
    alpha beta (delta_h - z); so all p > 1 have one radius.

    Arguments: `lr`, `momentum`, `moving_rate`, `center_rate` any and `curvature` h > 0, arrays that broadcast;
    `workers` p >= 1, one int.

    Erratum: (5.21) prints u with -delta in place of +delta_h and with eta; the text of (5.20) is lost.

    ValueError: an argument outside its range. Source: thesis (5.20), (5.21).
    """
    p = whole_workers(workers)
    e, a, b = _scaled(lr, moving_rate, center_rate, curvature)
    d = np.asarray(momentum, float) * (1 - e)
    rows: list[list[ArrayLike]] = []
    for i in range(p):
        before: list[ArrayLike] = [0.0] * (2 * i)
        after: list[ArrayLike] = [0.0] * (2 * (p - 1 - i))
        rows.append([*before, d, -e, *after, 0.0])
        rows.append([*before, d, 1 - e - a, *after, a])
    centre: list[ArrayLike] = [0.0, b / p] * p
    return stacked([*rows, [*centre, 1 - b]])


def _scaled(
    lr: ArrayLike, moving_rate: ArrayLike, center_rate: ArrayLike, curvature: ArrayLike
) -> list[Array]:
    """eta_h, alpha, beta."""
    lr, a, b, h = floats(lr, moving_rate, center_rate, curvature)
    need("curvature > 0", h > 0, curvature=h)
    return [lr * h, a, b]

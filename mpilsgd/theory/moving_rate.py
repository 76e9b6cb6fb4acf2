"""The moving rate with which EASGD forgets its start fastest, learning rate and center rate given.

The three eigenvalues of a step are z_1 = 1 - alpha - eta_h (only with p > 1) and the roots z_2, z_3 of
z^2 - (2 - beta - eta_h - alpha) z + (1 - eta_h)(1 - beta) - alpha.

The names: eta `lr`, alpha `moving_rate`, beta `center_rate`, p `workers`, h `curvature`. Source: thesis 5.1.3.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from mpilsgd.theory.ranges import Array, floats, need, roots_of_quadratic


def easgd_radius(
    lr: ArrayLike,
    moving_rate: ArrayLike,
    center_rate: ArrayLike,
    workers: ArrayLike,
    curvature: ArrayLike = 1.0,
) -> Array:
    """The spectral radius of `easgd_drift`, max |z_i|, without the matrix; its square is that of the second moments.

    Arguments (they broadcast): `lr`, `moving_rate`, `center_rate` any; `workers` p >= 1, which matters only as p = 1 or
    p > 1; `curvature` h > 0.

    ValueError: an argument outside its range. Source: thesis (5.19).
    """
    lr, a, b, p, h = floats(lr, moving_rate, center_rate, workers, curvature)
    need("workers >= 1", p >= 1, workers=p)
    need("curvature > 0", h > 0, curvature=h)
    e = lr * h
    reduced = np.abs(roots_of_quadratic((2 - b - e - a) / 2, (1 - e) * (1 - b) - a)).max(axis=-1)
    return np.where(p > 1, np.maximum(reduced, np.abs(1 - a - e)), reduced)


def best_moving_rate(
    lr: ArrayLike, center_rate: ArrayLike, workers: ArrayLike, curvature: ArrayLike = 1.0
) -> Array:
    """The moving rate with the least `easgd_radius`; it may be negative, and the radius there may be 1 or more.

    One worker (the reduced system, 5.17): alpha = -(sqrt(beta) - sqrt(eta_h))^2. Several workers:

        beta <= eta_h, sqrt(beta eta_h) <= (2 + beta) / 3:  the same
        beta <= eta_h, sqrt(beta eta_h) >= (2 + beta) / 3:  |z_1| = |z_2| = |z_3|,
                                                            (eta_h - 1 + alpha)^2 = (1 - eta_h)(1 - beta) - alpha
        beta >= eta_h, beta + eta_h <= 2:                   0
        beta >= eta_h, beta + eta_h >= 2:                   the first, or z_1 = -z_2 with z_2 real,
                                          (2 - beta - eta_h - alpha)(2 - 2 eta_h - 2 alpha) = alpha beta

    Each |z_i| is monotone in alpha between its zero, the double root and the crossings of two of them, so the least
    maximum is at one of these. The four above are all that ever win, and all four are tried.

    Arguments (they broadcast): `lr` eta > 0; `center_rate` beta > 0; `workers` p >= 1; `curvature` h > 0.

    Errata: the thesis prints the first case for all beta < eta_h (at beta = 0.9, eta_h = 1.5 its -0.0762 has radius
    0.4238, the best -0.1633 has 0.3367) and 0 for all beta > eta_h, which fails for beta + eta_h > 2, where the
    negative 1 - beta dominates (at beta = 1.7, eta_h = 1.2 radius 0.7; the best, -0.0434, has 0.4283).

    ValueError: an argument outside its range. Source: thesis (5.17), (5.19) and after.
    """
    lr, b, p, h = floats(lr, center_rate, workers, curvature)
    need("curvature > 0", h > 0, curvature=h)
    need("workers >= 1", p >= 1, workers=p)
    need("lr > 0", lr > 0, lr=lr)
    need("center_rate > 0", b > 0, center_rate=b)
    e, b, p = np.broadcast_arrays(lr * h, b, p)
    double = -((np.sqrt(b) - np.sqrt(e)) ** 2)
    opposite = _root(2.0, 4 * e + b - 6, 2 * (1 - e) * (2 - b - e), -1)
    equal = _root(1.0, 2 * e - 1, (e - 1) * (e - b), 1)
    candidates = np.stack([double, 0 * e, opposite, equal], axis=-1)
    radius = easgd_radius(e[..., None], candidates, b[..., None], p[..., None])
    best = np.argmin(radius, axis=-1)[..., None]
    several = np.take_along_axis(candidates, best, axis=-1)[..., 0]
    return np.where(p > 1, several, double)


def _root(a: float, b: Array, c: Array, sign: int) -> Array:
    """A root of a z^2 + b z + c; the vertex, a harmless candidate, where there is no real one."""
    return (-b + sign * np.sqrt(np.maximum(b * b - 4 * a * c, 0.0))) / (2 * a)

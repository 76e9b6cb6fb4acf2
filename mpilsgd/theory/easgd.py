"""EASGD on a one-dimensional quadratic with additive noise: where the centre is after t steps.

Worker i sees the gradient h x - xi, the noise xi independent with variance sigma^2; all distances are from the optimum:

    x^i <- x^i - eta (h x^i - xi^i) - alpha (x^i - c);    c <- c + alpha sum_i (x^i - c);    beta = p alpha

The names: eta `lr`, beta `center_rate`, p `workers`, h `curvature`, sigma `sigma`. Source: thesis 3.1.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from mpilsgd.theory.ranges import Array, floats, need


def easgd_eigenvalues(
    lr: ArrayLike, center_rate: ArrayLike, workers: ArrayLike, curvature: ArrayLike = 1.0
) -> tuple[Array, Array]:
    """gamma and phi, the two factors by which the centre and the workers' mean shrink in a step.

        gamma, phi = 1 - (a -+ sqrt(a^2 - 4 c^2)) / 2;    a = eta h + (p + 1) alpha;    c^2 = eta h p alpha

    Arguments (they broadcast): `lr` any; `center_rate` beta > 0; `workers` p >= 1; `curvature` h > 0. Both are real,
    as the drift matrix is symmetric for beta = p alpha, and gamma > phi.

    ValueError: an argument outside its range. Source: thesis, Lemma 3.1.1.
    """
    lr, beta, p, h = floats(lr, center_rate, workers, curvature)
    need("center_rate > 0", beta > 0, center_rate=beta)
    need("workers >= 1", p >= 1, workers=p)
    need("curvature > 0", h > 0, curvature=h)
    alpha = beta / p
    middle = 1 - (lr * h + beta + alpha) / 2
    # a^2 - 4 c^2 as a sum of squares: nothing cancels
    half_gap = np.sqrt((lr * h + alpha - beta) ** 2 + 4 * alpha * beta) / 2
    return middle + half_gap, middle - half_gap


def easgd_stable(
    lr: ArrayLike, center_rate: ArrayLike, workers: ArrayLike, curvature: ArrayLike = 1.0
) -> Array:
    """Whether EASGD with beta = p alpha is stable on a quadratic: condition 3.4, -1 < phi < gamma < 1.

        eta > 0,  beta > 0,  (2 - eta h)(2 - beta) > 2 beta / p,  (2 - eta h) + (2 - beta) > beta / p

    Arguments (they broadcast): `lr`, `center_rate` any; `workers` p >= 1; `curvature` h > 0, in several dimensions the
    largest eigenvalue of the Hessian.

    ValueError: `workers` or `curvature` outside its range. Source: thesis (3.4), Lemma 3.1.4, where ||M||_2 means the
    spectral radius.
    """
    lr, beta, p, h = floats(lr, center_rate, workers, curvature)
    need("workers >= 1", p >= 1, workers=p)
    need("curvature > 0", h > 0, curvature=h)
    left, right = 2 - lr * h, 2 - beta
    return (lr > 0) & (beta > 0) & (left * right > 2 * beta / p) & (left + right > beta / p)


def center_bias(
    steps: ArrayLike,
    lr: ArrayLike,
    center_rate: ArrayLike,
    workers: ArrayLike,
    curvature: ArrayLike = 1.0,
    *,
    center_start: ArrayLike = 1.0,
    workers_start: ArrayLike = 1.0,
) -> Array:
    """The expected distance of the centre from the optimum after t steps.

        E[c_t - x*] = gamma^t (c_0 - x*) + (gamma^t - phi^t) / (gamma - phi) alpha u_0
        u_0 = sum_i (x^i_0 - x*) - p alpha / (1 - p alpha - phi) (c_0 - x*)

    Arguments (they broadcast): `steps` t >= 0, infinity too; `lr`, `center_rate`, `workers`, `curvature` as in
    `easgd_eigenvalues`; `center_start` c_0 - x*; `workers_start` the mean of the x^i_0 - x*.

    ValueError: an argument outside its range. Source: thesis (3.2).
    """
    t, start, mean = floats(steps, center_start, workers_start)
    need("steps >= 0", t >= 0, steps=t)
    beta, p = floats(center_rate, workers)
    gamma, phi = easgd_eigenvalues(lr, beta, p, curvature)
    alpha = beta / p
    u = p * (mean - alpha / (1 - beta - phi) * start)
    with np.errstate(over="ignore", invalid="ignore"):
        return gamma**t * start + (gamma**t - phi**t) / (gamma - phi) * alpha * u


def center_variance(
    steps: ArrayLike,
    lr: ArrayLike,
    center_rate: ArrayLike,
    workers: ArrayLike,
    curvature: ArrayLike = 1.0,
    *,
    sigma: ArrayLike = 1.0,
) -> Array:
    """The variance of the centre after t steps from a fixed start.

        V[c_t] = (beta eta / (gamma - phi))^2 (S(gamma^2) + S(phi^2) - 2 S(gamma phi)) sigma^2 / p
        S(z) = z + z^2 + ... + z^(t-1) = (z - z^t) / (1 - z)

    Arguments (they broadcast): `steps` t >= 0 whole, or infinity (the asymptotic variance, infinite where condition 3.4
    fails); `lr`, `center_rate`, `workers`, `curvature` as in `easgd_eigenvalues`; `sigma` >= 0.

    ValueError: an argument outside its range. Source: thesis (3.3).
    """
    t, sigma = floats(steps, sigma)
    need("steps >= 0", t >= 0, steps=t)
    need("sigma >= 0", sigma >= 0, sigma=sigma)
    lr, beta, p = floats(lr, center_rate, workers)
    gamma, phi = easgd_eigenvalues(lr, beta, p, curvature)
    # of the first step the centre sees no noise yet: t = 0 and t = 1 are the same
    last = np.maximum(t, 1.0)
    with np.errstate(over="ignore", invalid="ignore"):
        sums = _sum(gamma**2, last) + _sum(phi**2, last) - 2 * _sum(gamma * phi, last)
        variance = (beta * lr / (gamma - phi)) ** 2 * sums * sigma**2 / p
    diverges = np.isinf(last) & ~easgd_stable(lr, beta, p, curvature)
    return np.where(diverges | np.isnan(variance), np.inf, variance)


def center_mse(
    steps: ArrayLike,
    lr: ArrayLike,
    center_rate: ArrayLike,
    workers: ArrayLike,
    curvature: ArrayLike = 1.0,
    *,
    sigma: ArrayLike = 1.0,
    center_start: ArrayLike = 1.0,
    workers_start: ArrayLike = 1.0,
) -> Array:
    """The mean squared error of the centre: bias squared plus variance (Fig. 3.1 is one call over a grid).

    Arguments, errors: `center_bias`, `center_variance`; infinite where it diverges. Source: thesis, Lemma 3.1.1.
    """
    variance = center_variance(steps, lr, center_rate, workers, curvature, sigma=sigma)
    starts = {"center_start": center_start, "workers_start": workers_start}
    bias = center_bias(steps, lr, center_rate, workers, curvature, **starts)
    with np.errstate(over="ignore", invalid="ignore"):
        mse = bias**2 + variance
    return np.where(np.isnan(mse), np.inf, mse)


def many_workers_mse(
    lr: ArrayLike, center_rate: ArrayLike, curvature: ArrayLike = 1.0, *, sigma: ArrayLike = 1.0
) -> Array:
    """The limit of p times the centre's asymptotic mean squared error as the number of workers p grows.

        beta eta h / ((2 - beta)(2 - eta h)) (2 - beta - eta h + beta eta h) / (beta + eta h - beta eta h) sigma^2 / h^2

    Arguments (they broadcast): `lr` in (0, 2 / h); `center_rate` beta in (0, 2), which is condition 3.4 for p to
    infinity; `curvature` h > 0; `sigma` >= 0.

    ValueError: an argument outside its range. Source: thesis, Corollary 3.1.1.
    """
    lr, beta, h, sigma = floats(lr, center_rate, curvature, sigma)
    need("curvature > 0", h > 0, curvature=h)
    need("sigma >= 0", sigma >= 0, sigma=sigma)
    e = lr * h
    need("0 < lr < 2 / curvature", (e > 0) & (e < 2), lr=lr, curvature=h)
    need("0 < center_rate < 2", (beta > 0) & (beta < 2), center_rate=beta)
    both = beta + e - beta * e
    return beta * e / ((2 - beta) * (2 - e)) * (2 - both) / both * (sigma / h) ** 2


def averaged_center_covariance(hessian: ArrayLike, noise: ArrayLike, workers: ArrayLike) -> Array:
    """The limit of t times the covariance of the centre's running average: no rate that is stable changes it.

        sqrt(t) (z_t - x*) -> N(0, A^-1 Sigma A^-T / p);    z_t = (c_0 + ... + c_(t-1)) / t

    Arguments: `hessian` A and `noise` Sigma, symmetric matrices in the last two axes (1 x 1 for the one-dimensional
    sigma^2 / (p h^2)); `workers` p >= 1, of the shape before those axes.

    ValueError: an argument outside its range. Source: thesis, Lemmas 3.1.2 and 3.1.3.
    """
    a, s, p = floats(hessian, noise, workers)
    need("workers >= 1", p >= 1, workers=p)
    least = np.linalg.eigvalsh(a)[..., 0]
    need("a positive definite hessian", least > 0, least_eigenvalue=least)
    inverse = np.linalg.inv(a)
    return inverse @ s @ np.swapaxes(inverse, -1, -2) / p[..., None, None]


def _sum(z: Array, t: Array) -> Array:
    """z + z^2 + ... + z^(t-1); near z = 1 by way of the logarithm, where the quotient would cancel."""
    near = np.abs(z - 1) < 0.1
    log = np.log1p(np.where(near, z - 1, -0.5))
    by_log = np.where(log == 0, t - 1, z * np.expm1((t - 1) * log) / np.expm1(np.where(log == 0, 1.0, log)))
    away = np.where(near, 0.5, z)
    return np.where(near, by_log, (away - away**t) / (1 - away))

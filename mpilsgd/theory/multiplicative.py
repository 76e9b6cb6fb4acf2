"""SGD, momentum SGD and EASGD with multiplicative noise: how fast the start is forgotten.

    a worker's gradient is xi x, with xi = u^2 of a Gamma distribution of shape lambda and rate omega

(mean lambda / omega, variance lambda / omega^2). What the matrices multiply are second moments, so a spectral radius
below 1 means convergence in mean square.

The names: lambda `shape`, omega `rate`, eta `lr`, delta `momentum`, alpha `moving_rate`, beta `center_rate`, p
`workers`. Source: thesis 5.2. The updates count; the objective (5.22) as printed is off by a factor of 2 from them.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from mpilsgd.theory.ranges import Array, floats, need, stacked


def gamma_sgd_rate(
    lr: ArrayLike, workers: ArrayLike = 1, *, shape: ArrayLike = 0.5, rate: ArrayLike = 0.5
) -> Array:
    """The factor of E x^2 in a step of SGD with a mini-batch of p; stable where it is below 1.

        1 - 2 eta lambda / omega + eta^2 lambda (p lambda + 1) / (p omega^2)

    Arguments (they broadcast): `lr` any; `workers` p >= 1; `shape` lambda > 0; `rate` omega > 0.

    ValueError: an argument outside its range. Source: thesis (5.26).
    """
    p, lam, om = _input(workers, shape, rate)
    (eta,) = floats(lr)
    return (1 - eta * lam / om) ** 2 + eta**2 * lam / (p * om**2)


def gamma_sgd_best_lr(workers: ArrayLike = 1, *, shape: ArrayLike = 0.5, rate: ArrayLike = 0.5) -> Array:
    """The learning rate with the least `gamma_sgd_rate`, which is then 1 / (p lambda + 1).

        eta = omega / (lambda + 1 / p)

    Arguments, errors: `gamma_sgd_rate`. Source: thesis (5.27); Case I and Fig. 5.13 print lambda / (omega + 1) for
    omega / (lambda + 1).
    """
    p, lam, om = _input(workers, shape, rate)
    return om / (lam + 1 / p)


def gamma_msgd_moments(
    lr: ArrayLike,
    momentum: ArrayLike,
    workers: ArrayLike = 1,
    *,
    shape: ArrayLike = 0.5,
    rate: ArrayLike = 0.5,
) -> Array:
    """The matrix of one step of (E v^2, E x^2, E v x) of Nesterov's momentum SGD with a mini-batch of p.

            | delta^2 q   eta^2 u2             -2 delta eta (u1 - eta u2)                          |
        M = | delta^2 q   q                     2 delta (1 - eta u1) - 2 delta eta (u1 - eta u2)   |
            | delta^2 q   -eta u1 + eta^2 u2    delta (1 - eta u1) - 2 delta eta (u1 - eta u2)     |

        q = 1 - 2 eta u1 + eta^2 u2,  u1 = lambda / omega,  u2 = lambda (lambda + 1 / p) / omega^2

    Arguments (they broadcast): `lr`, `momentum` any; `workers` p >= 1; `shape` lambda > 0; `rate` omega > 0.

    ValueError: an argument outside its range. Source: thesis (5.30).
    """
    p, lam, om = _input(workers, shape, rate)
    eta, d = floats(lr, momentum)
    m1, m2 = eta * lam / om, eta**2 * lam * (lam + 1 / p) / om**2
    q, cross = 1 - 2 * m1 + m2, -2 * d * (m1 - m2)
    return stacked(
        [
            [d * d * q, m2, cross],
            [d * d * q, q, 2 * d * (1 - m1) + cross],
            [d * d * q, m2 - m1, d * (1 - m1) + cross],
        ]
    )


def gamma_easgd_moments(
    lr: ArrayLike,
    moving_rate: ArrayLike | None,
    center_rate: ArrayLike,
    workers: ArrayLike,
    *,
    shape: ArrayLike = 0.5,
    rate: ArrayLike = 0.5,
) -> Array:
    """The matrix of one step of the second moments of EASGD.

    They are (E c^2, the mean of E (x^i)^2, the mean of E c x^i, the mean over all i, j of E x^i x^j). With
    k = 1 - alpha - eta lambda / omega and w = eta^2 lambda / omega^2:

            | (1 - beta)^2       0         2 beta (1 - beta)           beta^2 |
        M = | alpha^2            k^2 + w   2 alpha k                   0      |
            | alpha (1 - beta)   0         k (1 - beta) + alpha beta   k beta |
            | alpha^2            w / p     2 alpha k                   k^2    |

    Arguments (they broadcast): `lr`, `center_rate` any; `moving_rate` any, None: beta / p; `workers` p >= 1; `shape`
    lambda > 0; `rate` omega > 0.

    Erratum: in (5.32) the line of c x^i lacks (alpha beta / p) sum_j c x^j; (5.33) and (5.34) have it.

    ValueError: an argument outside its range. Source: thesis (5.34).
    """
    p, lam, om = _input(workers, shape, rate)
    eta, b = floats(lr, center_rate)
    a = b / p if moving_rate is None else np.asarray(moving_rate, float)
    k, w = 1 - a - eta * lam / om, eta**2 * lam / om**2
    return stacked(
        [
            [(1 - b) ** 2, 0.0, 2 * b * (1 - b), b * b],
            [a * a, k * k + w, 2 * a * k, 0.0],
            [a * (1 - b), 0.0, (1 - b) * k + a * b, k * b],
            [a * a, w / p, 2 * a * k, k * k],
        ]
    )


def gamma_easgd_lr_edge(
    moving_rate: ArrayLike, center_rate: ArrayLike, *, shape: ArrayLike = 0.5, rate: ArrayLike = 0.5
) -> Array:
    """The learning rate below which EASGD is stable as the number of workers grows, alpha fixed.

        the lesser of omega / lambda (4 - 2 alpha - 2 beta) / (2 - beta),
                      omega / (lambda + 1) (1 - alpha + sqrt(lambda^2 + lambda (2 alpha - alpha^2)) / lambda)

    With alpha = 0 (the limit of alpha = beta / p) it is SGD's 2 omega / (lambda + 1). For lambda < 1 the widest is
    omega / sqrt(lambda), at alpha = 1 - sqrt(lambda).

    Arguments (they broadcast): `moving_rate` alpha in [0, 1); `center_rate` beta in (0, 1); `shape` lambda > 0; `rate`
    omega > 0.

    ValueError: an argument outside its range. Source: thesis 5.2.3, Cases I and II.
    """
    _, lam, om = _input(1.0, shape, rate)
    a, b = floats(moving_rate, center_rate)
    need("0 <= moving_rate < 1", (a >= 0) & (a < 1), moving_rate=a)
    need("0 < center_rate < 1", (b > 0) & (b < 1), center_rate=b)
    pair = (4 - 2 * a - 2 * b) / (2 - b) * om / lam
    single = om / (lam + 1) * (1 - a + np.sqrt(lam**2 + lam * a * (2 - a)) / lam)
    return np.minimum(pair, single)


def _input(workers: ArrayLike, shape: ArrayLike, rate: ArrayLike) -> list[Array]:
    p, lam, om = floats(workers, shape, rate)
    need("workers >= 1", p >= 1, workers=p)
    need("shape > 0", lam > 0, shape=lam)
    need("rate > 0", om > 0, rate=om)
    return [p, lam, om]

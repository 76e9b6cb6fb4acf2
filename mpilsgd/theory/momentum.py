"""SGD and momentum SGD on a one-dimensional quadratic with additive noise.

    v <- delta v - eta (h (x + delta v) - xi);    x <- x + v                (Nesterov, 5.4)
    v <- delta v - eta (h x - xi);                x <- x + v                (heavy ball)

The noise xi has variance sigma^2; distances are from the optimum. With eta_h = eta h, and delta_h = delta (1 - eta_h)
for Nesterov, delta_h = delta for the heavy ball, both are v <- delta_h v - eta_h x + eta xi.

The names: eta `lr`, delta `momentum`, h `curvature`, sigma `sigma`, p `workers` (the mini-batch). Source: thesis 5.1.1,
5.1.2. The updates count; the objective (5.1) as printed is off by a factor of 2 from them.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from mpilsgd.theory.ranges import Array, floats, need, stacked


def sgd_variance(
    lr: ArrayLike, workers: ArrayLike = 1, curvature: ArrayLike = 1.0, *, sigma: ArrayLike = 1.0
) -> Array:
    """The asymptotic variance of SGD with a mini-batch of p.

        V[x] = eta^2 / (1 - (1 - eta h)^2) sigma^2 / p

    Arguments (they broadcast): `lr` in (0, 2 / h); `workers` p >= 1; `curvature` h > 0; `sigma` >= 0.

    ValueError: an argument outside its range. Source: thesis 5.1.1, after (5.3).
    """
    lr, p, h, sigma = floats(lr, workers, curvature, sigma)
    need("workers >= 1", p >= 1, workers=p)
    need("curvature > 0", h > 0, curvature=h)
    need("sigma >= 0", sigma >= 0, sigma=sigma)
    need("0 < lr < 2 / curvature", (lr > 0) & (lr * h < 2), lr=lr, curvature=h)
    return lr * sigma**2 / (h * (2 - lr * h) * p)


def msgd_moments(
    lr: ArrayLike, momentum: ArrayLike, curvature: ArrayLike = 1.0, *, nesterov: bool = True
) -> Array:
    """The matrix of one step of (E v^2, E v x, E x^2); the noise adds eta^2 sigma^2 to each.

            | delta_h^2   -2 delta_h eta_h          eta_h^2            |
        M = | delta_h^2   delta_h (1 - 2 eta_h)    -eta_h (1 - eta_h)  |
            | delta_h^2   2 delta_h (1 - eta_h)     (1 - eta_h)^2      |

    Arguments (they broadcast): `lr`, `momentum` any; `curvature` h > 0; `nesterov`: False for the heavy ball.

    ValueError: `curvature` outside its range. Source: thesis (5.6).
    """
    d, e = _scaled(lr, momentum, curvature, nesterov)
    return stacked(
        [
            [d * d, -2 * d * e, e * e],
            [d * d, d * (1 - 2 * e), -e * (1 - e)],
            [d * d, 2 * d * (1 - e), (1 - e) ** 2],
        ]
    )


def msgd_stable(
    lr: ArrayLike, momentum: ArrayLike, curvature: ArrayLike = 1.0, *, nesterov: bool = True
) -> Array:
    """Whether momentum SGD is stable: -1 < delta_h < 1 and 0 < eta_h < 2 (1 + delta_h).

    Arguments, errors: `msgd_moments`. Source: thesis 5.1.2, after (5.7).
    """
    d, e = _scaled(lr, momentum, curvature, nesterov)
    return (np.abs(d) < 1) & (e > 0) & (e < 2 * (1 + d))


def msgd_variance(
    lr: ArrayLike,
    momentum: ArrayLike,
    curvature: ArrayLike = 1.0,
    *,
    sigma: ArrayLike = 1.0,
    nesterov: bool = True,
) -> tuple[Array, Array, Array]:
    """The asymptotic moments E v^2, E v x, E x^2 of momentum SGD.

        (2, 1, (1 + delta_h) / eta_h) eta^2 sigma^2 / ((1 - delta_h)(2 (1 + delta_h) - eta_h))

    Nesterov's stays bounded as the momentum tends to 1, the heavy ball's does not.

    Arguments (they broadcast): `lr`, `momentum` where `msgd_stable`; `curvature` h > 0; `sigma` >= 0.

    ValueError: an argument outside its range. Source: thesis (5.7).
    """
    (sigma,) = floats(sigma)
    need("sigma >= 0", sigma >= 0, sigma=sigma)
    d, e = _scaled(lr, momentum, curvature, nesterov)
    stable = msgd_stable(lr, momentum, curvature, nesterov=nesterov)
    need("-1 < delta_h < 1 and 0 < eta_h < 2 (1 + delta_h)", stable, delta_h=d, eta_h=e)
    scale = (np.asarray(lr, float) * sigma) ** 2 / ((1 - d) * (2 * (1 + d) - e))
    return 2 * scale, scale, (1 + d) / e * scale


def msgd_best_momentum(lr: ArrayLike, curvature: ArrayLike = 1.0, *, nesterov: bool = True) -> Array:
    """The momentum with the fastest decay of the second moments at a given learning rate.

        delta_h = (1 - sqrt(eta_h))^2, so delta = (1 - sqrt(eta_h)) / (1 + sqrt(eta_h)) for Nesterov

    The spectral radius of `msgd_moments` is then delta_h, against (1 - eta_h)^2 without momentum. For eta_h > 1 the
    best Nesterov momentum is negative; at eta_h = 1 every momentum is as good.

    Arguments (they broadcast): `lr` in (0, 4 / h); `curvature` h > 0; `nesterov`: False for the heavy ball.

    ValueError: an argument outside its range. Source: thesis 5.1.2, after (5.8).
    """
    lr, h = floats(lr, curvature)
    need("curvature > 0", h > 0, curvature=h)
    need("0 < lr < 4 / curvature", (lr > 0) & (lr * h < 4), lr=lr, curvature=h)
    root = np.sqrt(lr * h)
    return (1 - root) / (1 + root) if nesterov else (1 - root) ** 2


def _scaled(lr: ArrayLike, momentum: ArrayLike, curvature: ArrayLike, nesterov: bool) -> tuple[Array, Array]:
    """delta_h and eta_h."""
    lr, delta, h = floats(lr, momentum, curvature)
    need("curvature > 0", h > 0, curvature=h)
    e = lr * h
    return (delta * (1 - e) if nesterov else delta + 0 * e), e

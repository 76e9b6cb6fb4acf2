"""EASGD on a strongly convex function: the bound of Theorem 3.2.1.

    (a, b, c) <- M (a, b, c) + (eta^2 sigma^2 / p, eta^2 sigma^2, 0)

bounds a = E |mean x - x*|^2, b = the mean of E |x^i - x*|^2, c = E |c - x*|^2. The names: mu `convexity`, L
`smoothness`, eta `lr`, alpha `moving_rate`, beta `center_rate`, p `workers`. Source: thesis 3.2.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from mpilsgd.theory.ranges import Array, floats, need, stacked


def convex_matrix(
    lr: ArrayLike,
    moving_rate: ArrayLike,
    center_rate: ArrayLike,
    *,
    convexity: ArrayLike,
    smoothness: ArrayLike,
) -> Array:
    """The matrix M that bounds one step of (a, b, c).

            | 1 - g1 - g2 - alpha   g2               alpha    |     g1 = 2 eta mu L / (mu + L)
        M = | 0                     1 - g1 - alpha   alpha    |     g2 = 2 eta L (1 - 2 sqrt(mu L) / (mu + L))
            | beta                  0                1 - beta |

    Arguments (they broadcast): `convexity` mu and `smoothness` L with 0 < mu <= L; `moving_rate` alpha in [0, 1);
    `center_rate` beta in [0, 1]; `lr` in [0, 2 (1 - alpha) / (mu + L)].

    ValueError: an argument outside its range. Source: thesis, Theorem 3.2.1.
    """
    g1, g2, alpha, beta = _rates(lr, moving_rate, center_rate, convexity, smoothness)
    return stacked(
        [
            [1 - g1 - g2 - alpha, g2, alpha],
            [0.0, 1 - g1 - alpha, alpha],
            [beta, 0.0, 1 - beta],
        ]
    )


def convex_eigenvalues(
    lr: ArrayLike,
    moving_rate: ArrayLike,
    center_rate: ArrayLike,
    *,
    convexity: ArrayLike,
    smoothness: ArrayLike,
) -> Array:
    """The three eigenvalues of `convex_matrix` in a new last axis, all real.

        1 - alpha - g1 - g2;    1 - (s -+ sqrt(s^2 - 4 beta g1)) / 2 with s = alpha + beta + g1

    Arguments, errors: `convex_matrix`. Source: thesis 3.2, after Theorem 3.2.1.
    """
    g1, g2, alpha, beta = _rates(lr, moving_rate, center_rate, convexity, smoothness)
    s = alpha + beta + g1
    root = np.sqrt((beta - g1) ** 2 + alpha * (alpha + 2 * (beta + g1)))
    found = np.broadcast_arrays(1 - alpha - g1 - g2, 1 - (s - root) / 2, 1 - (s + root) / 2)
    return np.stack(found, axis=-1)


def convex_lr_edge(moving_rate: ArrayLike, *, convexity: ArrayLike, smoothness: ArrayLike) -> Array:
    """The learning rate below which the bound of Theorem 3.2.1 holds, its matrix is positive and it contracts.

        (1 - alpha) / (2 mu L / (mu + L) + 2 L (1 - 2 sqrt(mu L) / (mu + L)))

    Arguments (they broadcast): `moving_rate`, `convexity`, `smoothness` as in `convex_matrix`.

    Erratum, found here: the text's other condition, eta < (mu + L) / (mu L) (1 - alpha / (2 - beta)), follows from this
    one for beta <= 1, and so does that of the theorem; only contraction needs beta > 0 besides.

    ValueError: an argument outside its range. Source: thesis 3.2, after Theorem 3.2.1.
    """
    alpha, mu, big = floats(moving_rate, convexity, smoothness)
    g1, g2 = _per_lr(mu, big)
    need("0 <= moving_rate < 1", (alpha >= 0) & (alpha < 1), moving_rate=alpha)
    return (1 - alpha) / (g1 + g2)


def convex_limit(
    lr: ArrayLike,
    moving_rate: ArrayLike,
    workers: ArrayLike,
    *,
    convexity: ArrayLike,
    smoothness: ArrayLike,
    sigma: ArrayLike = 1.0,
) -> tuple[Array, Array]:
    """The bounds after infinitely many steps: that of the mean and the centre (a = c), that of the workers (b).

        a = c = (alpha / p + g1 / p + g2) / (g1 (alpha + g1 + g2)) eta^2 sigma^2
        b     = (alpha / p + g1 + g2) / (g1 (alpha + g1 + g2)) eta^2 sigma^2

    Every center rate in (0, 1] has the same.

    Arguments (they broadcast): `workers` p >= 1; `sigma` >= 0; the others as in `convex_matrix`, with `lr` > 0 and
    below `convex_lr_edge`.

    ValueError: an argument outside its range. Source: thesis 3.2, after Theorem 3.2.1.
    """
    lr, alpha, p, mu, big, sigma = floats(lr, moving_rate, workers, convexity, smoothness, sigma)
    need("workers >= 1", p >= 1, workers=p)
    need("sigma >= 0", sigma >= 0, sigma=sigma)
    edge = convex_lr_edge(alpha, convexity=mu, smoothness=big)
    need("0 < lr < convex_lr_edge(...)", (lr > 0) & (lr < edge), lr=lr, edge=edge)
    g1, g2 = (lr * g for g in _per_lr(mu, big))
    scale = (lr * sigma) ** 2 / (g1 * (alpha + g1 + g2))
    return ((alpha + g1) / p + g2) * scale, (alpha / p + g1 + g2) * scale


def _rates(
    lr: ArrayLike, moving_rate: ArrayLike, center_rate: ArrayLike, convexity: ArrayLike, smoothness: ArrayLike
) -> tuple[Array, Array, Array, Array]:
    """g1, g2, alpha, beta, all checked."""
    lr, alpha, beta, mu, big = floats(lr, moving_rate, center_rate, convexity, smoothness)
    g1, g2 = _per_lr(mu, big)
    need("0 <= moving_rate < 1", (alpha >= 0) & (alpha < 1), moving_rate=alpha)
    need("0 <= center_rate <= 1", (beta >= 0) & (beta <= 1), center_rate=beta)
    edge = 2 * (1 - alpha) / (mu + big)
    inside = (lr >= 0) & (lr <= edge)
    need("0 <= lr <= 2 (1 - moving_rate) / (convexity + smoothness)", inside, lr=lr, edge=edge)
    return lr * g1, lr * g2, alpha, beta


def _per_lr(mu: Array, big: Array) -> tuple[Array, Array]:
    need("0 < convexity <= smoothness", (mu > 0) & (mu <= big), convexity=mu, smoothness=big)
    return 2 * mu * big / (mu + big), 2 * big * (1 - 2 * np.sqrt(mu * big) / (mu + big))

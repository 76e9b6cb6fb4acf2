"""EASGD in the Gauss-Seidel form, of which DOWNPOUR is alpha = 1, beta = p: where it is stable.

On f(x) = x^2 / 2 without noise, period 1, with y the workers' mean:

    x^i <- (1 - eta)(x^i - alpha (x^i - c));    then c <- c + beta (y - c)

A curvature h other than 1 is the learning rate eta h. The names: eta `lr`, alpha `moving_rate`, beta `center_rate`, p
`workers`. Source: thesis 6.2.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from mpilsgd.theory.ranges import Array, floats, need, stacked


def gauss_seidel_drift(lr: ArrayLike, moving_rate: ArrayLike, center_rate: ArrayLike) -> Array:
    """The matrix of one step of the workers' mean and the centre, (y, c).

        M = | (1 - eta)(1 - alpha)        (1 - eta) alpha                   |
            | beta (1 - eta)(1 - alpha)   1 - beta + beta (1 - eta) alpha   |

    With p > 1 the differences between workers shrink by (1 - eta)(1 - alpha) besides.

    Arguments (they broadcast): `lr`, `moving_rate`, `center_rate` any. Source: thesis (6.5).
    """
    eta, a, b = floats(lr, moving_rate, center_rate)
    own, centre = (1 - eta) * (1 - a), (1 - eta) * a
    return stacked([[own, centre], [b * own, 1 - b + b * centre]])


def gauss_seidel_stable(
    lr: ArrayLike, moving_rate: ArrayLike, center_rate: ArrayLike, workers: ArrayLike
) -> Array:
    """Whether the Gauss-Seidel form is stable.

        -1 < k < 1,  0 < beta eta < 2 (1 + k),  k = (1 - eta)(1 - alpha)(1 - beta);    p > 1: |(1 - eta)(1 - alpha)| < 1

    Arguments (they broadcast): `lr`, `moving_rate`, `center_rate` any; `workers` p >= 1.

    Erratum: Theorem 6.2.1 lists the first two, which describe (6.4), the mean and the centre; p > 1 needs the last.

    ValueError: `workers` outside its range. Source: thesis, Theorem 6.2.1.
    """
    eta, a, b, p = floats(lr, moving_rate, center_rate, workers)
    need("workers >= 1", p >= 1, workers=p)
    apart = (1 - eta) * (1 - a)
    k = apart * (1 - b)
    return (np.abs(k) < 1) & (b * eta > 0) & (b * eta < 2 * (1 + k)) & ((p <= 1) | (np.abs(apart) < 1))


def gauss_seidel_moving_rates(
    lr: ArrayLike, center_rate: ArrayLike, workers: ArrayLike
) -> tuple[Array, Array]:
    """The open interval of moving rates with which the Gauss-Seidel form is stable: (NaN, NaN) where there is none.

    Its ends are among the thesis'

        c_2 = (4 - 2 beta - 2 eta + beta eta) / (2 (1 - eta)(1 - beta)),  c_3 = 1 - 1 / ((1 - eta)(1 - beta))

    and, for p > 1, 1 -+ 1 / |1 - eta|; they may be infinite, and negative.

    Arguments (they broadcast): `lr` eta > 0; `center_rate` beta > 0; `workers` p >= 1.

    ValueError: an argument outside its range. Source: thesis, Theorem 6.2.1, which asks alpha > 0 besides.
    """
    eta, b, p = floats(lr, center_rate, workers)
    need("workers >= 1", p >= 1, workers=p)
    need("lr > 0", eta > 0, lr=eta)
    need("center_rate > 0", b > 0, center_rate=b)
    low, high = _where(beyond=b * eta / 2 - 1, slope=(1 - eta) * (1 - b))
    apart = _where(beyond=np.full(b.shape, -np.inf), slope=1 - eta)
    low = np.where(p > 1, np.maximum(low, apart[0]), low)
    high = np.where(p > 1, np.minimum(high, apart[1]), high)
    return _interval(1 - high, 1 - low)


def gauss_seidel_lrs(
    moving_rate: ArrayLike, center_rate: ArrayLike, workers: ArrayLike
) -> tuple[Array, Array]:
    """The open interval of learning rates with which the Gauss-Seidel form is stable: (NaN, NaN) where there is none.

        eta > 0,  |1 - eta| |m| < 1,  eta (beta + 2 m) < 2 (1 + m);    m = (1 - alpha)(1 - beta)
        p > 1: |1 - eta| |1 - alpha| < 1

    DOWNPOUR (alpha = 1, beta = p) has 0 < eta < 2 / p. With beta large, alpha must be close to 1: at alpha = 0.9,
    beta = 16 no learning rate is stable.

    Arguments (they broadcast): `moving_rate` alpha any; `center_rate` beta > 0; `workers` p >= 1.

    ValueError: an argument outside its range. Source: thesis, Theorem 6.2.1, solved for eta.
    """
    a, b, p = floats(moving_rate, center_rate, workers)
    need("workers >= 1", p >= 1, workers=p)
    need("center_rate > 0", b > 0, center_rate=b)
    m = (1 - a) * (1 - b)
    slope, limit = b + 2 * m, 2 * (1 + m)
    with np.errstate(divide="ignore", invalid="ignore"):
        edge = limit / slope
        reach = np.minimum(1 / np.abs(m), np.where(p > 1, 1 / np.abs(1 - a), np.inf))
    # slope < 0: the inequality bounds eta from below; slope = 0: it holds for all eta or for none
    low = np.where(slope < 0, np.maximum(edge, 0.0), np.where((slope == 0) & (limit <= 0), np.inf, 0.0))
    high = np.where(slope > 0, edge, np.inf)
    return _interval(np.maximum(low, 1 - reach), np.minimum(high, 1 + reach))


def _where(beyond: Array, slope: Array) -> tuple[Array, Array]:
    """The s with max(-1, beyond) < slope s < 1, as an interval."""
    least = np.maximum(beyond, -1.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        ends = least / slope, 1 / slope
    flat_low = np.where(least < 0, -np.inf, np.inf)  # slope 0: every s, or none
    low = np.where(slope == 0, flat_low, np.minimum(*ends))
    high = np.where(slope == 0, -flat_low, np.maximum(*ends))
    empty = least >= 1
    return np.where(empty, np.inf, low), np.where(empty, -np.inf, high)


def _interval(low: Array, high: Array) -> tuple[Array, Array]:
    low, high = np.broadcast_arrays(low, high)
    inside = low < high
    return np.where(inside, low, np.nan), np.where(inside, high, np.nan)

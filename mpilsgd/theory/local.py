"""Local SGD on a strongly convex function: Stich's step sizes, weights and bound.

The names: mu `convexity`, L `smoothness`, kappa = L / mu, a `shift`, K `workers`, H `period` (the longest gap between
averages), T `steps`, sigma^2 a bound of the gradient's variance, G^2 of its second moment. Source: Stich, "Local SGD
Converges Fast and Communicates Little".
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import ArrayLike

from mpilsgd.theory.ranges import Array, floats, need


def local_sgd_gap(averages: Iterable[int]) -> int:
    """The longest run of steps without an average, of the steps (counted from 1) after which one is taken.

        gap = max_i (p_i - p_(i-1)),  p_0 = 0

    ValueError: no step, or a step below 1. Source: Definition 2.1; the erratum: the gap counts from 0.
    """
    steps = sorted({int(step) for step in averages})
    if not steps or steps[0] < 1:
        raise ValueError(f"needs averages, at least one step and all >= 1, not {steps[:3]}")
    return int(np.diff([0, *steps]).max())


def local_sgd_shift(period: ArrayLike, *, convexity: ArrayLike, smoothness: ArrayLike) -> Array:
    """The least shift a for which the bound holds.

        a = max(16 kappa, H)

    Arguments (they broadcast): `period` H >= 1; 0 < `convexity` <= `smoothness`.

    Erratum: Theorem 2.2 prints a > max(4 kappa, H / mu). Lemma 3.1 needs eta_0 = 4 / (mu a) <= 1 / (4 L), and Lemma 3.3
    needs a >= H.

    ValueError: an argument outside its range. Source: Theorem 2.2.
    """
    h, mu, big = floats(period, convexity, smoothness)
    need("period >= 1", h >= 1, period=h)
    need("0 < convexity <= smoothness", (mu > 0) & (mu <= big), convexity=mu, smoothness=big)
    return np.maximum(16 * big / mu, h)


def local_sgd_lr(step: ArrayLike, shift: ArrayLike, *, convexity: ArrayLike) -> Array:
    """The step size of step t, counted from 0.

        eta_t = 4 / (mu (a + t))

    Arguments (they broadcast): `step` t >= 0; `shift` a > 0; `convexity` mu > 0.

    ValueError: an argument outside its range. Source: Theorem 2.2.
    """
    t, a, mu = floats(step, shift, convexity)
    need("step >= 0", t >= 0, step=t)
    need("shift > 0", a > 0, shift=a)
    need("convexity > 0", mu > 0, convexity=mu)
    return 4 / (mu * (a + t))


def local_sgd_weight_sum(steps: ArrayLike, shift: ArrayLike) -> Array:
    """The sum of the weights w_t = (a + t)^2 of the iterates t = 0 .. T - 1 (`average="quadratic"`).

        S_T = T / 6 (2 T^2 + 6 a T - 3 T + 6 a^2 - 6 a + 1)

    Arguments (they broadcast): `steps` T >= 1; `shift` a > 0.

    ValueError: an argument outside its range. Source: Theorem 2.2, Lemma 3.4.
    """
    t, a = floats(steps, shift)
    need("steps >= 1", t >= 1, steps=t)
    need("shift > 0", a > 0, shift=a)
    return t / 6 * (2 * t**2 + 6 * a * t - 3 * t + 6 * a**2 - 6 * a + 1)


def local_sgd_deviation(lr: ArrayLike, period: ArrayLike, *, gradient: ArrayLike) -> Array:
    """The bound of the mean squared distance of the workers from their mean at step size eta_t.

        (1 / K) sum_k E |mean x_t - x_t^k|^2 <= 4 eta_t^2 G^2 H^2

    Arguments (they broadcast): `lr` eta_t > 0 of a step; `period` H >= 1; `gradient` G >= 0. The shift must be >= H.

    ValueError: an argument outside its range. Source: Lemma 3.3, with its misprint a >= H.
    """
    eta, h, g = floats(lr, period, gradient)
    need("lr > 0", eta > 0, lr=eta)
    need("period >= 1", h >= 1, period=h)
    need("gradient >= 0", g >= 0, gradient=g)
    return 4 * (eta * g * h) ** 2


def local_sgd_bound(
    steps: ArrayLike,
    workers: ArrayLike,
    period: ArrayLike,
    *,
    convexity: ArrayLike,
    smoothness: ArrayLike,
    distance: ArrayLike,
    sigma: ArrayLike,
    gradient: ArrayLike,
    batch: ArrayLike = 1,
    shift: ArrayLike | None = None,
) -> tuple[Array, Array, Array]:
    """The three terms whose sum bounds the expected error f(x_hat) - f* of the weighted mean of the iterates.

        mu a^3 / (2 S_T) |x_0 - x*|^2,  4 T (T + 2 a) / (mu K S_T) sigma^2 / b,  256 T / (mu^2 S_T) G^2 H^2 L

    What the start leaves, the noise, and the workers' drifting apart.

    Arguments (they broadcast): `steps` T >= 1; `workers` K >= 1; `period` H >= 1; 0 < `convexity` <= `smoothness`;
    `distance` |x_0 - x*| >= 0; `sigma`, `gradient` G >= 0; `batch` b >= 1; `shift` a >= `local_sgd_shift(...)`, which
    is what None stands for.

    ValueError: an argument outside its range. Source: Theorem 2.2 (6), Remark 2.4; the shift's erratum:
    `local_sgd_shift`.
    """
    t, k, h, mu, big = floats(steps, workers, period, convexity, smoothness)
    d, sigma, g, batch = floats(distance, sigma, gradient, batch)
    need("workers >= 1", k >= 1, workers=k)
    need("batch >= 1", batch >= 1, batch=batch)
    need("distance >= 0", d >= 0, distance=d)
    need("sigma >= 0", sigma >= 0, sigma=sigma)
    need("gradient >= 0", g >= 0, gradient=g)
    least = local_sgd_shift(h, convexity=mu, smoothness=big)
    a = least if shift is None else np.asarray(shift, float)
    need("shift >= max(16 smoothness / convexity, period)", a >= least, shift=a, least=least)
    s = local_sgd_weight_sum(t, a)
    return (
        mu * a**3 / (2 * s) * d**2,
        4 * t * (t + 2 * a) / (mu * k * s) * sigma**2 / batch,
        256 * t / (mu**2 * s) * (g * h) ** 2 * big,
    )


def local_sgd_longest_period(
    steps: ArrayLike,
    workers: ArrayLike,
    *,
    convexity: ArrayLike,
    smoothness: ArrayLike,
    sigma: ArrayLike,
    gradient: ArrayLike,
    batch: ArrayLike = 1,
    shift: ArrayLike | None = None,
) -> Array:
    """The period up to which the drift term of `local_sgd_bound` stays below its noise term, for a given shift.

        H = sigma / (8 G) sqrt(mu (T + 2 a) / (K L b)), of the order of sqrt(T / (K b)); at most a, and at least 1

    Arguments (they broadcast): as in `local_sgd_bound`, `gradient` > 0; `shift` a >= 16 kappa, which is what None
    stands for: with a longer period than that the bound needs a larger shift.

    ValueError: an argument outside its range. Source: section 2.2, "Global synchronization steps", with the constants
    of (6).
    """
    t, k, mu, big = floats(steps, workers, convexity, smoothness)
    sigma, g, batch = floats(sigma, gradient, batch)
    need("steps >= 1", t >= 1, steps=t)
    need("workers >= 1", k >= 1, workers=k)
    need("batch >= 1", batch >= 1, batch=batch)
    need("sigma >= 0", sigma >= 0, sigma=sigma)
    need("gradient > 0", g > 0, gradient=g)
    least = local_sgd_shift(1.0, convexity=mu, smoothness=big)
    a = least if shift is None else np.asarray(shift, float)
    need("shift >= 16 smoothness / convexity", a >= least, shift=a, least=least)
    return np.clip(sigma / (8 * g) * np.sqrt(mu * (t + 2 * a) / (k * big * batch)), 1.0, a)

"""How many local steps between averages cost least: Zhang and Li's T* for two decays of the local gradients.

    total cost <= C_c m d(x_0, S)^2 / (alpha eps) (1 + r T) / (h(0) + ... + h(T - 1)),   r = C_g / C_c

h(t) is what t local steps leave of |grad f_i|^2: beta^t, or 1 / (1 + a t)^beta. The functions of a `period` give the
last factor, the cost in units of the first.

The names: T `period`, r `cost_ratio` (a gradient step's cost over a communication's), beta `decay` or `exponent`, a
`scale`. Source: Zhang and Li, section 4.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from mpilsgd.theory.ranges import Array, floats, need


def rounds_bound(
    decay_sum: ArrayLike, *, distance: ArrayLike, descent: ArrayLike, tolerance: ArrayLike
) -> Array:
    """The rounds after which |grad f|^2 has been at most eps.

        n* <= d(x_0, S)^2 / (alpha eps (h(0) + ... + h(T - 1)))

    Arguments (they broadcast): `decay_sum` > 0, the sum of the h; `distance` d(x_0, S) >= 0; `descent` alpha > 0, the
    least `local_descent`; `tolerance` eps > 0.

    ValueError: an argument outside its range. Source: (5).
    """
    s, d, alpha, eps = floats(decay_sum, distance, descent, tolerance)
    need("decay_sum > 0", s > 0, decay_sum=s)
    need("distance >= 0", d >= 0, distance=d)
    need("descent > 0", alpha > 0, descent=alpha)
    need("tolerance > 0", eps > 0, tolerance=eps)
    return d**2 / (alpha * eps * s)


def linear_decay_sum(period: ArrayLike, decay: ArrayLike) -> Array:
    """The sum of beta^t over T local steps: (1 - beta^T) / (1 - beta).

    Arguments (they broadcast): `period` T > 0, infinity too; `decay` beta in (0, 1).

    ValueError: an argument outside its range. Source: section 4.
    """
    t, beta = floats(period, decay)
    need("period > 0", t > 0, period=t)
    need("0 < decay < 1", (beta > 0) & (beta < 1), decay=beta)
    return -np.expm1(t * np.log(beta)) / (1 - beta)


def linear_cost(period: ArrayLike, cost_ratio: ArrayLike, decay: ArrayLike) -> Array:
    """The cost of period T under linear decay, (1 + r T)(1 - beta) / (1 - beta^T).

    Arguments (they broadcast): `period` T > 0; `cost_ratio` r >= 0; `decay` beta in (0, 1).

    ValueError: an argument outside its range. Source: section 4.
    """
    t, r = floats(period, cost_ratio)
    need("cost_ratio >= 0", r >= 0, cost_ratio=r)
    return (1 + r * t) / linear_decay_sum(t, decay)


def linear_best_period(cost_ratio: ArrayLike, decay: ArrayLike) -> Array:
    """The period (a real number) of least `linear_cost`.

        T* = (1 + W(-exp(-1 - L / r))) / -L - 1 / r = log(y) / L;    L = log(1 / beta),  y - log y = 1 + L / r,  y > 1

    with W the lower branch of Lambert's function, which is -y here: exp(-L / r) itself would underflow.

    Arguments (they broadcast): `cost_ratio` r > 0; `decay` beta in (0, 1).

    ValueError: an argument outside its range. Source: section 4, "Linearly Convergent Case".
    """
    r, beta = floats(cost_ratio, decay)
    need("cost_ratio > 0", r > 0, cost_ratio=r)
    need("0 < decay < 1", (beta > 0) & (beta < 1), decay=beta)
    rate = -np.log(beta)
    u = rate / r
    # v = y - 1 solves v - log(1 + v) = u; from this upper bound Newton's steps only fall
    v = u + np.sqrt(2 * u)
    for _ in range(8):
        v = v - (v - np.log1p(v) - u) * (1 + v) / v
    return np.log1p(v) / rate


def linear_best_period_asymptotic(cost_ratio: ArrayLike, decay: ArrayLike) -> Array:
    """`linear_best_period` for small r.

        T* = log(1 + L / r) / L,  L = log(1 / beta)

    Arguments, errors: `linear_best_period`.

    Erratum: the paper prints log(1 + L / r), without the last division. beta = 0.9, r = 1e-4: exact 66.13, this 66.07,
    printed 6.96.

    Source: section 4, "Linearly Convergent Case".
    """
    r, beta = floats(cost_ratio, decay)
    need("cost_ratio > 0", r > 0, cost_ratio=r)
    need("0 < decay < 1", (beta > 0) & (beta < 1), decay=beta)
    rate = -np.log(beta)
    return np.log1p(rate / r) / rate


def power_decay(order: ArrayLike, lr: ArrayLike, start: ArrayLike) -> tuple[Array, Array]:
    """The scale a and the exponent beta of the decay of |f'|^2 under small gradient steps on f(x) = x^(2 l).

        a = 2 l (2 l - 2) eta x_0^(2 l - 2),  beta = (2 l - 1) / (l - 1)

    Arguments (they broadcast): `order` l > 1; `lr` eta > 0; `start` x_0, not 0.

    Erratum: the paper prints a = 2 l - 2 and half this beta, which is the decay of |f'|, not of its square.

    ValueError: an argument outside its range. Source: section 4, "Sub-linearly Convergent Case".
    """
    order, eta, x = floats(order, lr, start)
    need("order > 1", order > 1, order=order)
    need("lr > 0", eta > 0, lr=eta)
    need("start, not 0", x != 0, start=x)
    return 2 * order * (2 * order - 2) * eta * np.abs(x) ** (2 * order - 2), (2 * order - 1) / (order - 1)


def power_decay_sum(period: ArrayLike, scale: ArrayLike, exponent: ArrayLike) -> Array:
    """The sum of 1 / (1 + a t)^beta over T local steps, by Hurwitz' zeta function (scipy).

        a^-beta (zeta(beta, 1 / a) - zeta(beta, 1 / a + T))

    Arguments (they broadcast): `period` T >= 1; `scale` a > 0; `exponent` beta > 1.

    ValueError: an argument outside its range. Source: section 4, where an integral stands for it.
    """
    from scipy.special import zeta

    t, a, beta = floats(period, scale, exponent)
    need("period >= 1", t >= 1, period=t)
    need("scale > 0", a > 0, scale=a)
    need("exponent > 1", beta > 1, exponent=beta)
    return (zeta(beta, 1 / a) - zeta(beta, 1 / a + t)) / a**beta


def power_cost(period: ArrayLike, cost_ratio: ArrayLike, scale: ArrayLike, exponent: ArrayLike) -> Array:
    """The bound of the cost of period T under power-law decay, a (beta - 1)(1 + r T) / (1 - (1 + a T)^(1 - beta)).

    It is above (1 + r T) / `power_decay_sum`, by less than 1 + a (beta - 1) times for large T.

    Arguments (they broadcast): `period` T > 0; `cost_ratio` r >= 0; `scale` a > 0; `exponent` beta > 1.

    ValueError: an argument outside its range. Source: section 4.
    """
    t, r, a, beta = floats(period, cost_ratio, scale, exponent)
    need("period > 0", t > 0, period=t)
    need("cost_ratio >= 0", r >= 0, cost_ratio=r)
    need("scale > 0", a > 0, scale=a)
    need("exponent > 1", beta > 1, exponent=beta)
    return a * (beta - 1) * (1 + r * t) / -np.expm1((1 - beta) * np.log1p(a * t))


def power_best_period(cost_ratio: ArrayLike, scale: ArrayLike, exponent: ArrayLike) -> Array:
    """The period (a real number) of least `power_cost`.

        r ((1 + a T)^beta - 1) = a (beta + beta r T - 1)

    Arguments (they broadcast): `cost_ratio` r > 0; `scale` a > 0; `exponent` beta > 1.

    ValueError: an argument outside its range. Source: (6).
    """
    r, a, beta = floats(cost_ratio, scale, exponent)
    _need_power(r, a, beta)
    target = a * (beta - 1) / r
    u = np.ones(np.broadcast(target, beta).shape)  # u = a T: (1 + u)^beta - 1 - beta u = target
    while (short := _excess(u, beta) < target).any():
        u = np.where(short, 2 * u, u)
    for _ in range(60):  # from above, the function convex: Newton's steps only fall, and stop at rounding
        slope = beta * np.expm1((beta - 1) * np.log1p(u))
        less = u - (_excess(u, beta) - target) / slope
        if not (less < u * (1 - 1e-15)).any():
            break
        u = np.minimum(less, u)
    return u / a


def power_best_period_asymptotic(cost_ratio: ArrayLike, scale: ArrayLike, exponent: ArrayLike) -> Array:
    """`power_best_period` for small r.

        T* = ((a (beta - 1) / r)^(1 / beta) - 1) / a

    Arguments, errors: `power_best_period`. Source: section 4; 367.90 at r = 1e-8, a = 2, beta = 3.
    """
    r, a, beta = floats(cost_ratio, scale, exponent)
    _need_power(r, a, beta)
    return ((a * (beta - 1) / r) ** (1 / beta) - 1) / a


def _need_power(r: Array, a: Array, beta: Array) -> None:
    need("cost_ratio > 0", r > 0, cost_ratio=r)
    need("scale > 0", a > 0, scale=a)
    need("exponent > 1", beta > 1, exponent=beta)


def _excess(u: Array, beta: Array) -> Array:
    """(1 + u)^beta - 1 - beta u, infinite where it overflows."""
    with np.errstate(over="ignore"):
        return np.expm1(beta * np.log1p(u)) - beta * u

"""Stationary points: those that elastic averaging adds, and that of Leader SGD, whose leader is one of f itself.

Proposition 8's f is exp(x + 1) below -1, exp(1 - x) above 1, and between them the polynomial of degree 7 that makes f
twice continuously differentiable with f'(0) = 1. Source: Leader SGD, 3.2, 7.2.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from mpilsgd.theory.ranges import Array, floats, need


def leader_objective_gradient(
    points: ArrayLike, values: ArrayLike, gradients: ArrayLike, strength: ArrayLike
) -> Array:
    """What a step of Leader SGD follows: its gradient with the leader held where it is.

        grad f(x^i) + lambda (x^i - x^j),  j the worker of least value

    The leader's own is grad f(x^j): where all are 0, the leader is a stationary point of f.

    Arguments: `points`, `gradients` of f there, (..., p, d); `values` of f there, (..., p); `strength` lambda = pull
    / lr >= 0.

    Erratum, found here: Theorem 4 is true of this gradient, as the update has it. Differentiated through the argmin,
    the leader's part has sum_i lambda (x^j - x^i) besides, and then it need not be.

    ValueError: an argument outside its range. Source: Theorem 4 (20), where f^i is f.
    """
    x, f, g, lam = floats(points, values, gradients, strength)
    need("strength >= 0", lam >= 0, strength=lam)
    leader = np.argmin(f, axis=-1)[..., None, None]
    return g + lam * (x - np.take_along_axis(x, leader, axis=-2))


def elastic_objective_gradient(
    points: ArrayLike, centre: ArrayLike, gradients: ArrayLike, strength: ArrayLike
) -> tuple[Array, Array]:
    """The gradient of the elastic averaging objective: in the workers, and in the centre.

        grad f(x^i) + lambda (x^i - c);    lambda sum_i (c - x^i)

    Arguments: `points`, `gradients` of f there, (..., p, d); `centre` c, (..., d); `strength` lambda = alpha / lr >= 0.

    ValueError: an argument outside its range. Source: Leader SGD (5), thesis (1.2).
    """
    x, c, g, lam = floats(points, centre, gradients, strength)
    need("strength >= 0", lam >= 0, strength=lam)
    apart = lam * (x - c[..., None, :])
    return g + apart, -apart.sum(axis=-2)


def elastic_trap(strength: ArrayLike) -> Array:
    """The y at which (-y, y, 0) is a stationary point of elastic averaging of two workers, but none of the three of f.

        lambda y = exp(1 - y), so y = W_0(e / lambda) >= 1 (scipy)

    Arguments: `strength` lambda in (0, 1].

    Erratum: the text gives the equation without its solution.

    ValueError: `strength` outside its range. Source: Proposition 8.
    """
    from scipy.special import lambertw

    (lam,) = floats(strength)
    need("0 < strength <= 1", (lam > 0) & (lam <= 1), strength=lam)
    return lambertw(np.e / lam).real


def two_slopes(x: ArrayLike) -> tuple[Array, Array]:
    """Proposition 8's f and its derivative at x.

    Erratum: the polynomial must have p(-1) = 1, p'(-1) = 1, p''(-1) = 1 and p(1) = 1, p'(1) = -1, p''(1) = 1, p'(0) =
    1. The printed -1 for p(-1) and p''(-1) is wrong, and the seven conditions are singular in degree 6; in degree 7
    they have a solution.

    Arguments: `x` any. Source: Proposition 8.
    """
    (x,) = floats(x)
    inner = _BRIDGE(np.clip(x, -1, 1)), _BRIDGE.deriv()(np.clip(x, -1, 1))
    outer = np.exp(1 - np.maximum(np.abs(x), 1.0))
    between = np.abs(x) <= 1
    return np.where(between, inner[0], outer), np.where(between, inner[1], -np.sign(x) * outer)


def _bridge() -> np.polynomial.Polynomial:
    # the even part meets value 1, slope -1, curvature 1 at 1; the odd part is 0 there in all three, with slope 1 at 0
    powers = np.arange(4)
    even, odd = 2 * powers[:3], 2 * powers + 1
    rows = [even**0, even, even * (even - 1)]
    of_even = np.linalg.solve(np.array(rows, float), [1.0, -1.0, 1.0])
    rows = [odd**0, odd, odd * (odd - 1), (odd == 1).astype(int)]
    of_odd = np.linalg.solve(np.array(rows, float), [0.0, 0.0, 0.0, 1.0])
    coefficients = np.zeros(8)
    coefficients[even], coefficients[odd] = of_even, of_odd
    return np.polynomial.Polynomial(coefficients)


_BRIDGE = _bridge()

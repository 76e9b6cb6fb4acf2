"""Leader gradient descent on f(x) = x' A x / 2: when the leader turns the step toward Newton's direction.

    d_z = -(A x + lambda (x - z)),  d_G = -A x,  d_N = -x,  E = {z: f(z) <= f(x)}

lambda is `strength` = pull / lr. The leaders in E with which the angle of d_z to d_N is at most that of d_G are the
improvement set. Source: Leader SGD, 3.3, 7.8.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from mpilsgd.theory.ranges import Array, floats, need


def newton_cosine(x: ArrayLike, hessian: ArrayLike) -> Array:
    """The cosine of the angle between the gradient's and Newton's direction at x.

        x' A x / (|x| |A x|);    its least value is 2 / (sqrt(kappa) + 1 / sqrt(kappa))

    Arguments: `x` of shape (..., d), not 0; `hessian` A, positive definite, (d, d).

    ValueError: an argument outside its range. Source: 3.3, Lemma 26.
    """
    x, a = _point(x, hessian)
    gradient = x @ a
    return np.sum(x * gradient, -1) / (np.linalg.norm(x, axis=-1) * np.linalg.norm(gradient, axis=-1))


def angle_improves(x: ArrayLike, leader: ArrayLike, strength: ArrayLike, hessian: ArrayLike) -> Array:
    """Whether a leader is in the improvement set of x.

        f(z) <= f(x) and theta(d_z, d_N) <= theta(d_G, d_N)

    Arguments: `x`, `leader` z of shapes (..., d) that broadcast, x not 0; `strength` lambda >= 0; `hessian` A, positive
    definite, (d, d).

    ValueError: an argument outside its range. Source: 3.3.
    """
    x, a = _point(x, hessian)
    z, lam = floats(leader, strength)
    need("strength >= 0", lam >= 0, strength=lam)
    step = x @ a + lam[..., None] * (x - z)
    length = np.linalg.norm(x, axis=-1) * np.linalg.norm(step, axis=-1)
    # products in place of quotients: a step of length 0 has no angle, and counts as one that does not turn away
    turns = np.sum(x * step, -1) >= newton_cosine(x, a) * length * (1 - 1e-12)
    return (np.sum(z * (z @ a), -1) <= np.sum(x * (x @ a), -1)) & turns


def small_pull_share(x: ArrayLike, hessian: ArrayLike) -> Array:
    """The share of E that improves the angle as lambda tends to 0: at least one half (scipy).

        E and N' z < N' x,  N = -A x + |A x| / (cos theta_x |x|) x

    It is a part of an ellipsoid beyond a plane, so an incomplete beta function.

    Arguments: `x` of shape (..., d), not along an eigenvector of A (there the angle is 0 already); `hessian` A,
    positive definite, (d, d), d >= 2.

    ValueError: an argument outside its range. Source: Theorem 6, Proposition 25; the closed form is ours.
    """
    from scipy.special import betainc

    x, a = _point(x, hessian)
    cosine = newton_cosine(x, a)
    need("x with an angle above 0 to Newton's direction", cosine < 1 - 1e-14, cosine=cosine)
    gradient = x @ a
    scale = np.linalg.norm(gradient, axis=-1) / (cosine * np.linalg.norm(x, axis=-1))
    normal = scale[..., None] * x - gradient
    # in u = A^(1/2) z the set E is a ball of radius sqrt(x' A x)
    width = np.sqrt(
        np.sum(normal * np.linalg.solve(a, normal[..., None])[..., 0], -1) * np.sum(x * gradient, -1)
    )
    depth = np.clip(np.sum(normal * x, -1) / width, 0.0, 1.0)
    return 1 - betainc((len(a) + 1) / 2, 0.5, 1 - depth**2) / 2


def largest_angle_ratio(kappa: ArrayLike) -> Array:
    """The largest r of R_kappa: wherever cos theta_x = r' / sqrt(kappa), r' <= r, half of E improves at every lambda.

        r / sqrt(kappa) + r^(3/2) / kappa^(1/4) = 1

    Such x exist for r >= 2 kappa / (kappa + 1); so kappa >= (2 + sqrt(2))^4 = 135.9 is enough for r = 2.

    Arguments: `kappa` >= 1, the condition number of A.

    ValueError: `kappa` outside its range. Source: Theorem 7; of "nonempty for all r >= 2" only r <= sqrt(kappa) is
    meant.
    """
    (kappa,) = floats(kappa)
    need("kappa >= 1", kappa >= 1, kappa=kappa)
    # s = sqrt(r) / kappa^(1/4) solves s^2 + sqrt(kappa) s^3 = 1: convex and rising, so Newton falls from s = 1
    s, k = np.ones(kappa.shape), np.sqrt(kappa)
    for _ in range(60):
        s = s - (s**2 + k * s**3 - 1) / (2 * s + 3 * k * s**2)
    return s**2 * k


def farthest_level_point(kappa: ArrayLike, cosine: ArrayLike) -> Array:
    """The bound of |z|^2 / |x|^2 over the z orthogonal to x with f(z) <= f(x): kappa cos theta_x.

    Arguments (they broadcast): `kappa` >= 1; `cosine` of theta_x, in (0, 1].

    ValueError: an argument outside its range. Source: Proposition 27.
    """
    kappa, c = floats(kappa, cosine)
    need("kappa >= 1", kappa >= 1, kappa=kappa)
    need("0 < cosine <= 1", (c > 0) & (c <= 1), cosine=c)
    return kappa * c


def _point(x: ArrayLike, hessian: ArrayLike) -> tuple[Array, Array]:
    x, a = floats(x, hessian)
    least = np.linalg.eigvalsh(a)[0]
    need("a positive definite hessian", least > 0, least_eigenvalue=least)
    size = np.linalg.norm(x, axis=-1)
    need("x, not 0", size > 0, length=size)
    return x, a

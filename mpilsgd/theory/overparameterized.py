"""Model averaging where the local optima meet: Zhang and Li's rates, with any number of local steps.

Each of m nodes takes T gradient steps on its own f_i, then all average. S is the intersection of the optimal sets S_i.

The names: eta_i `lr`, L_i `smoothness`, mu_i `convexity` (restricted strong convexity), T `period`, n `rounds`. Source:
Zhang and Li, "Distributed Optimization for Over-Parameterized Learning".
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from mpilsgd.theory.ranges import Array, floats, need


def local_descent(lr: ArrayLike, smoothness: ArrayLike) -> Array:
    """The weight of a node's squared gradients in the decrease of the distance to S.

        d(x_(n+1), S)^2 <= d(x_n, S)^2 - (1 / m) sum_i sum_t alpha_i |grad f_i|^2;    alpha_i = eta_i (2 / L_i - eta_i)

    Arguments (they broadcast): `smoothness` L_i > 0; `lr` in (0, 2 / L_i).

    ValueError: an argument outside its range. Source: Lemma 1.
    """
    eta, big = floats(lr, smoothness)
    need("smoothness > 0", big > 0, smoothness=big)
    need("0 < lr < 2 / smoothness", (eta > 0) & (eta * big < 2), lr=eta, smoothness=big)
    return eta * (2 / big - eta)


def least_gradient(rounds: ArrayLike, distance: ArrayLike, descent: ArrayLike) -> Array:
    """The bound of the least |grad f(x_k)|^2 of the first n rounds, convex f_i.

        d(x_0, S)^2 / (n min_i alpha_i);    then f(x_k) - min f <= |grad f(x_k)| d(x_0, S)

    Arguments (they broadcast): `rounds` n >= 1; `distance` d(x_0, S) >= 0; `descent` > 0, the least `local_descent`.

    ValueError: an argument outside its range. Source: Theorem 2, from its proof.
    """
    n, d, alpha = floats(rounds, distance, descent)
    need("rounds >= 1", n >= 1, rounds=n)
    need("distance >= 0", d >= 0, distance=d)
    need("descent > 0", alpha > 0, descent=alpha)
    return d**2 / (n * alpha)


def contraction(separation: ArrayLike, conditioning: ArrayLike = 1.0) -> Array:
    """The factor by which a round brings the model closer to S, at most.

        d(x_(n+1), S) <= sqrt(1 - c^-2 min_i (alpha_i mu_i^2)) d(x_n, S)

    Conditioning 1 is T = infinity on affine optimal sets, where the local models are projections (Theorem 7).

    Arguments (they broadcast): `separation` c >= 1, with d(x, S) <= c (1 / m) sum_i d(x, S_i); `conditioning` in (0,
    1], min_i of `local_descent` times mu_i^2.

    Erratum: Theorem 3 prints c^-1. Two lines at an angle of 0.2 contract by 0.9900 with c = 2 / sin 0.2; the printed
    bound says 0.9490, this one 0.9951.

    ValueError: an argument outside its range. Source: Theorems 3 and 7.
    """
    c, k = floats(separation, conditioning)
    need("separation >= 1", c >= 1, separation=c)
    need("0 < conditioning <= 1", (k > 0) & (k <= 1), conditioning=k)
    return np.sqrt(1 - k / c**2)


def affine_separation(normals: Sequence[ArrayLike]) -> float:
    """The separation constant c of affine sets with a common point, from the matrices whose rows are normal to them.

        c = 1 / sigma_min(Q),  Q = (1 / m) sum_i A_i^+ A_i,  the least singular value that is not 0

    It holds for every point, and is not the least that does: two lines at angle theta have 2 / sin theta.

    Arguments: `normals`, m matrices of shape (any, d).

    ValueError: no matrix, or matrices that are all 0. Source: Lemma 6.
    """
    if not len(normals):
        raise ValueError("needs normals, at least one matrix")
    parts = [np.linalg.pinv(a) @ a for a in floats(*normals)]
    values = np.linalg.eigvalsh(sum(parts) / len(parts))
    found = values[values > 1e-10]  # eigenvalues of a mean of projections: all in [0, 1]
    if not len(found):
        raise ValueError("needs normals that are not all 0: every set is the whole space")
    return float(1 / found[0])


def two_lines_separation(angle: ArrayLike) -> Array:
    """The least separation constant of two lines (or hyperplanes) at an angle.

        c = 2 / sin(theta)

    Arguments: `angle` theta in (0, pi / 2]. ValueError: outside it. Source: section 2.3.1.
    """
    (theta,) = floats(angle)
    need("0 < angle <= pi / 2", (theta > 0) & (theta <= np.pi / 2), angle=theta)
    return 2 / np.sin(theta)


def tangent_gradient(rounds: ArrayLike, lr: ArrayLike, period: ArrayLike) -> Array:
    """The squared gradient after n rounds where a disc touches a half-plane and Assumption 3 fails (Fig. 2a).

        |grad f(x_n)|^2 ~ 4 / ((1 - q)^3 n^3),  q = (1 - 2 eta)^T
        f_1 = max(sqrt(x^2 + (y - 1)^2) - 1, 0)^2,  f_2 = max(y, 0)^2,  f = (f_1 + f_2) / 2

    Arguments (they broadcast): `rounds` n >= 1; `lr` in (0, 1/2); `period` T >= 1.

    Erratum: the paper sees 1 / n; that slope is a transient for small eta and T.

    ValueError: an argument outside its range. Source: section 2.3.1, as corrected.
    """
    n, eta, t = floats(rounds, lr, period)
    need("rounds >= 1", n >= 1, rounds=n)
    need("0 < lr < 1/2", (eta > 0) & (eta < 0.5), lr=eta)
    need("period >= 1", t >= 1, period=t)
    return 4 / ((1 - (1 - 2 * eta) ** t) * n) ** 3

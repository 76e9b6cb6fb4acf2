"""EASGD and ADMM when the workers take turns, on F(x) = x^2 / 2: the maps of one whole round.

A curvature h other than 1 is the learning rate eta h (EASGD) or eta h and rho / h (ADMM).

The names: eta `lr`, alpha `moving_rate`, rho `rho`, p `workers`. Source: thesis 3.3.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from mpilsgd.theory.ranges import Array, floats, need, whole_workers


def round_robin_easgd(lr: ArrayLike, moving_rate: ArrayLike, workers: int) -> Array:
    """The map of one round of EASGD in the state (x^1, ..., x^p, c): F^p ... F^1.

    In its turn, worker i and the centre move at once, from the old values:

        x^i <- x^i - eta x^i - alpha (x^i - c);    c <- c + alpha (x^i - c)

    Arguments: `lr`, `moving_rate` any, arrays that broadcast; `workers` p >= 1, one int.

    ValueError: `workers` outside its range. Source: thesis (3.55), (3.56).
    """
    p = whole_workers(workers)
    eta, alpha = np.broadcast_arrays(*floats(lr, moving_rate))
    whole = _identities(eta.shape, p + 1)
    for i in range(p):
        x, c = whole[..., i, :].copy(), whole[..., p, :].copy()
        whole[..., i, :] = (1 - eta - alpha)[..., None] * x + alpha[..., None] * c
        whole[..., p, :] = alpha[..., None] * x + (1 - alpha)[..., None] * c
    return whole


def round_robin_easgd_edge(lr: ArrayLike) -> Array:
    """The moving rate up to which EASGD in round robin is stable, whatever the number of workers.

        0 <= alpha <= (4 - 2 eta) / (4 - eta)

    Arguments: `lr` in [0, 2].

    Erratum: the thesis calls this the condition that must be satisfied. It is sufficient for every p, since each turn's
    map is symmetric with eigenvalues in [-1, 1]; for even p the product can be stable beyond it.

    ValueError: `lr` outside its range. Source: thesis 3.3, its last formula.
    """
    (eta,) = floats(lr)
    need("0 <= lr <= 2", (eta >= 0) & (eta <= 2), lr=eta)
    return (4 - 2 * eta) / (4 - eta)


def round_robin_admm(lr: ArrayLike, rho: ArrayLike, workers: int) -> Array:
    """The map of one round of ADMM in the state (lambda^1, x^1, ..., lambda^p, x^p, c): F_3^p F_2^p F_1^p ... F_1^1.

    In its turn, worker i does in this order

        lambda^i <- lambda^i - (x^i - c)
        x^i <- (x^i - eta x^i + eta rho (lambda^i + c)) / (1 + eta rho)
        c <- (1/p) sum_j (x^j - lambda^j)

    Each turn alone is stable; their product need not be: at p = 3, eta = 0.001, rho = 2.5 its radius is 1.0009739.
    No closed condition is known.

    Arguments: `lr` any, `rho` with lr rho > -1, arrays that broadcast; `workers` p >= 1, one int.

    ValueError: an argument outside its range. Source: thesis (3.52)-(3.54), with lambda in units of rho.
    """
    p = whole_workers(workers)
    eta, rho = np.broadcast_arrays(*floats(lr, rho))
    need("lr rho > -1", eta * rho > -1, lr=eta, rho=rho)
    keep, pull = ((1 - eta) / (1 + eta * rho))[..., None], (eta * rho / (1 + eta * rho))[..., None]
    whole = _identities(eta.shape, 2 * p + 1)
    for i in range(p):
        dual, x, c = whole[..., 2 * i, :], whole[..., 2 * i + 1, :], whole[..., 2 * p, :]
        dual -= x - c
        x[...] = keep * x + pull * (dual + c)
        c[...] = (whole[..., 1 : 2 * p : 2, :] - whole[..., 0 : 2 * p : 2, :]).mean(axis=-2)
    return whole


def _identities(shape: tuple[int, ...], size: int) -> Array:
    return np.broadcast_to(np.eye(size), (*shape, size, size)).copy()

"""Leader SGD on a strongly convex function: one step, the limit, stale leaders, leaders chosen by noisy losses.

    x <- x - eta g(x) - pull (x - z)

g is unbiased with variance at most sigma^2 + nu |grad f|^2; z is any guiding point. The theory's lambda is pull /
eta: its pull is eta lambda, while (3) of the paper has the rate lambda, our `pull`.

The names: m `convexity`, M `smoothness`, kappa = M / m, eta `lr`, p `workers`. Source: "Leader Stochastic Gradient
Descent for Distributed Training of Deep Learning Models", 3.1, 3.2.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from mpilsgd.theory.ranges import Array, floats, need


def leader_lr_edge(*, smoothness: ArrayLike, nu: ArrayLike = 0.0) -> Array:
    """The largest learning rate of Theorems 1 and 3.

        eta <= 1 / (2 M (nu + 1))

    Arguments (they broadcast): `smoothness` M > 0; `nu` >= 0.

    ValueError: an argument outside its range. Source: Theorem 1.
    """
    big, nu = floats(smoothness, nu)
    need("smoothness > 0", big > 0, smoothness=big)
    need("nu >= 0", nu >= 0, nu=nu)
    return 1 / (2 * big * (nu + 1))


def leader_pull_edge(*, convexity: ArrayLike, smoothness: ArrayLike) -> Array:
    """The largest pull of Theorems 1 and 3.

        pull = eta lambda <= m / (2 M)

    Arguments (they broadcast): 0 < `convexity` m <= `smoothness` M.

    Erratum: the third condition of the paper, eta sqrt(lambda) <= 1 / (kappa sqrt(2 m)), follows from the other two.

    ValueError: an argument outside its range. Source: Theorem 1.
    """
    m, big = floats(convexity, smoothness)
    need("0 < convexity <= smoothness", (m > 0) & (m <= big), convexity=m, smoothness=big)
    return m / (2 * big)


def leader_step(
    gap: ArrayLike,
    leader_gap: ArrayLike,
    lr: ArrayLike,
    pull: ArrayLike,
    *,
    convexity: ArrayLike,
    smoothness: ArrayLike,
    sigma: ArrayLike = 0.0,
    nu: ArrayLike = 0.0,
) -> Array:
    """The bound of the expected f(x+) - f* after one step from f(x) - f* = `gap` with a leader at `leader_gap`.

        (1 - m eta) gap - pull (gap - leader_gap) + eta^2 M sigma^2 / 2

    Arguments (they broadcast): `gap`, `leader_gap` >= 0; `lr` in (0, `leader_lr_edge`]; `pull` in [0,
    `leader_pull_edge`]; 0 < `convexity` <= `smoothness`; `sigma`, `nu` >= 0.

    Erratum: the printed route from (8) to (9) gives 1 - m eta / 2; (9) is true all the same.

    ValueError: an argument outside its range. Source: Theorem 1, (9).
    """
    gap, leader_gap = floats(gap, leader_gap)
    need("gap >= 0", gap >= 0, gap=gap)
    need("leader_gap >= 0", leader_gap >= 0, leader_gap=leader_gap)
    eta, pull, m, big, sigma = _step(lr, pull, convexity, smoothness, sigma, nu)
    return (1 - m * eta) * gap - pull * (gap - leader_gap) + eta**2 * big * sigma**2 / 2


def leader_limit(
    lr: ArrayLike,
    pull: ArrayLike,
    *,
    convexity: ArrayLike,
    smoothness: ArrayLike,
    sigma: ArrayLike,
    nu: ArrayLike = 0.0,
    workers: ArrayLike = 1,
    loss_sigma: ArrayLike = 0.0,
) -> Array:
    """The bound of the limit of E f(x_k) - f* with fixed rates, the leader chosen by losses of variance `loss_sigma`^2.

        eta kappa sigma^2 / 2 + 4 lambda sqrt(p) sigma_f / m,  lambda = pull / eta

    With the true leader (`loss_sigma` 0) the second term is absent and no number of workers matters.

    Arguments (they broadcast): `lr`, `pull`, `convexity`, `smoothness`, `sigma`, `nu` as in `leader_step`; `workers`
    p >= 1; `loss_sigma` sigma_f >= 0.

    ValueError: an argument outside its range. Source: Theorems 1 and 3.
    """
    eta, pull, m, big, sigma = _step(lr, pull, convexity, smoothness, sigma, nu)
    return eta * big / m * sigma**2 / 2 + pull / eta * stochastic_leader_excess(workers, loss_sigma) / m


def stale_leader_gap(leader_gap: ArrayLike, strength: ArrayLike, *, convexity: ArrayLike) -> Array:
    """The bound of f(w) - f* where a worker ends that is pulled to one leader z for ever.

        f(w) - f* <= lambda / (m + lambda) (f(z) - f*);    w minimises f(x) + lambda / 2 |x - z|^2

    Arguments (they broadcast): `leader_gap` f(z) - f* >= 0; `strength` lambda = pull / lr >= 0; `convexity` m > 0.

    ValueError: an argument outside its range. Source: Theorem 2, (10).
    """
    gap, lam, m = floats(leader_gap, strength, convexity)
    need("leader_gap >= 0", gap >= 0, leader_gap=gap)
    need("strength >= 0", lam >= 0, strength=lam)
    need("convexity > 0", m > 0, convexity=m)
    return lam / (m + lam) * gap


def stale_leader_distance(leader_distance: ArrayLike, strength: ArrayLike, *, convexity: ArrayLike) -> Array:
    """The bound of |w - x*| where a worker ends that is pulled to one leader z for ever.

        |w - x*|^2 <= lambda^2 / (m (m + lambda)) |z - x*|^2

    Arguments (they broadcast): `leader_distance` |z - x*| >= 0; `strength` lambda = pull / lr >= 0; `convexity` m > 0.

    ValueError: an argument outside its range. Source: Theorem 15, (11).
    """
    d, lam, m = floats(leader_distance, strength, convexity)
    need("leader_distance >= 0", d >= 0, leader_distance=d)
    need("strength >= 0", lam >= 0, strength=lam)
    need("convexity > 0", m > 0, convexity=m)
    return lam / np.sqrt(m * (m + lam)) * d


def stochastic_leader_excess(workers: ArrayLike, loss_sigma: ArrayLike) -> Array:
    """The bound of how much worse than the best the leader is, in the mean, that has the least noisy loss.

        E f(z) - min_i f(x^i) <= 4 sqrt(p) sigma_f

    Arguments (they broadcast): `workers` p >= 1; `loss_sigma` sigma_f >= 0, the losses' standard deviation.

    ValueError: an argument outside its range. Source: 3.1.3, Lemma 17.
    """
    p, sigma = floats(workers, loss_sigma)
    need("workers >= 1", p >= 1, workers=p)
    need("loss_sigma >= 0", sigma >= 0, loss_sigma=sigma)
    return 4 * np.sqrt(p) * sigma


def wrong_leader_probability(excess: ArrayLike, workers: ArrayLike, loss_sigma: ArrayLike) -> Array:
    """The bound of the probability that the leader is worse than the best by `excess` or more.

        P(f(z) >= min_i f(x^i) + a) <= 4 sigma_f^2 p / a^2, at most 1

    Arguments (they broadcast): `excess` a > 0; `workers` p >= 1; `loss_sigma` sigma_f >= 0.

    ValueError: an argument outside its range. Source: Lemma 16.
    """
    a, p, sigma = floats(excess, workers, loss_sigma)
    need("excess > 0", a > 0, excess=a)
    need("workers >= 1", p >= 1, workers=p)
    need("loss_sigma >= 0", sigma >= 0, loss_sigma=sigma)
    return np.minimum(4 * sigma**2 * p / a**2, 1.0)


def leader_descends(lr: ArrayLike, pull: ArrayLike, *, smoothness: ArrayLike) -> Array:
    """Whether the leader's loss cannot rise in a period in which it is pulled to its own copy of the period's start.

        eta M + pull < 2

    A leader that is pulled at the first step only, or never, is a plain gradient descent: ask with `pull` 0.

    Arguments (they broadcast): `lr` eta > 0; `pull` >= 0; `smoothness` M > 0.

    Erratum: Lemma 21 and Theorem 5 ask eta < 2 / M, which is enough only if the leader's pull is 0 at every step.

    ValueError: an argument outside its range. Source: Theorem 5, Lemma 21.
    """
    eta, pull, big = floats(lr, pull, smoothness)
    need("lr > 0", eta > 0, lr=eta)
    need("pull >= 0", pull >= 0, pull=pull)
    need("smoothness > 0", big > 0, smoothness=big)
    return eta * big + pull < 2


def leader_gradient_sum(descent: ArrayLike, lr: ArrayLike, *, smoothness: ArrayLike) -> Array:
    """The bound of the sum of |grad f|^2 over gradient steps that lower f by `descent` in all.

        sum |grad f|^2 <= 2 / (eta (2 - eta M)) (f(start) - f(end))

    So a worker that leads for ever again has liminf |grad f| = 0.

    Arguments (they broadcast): `descent` >= 0; `smoothness` M > 0; `lr` in (0, 2 / M).

    ValueError: an argument outside its range. Source: Lemma 11, Theorem 5.
    """
    fall, eta, big = floats(descent, lr, smoothness)
    need("descent >= 0", fall >= 0, descent=fall)
    need("smoothness > 0", big > 0, smoothness=big)
    need("0 < lr < 2 / smoothness", (eta > 0) & (eta * big < 2), lr=eta, smoothness=big)
    return 2 / (eta * (2 - eta * big)) * fall


def _step(
    lr: ArrayLike,
    pull: ArrayLike,
    convexity: ArrayLike,
    smoothness: ArrayLike,
    sigma: ArrayLike,
    nu: ArrayLike,
) -> list[Array]:
    eta, pull, m, big, sigma = floats(lr, pull, convexity, smoothness, sigma)
    most, edge = leader_pull_edge(convexity=m, smoothness=big), leader_lr_edge(smoothness=big, nu=nu)
    need("0 < lr <= 1 / (2 smoothness (nu + 1))", (eta > 0) & (eta <= edge), lr=eta, edge=edge)
    need("0 <= pull <= convexity / (2 smoothness)", (pull >= 0) & (pull <= most), pull=pull, edge=most)
    need("sigma >= 0", sigma >= 0, sigma=sigma)
    return [eta, pull, m, big, sigma]

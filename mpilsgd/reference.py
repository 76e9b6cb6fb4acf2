"""Every update in a few lines of torch: the specification of the kernels, and their announced fallback.

The functions have the names, arguments and results of :mod:`mpilsgd.kernels`, which checks the arguments;
they run on every device, but make temporaries. In float32 and float64 the kernels give the same bits: each
line here is one rounding after the other in the same order. Half types are computed in float32 and rounded
once, at the store: to nearest, or by chance where a small pull would be lost (`round_by_chance`).
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mpilsgd.rounding import round_by_chance

__all__ = [
    "Moved",
    "assign",
    "average",
    "check",
    "elastic",
    "elastic_apply",
    "elastic_sum",
    "iterate",
    "msgd",
    "outer",
    "pull",
    "push",
    "total",
    "triad",
]


class Moved(NamedTuple):
    """What an update found out on its way over the vectors.

    squared_distance: sum of (after - before)^2 in float64, over x or all peers (not the centre) and over the
    elements that are finite before and after. finite: all values of x (of all peers) were finite before and
    are after. source_finite: so were those of the leaders or the centre (True where there is none).
    bad_peers: the indices of the peers that had a value not finite before
    (pull: before or after).
    """

    squared_distance: float
    finite: bool
    source_finite: bool
    bad_peers: tuple[int, ...] = ()


# --- pull toward leaders --------------------------------------------------------------------------


def pull_term(x: Tensor, leader: Tensor) -> Tensor:
    """x - leader, and 0 where the leader's value is not finite."""
    return torch.where(torch.isfinite(leader), x - leader, 0.0)


def elastic_term(x: Tensor, center: Tensor) -> Tensor:
    """d = x - c, and 0 where one of the two is not finite."""
    return torch.where(torch.isfinite(x), pull_term(x, center), 0.0)


@torch.no_grad()
def pull(
    x: Tensor | Sequence[Tensor],
    leader: Tensor,
    rate: float,
    other: Tensor | None = None,
    other_rate: float = 0.0,
    stats: bool = False,
    seed: int = 0,
) -> Moved | None:
    """x <- x - rate (x - leader) [- other_rate (x - other)]"""
    peers = [x] if isinstance(x, Tensor) else list(x)
    before = [p.clone() for p in peers] if stats else []
    sources = [leader.clone()] if other is None else [leader.clone(), other.clone()]
    for p in peers:
        old = _wide(p)
        new = old - rate * pull_term(old, _wide(sources[0]))
        if other is not None:
            new = new - other_rate * pull_term(old, _wide(sources[1]))
        p.copy_(round_by_chance(new, p.dtype, seed))
    if not stats:
        return None
    bad = tuple(i for i, p in enumerate(peers) if not (check(before[i]) and check(p)))
    return _moved(before, peers, sources)._replace(bad_peers=bad)


# --- elastic averaging ----------------------------------------------------------------------------


@torch.no_grad()
def elastic(
    center: Tensor,
    peers: Sequence[Tensor],
    moving_rate: float,
    rate: float,
    gauss_seidel: bool = False,
    stats: bool = False,
    seed: int = 0,
) -> Moved | None:
    """x_i <- x_i - moving_rate d_i,  c <- c + rate sum d_i,  d_i = x_i - c; Gauss-Seidel: c first."""
    before, old_center = [x.clone() for x in peers] if stats else [], center.clone()
    c = _wide(old_center)
    new_center = c + rate * _sum(elastic_term(_wide(x), c) for x in peers)
    anchor = new_center if gauss_seidel else c
    if moving_rate:
        for x in peers:
            new = _wide(x) - moving_rate * elastic_term(_wide(x), anchor)
            x.copy_(round_by_chance(new, x.dtype, seed))
    center.copy_(round_by_chance(new_center, center.dtype, seed))
    return _moved_peers(before, peers, [old_center, center]) if stats else None


@torch.no_grad()
def elastic_sum(
    total: Tensor,
    center: Tensor,
    peers: Sequence[Tensor],
    moving_rate: float,
    stats: bool = False,
    seed: int = 0,
) -> Moved | None:
    """total <- sum_i d_i,  x_i <- x_i - moving_rate d_i"""
    before, c = [x.clone() for x in peers] if stats else [], _wide(center)
    total.copy_(_sum(elastic_term(_wide(x), c) for x in peers))
    if moving_rate:
        for x in peers:
            new = _wide(x) - moving_rate * elastic_term(_wide(x), c)
            x.copy_(round_by_chance(new, x.dtype, seed))
    return _moved_peers(before, peers, [center]) if stats else None


@torch.no_grad()
def elastic_apply(
    center: Tensor, peers: Sequence[Tensor], total: Tensor, moving_rate: float, rate: float, seed: int = 0
) -> None:
    """c <- c + rate total,  x_i <- x_i - moving_rate (x_i - c)"""
    c = _wide(center) + rate * total
    for x in peers if moving_rate else ():
        new = _wide(x) - moving_rate * elastic_term(_wide(x), c)
        x.copy_(round_by_chance(new, x.dtype, seed))
    center.copy_(round_by_chance(c, center.dtype, seed))


# --- sums and means over workers ------------------------------------------------------------------


@torch.no_grad()
def total(out: Tensor, peers: Sequence[Tensor], stats: bool = False) -> Moved | None:
    """out <- sum_i x_i, over the finite values"""
    out.copy_(_sum(torch.where(torch.isfinite(x), _wide(x), 0.0) for x in peers))
    return _moved_peers(peers, peers, [], also=[out]) if stats else None


@torch.no_grad()
def assign(peers: Sequence[Tensor], total: Tensor, scale: float) -> None:
    """x_i <- scale total"""
    for x in peers:
        x.copy_(scale * total)


@torch.no_grad()
def average(peers: Sequence[Tensor], stats: bool = False) -> Moved | None:
    """x_i <- mean of the finite x_i; where there are none all stay as they are"""
    before = [x.clone() for x in peers] if stats else []
    count = _sum(torch.isfinite(x).to(_wide(x).dtype) for x in peers)
    mean = _sum(torch.where(torch.isfinite(x), _wide(x), 0.0) for x in peers) / count
    for x in peers:
        x.copy_(torch.where(count > 0, mean, _wide(x)))
    return _moved_peers(before, peers, []) if stats else None


# --- SGD with momentum ----------------------------------------------------------------------------


@torch.no_grad()
def msgd(
    x: Tensor,
    grad: Tensor,
    velocity: Tensor | None,
    lr: float | Tensor,
    momentum: float = 0.0,
    nesterov: bool = True,
    weight_decay: float = 0.0,
    leader: Tensor | None = None,
    rate: float = 0.0,
    other: Tensor | None = None,
    other_rate: float = 0.0,
    stats: bool = False,
) -> Moved | None:
    """v <- momentum v - lr (grad + weight_decay x);  x <- x + v - rate (x - leader) - ..."""
    before = [x.clone()] if stats else []
    sources = [source.clone() for source in (leader, other) if source is not None]
    look, stored = momentum if nesterov else 0.0, _wide(x)
    v = torch.zeros_like(stored) if velocity is None else _wide(velocity)
    new_v = momentum * v - lr * (_wide(grad) + weight_decay * stored)
    old = stored - look * v
    new = old + new_v
    for source, source_rate in ((leader, rate), (other, other_rate)):
        if source is not None:
            new = new - source_rate * pull_term(old, _wide(source))
    x.copy_(new + look * new_v)
    if velocity is not None:
        velocity.copy_(new_v)
    return _moved(before, [x], sources) if stats else None


@torch.no_grad()
def iterate(x: Tensor, velocity: Tensor, momentum: float, sign: float) -> None:
    """x <- x + sign momentum velocity"""
    x.copy_(_wide(x) + (sign * momentum) * _wide(velocity))


# --- push into a centre, outer step ---------------------------------------------------------------


@torch.no_grad()
def push(
    center: Tensor,
    x: Tensor,
    anchor: Tensor,
    rate: float = 1.0,
    velocity: Tensor | None = None,
    momentum: float = 0.0,
) -> None:
    """d = rate (x - anchor);  u <- momentum u + d,  c <- c + u,  x <- c + momentum u,  anchor <- x"""
    u = rate * elastic_term(_wide(x), _wide(anchor))
    if velocity is not None:
        u = momentum * _wide(velocity) + u
        velocity.copy_(u)
    c = _wide(center) + u
    center.copy_(c)
    x.copy_(c if velocity is None else c + momentum * u)
    anchor.copy_(x)


@torch.no_grad()
def outer(center: Tensor, velocity: Tensor, mean: Tensor, lr: float, momentum: float) -> None:
    """g = c - mean;  u <- momentum u + g;  c <- c - lr (g + momentum u) = mean + (1 - lr) g - lr momentum u"""
    c, m = _wide(center), _wide(mean)
    u = momentum * _wide(velocity) + (g := elastic_term(c, m))
    velocity.copy_(u)
    center.copy_(torch.where(torch.isfinite(m), m, c) + (1 - lr) * g - (lr * momentum) * u)


# --- reading, and the yardstick -------------------------------------------------------------------


@torch.no_grad()
def check(x: Tensor) -> bool:
    """Whether all values are finite."""
    return bool(torch.isfinite(x).all())


@torch.no_grad()
def triad(out: Tensor, b: Tensor, c: Tensor, scale: float) -> None:
    """out <- b + scale c, the yardstick of the benchmarks"""
    out.copy_(_wide(b) + scale * _wide(c))


def _wide(x: Tensor) -> Tensor:
    """x in the type of the arithmetic."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def _sum(terms: Iterable[Tensor]) -> Tensor:
    """The sum in the order of the terms (sum() would start with an int)."""
    return functools.reduce(operator.add, terms)


def _moved(before: Sequence[Tensor], after: Sequence[Tensor], sources: Sequence[Tensor]) -> Moved:
    distances = (new.double() - old.double() for old, new in zip(before, after, strict=True))
    return Moved(
        squared_distance=math.fsum(float((d[torch.isfinite(d)] ** 2).sum()) for d in distances),
        finite=all(check(t) for t in (*before, *after)),
        source_finite=all(check(t) for t in sources),
    )


def _moved_peers(
    before: Sequence[Tensor],
    after: Sequence[Tensor],
    sources: Sequence[Tensor],
    also: Sequence[Tensor] = (),
) -> Moved:
    """As _moved, over peers; with other vectors that must be finite."""
    moved = _moved(before, after, sources)
    return Moved(
        squared_distance=moved.squared_distance,
        finite=moved.finite and all(check(t) for t in also),
        source_finite=moved.source_finite,
        bad_peers=tuple(i for i, t in enumerate(before) if not check(t)),
    )

"""The updates on flat vectors, each in one pass over memory: on CPU, on CUDA, or (announced) in torch.

Every function works in place on 1-D contiguous tensors of one dtype (float32, float64, bfloat16, float16),
one device and one length, 0 included; bad arguments raise ValueError. Half types are computed in float32 and
rounded once, at the store; a `total` over peers has the type of the arithmetic (float32 for the half types).
Pulls and elastic moves, often smaller than half the distance of two half values, are rounded up or down by
chance, with the exact value as the mean: by the value and `seed` alone, so each round should have another one. No
temporary vectors are made; the CPU uses torch.get_num_threads() threads; CUDA work goes to torch's current stream.

Values that are not finite do not spread, element by element: such a leader's value pulls nothing, such a
peer's value adds nothing to a centre or total and is not moved, and a mean is over the finite ones.

With ``stats=True`` a function returns :class:`Moved`, from the same pass; on CUDA this waits for the result.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mpilsgd import bound, reference
from mpilsgd import kernel_arguments as need
from mpilsgd.blocks import decode, encode
from mpilsgd.extension import (
    FallbackWarning,
    backend,
    device_of,
    instruction_set,
    moved,
    pointer,
    pointers,
    where_to_run,
)
from mpilsgd.extension import core as _core
from mpilsgd.reference import Moved

__all__ = [
    "FallbackWarning",
    "Moved",
    "assign",
    "average",
    "backend",
    "check",
    "decode",
    "elastic",
    "elastic_apply",
    "elastic_sum",
    "encode",
    "instruction_set",
    "iterate",
    "msgd",
    "outer",
    "pull",
    "push",
    "total",
    "triad",
]


def pull(
    x: Tensor | Sequence[Tensor],
    leader: Tensor,
    rate: float,
    other: Tensor | None = None,
    other_rate: float = 0.0,
    *,
    stats: bool = False,
    seed: int = 0,
) -> Moved | None:
    """Pull x toward one or two leaders, both terms from the old x (LSGD Eq. 3; a running average, too).

    x <- x - rate (x - leader) [- other_rate (x - other)]

    x: the vector that moves, or several, which lie apart; then the leader's memory is read once for all of them.
    leader, other: what it is pulled to; may be the last x itself. rate, other_rate: finite.
    """
    return bound.pull(x, leader, rate, other, other_rate)(stats, seed)


def elastic(
    center: Tensor,
    peers: Sequence[Tensor],
    moving_rate: float,
    rate: float,
    *,
    gauss_seidel: bool = False,
    stats: bool = False,
    seed: int = 0,
) -> Moved | None:
    """Move workers and centre toward each other (EASGD, thesis 2.3-2.4; Gauss-Seidel 6.3).

    Jacobi: d_i = x_i - c;  x_i <- x_i - moving_rate d_i;  c <- c + rate sum_i d_i.
    Gauss-Seidel: c <- c + rate sum_i (x_i - c) first, then x_i <- x_i - moving_rate (x_i - c).

    center: the centre c. peers: the workers' vectors x_i, one or more. moving_rate: alpha; with 0 the peers
    are only read. rate: of the centre, beta/p.
    """
    return bound.elastic(center, peers, moving_rate, rate, gauss_seidel)(stats, seed)


def elastic_sum(
    total: Tensor,
    center: Tensor,
    peers: Sequence[Tensor],
    moving_rate: float,
    *,
    stats: bool = False,
    seed: int = 0,
) -> Moved | None:
    """The workers' half of the Jacobi form, d_i = x_i - c.

    total <- sum_i d_i;  x_i <- x_i - moving_rate d_i

    total: written, of the type of the arithmetic. center: read only. peers, moving_rate: as for elastic.
    """
    need.match_peers(center, peers)
    need.match_total(total, center, (center, *peers))
    need.number(moving_rate=moving_rate)
    where = where_to_run(center, stats, seed)
    if where is None:
        return reference.elastic_sum(total, center, peers, moving_rate, stats, seed)
    return moved(_core.elastic_sum(where, total.data_ptr(), center.data_ptr(), pointers(peers), moving_rate))


def elastic_apply(
    center: Tensor, peers: Sequence[Tensor], total: Tensor, moving_rate: float, rate: float, *, seed: int = 0
) -> None:
    """Move the centre by a known sum, then the workers toward it.

    c <- c + rate total;  x_i <- x_i - moving_rate (x_i - c)

    center: moved. peers: none are needed. total: sum_i d_i, of the type of the arithmetic. moving_rate 0
    leaves the peers alone: the second half of the Jacobi form.
    """
    need.match_peers(center, peers, least=0)
    need.match_total(total, center, (center, *peers))
    need.number(moving_rate=moving_rate, rate=rate)
    where = where_to_run(center, False, seed)
    if where is None:
        reference.elastic_apply(center, peers, total, moving_rate, rate, seed)
    else:
        _core.elastic_apply(where, center.data_ptr(), pointers(peers), total.data_ptr(), moving_rate, rate)


def total(out: Tensor, peers: Sequence[Tensor], *, stats: bool = False) -> Moved | None:
    """The sum over workers: out <- sum_i x_i.

    out: of the type of the arithmetic. peers: one or more. With stats the squared distance is 0 (nothing
    moves) and `finite` speaks of the peers and of the sum.
    """
    need.match_peers(None, peers)
    need.match_total(out, peers[0], peers)
    where = where_to_run(peers[0], stats)
    if where is None:
        return reference.total(out, peers, stats)
    return moved(_core.total(where, out.data_ptr(), pointers(peers)))


def assign(peers: Sequence[Tensor], total: Tensor, scale: float) -> None:
    """x_i <- scale total, for all peers (one or more)."""
    need.match_peers(None, peers)
    need.match_total(total, peers[0], peers)
    need.number(scale=scale)
    where = where_to_run(peers[0], False)
    if where is None:
        reference.assign(peers, total, scale)
    else:
        _core.assign(where, pointers(peers), total.data_ptr(), scale)


def average(peers: Sequence[Tensor], *, stats: bool = False) -> Moved | None:
    """x_i <- mean of all x_i (the finite ones; where none is, all stay as they are)."""
    return bound.average(peers)(stats)


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
    *,
    stats: bool = False,
) -> Moved | None:
    """A step of SGD with momentum, with or without the pull to leaders, in one pass (thesis 2.5, 2.6).

    g = grad + weight_decay x(stored);  v' = momentum v - lr g; x' = x + v' - rate (x - leader) - other_rate
    (x - other). Nesterov: what is stored in x is the look-ahead y = x + momentum v, before (with v) and after
    (with v'); leaders are iterates. Heavy ball and momentum 0: it is the iterate x itself.

    velocity: v; may be None with momentum 0. lr: the learning rate; a tensor of it, float32 or float64, is read where x
    lies when the kernel runs. With stats: the distance that x (as stored) moved.
    """
    need.match(x, grad=grad, velocity=velocity, leader=leader, other=other)
    need.number(momentum=momentum, weight_decay=weight_decay, rate=rate, other_rate=other_rate)
    need.rate("lr", lr, x)
    need.has_velocity(velocity, momentum)
    where = where_to_run(x, stats)
    if where is None:
        return reference.msgd(
            x, grad, velocity, lr, momentum, nesterov, weight_decay, leader, rate, other, other_rate, stats
        )
    own = (x.data_ptr(), grad.data_ptr(), pointer(velocity))
    pulls = (pointer(leader), rate, pointer(other), other_rate)
    there = lr if isinstance(lr, Tensor) and device_of(lr) >= 0 else None
    rates = (float(lr) if there is None else 0.0, momentum, nesterov, weight_decay)
    at = (pointer(there), there is not None and there.dtype is torch.float64)
    return moved(_core.msgd(where, *own, *rates, *pulls, *at))


def iterate(x: Tensor, velocity: Tensor, momentum: float, sign: float) -> None:
    """Between look-ahead and iterate: x <- x + sign momentum velocity.

    sign: -1 takes the look-ahead to the iterate, +1 back.
    """
    need.match(x, velocity=velocity)
    need.number(momentum=momentum, sign=sign)
    where = where_to_run(x, False)
    if where is None:
        reference.iterate(x, velocity, momentum, sign)
    else:
        _core.iterate(where, x.data_ptr(), velocity.data_ptr(), sign * momentum)


def push(
    center: Tensor,
    x: Tensor,
    anchor: Tensor,
    rate: float = 1.0,
    velocity: Tensor | None = None,
    momentum: float = 0.0,
) -> None:
    """A worker pushes what it moved into the centre, and goes on from there (DOWNPOUR, thesis Alg. 3-5).

    d = rate (x - anchor).  Without velocity: c <- c + d;  x <- c;  anchor <- x.
    With: u <- momentum u + d;  c <- c + u;  x <- c + momentum u;  anchor <- x.

    center: c. anchor: what the worker last received. velocity: u; may be None with momentum 0. All of them are
    written, and lie apart. Where x or anchor is not finite d is 0, and x takes the centre all the same.
    """
    need.match(x, center=center, anchor=anchor, velocity=velocity)
    named = [("center", center), ("x", x), ("anchor", anchor)]
    need.apart(named if velocity is None else [*named, ("velocity", velocity)], [])
    need.number(rate=rate, momentum=momentum)
    need.has_velocity(velocity, momentum)
    where = where_to_run(x, False)
    if where is None:
        reference.push(center, x, anchor, rate, velocity, momentum)
    else:
        _core.push(
            where, center.data_ptr(), x.data_ptr(), anchor.data_ptr(), rate, pointer(velocity), momentum
        )


def outer(center: Tensor, velocity: Tensor, mean: Tensor, lr: float, momentum: float) -> None:
    """An outer optimizer's step toward the workers' mean, SGD with torch's Nesterov momentum (DiLoCo).

    g = c - mean;  u <- momentum u + g;  c <- c - lr (g + momentum u)

    center: c. velocity: u. mean: read only. All lie apart. lr 1 and momentum 0 make c the mean to the last bit. Where c
    or the mean is not finite g is 0 and c goes on from the other one.
    """
    need.match(center, velocity=velocity, mean=mean)
    need.apart([("center", center), ("velocity", velocity), ("mean", mean)], [])
    need.number(lr=lr, momentum=momentum)
    where = where_to_run(center, False)
    if where is None:
        reference.outer(center, velocity, mean, lr, momentum)
    else:
        own = (center.data_ptr(), velocity.data_ptr(), mean.data_ptr())
        _core.outer(where, *own, momentum, 1 - lr, lr * momentum)


def check(x: Tensor) -> bool:
    """Whether all values of x are finite; reads only."""
    moved = bound.check(x)(stats=True)
    return moved is not None and moved.finite


def triad(out: Tensor, b: Tensor, c: Tensor, scale: float, *, streaming: bool = True) -> None:
    """out <- b + scale c: the usual measure of the memory's speed, for benchmarks (float32, float64).

    streaming: write past the caches on the CPU, so that out is not read before; 12 bytes are moved a float32
    then, and 16 without.
    """
    need.match(out, b=b, c=c)
    need.number(scale=scale)
    where = where_to_run(out, False)
    if where is None or out.dtype not in (torch.float32, torch.float64):
        reference.triad(out, b, c, scale)
    else:
        _core.triad(where, out.data_ptr(), b.data_ptr(), c.data_ptr(), scale, streaming)

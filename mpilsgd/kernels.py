"""The updates on flat vectors, each in one pass over memory: on CPU, on CUDA, or (announced) in torch.

Every function works in place on 1-D contiguous tensors of one dtype (float32, float64, bfloat16, float16),
one device and one length, 0 included; bad arguments raise ValueError. Half types are computed in float32 and
rounded once, at the store; a `total` over peers has the type of the arithmetic (float32 for the half types).
No temporary vectors are made; the CPU uses torch.get_num_threads() threads; CUDA work goes to torch's current
stream.

Values that are not finite do not spread, element by element: such a leader's value pulls nothing, such a
peer's value adds nothing to a centre or total and is not moved, and a mean is over the finite ones.

With ``stats=True`` a function returns :class:`Moved`, from the same pass; on CUDA this waits for the result.
"""

from __future__ import annotations

import importlib
import itertools
import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mpilsgd import reference
from mpilsgd.reference import Moved

_core: Any = None
_missing = ""
try:
    _core = importlib.import_module("mpilsgd._core")
except ImportError as error:
    _missing = str(error)

__all__ = [
    "FallbackWarning",
    "Moved",
    "assign",
    "average",
    "backend",
    "check",
    "elastic",
    "elastic_apply",
    "elastic_sum",
    "instruction_set",
    "iterate",
    "msgd",
    "pull",
    "push",
    "total",
    "triad",
]


class FallbackWarning(UserWarning):
    """The compiled kernels are missing, and slower torch operations take their place."""


def pull(
    x: Tensor | Sequence[Tensor],
    leader: Tensor,
    rate: float,
    other: Tensor | None = None,
    other_rate: float = 0.0,
    *,
    stats: bool = False,
) -> Moved | None:
    """Pull x toward one or two leaders, both terms from the old x (LSGD Eq. 3; a running average, too).

    x <- x - rate (x - leader) [- other_rate (x - other)]

    x: the vector that moves, or several, which lie apart; then the leader's memory is read once for all of them.
    leader, other: what it is pulled to; may be the last x itself. rate, other_rate: finite.
    """
    peers = [x] if isinstance(x, Tensor) else x
    _match_pulled(peers, leader, other)
    _number(rate=rate, other_rate=other_rate)
    where = _where(leader, stats, len(peers))
    if where is None:
        return reference.pull(x, leader, rate, other, other_rate, stats)
    return _moved(_core.pull(where, _pointers(peers), leader.data_ptr(), rate, _pointer(other), other_rate))


def elastic(
    center: Tensor,
    peers: Sequence[Tensor],
    moving_rate: float,
    rate: float,
    *,
    gauss_seidel: bool = False,
    stats: bool = False,
) -> Moved | None:
    """Move workers and centre toward each other (EASGD, thesis 2.3-2.4; Gauss-Seidel 6.3).

    Jacobi: d_i = x_i - c;  x_i <- x_i - moving_rate d_i;  c <- c + rate sum_i d_i.
    Gauss-Seidel: c <- c + rate sum_i (x_i - c) first, then x_i <- x_i - moving_rate (x_i - c).

    center: the centre c. peers: the workers' vectors x_i, one or more. moving_rate: alpha; with 0 the peers
    are only read. rate: of the centre, beta/p.
    """
    _match_peers(center, peers)
    _number(moving_rate=moving_rate, rate=rate)
    where = _where(center, stats, len(peers))
    if where is None:
        return reference.elastic(center, peers, moving_rate, rate, gauss_seidel, stats)
    return _moved(_core.elastic(where, center.data_ptr(), _pointers(peers), moving_rate, rate, gauss_seidel))


def elastic_sum(
    total: Tensor, center: Tensor, peers: Sequence[Tensor], moving_rate: float, *, stats: bool = False
) -> Moved | None:
    """The workers' half of the Jacobi form, d_i = x_i - c.

    total <- sum_i d_i;  x_i <- x_i - moving_rate d_i

    total: written, of the type of the arithmetic. center: read only. peers, moving_rate: as for elastic.
    """
    _match_peers(center, peers)
    _match_total(total, center, (center, *peers))
    _number(moving_rate=moving_rate)
    where = _where(center, stats, len(peers))
    if where is None:
        return reference.elastic_sum(total, center, peers, moving_rate, stats)
    return _moved(
        _core.elastic_sum(where, total.data_ptr(), center.data_ptr(), _pointers(peers), moving_rate)
    )


def elastic_apply(
    center: Tensor, peers: Sequence[Tensor], total: Tensor, moving_rate: float, rate: float
) -> None:
    """Move the centre by a known sum, then the workers toward it.

    c <- c + rate total;  x_i <- x_i - moving_rate (x_i - c)

    center: moved. peers: none are needed. total: sum_i d_i, of the type of the arithmetic. moving_rate 0
    leaves the peers alone: the second half of the Jacobi form.
    """
    _match_peers(center, peers, least=0)
    _match_total(total, center, (center, *peers))
    _number(moving_rate=moving_rate, rate=rate)
    where = _where(center, False, len(peers))
    if where is None:
        reference.elastic_apply(center, peers, total, moving_rate, rate)
    else:
        _core.elastic_apply(where, center.data_ptr(), _pointers(peers), total.data_ptr(), moving_rate, rate)


def total(out: Tensor, peers: Sequence[Tensor], *, stats: bool = False) -> Moved | None:
    """The sum over workers: out <- sum_i x_i.

    out: of the type of the arithmetic. peers: one or more. With stats the squared distance is 0 (nothing
    moves) and `finite` speaks of the peers and of the sum.
    """
    _match_peers(None, peers)
    _match_total(out, peers[0], peers)
    where = _where(peers[0], stats, len(peers))
    if where is None:
        return reference.total(out, peers, stats)
    return _moved(_core.total(where, out.data_ptr(), _pointers(peers)))


def assign(peers: Sequence[Tensor], total: Tensor, scale: float) -> None:
    """x_i <- scale total, for all peers (one or more)."""
    _match_peers(None, peers)
    _match_total(total, peers[0], peers)
    _number(scale=scale)
    where = _where(peers[0], False, len(peers))
    if where is None:
        reference.assign(peers, total, scale)
    else:
        _core.assign(where, _pointers(peers), total.data_ptr(), scale)


def average(peers: Sequence[Tensor], *, stats: bool = False) -> Moved | None:
    """x_i <- mean of all x_i (the finite ones; where none is, all stay as they are)."""
    _match_peers(None, peers)
    where = _where(peers[0], stats, len(peers))
    if where is None:
        return reference.average(peers, stats)
    return _moved(_core.average(where, _pointers(peers)))


def msgd(
    x: Tensor,
    grad: Tensor,
    velocity: Tensor | None,
    lr: float,
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

    velocity: v; may be None with momentum 0. lr: the learning rate. With stats: the distance that x (as
    stored) moved.
    """
    _match(x, grad=grad, velocity=velocity, leader=leader, other=other)
    _number(lr=lr, momentum=momentum, weight_decay=weight_decay, rate=rate, other_rate=other_rate)
    _has_velocity(velocity, momentum)
    where = _where(x, stats)
    if where is None:
        return reference.msgd(
            x, grad, velocity, lr, momentum, nesterov, weight_decay, leader, rate, other, other_rate, stats
        )
    return _moved(
        _core.msgd(
            where,
            x.data_ptr(),
            grad.data_ptr(),
            _pointer(velocity),
            lr,
            momentum,
            nesterov,
            weight_decay,
            _pointer(leader),
            rate,
            _pointer(other),
            other_rate,
        )
    )


def iterate(x: Tensor, velocity: Tensor, momentum: float, sign: float) -> None:
    """Between look-ahead and iterate: x <- x + sign momentum velocity.

    sign: -1 takes the look-ahead to the iterate, +1 back.
    """
    _match(x, velocity=velocity)
    _number(momentum=momentum, sign=sign)
    where = _where(x, False)
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
    _match(x, center=center, anchor=anchor, velocity=velocity)
    named = [("center", center), ("x", x), ("anchor", anchor)]
    _apart(named if velocity is None else [*named, ("velocity", velocity)], [])
    _number(rate=rate, momentum=momentum)
    _has_velocity(velocity, momentum)
    where = _where(x, False)
    if where is None:
        reference.push(center, x, anchor, rate, velocity, momentum)
    else:
        _core.push(
            where, center.data_ptr(), x.data_ptr(), anchor.data_ptr(), rate, _pointer(velocity), momentum
        )


def check(x: Tensor) -> bool:
    """Whether all values of x are finite; reads only."""
    _match(x)
    where = _where(x, True)
    if where is None:
        return reference.check(x)
    return _core.check(where, x.data_ptr())[1]


def triad(out: Tensor, b: Tensor, c: Tensor, scale: float, *, streaming: bool = True) -> None:
    """out <- b + scale c: the usual measure of the memory's speed, for benchmarks (float32, float64).

    streaming: write past the caches on the CPU, so that out is not read before; 12 bytes are moved a float32
    then, and 16 without.
    """
    _match(out, b=b, c=c)
    _number(scale=scale)
    where = _where(out, False)
    if where is None or out.dtype not in (torch.float32, torch.float64):
        reference.triad(out, b, c, scale)
    else:
        _core.triad(where, out.data_ptr(), b.data_ptr(), c.data_ptr(), scale, streaming)


def backend(x: Tensor) -> str:
    """What updates a tensor like x: "cpu", "cuda" or "reference"."""
    if _core is not None and x.dtype in _DTYPES and (x.is_cpu or (x.is_cuda and _core.cuda)):
        return x.device.type
    return "reference"


def instruction_set() -> str:
    """What the CPU kernels are compiled for: "avx512", "avx2", "baseline" (none: "reference")."""
    return "reference" if _core is None else _core.instruction_set()


_DTYPES: dict[torch.dtype, Any] = {
    dtype: None if _core is None else getattr(_core.DType, str(dtype).removeprefix("torch."))
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16)
}
_HALF = (torch.bfloat16, torch.float16)
_INLINE_PEERS = 64  # more go through device memory (cuda.cu)
_warned: set[str] = set()


def _where(x: Tensor, stats: bool, n_peers: int = 0) -> Any:
    """Where and how the extension shall run; None: it cannot, the reference must."""
    if _core is None:
        _warn(
            f"the extension mpilsgd._core is not there ({_missing})",
            "pip install . in the checkout builds it",
        )
        return None
    if x.is_cpu:
        return _core.Where(_DTYPES[x.dtype], x.numel(), -1, torch.get_num_threads(), None, stats)
    if x.is_cuda and _core.cuda:
        stream = torch.cuda.current_stream(x.device)
        workspace = None
        if stats or n_peers > _INLINE_PEERS:
            size = _core.cuda_workspace_bytes(n_peers)
            workspace = torch.empty(size, dtype=torch.uint8, device=x.device)
        return _core.Where(_DTYPES[x.dtype], x.numel(), x.device.index, stream.cuda_stream, workspace, stats)
    hint = (
        "build it with -C cmake.define.MPILSGD_CUDA=ON" if x.is_cuda else "there are kernels for cpu and cuda"
    )
    _warn(f"the extension mpilsgd._core has no kernels for {x.device.type} tensors", hint)
    return None


def _warn(problem: str, hint: str) -> None:
    if problem not in _warned:
        _warned.add(problem)
        warnings.warn(
            f"{problem}: slower torch operations take their place ({hint})", FallbackWarning, stacklevel=4
        )


def _moved(result: tuple[float, bool, bool, tuple[int, ...]] | None) -> Moved | None:
    return None if result is None else Moved(*result)


def _pointer(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _pointers(peers: Sequence[Tensor]) -> list[int]:
    return [x.data_ptr() for x in peers]


# --- checks ---------------------------------------------------------------------------------------


def _match(x: Tensor, **others: Tensor | None) -> None:
    """Each of the others is None or matches x, and lies exactly on it or apart from it."""
    _vector("x", x)
    for name, other in others.items():
        if other is not None:
            _same(name, other, "x", x)
            if _overlap(x, other) and x.data_ptr() != other.data_ptr():
                raise ValueError(f"{name} overlaps x in memory without being the same vector")


def _match_peers(center: Tensor | None, peers: Sequence[Tensor], least: int = 1) -> None:
    if isinstance(peers, Tensor):
        raise ValueError("peers must be a sequence of vectors, not one tensor")
    if len(peers) < least:
        raise ValueError("peers must hold at least one vector, got none")
    first, name = (peers[0], "peers[0]") if center is None else (center, "center")
    _vector(name, first)
    for i, peer in enumerate(peers):
        if peer is not first:
            _same(f"peers[{i}]", peer, name, first)
    _apart([("center", center)] if center is not None else [], peers)


def _match_pulled(peers: Sequence[Tensor], leader: Tensor, other: Tensor | None) -> None:
    """The last of the peers is as x of _match, the others lie apart from all."""
    if not peers:
        raise ValueError("x must be a vector or hold at least one, got none")
    *first, last = peers
    _match(last, leader=leader, other=other)
    if first:
        for i, peer in enumerate(first):
            _same(f"x[{i}]", peer, "the last", last)
        sources = [("leader", leader)] + ([("other", other)] if other is not None else [])
        for name, source in sources:
            if any(_overlap(peer, source) for peer in first):
                raise ValueError(f"{name} overlaps one of the vectors to move that is not the last")
        _apart([], peers)


def _match_total(total: Tensor, first: Tensor, others: Sequence[Tensor]) -> None:
    """total matches in length and device and has the type of the arithmetic."""
    wanted = torch.float32 if first.dtype in _HALF else first.dtype
    if total.dtype != wanted:
        raise ValueError(f"the total over {first.dtype} vectors must be {wanted}, got {total.dtype}")
    _vector("total", total)
    if total.numel() != first.numel() or total.device != first.device:
        raise ValueError(
            f"the total must have length {first.numel()} on {first.device}, "
            f"got length {total.numel()} on {total.device}"
        )
    if any(_overlap(total, other) for other in others):
        raise ValueError("the total overlaps one of the other vectors in memory")


def _vector(name: str, x: Tensor) -> None:
    if x.dtype not in _DTYPES:
        raise ValueError(f"{name} must be float32, float64, bfloat16 or float16, got {x.dtype}")
    if x.dim() != 1 or not x.is_contiguous():
        raise ValueError(
            f"{name} must be a contiguous 1-D vector, got shape {tuple(x.shape)} with strides {x.stride()}"
        )


def _same(name: str, x: Tensor, first_name: str, first: Tensor) -> None:
    if x.dtype != first.dtype:
        raise ValueError(f"{name} is {x.dtype}, but {first_name} is {first.dtype}")
    if x.device != first.device:
        raise ValueError(f"{name} is on {x.device}, but {first_name} is on {first.device}")
    if x.dim() != 1 or not x.is_contiguous():
        _vector(name, x)
    if x.numel() != first.numel():
        raise ValueError(f"{name} has length {x.numel()}, but {first_name} has length {first.numel()}")


def _overlap(a: Tensor, b: Tensor) -> bool:
    """Whether two non-empty vectors share memory."""
    start, other = a.data_ptr(), b.data_ptr()
    return start < other + b.numel() * b.element_size() and other < start + a.numel() * a.element_size()


def _apart(first: list[tuple[str, Tensor]], peers: Sequence[Tensor]) -> None:
    """All vectors lie apart: each is written at its own time."""
    named = first + [(f"peers[{i}]", peer) for i, peer in enumerate(peers)]
    named.sort(key=lambda item: item[1].data_ptr())
    for (name, x), (next_name, following) in itertools.pairwise(named):
        if _overlap(x, following):
            raise ValueError(f"{name} and {next_name} overlap in memory")


def _has_velocity(velocity: Tensor | None, momentum: float) -> None:
    if velocity is None and momentum != 0:
        raise ValueError(f"momentum {momentum} needs a velocity, which is None")


def _number(**values: float) -> None:
    for name, value in values.items():
        if not math.isfinite(value):
            raise ValueError(f"{name} must be a finite number, got {value}")

"""What the vectors given to a kernel must be: of one type, device and length, and apart where both are written."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mpilsgd.extension import DTYPES, HALF, device_of, emulated, place_of


def match(x: Tensor, **others: Tensor | None) -> None:
    """Each of the others is None or matches x, and lies exactly on it or apart from it."""
    _vector("x", x)
    for name, other in others.items():
        if other is not None:
            _same(name, other, "x", x)
            if overlap(x, other) and x.data_ptr() != other.data_ptr():
                raise ValueError(f"{name} overlaps x in memory without being the same vector")


def match_peers(center: Tensor | None, peers: Sequence[Tensor], least: int = 1) -> None:
    if isinstance(peers, Tensor):
        raise ValueError("peers must be a sequence of vectors, not one tensor")
    if len(peers) < least:
        raise ValueError("peers must hold at least one vector, got none")
    first, name = (peers[0], "peers[0]") if center is None else (center, "center")
    _vector(name, first)
    for i, peer in enumerate(peers):
        if peer is not first:
            _same(f"peers[{i}]", peer, name, first)
    apart([("center", center)] if center is not None else [], peers)


def match_pulled(peers: Sequence[Tensor], leader: Tensor, other: Tensor | None) -> None:
    """The last of the peers is as x of match, the others lie apart from all."""
    if not peers:
        raise ValueError("x must be a vector or hold at least one, got none")
    *first, last = peers
    match(last, leader=leader, other=other)
    if first:
        for i, peer in enumerate(first):
            _same(f"x[{i}]", peer, "the last", last)
        sources = [("leader", leader)] + ([("other", other)] if other is not None else [])
        for name, source in sources:
            if any(overlap(peer, source) for peer in first):
                raise ValueError(f"{name} overlaps one of the vectors to move that is not the last")
        apart([], peers)


def match_total(total: Tensor, first: Tensor, others: Sequence[Tensor]) -> None:
    """total matches in length and device and has the type of the arithmetic."""
    wanted = torch.float32 if first.dtype in HALF else first.dtype
    if total.dtype != wanted:
        raise ValueError(f"the total over {first.dtype} vectors must be {wanted}, got {total.dtype}")
    _vector("total", total)
    if total.numel() != first.numel() or _elsewhere(total, first):
        raise ValueError(
            f"the total must have length {first.numel()} on {place_of(first)}, "
            f"got length {total.numel()} on {place_of(total)}"
        )
    if any(overlap(total, other) for other in others):
        raise ValueError("the total overlaps one of the other vectors in memory")


def _vector(name: str, x: Tensor) -> None:
    if x.dtype not in DTYPES:
        raise ValueError(f"{name} must be float32, float64, bfloat16 or float16, got {x.dtype}")
    if x.dim() != 1 or not x.is_contiguous():
        raise ValueError(
            f"{name} must be a contiguous 1-D vector, got shape {tuple(x.shape)} with strides {x.stride()}"
        )


def _same(name: str, x: Tensor, first_name: str, first: Tensor) -> None:
    if x.dtype != first.dtype:
        raise ValueError(f"{name} is {x.dtype}, but {first_name} is {first.dtype}")
    if x.device != first.device or (emulated is not None and _elsewhere(x, first)):
        raise ValueError(f"{name} is on {place_of(x)}, but {first_name} is on {place_of(first)}")
    if x.dim() != 1 or not x.is_contiguous():
        _vector(name, x)
    if x.numel() != first.numel():
        raise ValueError(f"{name} has length {x.numel()}, but {first_name} has length {first.numel()}")


def _elsewhere(x: Tensor, first: Tensor) -> bool:
    return x.device != first.device or device_of(x) != device_of(first)


def overlap(a: Tensor, b: Tensor) -> bool:
    """Whether two non-empty vectors share memory."""
    start, other = a.data_ptr(), b.data_ptr()
    return start < other + b.numel() * b.element_size() and other < start + a.numel() * a.element_size()


def apart(first: list[tuple[str, Tensor]], peers: Sequence[Tensor]) -> None:
    """All vectors lie apart: each is written at its own time."""
    named = first + [(f"peers[{i}]", peer) for i, peer in enumerate(peers)]
    named.sort(key=lambda item: item[1].data_ptr())
    for (name, x), (next_name, following) in itertools.pairwise(named):
        if overlap(x, following):
            raise ValueError(f"{name} and {next_name} overlap in memory")


def has_velocity(velocity: Tensor | None, momentum: float) -> None:
    if velocity is None and momentum != 0:
        raise ValueError(f"momentum {momentum} needs a velocity, which is None")


def rate(name: str, value: float | Tensor, x: Tensor) -> None:
    """A finite number, or a tensor of one that lies where x does; of that nothing is read."""
    if not isinstance(value, Tensor):
        number(**{name: value})
    elif value.dim() or value.dtype not in (torch.float32, torch.float64) or _elsewhere(value, x):
        raise ValueError(
            f"{name} must be a number, or a tensor of one (float32 or float64, 0-dim) on {place_of(x)}, got "
            f"{value.dtype} of shape {tuple(value.shape)} on {place_of(value)}"
        )


def number(**values: float) -> None:
    for name, value in values.items():
        if not math.isfinite(value):
            raise ValueError(f"{name} must be a finite number, got {value}")

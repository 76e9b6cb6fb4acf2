"""Kernels on vectors that stay where they are: checked once, here; each call works on what the vectors hold then.

Arguments are those of the functions of the same names in `kernels`, which check and call at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from mpilsgd import kernel_arguments as need
from mpilsgd import reference
from mpilsgd.extension import core, moved, pointer, pointers, where_to_run
from mpilsgd.reference import Moved


class Bound:
    """A kernel and its vectors, of which `like` is one. plain: what takes its place where it cannot run."""

    __slots__ = ("_arguments", "_like", "_plain", "_run")

    def __init__(self, name: str, like: Tensor, arguments: tuple[Any, ...], plain: Callable[..., Any]):
        self._run: Any = getattr(core, name, None)
        self._like, self._arguments, self._plain = like, arguments, plain

    def __call__(self, stats: bool = False, seed: int = 0) -> Moved | None:
        where = where_to_run(self._like, stats, seed)
        if where is None:
            return self._plain(stats, seed)
        return moved(self._run(where, *self._arguments))

    def begin(self) -> Callable[[], Moved | None]:
        """Runs it, and gives what waits for its statistics: on a device they come when the stream has come so far."""
        where = where_to_run(self._like, True)
        found = self._plain(True, 0) if where is None else self._run(where, *self._arguments)
        return lambda: found if isinstance(found, Moved) else moved(found)


def pull(
    x: Tensor | Sequence[Tensor],
    leader: Tensor,
    rate: float,
    other: Tensor | None = None,
    other_rate: float = 0.0,
) -> Bound:
    peers = [x] if isinstance(x, Tensor) else x
    need.match_pulled(peers, leader, other)
    need.number(rate=rate, other_rate=other_rate)
    arguments = (pointers(peers), leader.data_ptr(), rate, pointer(other), other_rate)
    return Bound(
        "pull",
        leader,
        arguments,
        lambda stats, seed: reference.pull(x, leader, rate, other, other_rate, stats, seed),
    )


def elastic(
    center: Tensor, peers: Sequence[Tensor], moving_rate: float, rate: float, gauss_seidel: bool = False
) -> Bound:
    need.match_peers(center, peers)
    need.number(moving_rate=moving_rate, rate=rate)
    arguments = (center.data_ptr(), pointers(peers), moving_rate, rate, gauss_seidel)
    return Bound(
        "elastic",
        center,
        arguments,
        lambda stats, seed: reference.elastic(center, peers, moving_rate, rate, gauss_seidel, stats, seed),
    )


def average(peers: Sequence[Tensor]) -> Bound:
    need.match_peers(None, peers)
    plain = lambda stats, _: reference.average(peers, stats)  # noqa: E731
    return Bound("average", peers[0], (pointers(peers),), plain)


def check(x: Tensor) -> Bound:
    """Called with stats=True it gives whether all values are `finite`."""
    need.match(x)

    def plain(stats: bool, _: int) -> Moved:
        return Moved(0.0, reference.check(x), True, ())

    return Bound("check", x, (x.data_ptr(),), plain)

"""What is under way between islands when something goes wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import mpilsgd
from mpilsgd.comm import MPI, channel
from mpilsgd.transport.wire import wire_of


class Recording:
    """A communicator that notes its requests. interrupted: an interrupt comes before its so manieth message."""

    def __init__(self, comm: Any, interrupted: int = 0):
        self._comm, self._interrupted, self.requests = comm, interrupted, []  # type: Any, int, list[Any]
        self.rank, self.size = comm.rank, comm.size

    def Irecv(self, buffer: Any, source: int) -> Any:
        self.requests.append(self._comm.Irecv(buffer, source))
        return self.requests[-1]

    def Isend(self, buffer: Any, dest: int) -> Any:
        self._interrupted -= 1
        if self._interrupted == 0:
            raise KeyboardInterrupt
        self.requests.append(self._comm.Isend(buffer, dest))
        return self.requests[-1]


def interrupted(nth: int, in_use: bool) -> Callable[[], tuple[int, int]]:
    """A worker whose nth wait, or use of a sum, is interrupted; its requests, and how many of them are not done."""

    def worker() -> tuple[int, int]:
        heads, waits = Recording(MPI.COMM_WORLD), 0
        vector = torch.full((1 << 22,), 1.0, dtype=torch.float64)  # several chunks

        def wait(request: Any) -> None:
            nonlocal waits
            waits += 1
            request.Wait()
            if not in_use and waits == nth:
                raise KeyboardInterrupt

        wire = wire_of(torch.float64, None)
        with pytest.raises(KeyboardInterrupt):
            for k, _ in enumerate(
                channel.sums(heads, vector, wire, channel.cuts(len(vector), wire, heads.size), wait)
            ):
                if in_use and k + 1 == nth:
                    raise KeyboardInterrupt
        return len(heads.requests), sum(not request._done() for request in heads.requests)

    return worker


@pytest.mark.parametrize("workers", [2, 3])
@pytest.mark.parametrize(("nth", "in_use"), [(1, False), (2, False), (5, False), (1, True), (2, True)])
def test_an_interrupt_amid_a_sum_leaves_no_request_under_way(workers: int, nth: int, in_use: bool) -> None:
    for asked, left in mpilsgd.in_process(interrupted(nth, in_use), workers, nodes=workers):
        assert asked >= 4 and left == 0


def passing(ranks: list[int], nth: int, in_use: bool) -> Callable[[], tuple[bool, int]]:
    """Rank 1's vector goes to all; `ranks` are interrupted at their nth message or chunk. Whether this rank was or has
    the vector, and how many of its requests are not done.
    """

    def worker() -> tuple[bool, int]:
        me, ends = MPI.COMM_WORLD.rank, MPI.COMM_WORLD.rank in ranks
        heads = Recording(MPI.COMM_WORLD, nth if ends and not in_use else 0)
        vector = torch.full((1 << 22,), float(me), dtype=torch.float64)  # several chunks
        wire = wire_of(torch.float64, None)
        interrupted = False
        try:
            for k, _ in enumerate(
                channel.pass_along(heads, vector, 1, wire, channel.cuts(len(vector), wire, heads.size))
            ):
                if ends and in_use and k + 1 == nth:
                    raise KeyboardInterrupt
        except KeyboardInterrupt:
            interrupted = True
        whole = bool((vector == 1.0).all()) and interrupted == ends
        return whole, sum(not request._done() for request in heads.requests)

    return worker


@pytest.mark.parametrize(
    ("ranks", "nth", "in_use"),
    [
        *(
            [ranks, nth, False] for ranks in ([1], [2], [1, 2]) for nth in (1, 5)
        ),  # the last one sends nothing
        *([ranks, nth, True] for ranks in ([0], [1], [2], [0, 1, 2]) for nth in (1, 2)),
    ],
)
def test_who_is_interrupted_amid_a_vector_passes_the_rest_on(
    ranks: list[int], nth: int, in_use: bool
) -> None:
    """Along the chain 1, 2, 0."""
    for whole, left in mpilsgd.in_process(passing(ranks, nth, in_use), 3, nodes=3):
        assert whole and left == 0

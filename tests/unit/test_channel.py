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
    """A communicator that notes its requests."""

    def __init__(self, comm: Any):
        self._comm, self.requests = comm, []  # type: Any, list[Any]
        self.rank, self.size = comm.rank, comm.size

    def Irecv(self, buffer: Any, source: int) -> Any:
        self.requests.append(self._comm.Irecv(buffer, source))
        return self.requests[-1]

    def Isend(self, buffer: Any, dest: int) -> Any:
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

"""What communication costs on a virtual clock, case by case and by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from simulated import MB, SLOW, near

from mpilsgd import simulate
from mpilsgd.comm import MPI
from mpilsgd.simulation import Network, clock


def timed(do: Any) -> Any:
    """What it takes each rank, from when all are there."""

    def worker() -> float:
        MPI.COMM_WORLD.Barrier()
        start = clock()
        do(MPI.COMM_WORLD)
        return clock() - start

    return worker


def sends(pairs: dict[int, int], nbytes: int = MB, tag: int = 3, synchronous: bool = False) -> Any:
    def do(comm: Any) -> None:
        if comm.rank in pairs:
            send = comm.Issend if synchronous else comm.Isend
            send(np.zeros(nbytes, np.uint8), pairs[comm.rank], tag).Wait()
        for source in (r for r, dest in pairs.items() if dest == comm.rank):
            comm.Recv(np.empty(nbytes, np.uint8), source, tag)

    return timed(do)


@pytest.mark.parametrize("synchronous", [False, True])
def test_a_message_takes_latency_and_bytes_over_bandwidth(synchronous: bool) -> None:
    found = simulate(sends({0: 1}, synchronous=synchronous), 2, nodes=2, network=SLOW)
    assert found.results == near([1.001 if synchronous else 1.0, 1.001])
    assert (found.sent, found.received) == ([MB + 8, 8], [8, MB + 8]) or found.sent[0] == MB
    assert found.communication[1] >= 1.001 and found.waiting[1] < 0.01


def test_the_ranks_of_a_node_share_its_link() -> None:
    """Two out of one node, or into one; but one each way at once go side by side."""
    out = simulate(sends({0: 2, 1: 3}), 4, nodes=2, network=SLOW)
    assert sorted(out.results[2:]) == near([1.001, 2.001])
    into = simulate(sends({0: 2, 1: 2}), 3, nodes=3, network=SLOW)
    assert into.results[2] == near(2.001)
    both = simulate(sends({0: 1, 1: 0}), 2, nodes=2, network=SLOW)
    assert both.results == near([1.001, 1.001])


def test_a_packet_waits_for_no_others() -> None:
    def do(comm: Any) -> None:
        if comm.rank == 0:
            comm.Isend(np.zeros(MB, np.uint8), 1, 1)
            comm.Isend(np.zeros(1000, np.uint8), 1, 2)
        else:
            comm.Recv(np.empty(1000, np.uint8), 0, 2)

    assert simulate(timed(do), 2, nodes=2, network=SLOW).results[1] == near(0.002)


def test_messages_and_reads_in_a_node() -> None:
    found = simulate(sends({0: 1}), 2, network=SLOW)
    assert found.results[1] == near(0.1 + 1e-5) and sum(found.sent) == 0

    def reads(comm: Any) -> None:
        from mpilsgd.comm import reads

        reads(MB)

    shared = Network(memory=1e7, shared_memory=True)
    assert simulate(timed(reads), 2, network=SLOW).results == near([0.1, 0.1])
    assert sorted(simulate(timed(reads), 2, network=shared).results) == near([0.1, 0.2])


def test_a_one_sided_operation_takes_a_round_trip() -> None:
    def do(comm: Any) -> None:
        win = MPI.Win.Create(np.zeros(MB, np.uint8), 1, comm=comm)
        comm.Barrier()
        start = clock()
        if comm.rank == 0:
            win.Get(np.empty(MB, np.uint8), 1, [0, MB, MPI.BYTE])
            win.Flush(1)
            assert clock() - start == near(1.002)
            win.Fetch_and_op(np.ones(1, np.int64), np.ones(1, np.int64), 1, 0, MPI.SUM)
            win.Flush(1)
            assert clock() - start == near(1.002 + 0.002 + 16e-6)

    simulate(timed(do), 2, nodes=2, network=SLOW)


def test_who_looks_from_afar_learns_a_round_trip_later() -> None:
    """Of a word on another node, for which it looks again and again."""
    from mpilsgd.comm import wait_until

    def do(comm: Any) -> None:
        win, word = MPI.Win.Create(np.zeros(8, np.uint8), 1, comm=comm), np.zeros(1, np.int64)
        comm.Barrier()
        start = clock()
        if comm.rank == 1:
            here_computes(1.0)
            win.Fetch_and_op(np.ones(1, np.int64), word, 1, 0, MPI.SUM)
            return

        def true() -> bool:
            win.Fetch_and_op(word, word, 1, 0, MPI.NO_OP)
            return bool(word[0])

        wait_until(true)
        assert clock() - start == near(1.002)

    simulate(timed(do), 2, nodes=2, network=SLOW)


def here_computes(seconds: float) -> None:
    from mpilsgd.comm import here

    here.task.baton.computes(seconds)


@pytest.mark.parametrize(
    ("name", "seconds"),
    [
        ("barrier", 2e-3),  # of 4 nodes: 2 doublings
        ("allgather", 2e-3 + 3 * 0.1),  # all but the own 100 kB come
        ("bcast", 2e-3 + 0.1),
        ("allreduce", 4e-3 + 2 * 0.75 * 0.1),
    ],
)
def test_collective_operations(name: str, seconds: float) -> None:
    own = np.zeros(MB // 10, np.uint8)

    def do(comm: Any) -> None:
        if name == "barrier":
            comm.Barrier()
        elif name == "allgather":
            comm.Allgather(own, np.empty(4 * own.size, np.uint8))
        elif name == "bcast":
            comm.Bcast(own.copy())
        else:
            comm.Allreduce(own, own.copy(), MPI.SUM)

    found = simulate(timed(do), 4, nodes=4, network=SLOW).results
    assert max(found) == near(seconds, rel=1e-2)

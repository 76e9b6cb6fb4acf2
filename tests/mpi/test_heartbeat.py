"""Beats between nodes: who hears whom, and an end without false alarms; a node that vanishes is in tests/cluster."""

from __future__ import annotations

import ctypes
import threading
import time

import pytest
from harness import WORLD

from mpilsgd import Topology
from mpilsgd.comm import Heartbeat, Place
from mpilsgd.comm.heartbeat import Standstill, neighbours, place_text

pytestmark = [pytest.mark.mpi]


@pytest.mark.parametrize("nodes", [[[0, 1], [2, 3]], [[0], [1], [2]], [[0, 2, 4], [1], [3, 5]], [[0, 1, 2]]])
def test_a_node_is_heard_and_hears(nodes: list[list[int]]) -> None:
    firsts = [ranks[0] for ranks in nodes]
    heard = {rank: neighbours(nodes, rank) for ranks in nodes for rank in ranks}
    assert all(rank in heard[other] for rank, others in heard.items() for other in others)
    assert heard[0] == firsts[1:] and all(heard[r] == [0] * (r in firsts) for r in heard if r)


def test_who_stands_still_while_others_are_further_is_found_once() -> None:
    still = Standstill([0, 1, 2], patience=10.0)
    assert still.look({0: 1, 1: 1, 2: 4}, 0.0) == {}
    assert still.look({0: 1, 1: 2, 2: 4}, 9.0) == {}
    assert still.look({0: 1, 1: 2, 2: 4}, 11.0) == {0: 1}
    assert still.look({0: 1, 1: 2, 2: 4}, 20.0) == {1: 2}
    assert still.look({0: 4, 1: 4, 2: 4}, 40.0) == {}
    assert still.look({0: 4, 1: 4, 2: 4}, 60.0) == {}  # an evaluation that takes long
    assert still.look({0: 4, 1: 5, 2: 5}, 61.0) == {0: 4}
    still.forget()
    assert still.look({0: 4, 1: 5, 2: 5}, 99.0) == {}
    assert place_text(7) == "in batch 3" and place_text(8) == "in the exchange after batch 3"


def test_ranks_end_at_different_times() -> None:
    topology = Topology()
    for seconds in (0.0, 1.2):
        beats = Heartbeat(topology, patience=6.0)
        time.sleep(seconds + 0.2 * WORLD.rank)
        beats.free()
    assert not [thread for thread in threading.enumerate() if "heartbeat" in thread.name]
    topology.free()


@pytest.mark.mpi(min_size=2)
def test_a_rank_that_holds_the_interpreter_s_lock_is_slow_and_not_gone(
    capsys: pytest.CaptureFixture[str],
) -> None:
    topology = Topology()
    beats = Heartbeat(topology, patience=3.0)
    last = WORLD.size - 1
    beats.at(4, Place.BATCH if last == WORLD.rank else Place.EXCHANGE)
    if last == WORLD.rank:
        ctypes.PyDLL(None).sleep(7)
    topology.barrier()
    beats.free()
    told = capsys.readouterr().err
    assert ("while others are further" in told and f"rank {last} (on " in told) == (WORLD.rank == 0), told
    assert ("in batch 5" in told) == (WORLD.rank == 0) and "vanished" not in told
    topology.free()

"""Beats between nodes: who hears whom, and an end without false alarms; a node that vanishes is in tests/cluster."""

from __future__ import annotations

import threading
import time

import pytest
from harness import WORLD

from mpilsgd import Topology
from mpilsgd.comm import Heartbeat
from mpilsgd.comm.heartbeat import neighbours

pytestmark = [pytest.mark.mpi]


@pytest.mark.parametrize("nodes", [[[0, 1], [2, 3]], [[0], [1], [2]], [[0, 2, 4], [1], [3, 5]]])
def test_who_is_heard_hears(nodes: list[list[int]]) -> None:
    heard = {rank: neighbours(nodes, rank) for ranks in nodes for rank in ranks}
    assert all(rank in heard[other] for rank, others in heard.items() for other in others)
    reached, todo = {0}, [0]
    while todo:
        new = set(heard[todo.pop()]) - reached
        reached |= new
        todo += new
    assert reached == set(heard)


def test_ranks_end_at_different_times() -> None:
    topology = Topology()
    for seconds in (0.0, 1.2):
        beats = Heartbeat(topology, patience=6.0)
        time.sleep(seconds + 0.2 * WORLD.rank)
        beats.free()
    assert not [thread for thread in threading.enumerate() if "heartbeat" in thread.name]
    topology.free()

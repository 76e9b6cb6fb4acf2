"""Beats between nodes: who hears whom, and an end without false alarms; a node that vanishes is in tests/cluster."""

from __future__ import annotations

import ctypes
import threading
import time

import pytest
from harness import WORLD

from mpilsgd import Topology
from mpilsgd.comm import Heartbeat, Place
from mpilsgd.comm.heartbeat import neighbours
from mpilsgd.comm.standstill import ENDED, Sign, Standstill

pytestmark = [pytest.mark.mpi]


@pytest.mark.parametrize("nodes", [[[0, 1], [2, 3]], [[0], [1], [2]], [[0, 2, 4], [1], [3, 5]], [[0, 1, 2]]])
def test_a_node_is_heard_and_hears(nodes: list[list[int]]) -> None:
    firsts = [ranks[0] for ranks in nodes]
    heard = {rank: neighbours(nodes, rank) for ranks in nodes for rank in ranks}
    assert all(rank in heard[other] for rank, others in heard.items() for other in others)
    assert heard[0] == firsts[1:] and all(heard[r] == [0] * (r in firsts) for r in heard if r)


def test_who_holds_the_others_up_is_found_once() -> None:
    still, pulse = Standstill([0, 1, 2], patience=10.0), 0

    def look(now: float, *positions: int, stopped: tuple[int, ...] = ()) -> dict[int, str]:
        nonlocal pulse
        pulse += 1
        return still.look({r: Sign(p, 0 if r in stopped else pulse) for r, p in enumerate(positions)}, now)

    assert look(0.0, 1, 1, 4) == {}
    assert look(9.0, 1, 2, 4) == {}
    assert look(11.0, 1, 2, 4) == {0: "it stands in batch 1"}
    assert look(20.0, 1, 2, 4) == {1: "it stands in the exchange after batch 1"}
    assert look(40.0, 4, 4, 4) == look(60.0, 4, 4, 4) == {}  # an evaluation that takes long
    assert look(61.0, 4, 5, 5) == {0: "it stands in batch 2"}
    still.forget()
    assert look(99.0, 4, 5, 5) == {}
    assert look(105.0, 6, 6, 6, stopped=(2,)) == {}
    (told,) = look(116.0, 6, 6, 6, stopped=(2,)).items()
    assert told[0] == 2 and "is stopped" in told[1] and "after batch 2, in an evaluation" in told[1]
    assert look(130.0, 6, 6, 6, stopped=(2,)) == {}
    assert still.look(dict.fromkeys(range(3), Sign(6, ENDED)), 150.0) == {}
    assert still.look(dict.fromkeys(range(3), Sign(6, ENDED)), 170.0) == {}


def test_ranks_end_at_different_times() -> None:
    topology = Topology()
    for seconds in (0.0, 1.2):
        beats = Heartbeat(topology, patience=6.0)
        time.sleep(seconds + 0.2 * WORLD.rank)
        beats.free()
    assert not [thread for thread in threading.enumerate() if "heartbeat" in thread.name]
    topology.free()


@pytest.mark.mpi(min_size=2)
@pytest.mark.brief(2)
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
    assert (f"rank {last} (on " in told and " in batch 5\n" in told) == (WORLD.rank == 0), told
    assert "vanished" not in told
    topology.free()

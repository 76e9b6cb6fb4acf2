"""Devices of a node that cannot reach each other: vectors go through pinned memory that the ranks share."""

from __future__ import annotations

import types
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from harness import (
    CORE,
    LAYOUTS,
    MOST,
    WORLD,
    Case,
    check_together,
    compare,
    place,
    running,
)
from method_cases import BY_NAME, FORMS, MSGD, SGD
from problems import LeastSquares, TanhNet
from test_streams import is_wrong

import mpilsgd
from mpilsgd import LSGD, devices
from mpilsgd.extension import core
from mpilsgd.transport import Fabric, SharedMemoryWarning, exhaust, staged
from mpilsgd.transport.staged import Stage

pytestmark = [
    pytest.mark.mpi(min_size=2),
    pytest.mark.gpu,
    pytest.mark.processes,
    pytest.mark.brief(2, "4x2"),
]
only_emulated = pytest.mark.skipif(not CORE, reason="needs an emulated device")
without_notice = pytest.mark.filterwarnings("ignore:this node's ranks cannot read each other")
BYTES = 320  # a slot: 40 numbers, fewer than a model has
PASSED = [case for case in FORMS if not case.asynchronous]


@pytest.fixture
def apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on GPUs without peer access, with slots that a model does not fit into."""
    monkeypatch.setattr("mpilsgd.transport.sharing.unreachable", lambda topology, place: "no peer access")
    monkeypatch.setattr(staged, "SLOT", BYTES)


def is_staged(fabric: Fabric) -> bool:
    """Whether rounds go by the stage: where the ranks of a level lie on one node."""
    one = len(fabric.topology.nodes) == 1
    return (fabric.world.stage is not None) == one and (fabric.group.stage is not None) == (
        fabric.group.size > 1
    )


@without_notice
@pytest.mark.parametrize("case", PASSED, ids=str)
def test_equals_the_simulation(case: Case, apart: None) -> None:
    errors = []
    for layout in [layout for layout in MOST if layout.shared][: 2 if str(case) == "LSGD-after-step" else 1]:
        with running(case, TanhNet(), MSGD, layout, device="cuda") as run:
            errors += [] if is_staged(run.opt.fabric) else [f"{layout}: not by the stage"]
            errors += compare(run, case.simulate(TanhNet(), MSGD, layout), 7, 1e-12, str(layout))
    check_together(errors)


@without_notice
@pytest.mark.parametrize("name", ["EASGD-turns-3", "LSGD-turns-1", "LSGD-wait-free-1"])
def test_what_is_not_for_all_goes_as_it_did(name: str, apart: None) -> None:
    """By messages and one-sided operations: a centre in turns, snapshots; their first and last rounds are for all."""
    case = BY_NAME[name]
    with running(case, TanhNet(), SGD, LAYOUTS[0], device="cuda") as run:
        errors = compare(run, case.simulate(TanhNet(), SGD, LAYOUTS[0]), 7, 1e-12)
    check_together(errors)


@without_notice
@pytest.mark.brief(2)
def test_values_are_not_rounded_in_a_node(apart: None) -> None:
    """As where its ranks share their vectors."""
    topo, case = mpilsgd.Topology(across_dtype="int8"), BY_NAME["LSGD-after-step"]
    with running(case, TanhNet(), SGD, LAYOUTS[0], device="cuda", topo=topo) as run:
        errors = compare(run, case.simulate(TanhNet(), SGD, LAYOUTS[0]), 7, 1e-12)
    topo.free()
    check_together(errors)


@only_emulated
@without_notice
@pytest.mark.brief(2)
def test_a_leader_is_copied_to_the_host_once(apart: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """And from there once by every other; no message is sent."""
    monkeypatch.setattr(staged, "SLOT", 1 << 16)
    case = Case(LSGD, {"period": 1, "global_period": 2, "loss_window": 1})
    with running(case, TanhNet(), MSGD, LAYOUTS[0], device="cuda", losses=lambda rank, t: float(rank)) as run:
        run.run(4)
        core.emulated.drain()
        core.emulated.clear()
        before = run.opt.metrics.bytes_group
        run.run(1)
        calls, moved = core.emulated.log(), run.opt.metrics.bytes_group - before
        (x,) = run.opt.x.values()
    errors = [] if calls["cudaMemcpyAsync"] == 1 else [f"{calls}"]
    errors += [] if moved == (x.mine.nbytes if WORLD.rank else 0) else [f"{moved} bytes"]
    check_together(errors)


@only_emulated
@without_notice
@pytest.mark.brief(2)
@pytest.mark.parametrize("name", ["LSGD-after-step", "EASGD-jacobi", "LocalSGD-period", "EASGD-overlap"])
def test_late_streams_change_nothing(name: str, apart: None) -> None:
    assert not is_wrong(BY_NAME[name], len(name), 6)


@only_emulated
@pytest.mark.brief(2)
@pytest.mark.parametrize("what", ["passed", "sums"])
@pytest.mark.parametrize("lacks", ["", "writer", "reader"])
def test_a_host_waits_for_its_own_stream_before_it_meets_the_others(
    lacks: str, what: str, apart: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else what rank 0 writes is read before it is there, or overwritten before rank 1 has read it."""
    late = WORLD.rank == (lacks == "reader")
    topo, numel = mpilsgd.Topology(), 300
    stage = Stage(topo.node, place("cuda"), topo.node.Barrier)
    if lacks and late:
        hurried = types.SimpleNamespace(**{**vars(devices), "finish": lambda place: None})
        monkeypatch.setattr(staged, "devices", hurried)
    values = torch.arange(numel, dtype=torch.float64)
    vector = (
        values.to(place("cuda"))
        if WORLD.rank == 0 or what == "sums"
        else torch.zeros_like(values).to(place("cuda"))
    )
    core.emulated.drain()
    core.emulated.delay(0.03 if late else 0.0)
    exhaust(stage.passed(vector, 0) if what == "passed" else stage.sums(vector))
    devices.finish(place("cuda"))
    core.emulated.delay(1e-4)
    expected = values * (WORLD.size if what == "sums" else 1)
    right = WORLD.allgather(bool((vector.cpu() == expected).all()))
    stage.free()
    topo.free()
    assert all(right) == (not lacks)


@only_emulated
@without_notice
@pytest.mark.brief(2)
@pytest.mark.parametrize("call", ["cudaHostRegister", "cudaHostGetDevicePointer"])
def test_ranks_that_cannot_share_pinned_memory_exchange_messages(call: str, apart: None) -> None:
    """Of one rank a call fails: all take messages, with a notice, and train as ever."""
    topo, case = mpilsgd.Topology(), BY_NAME["EASGD-jacobi"]
    for _ in range(WORLD.rank == WORLD.size - 1):
        core.emulated.fail(call, 1, 999)
        core.emulated.fail(call, 2, 999)
    caught: Any = (
        pytest.warns(SharedMemoryWarning, match="cannot share pinned memory")
        if WORLD.rank == 0
        else nullcontext()
    )
    with caught, running(case, LeastSquares(), SGD, LAYOUTS[0], device="cuda", topo=topo) as run:
        errors = [] if run.opt.fabric.world.stage is None else ["it has a stage"]
        errors += compare(run, case.simulate(LeastSquares(), SGD, LAYOUTS[0]), 4, 1e-12)
    topo.free()
    check_together(errors)


@pytest.mark.brief(2)
def test_pinned_memory_needs_room(apart: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mpilsgd.transport.sharing.free_shared_memory", lambda: 1000)
    topo = mpilsgd.Topology()
    told = r"no peer access\), and 34 MB of shared windows do not fit"
    caught: Any = pytest.warns(SharedMemoryWarning, match=told) if WORLD.rank == 0 else nullcontext()
    with caught:
        fabric = Fabric(topo, 1000, place("cuda"))
    assert fabric.world.stage is None and fabric.world.n_islands == WORLD.size
    fabric.free()
    topo.free()

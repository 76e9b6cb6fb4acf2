"""Ranks whose vectors lie on a device, where the others read them; on an emulated one, where there is no GPU."""

from __future__ import annotations

import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import emulated
import pytest
import torch
from harness import (
    CORE,
    LAYOUTS,
    MESSAGES,
    TOLERANCE,
    WORLD,
    Case,
    check_together,
    compare,
    distance,
    place,
    running,
)
from method_cases import BY_NAME, MSGD, SGD
from problems import LeastSquares, TanhNet

import mpilsgd
from mpilsgd import devices, kernels
from mpilsgd.comm import inquiry
from mpilsgd.extension import core, device_of
from mpilsgd.transport import Fabric, SharedMemoryWarning, probe
from mpilsgd.transport.devices import DeviceWindow, DeviceWindows, Order
from mpilsgd.transport.probe import DevicePathWarning

pytestmark = [pytest.mark.mpi, pytest.mark.gpu]
only_emulated = pytest.mark.skipif(not CORE, reason="needs an emulated device")
TOGETHER = ["LSGD-after-step", "EASGD-jacobi", "LocalSGD-period", "AllreduceSGD", "Downpour-synchronous-3"]


def test_vectors_are_read_where_they_lie() -> None:
    """By one launch a dtype and slice; no byte goes through the host, and no call waits for the device."""
    case = Case(mpilsgd.LSGD, {"period": 2, "global_period": 4})
    with running(case, TanhNet(), SGD, LAYOUTS[0], device="cuda") as run:
        assert all(device_of(p) >= 0 for p in run.model.parameters())
        run.run(3)
        if CORE:
            core.emulated.drain()
            core.emulated.clear()
            emulated.waits.clear()
        run.step()
        if CORE:
            calls = core.emulated.log()
            moved = {name: n for name, n in calls.items() if name.startswith(("cudaMemcpy", "cudaMemset"))}
            waited = {name: n for name, n in calls.items() if "Synchronize" in name}
            assert not moved, calls
            assert not waited, calls


@only_emulated
def test_vectors_are_freed_when_no_stream_needs_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each rank waits for its own, which may read the others' vectors, before the first of them goes."""
    free, free_one, waited = DeviceWindows.free, DeviceWindow.free, list[int]()

    def freed(place: DeviceWindows) -> None:
        core.emulated.clear()
        free(place)

    def one_freed(window: DeviceWindow) -> None:
        waited.append(sum(n for call, n in core.emulated.log().items() if "Synchronize" in call))
        free_one(window)

    monkeypatch.setattr(DeviceWindows, "free", freed)
    monkeypatch.setattr(DeviceWindow, "free", one_freed)
    with running(BY_NAME["LSGD-after-step"], TanhNet(), SGD, LAYOUTS[0], device="cuda") as run:
        run.run(2)
    check_together([] if waited and all(waited) else [f"waits before each was freed: {waited}"])


def test_a_common_vector_is_one_a_node() -> None:
    """The zeros in it are there before anyone writes, however late its owner's stream is."""
    level = mpilsgd.Topology()
    island, where = level.node, place("cuda")
    if CORE:
        core.emulated.delay(0.2 * (island.rank == 0))
    window = DeviceWindow(island, where, torch.float32, 1000, common=True)
    if island.rank == island.size - 1:
        window.mine.fill_(3.0)
        devices.finish(where)
    island.Barrier()
    if CORE:
        core.emulated.delay(1e-4)
        devices.finish(where)
        island.Barrier()
    seen = float(window.views[0].cpu()[-1])
    island.Barrier()
    window.free()
    level.free()
    check_together([] if seen == 3.0 else [f"{seen}"])


class Unmarked(Order):
    """Without one of the two halves of what orders the streams."""

    lacks = ""

    def before(self, through_mpi: bool) -> None:
        if self.lacks != "before":
            super().before(through_mpi)

    def after(self, through_mpi: bool) -> None:
        if self.lacks != "after":
            super().after(through_mpi)
        else:
            self._turn = 1 - self._turn


@only_emulated
@pytest.mark.processes
@pytest.mark.brief(2)
@pytest.mark.parametrize("lacks", ["before", "after"])
def test_the_streams_have_to_be_ordered(lacks: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the events between streams the results are others: so the emulation's streams are late indeed.

    What is late are kernels and copies, not torch's arithmetic: the workers take their steps by the kernel of MSGD. The
    host must not wait for its stream before it meets, as it does for a loss that lies on the device.
    """

    def losses(rank: int, t: int) -> float:
        return float((rank + t) % 3)

    monkeypatch.setattr(Unmarked, "lacks", lacks)
    monkeypatch.setattr("mpilsgd.transport.devices.Order", Unmarked)
    wrong = 0
    try:
        for seed in range(12):
            core.emulated.seed(seed)
            late = seed % 2 == WORLD.rank
            core.emulated.delay(0.1 if late else 0.0)
            topo = mpilsgd.Topology()
            case = BY_NAME["LSGD-after-step"]
            with running(case, TanhNet(), MSGD, LAYOUTS[0], device="cuda", topo=topo, losses=losses) as run:
                simulated = case.simulate(TanhNet(), MSGD, LAYOUTS[0], losses=losses)
                for _ in range(6):
                    run.step()
                    simulated.step()
                    time.sleep(0.02 * late)
                    wrong += distance(run.x(), simulated.x[run.rank]) > 1e-12
            wrong = sum(WORLD.allgather(wrong))
            topo.free()
            if wrong:
                break
    finally:
        core.emulated.delay(1e-4)
    assert wrong


@only_emulated
@pytest.mark.processes
@pytest.mark.brief(2)
@pytest.mark.parametrize("lacks", ["", "before", "after"])
def test_a_kernel_sees_what_the_other_stream_was_given_before(
    lacks: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 1's kernel is late; rank 0's reads what it writes, if the events are there."""
    monkeypatch.setattr(Unmarked, "lacks", lacks)
    topo = mpilsgd.Topology()
    window = DeviceWindow(topo.node, place("cuda"), torch.float32, 64)
    order, seen = Unmarked(topo.node, place("cuda"), []), []
    ones, out = torch.ones(64, device=place("cuda")), torch.zeros(64, device=place("cuda"))
    core.emulated.delay(0.2 * WORLD.rank)
    for k in range(1, 7):
        if WORLD.rank == 1:
            kernels.triad(window.mine, ones, ones, float(k))
        order.before(False)
        topo.node.Barrier()
        order.after(False)
        if WORLD.rank == 0:
            kernels.total(out, [window.views[1]])
            seen.append(float(out[0]) == k + 1)
        topo.node.Barrier()
    core.emulated.delay(1e-4)
    devices.finish(place("cuda"))
    topo.node.Barrier()
    order.free()
    window.free()
    assert WORLD.rank or all(seen) == (not lacks), seen
    topo.free()


@pytest.mark.parametrize("aware", [True, False])
@pytest.mark.parametrize("name", [*TOGETHER, "EASGD-overlap", "DiLoCo-overlap", "EASGD-turns-3"])
def test_between_nodes(name: str, aware: bool) -> None:
    """Messages from and into device memory, and through the host's, give the same."""
    if aware and not CORE:
        pytest.skip("needs an emulated device")
    topo = mpilsgd.Topology(shared=MESSAGES.shared, group_size=MESSAGES.group_size, cuda_aware=aware)
    case, errors = BY_NAME[name], []
    runs = [(MSGD, torch.float64), (SGD, torch.float32)]
    for local, dtype in runs[:1] if "fragments" in case.options else runs:  # they begin elsewhere in float32
        with running(case, LeastSquares(), local, MESSAGES, device="cuda", topo=topo, dtype=dtype) as run:
            simulated = case.simulate(LeastSquares(), local, MESSAGES)
            errors += compare(run, simulated, 6, TOLERANCE[dtype], str(dtype))
    topo.free()
    check_together(errors)


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("across", ["bfloat16", "int8"])
def test_narrow_types_between_nodes(across: str) -> None:
    """The same bytes arrive through device memory as through the host's."""
    held = []
    for aware in (True, False) if CORE else (False,):
        topo = mpilsgd.Topology(shared=False, across_dtype=across, cuda_aware=aware)
        with running(BY_NAME["LocalSGD-period"], TanhNet(), SGD, MESSAGES, device="cuda", topo=topo) as run:
            held.append(run.run(7).x())
        topo.free()
    assert all((x == held[0]).all() for x in held)


@only_emulated
@pytest.mark.processes
@pytest.mark.brief(2)
@pytest.mark.parametrize(
    ("child", "told"),
    [
        ([sys.executable, str(Path(emulated.__file__).with_name("emulated_probe.py"))], None),
        ([sys.executable, "-c", "import os; os.abort()"], "ended with status -6"),
        ([sys.executable, "-c", "import sys; sys.exit('other bytes')"], "status 1: other bytes"),
        (["/no/such/program"], "No such file"),
    ],
    ids=["agrees", "crashes", "lies", "cannot start"],
)
def test_what_mpi_says_is_tried(child: list[str], told: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "command", lambda place: child)
    monkeypatch.setattr(inquiry, "cuda_support", lambda: inquiry.CudaSupport(True, "MPI says so"))
    topo = mpilsgd.Topology()
    caught: Any = pytest.warns(DevicePathWarning, match=told) if told and WORLD.rank == 0 else nullcontext()
    with caught:
        takes, why = probe.path(topo, place("cuda"))
    assert takes == (told is None), why
    assert (told or "came whole") in why
    topo.free()


@only_emulated
def test_too_little_device_memory_is_said_before_it_is_missed() -> None:
    """With the sizes, on every rank."""
    topo = mpilsgd.Topology()
    _, total = core.device.memory(0)
    with pytest.raises(ValueError, match=r"GB are wanted on cpu:0 by its ranks, of whose 1.07 GB"):
        Fabric(topo, total // topo.node.size + 1, place("cuda"))
    assert topo.allgather(1) == [1] * WORLD.size
    topo.free()


@only_emulated
@pytest.mark.processes
@pytest.mark.brief(2)
@pytest.mark.parametrize(
    "call",
    [
        "cudaMalloc",
        "cudaIpcGetMemHandle",
        "cudaIpcOpenMemHandle",
        "cudaEventCreateWithFlags",
        "cudaIpcOpenEventHandle",
    ],
)
def test_ranks_that_cannot_map_each_other_share_pinned_memory(call: str) -> None:
    """Of one rank a call fails: all take that, with a notice, and train as ever."""
    topo = mpilsgd.Topology()
    case, layout = BY_NAME["EASGD-jacobi"], MESSAGES
    if WORLD.rank == WORLD.size - 1:
        core.emulated.fail(call, 1, 999)
    caught: Any = (
        pytest.warns(SharedMemoryWarning, match="cannot read each other")
        if WORLD.rank == 0
        else nullcontext()
    )
    with caught, running(case, LeastSquares(), SGD, layout, device="cuda", topo=topo) as run:
        assert run.opt.fabric.world.n_islands == WORLD.size and run.opt.fabric.world.stage is not None
        errors = compare(run, case.simulate(LeastSquares(), SGD, layout), 4, 1e-12)
    topo.free()
    check_together(errors)


@only_emulated
@pytest.mark.processes
@pytest.mark.brief(2)
@pytest.mark.parametrize("call", ["cudaGetDeviceProperties", "cudaMemGetInfo"])
def test_a_driver_that_fails_on_one_rank_is_told_on_all(call: str) -> None:
    topo = mpilsgd.Topology()
    if WORLD.rank == 0:
        core.emulated.fail(call, 1, 999)
    with pytest.raises(ValueError, match=r"rank 0: mpilsgd: CUDA"):
        Fabric(topo, 1000, place("cuda"))
    assert topo.allgather(1) == [1] * WORLD.size
    topo.free()


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("name", ["LSGD-after-step", "EASGD-jacobi"])
def test_some_on_devices_and_some_not(name: str) -> None:
    """They exchange messages."""
    case = BY_NAME[name]
    with running(case, TanhNet(), SGD, MESSAGES, device="cuda" if WORLD.rank else "cpu") as run:
        errors = compare(run, case.simulate(TanhNet(), SGD, MESSAGES), 6, 1e-12)
    check_together(errors)


@only_emulated
@pytest.mark.processes
@pytest.mark.brief(2)
def test_what_lies_on_the_host_needs_room_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mpilsgd.transport.sharing.free_shared_memory", lambda: 1000)
    topo = mpilsgd.Topology()
    caught: Any = pytest.warns(SharedMemoryWarning, match="do not fit") if WORLD.rank == 0 else nullcontext()
    case = BY_NAME["LSGD-wait-free-1"]
    with caught, running(case, TanhNet(), SGD, MESSAGES, device="cuda", topo=topo) as run:
        assert run.opt.fabric.world.n_islands == WORLD.size
    topo.free()

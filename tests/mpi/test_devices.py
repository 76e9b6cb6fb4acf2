"""Ranks whose vectors lie on a device and are read there by the others: on an emulated device, where there is no GPU."""

from __future__ import annotations

import warnings
from typing import Any

import emulated
import pytest
import torch
from harness import CORE, LAYOUTS, MESSAGES, WORLD, Case, check_together, compare, place, running
from method_cases import BY_NAME, SGD, close
from problems import LeastSquares, TanhNet

import mpilsgd
from mpilsgd import devices
from mpilsgd.extension import core, device_of
from mpilsgd.transport import SharedMemoryWarning
from mpilsgd.transport.devices import DeviceWindow, Order

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


def test_a_common_vector_is_one_a_node() -> None:
    level = mpilsgd.Topology()
    island, where = level.node, place("cuda")
    window = DeviceWindow(island, where, torch.float32, 1000, common=True)
    if island.rank == island.size - 1:
        window.mine.fill_(3.0)
        devices.finish(where)
    island.Barrier()
    assert float(window.views[0].cpu()[-1]) == 3.0
    island.Barrier()
    window.free()
    level.free()


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
@pytest.mark.mpi(min_size=2)
@pytest.mark.processes
@pytest.mark.parametrize("lacks", ["before", "after"])
@pytest.mark.parametrize("name", TOGETHER[:3])
def test_the_streams_have_to_be_ordered(name: str, lacks: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the events between streams the results are others: so the emulation's streams are late indeed."""
    monkeypatch.setattr(Unmarked, "lacks", lacks)
    monkeypatch.setattr("mpilsgd.transport.devices.Order", Unmarked)
    wrong = 0
    core.emulated.delay(2e-3)
    try:
        for seed in range(4):
            core.emulated.seed(seed + 10 * WORLD.rank)
            with running(BY_NAME[name], TanhNet(), SGD, LAYOUTS[0], device="cuda", topo=mpilsgd.Topology()) as run:
                simulated = BY_NAME[name].simulate(TanhNet(), SGD, LAYOUTS[0])
                wrong += any(WORLD.allgather(compare(run, simulated, 6, 1e-12)))
                run.topo.free()
            if wrong:
                break
    finally:
        core.emulated.delay(1e-4)
    assert wrong

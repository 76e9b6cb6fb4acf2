"""Workers under a virtual clock: who waits for whom, and that results are the real ones."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from simulated import FREE, SLOW, SYNCHRONOUS, near, step_seconds, trains
from test_in_process import TURNS, Worker

import mpilsgd
from mpilsgd import (
    EASGD,
    LSGD,
    LocalSGD,
    in_process,
    simulate,
)
from mpilsgd.simulation import Network, lognormal, stragglers

# Who waits for whom


def test_a_round_waits_for_the_straggler() -> None:
    found = simulate(trains(LocalSGD, period=1), 3, compute=stragglers({1: 3.0}, 0.01), network=FREE)
    assert [result[1] for result in found.results] == near([0.24] * 3, abs=1e-4)
    assert found.compute == near([0.08, 0.24, 0.08])
    assert found.waiting == near([0.16, 0.0, 0.16], abs=1e-3)
    waited = [result[2].t_wait for result in found.results]
    assert waited == near([0.16, 0.0, 0.16], abs=1e-3)
    totals = np.add(np.add(found.compute, found.communication), found.waiting)
    assert totals == near(np.array(found.seconds))


def test_an_asynchronous_method_does_not() -> None:
    """In the time in which the slow worker takes a step, the others take three each."""
    found = simulate(
        trains(EASGD, 7, asynchronous=True, period=1), 3, compute=stragglers({1: 3.0}, 0.01), network=FREE
    )
    steps = [result[3] for result in found.results]
    assert min(steps[0], steps[2]) >= 8 and steps[1] <= 4
    assert max(result[1] for result in found.results) == near(0.1, abs=0.03)


def test_rounds_on_a_slow_network_take_what_they_should() -> None:
    """2 nodes: each sends half of its vector, then the sum of its half: 8 d bytes over bandwidth a round."""
    d, steps, network = 10_000, 16, Network(bandwidth=1e6, latency=0.0, local_latency=0.0, memory=math.inf)
    taken = {}
    for tau in (1, 16):
        found = simulate(trains(LocalSGD, steps, d, period=tau), 2, nodes=2, compute=0.01, network=network)
        taken[tau] = max(result[1] for result in found.results)
        assert taken[tau] == near(steps * 0.01 + steps / tau * 8 * d / 1e6, rel=2e-2)
    assert taken[1] / taken[16] == near(16 * 0.09 / (0.16 + 0.08), rel=2e-2)


def test_two_that_wait_for_a_turn_take_it_one_after_the_other() -> None:
    """The centre on the other node is fetched and put back in a turn: nobody else may meanwhile."""
    d, network = 50_000, Network(bandwidth=1e6, latency=0.0, local_latency=0.0, memory=math.inf)
    found = simulate(
        trains(EASGD, 2, d, asynchronous=True, period=1), 4, nodes=2, compute=0.001, network=network
    )
    assert max(result[1] for result in found.results) > 2 * 2 * 8 * (d / 2) / 1e6


# Results

ASYNCHRONOUS: dict[str, tuple[Any, dict[str, Any]]] = {
    "EASGD-turns": (EASGD, {**TURNS, "order": "round-robin"}),
    "LSGD-turns": (LSGD, {"asynchronous": True, "period": 2, "order": "round-robin"}),
    "LSGD-wait-free-turns": (LSGD, {"asynchronous": "wait-free", "period": 2, "order": "round-robin"}),
}


@pytest.mark.parametrize("nodes", [1, 2])
@pytest.mark.parametrize("name", [*SYNCHRONOUS, *ASYNCHRONOUS])
def test_parameters_are_those_of_in_process(name: str, nodes: int) -> None:
    method, options = {**SYNCHRONOUS, **ASYNCHRONOUS}[name]

    def worker() -> bytes:
        w = Worker(method, options, np.linspace(-1, 1, 5), init="same")
        for _ in range(7):
            w.step(np.sin(w.x() + w.world.rank), loss=float(np.square(w.x() + w.world.rank).sum()))
        return w.x().tobytes()

    found = simulate(worker, 4, nodes=nodes, seed=3, compute=step_seconds, network=SLOW)
    assert found.results == in_process(worker, 4, nodes=nodes)


def run_of(seed: int, name: str = "EASGD", **more: Any) -> Any:
    worker = trains(EASGD, **TURNS) if name == "EASGD" else trains(LSGD, asynchronous=name, period=2)
    return simulate(worker, 4, nodes=2, seed=seed, compute=step_seconds, network=SLOW, **more)


@pytest.mark.parametrize("name", ["EASGD", True, "wait-free"])
def test_the_seed_decides(name: Any) -> None:
    runs = [run_of(seed, name) for seed in (0, 0, 1, 2)]
    assert runs[0] == runs[1]
    assert all(run.results != runs[0].results for run in runs[2:])


def test_a_recorded_order_on_another_network(tmp_path: Path) -> None:
    """Replayed with one thing changed: what the workers did, in a tenth of the bandwidth and with other stragglers."""
    file = str(tmp_path / "order.json")
    first = simulate(
        trains(EASGD, size=2000, record=file, **TURNS), 4, nodes=2, compute=step_seconds, network=SLOW
    )
    slow = Network(bandwidth=1e5, latency=1e-3)
    again, other = (
        simulate(trains(EASGD, size=2000, **replay, **TURNS), 4, nodes=2, seed=1, compute=0.01, network=slow)
        for replay in ({"replay": file}, {})
    )
    x = [[result[0] for result in run.results] for run in (first, again, other)]
    assert x[0] == x[1] != x[2] and min(again.seconds) > 2 * max(first.seconds)


def test_draws_do_not_depend_on_the_order() -> None:
    compute = lognormal(0.01, 0.5)
    runs = [
        simulate(trains(LocalSGD, period=period), 3, seed=4, compute=compute, network=network)
        for period, network in ((1, SLOW), (4, FREE))
    ]
    assert runs[0].compute == near(runs[1].compute, rel=1e-12)
    drawn = simulate(trains(LocalSGD, 400, period=400), 3, compute=compute, network=FREE).compute
    assert np.mean(drawn) / 400 == near(0.01, rel=0.1) and len(set(drawn)) == 3


def test_measured_seconds_are_those_of_the_worker() -> None:
    def worker() -> None:
        w = Worker(LocalSGD, {"period": 2}, np.zeros(5))
        for _ in range(4):
            if w.world.rank == 1:
                for _ in range(40):
                    torch.ones(200, 200) @ torch.ones(200, 200)
            w.step(np.zeros(5))

    found = simulate(worker, 2, compute="measured", network=FREE)
    assert 0 < 2 * found.compute[0] < found.compute[1] < 5.0
    assert found.waiting[0] > found.waiting[1]


def test_methods_know_nothing_of_simulation() -> None:
    package = Path(mpilsgd.__file__).parent
    for folder in ("comm", "transport", "exchange", "methods", "optimizers"):
        for file in (package / folder).glob("*.py"):
            assert not re.search(r"(from|import) mpilsgd\.simulation", file.read_text()), file

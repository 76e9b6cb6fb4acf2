"""Workers under a virtual clock: what things cost, who waits for whom, and that results are the real ones."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_in_process import TURNS, Worker

from mpilsgd import (
    ADMM,
    EASGD,
    LSGD,
    AllreduceSGD,
    DiLoCo,
    Downpour,
    EASGDTree,
    LocalSGD,
    in_process,
    simulate,
)
from mpilsgd.comm import MPI
from mpilsgd.simulation import Network, clock, lognormal, stragglers

FREE = Network(math.inf, 0.0, math.inf, 0.0)
SLOW = Network(bandwidth=1e6, latency=1e-3, memory=1e7, local_latency=1e-5)
MB = 1_000_000
near = pytest.approx


def step_seconds(rank: int, step: int, random: Any) -> float:
    return random.uniform(0.001, 0.02)  # type: ignore[no-any-return]


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


# What communication costs


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


# Who waits for whom


def trains(method: Any, steps: int = 8, size: int = 5, **options: Any) -> Any:
    """Gives where every worker ended, and its method's metrics; `steps` are those of each, or of all together."""

    def worker() -> Any:
        w = Worker(method, options, np.linspace(-1, 1, size), init="same")
        begun, total = clock(), steps * len(w.opt.workers)
        while not w.opt.reached(total):
            w.step(np.sin(w.x() + w.world.rank), loss=float(np.square(w.x() + w.world.rank).sum()))
        return w.x().tobytes(), clock() - begun, w.opt.metrics, w.opt.t

    return worker


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

SYNCHRONOUS: dict[str, tuple[Any, dict[str, Any]]] = {
    "AllreduceSGD": (AllreduceSGD, {}),
    "LocalSGD": (LocalSGD, {"period": 3}),
    "DiLoCo": (DiLoCo, {"period": 3}),
    "DiLoCo-overlap": (DiLoCo, {"period": 6, "fragments": 2, "overlap": 2}),
    "LSGD": (LSGD, {"period": 2, "global_period": 4, "pull": 0.3}),
    "LSGD-every-step": (LSGD, {"period": 2, "when": "every_step"}),
    "EASGD": (EASGD, {"period": 2}),
    "EASGD-overlap": (EASGD, {"period": 2, "overlap": True}),
    "EASGD-gauss-seidel": (EASGD, {"period": 2, "form": "gauss-seidel"}),
    "Downpour": (Downpour, {"period": 2, "asynchronous": False}),
    "ADMM": (ADMM, {"rho": 0.5}),
    "EASGDTree": (EASGDTree, {"degree": 2, "period": 1, "upper_period": 2, "order": "lock-step"}),
}
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

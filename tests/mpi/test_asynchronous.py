"""The asynchronous methods: in round-robin order against the oracle, in free order by what no order may change."""

from __future__ import annotations

import io
import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import asynchronous_simulation as turns
import numpy as np
import pytest
import torch
from harness import (
    FEW,
    LAYOUTS,
    TOLERANCE,
    WORLD,
    Case,
    Layout,
    Run,
    check_together,
    compare,
    distance,
    running,
)
from mpi4py import MPI
from numpy.typing import NDArray
from problems import Buffered, LeastSquares, Problem, Quadratic, TanhNet
from simulation import LSGD as SimulatedLSGD
from simulation import Local, Simulation

from mpilsgd import ADMM, EASGD, LSGD, AllreduceSGD, Downpour, LocalSGD, Topology

pytestmark = pytest.mark.mpi

Vector = NDArray[np.float64]


class Turns(Case):
    """A method in round-robin order, where it is asynchronous; its simulation is the oracle's."""

    def simulate(self, problem: Problem, local: Local, layout: Layout, **options: Any) -> Simulation:
        own = {name: value for name, value in self.options.items() if name not in ("order", "asynchronous")}
        workers = sum(len(group) for group in layout.groups)
        if self.method is LSGD:
            wait_free = self.options["asynchronous"] == "wait-free"
            kind: Any = turns.WaitFreeLSGD if wait_free else SimulatedLSGD
            return kind(problem, workers, local, groups=layout.groups, **own, **options)
        if self.method is Downpour:
            own["asynchronous"] = self.options.get("asynchronous", True)
        made: Simulation = getattr(turns, self.method.__name__)(problem, workers, local, **own, **options)
        return made


def in_turns(method: Any, name: str, **options: Any) -> Turns:
    return Turns(method, {"asynchronous": True, "order": "round-robin", **options}, name)


def free(method: Any, name: str, **options: Any) -> Case:
    return Case(method, {"asynchronous": True, **options}, name)


PULLS = {"pull": 0.3, "global_pull": 0.2, "loss_window": 3}
CASES = [
    *(in_turns(EASGD, f"{tau}", period=tau) for tau in (1, 3)),
    in_turns(EASGD, "rates", period=2, center_rate=0.5, moving_rate=0.3),
    *(in_turns(EASGD, f"gauss-seidel-{tau}", period=tau, form="gauss-seidel") for tau in (1, 3)),
    *(in_turns(EASGD, f"overlap-{tau}", period=tau, overlap=True) for tau in (1, 3)),
    *(in_turns(Downpour, f"{tau}", period=tau) for tau in (1, 3)),
    in_turns(Downpour, "momentum", momentum=0.6),
    *(in_turns(Downpour, f"running-{tau}", period=tau, average="running") for tau in (1, 3)),
    in_turns(Downpour, "moving", period=2, average=0.3),
    in_turns(Downpour, "momentum-running", momentum=0.6, average="running"),
    *(Turns(Downpour, {"period": tau, "asynchronous": False}, f"synchronous-{tau}") for tau in (1, 3)),
    Turns(Downpour, {"momentum": 0.6, "average": 0.3, "asynchronous": False}, "synchronous-momentum"),
    Turns(Downpour, {"period": 3, "average": "running", "asynchronous": False}, "synchronous-running"),
    in_turns(ADMM, "asynchronous", rho=1.5),
    Turns(ADMM, {"rho": 0.4}),
    in_turns(LSGD, "1", period=1, global_period=2, **PULLS),
    in_turns(LSGD, "3", period=3, global_period=6, sequential=True, **PULLS),
    in_turns(LSGD, "with-step", period=3, global_period=3, when="with_step", **PULLS),
    in_turns(LSGD, "wait-free-1", asynchronous="wait-free", period=1, global_period=1, **PULLS),
    in_turns(LSGD, "wait-free-3", asynchronous="wait-free", period=3, global_period=2, **PULLS),
    in_turns(LSGD, "wait-free-pair", asynchronous="wait-free", period=2, sequential=True, **PULLS),
]
BY_NAME = {str(case): case for case in CASES}
SOME = [
    BY_NAME[name]
    for name in (
        "EASGD-3",
        "EASGD-gauss-seidel-3",
        "EASGD-overlap-3",
        "Downpour-3",
        "Downpour-running-3",
        "Downpour-momentum",
        "ADMM-asynchronous",
        "LSGD-1",
        "LSGD-wait-free-1",
    )
]
ONE_EACH = [case for case in SOME if case.name in ("3", "overlap-3", "asynchronous", "wait-free-1", "1")]
FREE = [
    free(EASGD, "", period=2),
    free(EASGD, "gauss-seidel", period=2, form="gauss-seidel"),
    free(EASGD, "overlap", period=2, overlap=True),
    free(Downpour, "", period=2),
    free(Downpour, "momentum-running", momentum=0.6, average="running"),
    free(ADMM, "", rho=0.5),
    free(LSGD, "", period=2, global_period=4, **PULLS),
    free(LSGD, "wait-free", asynchronous="wait-free", period=2, global_period=4, **PULLS),
]
SGD = Local(lr=0.05, weight_decay=0.02)
MSGD = Local("msgd", lr=0.05, momentum=0.7, nesterov=True, weight_decay=0.02)
LOCALS = {
    "torch nesterov": Local("momentum", lr=0.05, momentum=0.7, nesterov=True, weight_decay=0.02),
    "MSGD nesterov": MSGD,
    "MSGD heavy ball": Local("msgd", lr=0.05, momentum=0.7),
}
MESSAGES = next(layout for layout in LAYOUTS if not layout.shared)
BOTH = [LAYOUTS[0], MESSAGES]
by_layout = pytest.mark.parametrize("layout", FEW, ids=str)
by_transport = pytest.mark.parametrize("layout", BOTH, ids=str)
by_free = pytest.mark.parametrize("case", FREE, ids=str)
# Every method through windows, some through messages, too: a run of four ranks on two cores takes its time.
by_free_and_transport = pytest.mark.parametrize(
    ("case", "layout"),
    [
        *((case, LAYOUTS[0]) for case in FREE),
        *(
            (case, MESSAGES)
            for case in FREE
            if case.name in ("", "wait-free") and case.method is not Downpour
        ),
    ],
    ids=str,
)
several = pytest.mark.mpi(min_size=2)


def close(a: Vector, b: Vector, label: str = "", tolerance: float = 1e-12) -> list[str]:
    gap = distance(a, b)
    return [] if gap <= tolerance else [f"{label}: differs by {gap:.1e}"]


def work(
    run: Run, total: int, seed: int = 0, longest: float = 0.0, step: Callable[[], Any] | None = None
) -> None:
    """Steps until all workers together have taken `total`, each with pauses of up to `longest` seconds."""
    pauses = np.random.default_rng([seed, run.rank])
    while not run.opt.reached(total):
        if longest:
            time.sleep(pauses.uniform(0, longest))
        (step or run.step)()


# Round-robin order: the oracle's numbers


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_oracle(case: Case) -> None:
    """Convex and not, both precisions, both ways to start; the centre in mid-period and at the end."""
    errors: list[str] = []
    runs: list[tuple[Problem, torch.dtype, bool, Layout]] = [(TanhNet(), torch.float64, False, FEW[0])]
    if case in SOME:
        runs.append((LeastSquares(), torch.float64, True, FEW[-1]))
        runs.append((TanhNet(), torch.float32, True, FEW[1]))
    for problem, dtype, same, layout in runs:
        label = f"{type(problem).__name__} {dtype} {'same' if same else 'different'} start, {layout}"
        with running(case, problem, SGD, layout, same=same, dtype=dtype) as run:
            errors += compare(run, case.simulate(problem, SGD, layout, same=same), 7, TOLERANCE[dtype], label)
    check_together(errors)


@pytest.mark.parametrize("name", LOCALS)
@pytest.mark.parametrize("case", ONE_EACH, ids=str)
def test_local_optimizers(case: Case, name: str) -> None:
    """Momentum is the worker's own; of MSGD the iterate is exchanged, not the look-ahead."""
    with running(case, TanhNet(), LOCALS[name], LAYOUTS[0], same=False) as run:
        simulated = case.simulate(TanhNet(), LOCALS[name], LAYOUTS[0], same=False)
        errors = compare(run, simulated, 7, 1e-12)
    check_together(errors)


@pytest.mark.parametrize("case", SOME, ids=str)
def test_float_buffers_follow_the_exchange(case: Case) -> None:
    """Not those of parameters that are added up or have multipliers: see the oracle's `statistics`."""
    more = {"statistics": 3} if case.method in (Downpour, ADMM) else {}
    layout = FEW[0] if case in ONE_EACH else MESSAGES
    with running(case, Buffered(), Local(lr=0.05), layout) as run:
        errors = compare(run, case.simulate(Buffered(), Local(lr=0.05), layout, **more), 7, 1e-12)
    check_together(errors)


@pytest.mark.parametrize("case", ONE_EACH, ids=str)
def test_schedules(case: Case) -> None:
    """A schedule set on the method reaches the wrapped optimizer (and ADMM's η)."""
    local = Local(lr=lambda t: 0.05 * 0.5 ** (t // 3))
    errors: list[str] = []
    with running(case, TanhNet(), local, LAYOUTS[0]) as run:
        simulated = case.simulate(TanhNet(), local, LAYOUTS[0])
        scheduler = torch.optim.lr_scheduler.StepLR(run.opt, step_size=3, gamma=0.5)
        for t in range(7):
            run.step()
            scheduler.step()
            simulated.step()
            errors += close(run.x(), simulated.x[run.rank], f"t={t}")
    check_together(errors)


@by_transport
@pytest.mark.parametrize("case", [case for case in SOME if case.method is not LSGD], ids=str)
def test_staleness_in_turns(case: Case, layout: Layout) -> None:
    """Between two turns of a worker all others take theirs; before its first, those of lower rank."""
    tau = case.options.get("period", 1)
    with running(case, TanhNet(), SGD, layout) as run:
        run.run(4 * tau)
        expected = Counter({run.size - 1: 3})
        expected[run.rank] += 1
        metrics = run.opt.metrics
        errors = [] if metrics.staleness == dict(expected) else [f"{metrics.staleness}, not {expected}"]
        errors += [] if 0 <= metrics.t_wait <= metrics.t_comm else [f"{metrics}"]
    check_together(errors)


@several
@by_transport
@pytest.mark.parametrize("case", ONE_EACH, ids=str)
def test_turns_go_on_without_a_rank_that_rests(case: Case, layout: Layout) -> None:
    """It has run out of data and waits in center() or close(): its turns are left out."""
    last = WORLD.size - 1 if layout.shared else 0
    with running(case, TanhNet(), MSGD, layout) as run:
        run.run(3 + (4 if run.rank != last else 0))
        first = run.center()
        run.run(2 + 2 * (run.rank % 2))
        second = run.center()
        errors = [] if all(np.isfinite(v).all() for v in (run.held(), first, second)) else ["not finite"]
        for mine in (first, second):
            same = all((mine == other).all() for other in WORLD.allgather(mine))
            errors += [] if same else ["the centres differ"]
        run.run(3 * (run.rank == last))
    check_together(errors)


# Free order: what every order has to keep


def one_rank(layout: Layout) -> Layout:
    return Layout(None, layout.shared, ((0,),))


@by_transport
@pytest.mark.parametrize("case", FREE, ids=str)
def test_one_worker_is_its_optimizer(case: Case, layout: Layout) -> None:
    """Each rank alone (COMM_SELF): SGD or MSGD; momentum on the centre is MSGD."""
    errors: list[str] = []
    center = {"center_rate": 0} if case.method is EASGD else {}
    for local in (SGD, MSGD):
        if case.method is ADMM or (case.options.get("momentum") and local is MSGD):
            continue
        delta = case.options.get("momentum", 0.0)
        plain = Simulation(TanhNet(), 1, Local("msgd", 0.05, delta, True, 0.02) if delta else local).run(6)
        with running(case, TanhNet(), local, one_rank(layout), comm=MPI.COMM_SELF, **center) as run:
            run.run(6)
            errors += close(run.x(), (plain.points() if delta else plain.x)[0], str(local))
            if case.options.get("average") is None and case.method is not EASGD:
                errors += close(run.center(), plain.x[0], f"{local} centre")
    check_together(errors)


@by_free_and_transport
def test_consensus_is_a_fixed_point(case: Case, layout: Layout) -> None:
    """Under zero gradient, in any order."""
    problem = Quadratic(0.0)
    with running(case, problem, Local(lr=0.1), layout) as run:
        work(run, 12 * run.size, longest=1e-3, step=run.still)
        start = problem.start(0)
        errors = close(run.held(), start, "x", 1e-15) + close(run.center(), start, "centre", 1e-15)
    check_together(errors)


def kick(run: Run, gradient: Vector) -> None:
    (parameter,) = run.model.parameters()
    parameter.grad = torch.from_numpy(gradient.copy())
    run.opt.step(loss=float(run.rank))


def conserve(
    layout: Layout, exchanges: int, rate: float, gradients: bool, size: int = 8, **options: Any
) -> None:
    """Σx + c, less what the workers' own steps add, over exchanges of all ranks on a vector of some values.

    At zero gradient the workers soon agree, and then nothing is left to be lost. With α = 1 they never do: x and c
    change places. Exchanges of a long vector are more often under way at the same time.
    """
    each = -(-exchanges // WORLD.size)
    case = free(EASGD, "", period=1, center_rate=rate * WORLD.size, moving_rate=rate, **options)
    with running(case, Quadratic(0.0, size=size), Local(lr=0.125), layout, same=False) as run:
        before = np.sum(WORLD.allgather(run.x()), axis=0) + run.center()
        # multiples of 1/64, whose sums do not round
        random = np.random.default_rng([23, run.rank])
        own = random.integers(-64, 65, size=(each, size)) / 64 if gradients else np.zeros((1, size))
        for t in range(each):
            kick(run, own[t % len(own)])
        moved = np.sum(WORLD.allgather(-0.125 * own.sum(0)), axis=0)
        after = np.sum(WORLD.allgather(run.x()), axis=0) + run.center()
        errors = close(after, before + moved, "Σx + c", 1e-12)
        rounds = sum(run.opt.metrics.staleness.values())
        errors += [] if rounds == each else [f"{rounds} updates of the centre, not {each}"]
    check_together(errors)


@by_layout
def test_easgd_conserves_the_sum(layout: Layout) -> None:
    conserve(layout, 1500, 1.0, False)
    conserve(layout, 500, 1.0, False, size=50_000)


@by_transport
@pytest.mark.parametrize("overlap", [False, True], ids=["", "overlap"])
def test_easgd_conserves_the_sum_but_for_gradients(overlap: bool, layout: Layout) -> None:
    conserve(layout, 200, 0.15, True, overlap=overlap)


@pytest.mark.slow
@by_layout
def test_easgd_conserves_the_sum_over_100000_exchanges(layout: Layout) -> None:
    conserve(layout, 100_000, 1.0, False)


@by_transport
@pytest.mark.parametrize("period", [1, 3])
def test_downpour_loses_no_gradient(period: int, layout: Layout) -> None:
    """c + Σ (x − a) = c₀ − η Σ g over all gradients, also of workers in mid-period and with unequal clocks."""
    with running(free(Downpour, "", period=period), TanhNet(), Local(lr=0.01), layout, same=False) as run:
        start = run.center()
        pauses = np.random.default_rng(run.rank)
        received, total = run.x(), np.zeros_like(start)
        for t in range(40 + 7 * run.rank):
            total += TanhNet().gradient(run.x(), run.rank, t)[1]
            run.step()
            if (t + 1) % period == 0:
                received = run.x()
            time.sleep(pauses.uniform(0, 5e-4))
        unpushed = np.sum(WORLD.allgather(run.x() - received), axis=0)
        expected = start - 0.01 * np.sum(WORLD.allgather(total), axis=0)
        errors = close(run.center() + unpushed, expected, tolerance=1e-11)
    check_together(errors)


@by_layout
def test_admm_keeps_its_centre(layout: Layout) -> None:
    """c is the mean of all x − λ (3.54); each worker's λ follows from its own x alone."""
    eta, rho = 0.5, 2.0
    r = eta * rho
    with running(
        free(ADMM, "", rho=rho), Quadratic(0.4, optimum=1.0), Local(lr=eta), layout, same=False
    ) as run:
        dual = np.zeros_like(run.x())
        for _ in range(40 + 7 * run.rank):
            x = run.x()
            y = x - eta * run.problem.gradient(x, run.rank, 0)[1]
            run.step()
            time.sleep(2e-4 * (run.rank % 2))
            # x' (1 + r) = y + r (λ' + c) and λ' = λ − x + c
            dual = ((run.x() * (1 + r) - y) / r + dual - x) / 2
        expected = np.mean(WORLD.allgather(run.x() - dual), axis=0)
        errors = close(run.center(), expected, tolerance=1e-11)
    check_together(errors)


@by_free_and_transport
def test_the_run_ends_on_the_total_of_steps(case: Case, layout: Layout) -> None:
    """Not before it is reached, nor much later, with unequal workers; and `reached` stays as it was."""
    slow = WORLD.size - 1
    with running(case, TanhNet(), MSGD, layout) as run:
        for total in (5 * run.size, 15 * run.size):
            work(run, total, longest=5e-3 if run.rank == slow else 0.0)
            center = run.center()  # now the ranks may talk
            taken = WORLD.allreduce(run.t)
            # Each may be within a step; several islands of several ranks count in batches of so many.
            ranks = WORLD.allreduce(run.topo.node.size if layout.shared else 1, MPI.MAX)
            most = total + (3 if 1 < ranks < run.size else 1) * run.size
            errors = [] if total <= taken < most else [f"{taken} steps for a total of {total}"]
            errors += [] if run.opt.reached(total) and run.opt.reached(1) else ["reached() took it back"]
            errors += [] if run.opt.t == run.t else [f"t is {run.opt.t} after {run.t} steps"]
            errors += [] if all((center == c).all() for c in WORLD.allgather(center)) else ["centres differ"]
            errors += [] if np.isfinite(center).all() else [f"the centre is {center}"]
            check_together(errors)


@pytest.mark.parametrize(
    "case",
    [Case(AllreduceSGD), Case(LocalSGD), Case(LSGD), Case(EASGD), SOME[0], Turns(ADMM, {"rho": 1.0})],
    ids=str,
)
def test_reached_where_workers_keep_step(case: Case) -> None:
    """t p ≥ n, by one's own clock."""
    with running(case, TanhNet(), SGD, LAYOUTS[0]) as run:
        answers = [run.opt.reached(3 * run.size)]
        for _ in range(4):
            run.step()
            answers.append(run.opt.reached(3 * run.size))
        expected = [False, False, False, True, True]
        errors = [] if answers == expected else [f"{answers}"]
    check_together(errors)


@several
@by_free_and_transport
def test_a_slow_worker_holds_nobody_up(case: Case, layout: Layout) -> None:
    """Of methods without rounds, the others finish their steps while one sleeps."""
    if case.method is LSGD and case.options["asynchronous"] is True:
        case = free(LSGD, "", period=1000)  # between two rounds
    with running(case, TanhNet(), SGD, layout) as run:
        run.run(2)
        WORLD.Barrier()
        if run.rank == 0:
            time.sleep(0.5)
        else:
            run.run(6)
        ends = time.time()
        wakes = WORLD.bcast(ends)
        errors = [] if ends <= wakes else [f"done {ends - wakes:.2f} s after rank 0 woke up"]
        run.run(6 * (run.rank == 0))
    check_together(errors)


@by_transport
def test_rounds_of_leader_sgd_follow_the_total(layout: Layout) -> None:
    """A round each time the total of steps crosses a multiple of p τ, for all workers the same rounds."""
    with running(free(LSGD, "", period=3, global_period=6, **PULLS), TanhNet(), SGD, layout) as run:
        work(run, 30 * run.size, longest=3e-3 * (1 + 2 * run.rank))
        run.center()
        total = WORLD.allreduce(run.t)
        rounds = WORLD.allgather(run.opt.metrics.rounds)
        errors = [] if len(set(rounds)) == 1 else [f"unequal numbers of rounds {rounds}"]
        due = total // (3 * run.size)
        # Crossings that come while a round is still on its way are one with it.
        errors += (
            [] if due / 2 <= rounds[0] <= 2 * due else [f"{rounds[0]} rounds in {total} steps, not {due}"]
        )
    check_together(errors)


@several
@by_transport
def test_snapshots_are_whole(layout: Layout) -> None:
    """Workers whose values are all alike keep them so, who mixed two versions of a leader would not."""
    case = free(LSGD, "", asynchronous="wait-free", pull=0.3, global_pull=0.2, period=1, global_period=1)
    random = np.random.default_rng(WORLD.rank)
    with running(case, Quadratic(0.0, size=50_000), Local(lr=0.1), layout) as run:
        (parameter,) = run.model.parameters()
        parameter.data.fill_(float(run.rank))
        errors = []
        for t in range(400):
            parameter.grad = torch.full_like(parameter, random.normal())
            run.opt.step(loss=random.normal())
            if parameter.min() != parameter.max():
                errors.append(f"t={t}: from {parameter.min()} to {parameter.max()}")
        run.center()
    check_together(errors)


# Record and replay


def two_parts(run: Run, seed: int) -> list[Vector]:
    """A run of 10 p steps in all, with pauses and a look at the centre in between; what it came to."""
    seen = []
    for total in (4 * run.size, 10 * run.size):
        work(run, total, seed, longest=4e-3)
        seen += [run.x(), run.center(), np.array([run.opt.t, run.opt.metrics.rounds])]
    return seen


@by_transport
@by_free
def test_replay_is_the_recorded_run(case: Case, layout: Layout, folder: Path) -> None:
    """Bit for bit, whoever is slow then: parameters, centre, and everybody's number of steps."""
    errors: list[str] = []
    local = MSGD if layout.shared else SGD
    file = folder / "run.json"
    with running(case, TanhNet(), local, layout, same=False, record=file) as run:
        recorded = two_parts(run, 1)
    with running(case, TanhNet(), local, layout, same=False, replay=file) as run:
        replayed = two_parts(run, 2)
    for name, a, b in zip(("x", "centre", "steps") * 2, replayed, recorded, strict=True):
        errors += [] if (a == b).all() else [f"{name}: {a} in the replay of {b}"]
    check_together(errors)


def refused(method: Any, match: str, *, problem: Problem | None = None, **options: Any) -> None:
    """On every rank; and the topology goes on working after it."""
    topo = Topology()
    refuses(topo, method, match, problem or TanhNet(), options)
    topo.free()


def refuses(topo: Topology, method: Any, match: str, problem: Problem, options: dict[str, Any]) -> None:
    model = problem.build(torch.float64, problem.start(0))
    with pytest.raises(ValueError, match=match):
        method(torch.optim.SGD(model.parameters(), lr=0.05), topo, **options)
    assert topo.allgather(1) == [1] * topo.world.size


def test_replays_of_another_run_are_refused(folder: Path) -> None:
    """Of other settings, another method or model or number of workers, and files that are none."""
    file, small, text, other = (folder / name for name in ("run", "small", "text", "other"))
    case = free(EASGD, "", period=2)
    with running(case, TanhNet(), SGD, LAYOUTS[0], record=file) as run:
        work(run, 6 * run.size)
    replay = {"asynchronous": True, "replay": file}
    refused(EASGD, "period", period=3, **replay)
    refused(EASGD, "replay", period=2, init="different", **replay)
    refused(EASGD, "replay", period=2, overlap=True, **replay)
    refused(Downpour, "replay", period=2, **replay)
    refused(EASGD, "replay", problem=LeastSquares(), period=2, **replay)
    if WORLD.size > 1:
        if WORLD.rank == 0:
            with running(case, TanhNet(), SGD, one_rank(LAYOUTS[0]), comm=MPI.COMM_SELF, record=small) as run:
                work(run, 6)
        WORLD.Barrier()
        refused(EASGD, "workers", period=2, asynchronous=True, replay=small)
    if WORLD.rank == 0:
        text.write_bytes(b"\x89PNG no recording")
        other.write_text(json.dumps({"step": 3}))
    WORLD.Barrier()
    for wrong in (text, other, folder / "missing", folder):
        refused(EASGD, "replay", period=2, asynchronous=True, replay=wrong)
    refused(EASGD, "record", period=2, asynchronous=True, record=folder / "no such folder" / "run")
    refused(EASGD, "record|replay", period=2, record=folder / "x", **replay)
    with running(case, TanhNet(), SGD, LAYOUTS[0], replay=file) as run:  # and the right one is not
        work(run, 6 * run.size)


# Faults


def break_down(run: Run, element: bool) -> None:
    (parameter,) = run.model.parameters()
    parameter.data.fill_(1e30 if element else math.nan)
    if element:
        parameter.data[0] = math.inf


@several
@by_transport
@pytest.mark.parametrize(("element", "bad"), [(False, 1), (True, 0)], ids=["NaN", "one infinite"])
def test_a_broken_worker_starts_anew_from_the_centre(element: bool, bad: int, layout: Layout) -> None:
    """In turns, by the papers' equations: it leaves the centre alone, takes it over, and its momentum is cleared."""
    errors: list[str] = []
    local = Local("momentum", lr=0.1, momentum=0.5)
    for case in (
        in_turns(EASGD, "", period=1, center_rate=0.6),
        in_turns(EASGD, "gauss-seidel", period=1, center_rate=0.6, form="gauss-seidel"),
        in_turns(Downpour, ""),
    ):
        with running(case, Quadratic(0.0), local, layout, same=False) as run:
            simulated = case.simulate(Quadratic(0.0), local, layout, same=False)
            run.still()
            simulated.step()
            x, c = run.x(), run.center()
            if run.rank == bad:
                break_down(run, element)
            run.still()
            # The oracle of the others: one with the bad worker at the centre when its turn comes.
            again = case.simulate(Quadratic(0.0), local, layout, same=False)
            again.__dict__.update(simulated.__dict__)
            assert isinstance(again, turns.RoundRobin)
            again.before_step, again.after_step = absent(again, bad)  # type: ignore[method-assign]
            again.step()
            errors += close(run.x(), again.x[run.rank], f"{case} x, was {x}")
            errors += close(run.center(), again.center(), f"{case} centre, was {c}")
            resets = run.opt.metrics.resets
            errors += [] if resets == (run.rank == bad) else [f"{case}: {resets} resets"]
            for _ in range(3):
                run.still()
            finite = np.isfinite(run.held()).all() and np.isfinite(run.center()).all()
            errors += [] if finite and run.opt.metrics.resets == resets else [f"{case}: broken later"]
    check_together(errors)


def absent(method: Any, bad: int) -> tuple[Callable[[int, int], None], Callable[[int, int], None]]:
    """The exchanges of an oracle whose worker `bad` takes the centre over instead."""
    before, after, due = method.before_step, method.after_step, isinstance(method, turns.EASGD)
    early = due and method.form == "jacobi"

    def instead(i: int, exchange: Callable[[int, int], None], t: int, here: bool) -> None:
        if i != bad:
            exchange(i, t)
        elif here:
            method.x[bad] = method.c
            if isinstance(method, turns.Downpour):
                method.received[bad] = method.c

    return (lambda i, t: instead(i, before, t, early)), (lambda i, t: instead(i, after, t, not early))


@several
@pytest.mark.parametrize("order", ["free", "round-robin"])
@by_free
def test_training_goes_on_after_a_nan(case: Case, order: str) -> None:
    """Parameters, momentum and gradient of one worker break; the centre and the others never do."""
    errors: list[str] = []
    layout = FEW[0] if order == "free" else FEW[-1]
    with running(case, TanhNet(), MSGD, layout, order=order) as run:
        run.run(6)
        for round_ in range(2):
            if run.rank == 1:
                for parameter in run.model.parameters():
                    parameter.data.fill_(math.nan if round_ else math.inf)
            for _ in range(8):
                run.step()
                if run.rank != 1 and not np.isfinite(run.held()).all():
                    errors.append("NaN came over")
            center = run.center()
            if not (np.isfinite(center).all() and np.isfinite(run.held()).all()):
                errors.append(f"x is {run.held()}, the centre {center}")
            resets = (run.rank == 1) * (round_ + 1)
            if run.opt.metrics.resets != resets:
                errors.append(f"{run.opt.metrics.resets} resets, not {resets}")
    check_together(errors)


SCRIPT = """
import sys, torch, mpilsgd
from mpilsgd import kernels
name, order = sys.argv[1:]
model = torch.nn.Linear(3, 2)
topo = mpilsgd.Topology(shared=name != "messages")
sgd = torch.optim.SGD(model.parameters(), lr=0.1)
if name == "wait-free":
    opt = mpilsgd.LSGD(sgd, topo, asynchronous=name, order=order, period=1, global_period=1)
elif name == "Downpour":
    opt = mpilsgd.Downpour(sgd, topo, order=order)
else:
    opt = mpilsgd.EASGD(sgd, topo, asynchronous=True, order=order, period=1)

def fail(*args, **options):
    raise KeyError("in the middle of an exchange")

for t in range(2000):
    if t == 20 and topo.world.rank == topo.world.size - 1:
        for function in FUNCTIONS:
            setattr(kernels, function, fail)
    opt.zero_grad()
    loss = model(torch.ones(4, 3)).square().mean()
    loss.backward()
    opt.step(loss=loss)
with opt.center():
    print("came to its end")
opt.close()
"""
PER_RANK = ("PMI", "HYD", "OMPI_COMM", "OMPI_UNIVERSE", "OMPI_APP", "OMPI_FIRST", "OMPI_FILE", "PRTE_L")


@pytest.mark.parametrize(
    ("name", "order"), [("EASGD", "free"), ("messages", "round-robin"), ("wait-free", "free")]
)
def test_a_rank_that_raises_in_an_exchange_ends_the_job(name: str, order: str, folder: Path) -> None:
    """Promptly: no other rank waits for a turn that is never passed on."""
    if WORLD.size != 2:
        pytest.skip("needs exactly 2 ranks")
    error = None
    if WORLD.rank == 0:
        mpiexec = os.environ.get("MPILSGD_MPIEXEC") or shutil.which(
            "mpiexec", path=Path(sys.executable).parent
        )
        functions = "('pull', 'elastic', 'elastic_sum', 'elastic_apply', 'average', 'assign', 'total')"
        script = folder / "script.py"
        script.write_text(SCRIPT.replace("FUNCTIONS", functions))
        own = {k: v for k, v in os.environ.items() if not k.startswith(PER_RANK)}
        command = [mpiexec or "mpiexec", "-n", "2", sys.executable, "-m", "mpi4py", script, name, order]
        started = time.monotonic()
        done = subprocess.run(
            command, env=own | {"MPIEXEC_TIMEOUT": "60"}, capture_output=True, text=True, timeout=90
        )
        seconds = time.monotonic() - started
        if done.returncode == 0 or "in the middle of an exchange" not in done.stderr or seconds > 45:
            error = f"status {done.returncode} after {seconds:.0f} s: {done.stdout}{done.stderr}"
    told = WORLD.Ibarrier()
    while not told.Test():  # without a busy core
        time.sleep(0.05)
    check_together([error] if error else [])


ASYNCHRONOUS: dict[str, Any] = {"asynchronous": True}
WRONG: list[tuple[Any, str, dict[str, Any]]] = [
    *((method, "order", {**ASYNCHRONOUS, "order": "random"}) for method in (EASGD, Downpour, LSGD)),
    (ADMM, "order", {**ASYNCHRONOUS, "order": "random", "rho": 1.0}),
    *((method, "order", {"order": "round-robin"}) for method in (EASGD, LSGD)),
    (Downpour, "order", {"asynchronous": False, "order": "round-robin"}),
    *((method, "record", {"record": "file"}) for method in (EASGD, LSGD)),
    *((method, "replay", {"replay": "file"}) for method in (EASGD, LSGD)),
    *((method, "record", {**ASYNCHRONOUS, "record": 3}) for method in (EASGD, Downpour, LSGD)),
    (EASGD, "record|replay", {**ASYNCHRONOUS, "record": "file", "replay": "file"}),
    (EASGD, "replay", {**ASYNCHRONOUS, "order": "round-robin", "replay": "file"}),
    (EASGD, "overlap", {"overlap": True}),
    (EASGD, "overlap", {**ASYNCHRONOUS, "overlap": True, "form": "gauss-seidel"}),
    *((EASGD, "asynchronous", {"asynchronous": value}) for value in ("wait-free", None, 2)),
    *((LSGD, "asynchronous", {"asynchronous": value}) for value in ("sometimes", None, 2)),
    *((LSGD, "when", {"asynchronous": "wait-free", "when": when}) for when in ("with_step", "every_step")),
    (Downpour, "period", {"momentum": 0.5, "period": 2}),
    *((Downpour, "momentum", {"momentum": value}) for value in (-0.1, 1.5, math.nan, "much")),
    *((Downpour, "average", {"average": value}) for value in ("mean", 0, -0.1, 1.5, math.nan, True)),
    *((Downpour, "period", {"period": value}) for value in (0, 1.5)),
    *((ADMM, "rho", {"rho": value}) for value in (0, -1.0, math.inf, math.nan, "1")),
    *((method, "init", {"init": "random"}) for method in (Downpour,)),
]


@pytest.mark.parametrize(("method", "word", "options"), WRONG, ids=lambda v: getattr(v, "__name__", str(v)))
def test_wrong_arguments_are_refused(method: Any, word: str, options: dict[str, Any]) -> None:
    """On every rank, also where only one of them is wrong; the message names the argument."""
    topo = Topology()
    fine = {"rho": 1.0} if method is ADMM else {}
    for own in (options, options if WORLD.rank == WORLD.size - 1 else fine):
        refuses(topo, method, word, Quadratic(), own)
    topo.free()


@several
def test_settings_that_differ_are_refused() -> None:
    mine = WORLD.rank == 0
    refused(EASGD, "differ", asynchronous=mine)
    refused(EASGD, "differ", asynchronous=True, order="free" if mine else "round-robin")
    refused(EASGD, "differ", asynchronous=True, overlap=mine)
    refused(EASGD, "differ", asynchronous=True, record="file" if mine else None)
    refused(LSGD, "differ", asynchronous="wait-free" if mine else True)
    refused(Downpour, "differ", momentum=0.5 * mine)
    refused(Downpour, "differ", average="running" if mine else None)
    refused(ADMM, "differ", rho=1.0 + mine)


def test_admm_has_one_rate() -> None:
    """η stands in the centre's pull, for all parameters alike."""
    topo = Topology()
    model = torch.nn.Linear(3, 2)
    sgd = torch.optim.SGD([{"params": [model.weight], "lr": 0.1}, {"params": [model.bias]}], lr=0.2)
    with pytest.raises(ValueError, match=r"lr|learning rate"):
        ADMM(sgd, topo, rho=1.0)
    topo.free()


# Saving


SAVED = [
    *SOME,
    *(BY_NAME[name] for name in ("Downpour-momentum-running", "Downpour-synchronous-3")),
    *(BY_NAME[name] for name in ("Downpour-synchronous-momentum", "LSGD-with-step", "LSGD-wait-free-3")),
]


@pytest.mark.parametrize("case", SAVED, ids=str)
def test_resume_is_uninterrupted(case: Case) -> None:
    """Model and method saved in mid-period, loaded into fresh ones by ranks that come late: the same bits."""
    layout, local = (MESSAGES, SGD) if case in ONE_EACH else (FEW[-1], MSGD)
    with running(case, TanhNet(), local, layout, same=False) as run:
        run.run(5)
        run.center()
        file = io.BytesIO()
        torch.save({"model": run.model.state_dict(), "method": run.opt.state_dict()}, file)
        WORLD.Barrier()
        run.run(8)
        x, center = run.x(), run.center()
    file.seek(0)
    saved = torch.load(file)
    with running(case, TanhNet(), local, layout, same=False) as run:
        run.run(1)  # whatever it did before must not matter
        run.center()
        time.sleep(0.02 * run.rank)
        run.model.load_state_dict(saved["model"])
        run.opt.load_state_dict(saved["method"])
        run.t = 5
        run.run(8)
        errors = [] if (run.x() == x).all() else [f"x differs by {distance(run.x(), x):.1e}"]
        again = run.center()
        errors += [] if (again == center).all() else [f"centre differs by {distance(again, center):.1e}"]
    check_together(errors)


@pytest.mark.parametrize("case", [FREE[0], FREE[3], FREE[5], FREE[7]], ids=str)
def test_state_of_another_method_is_refused(case: Case) -> None:
    with running(Case(LocalSGD), TanhNet(), SGD, LAYOUTS[0]) as run:
        other = run.opt.state_dict()
    with running(case, TanhNet(), SGD, LAYOUTS[0]) as run:
        with pytest.raises(ValueError, match="state of"):
            run.opt.load_state_dict(other)
        check_together([])

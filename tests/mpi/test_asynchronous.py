"""The asynchronous methods: staleness in turns; in free order what no order may change; recorded and replayed."""

from __future__ import annotations

import copy
import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from harness import (
    LAYOUTS,
    WORLD,
    Case,
    Layout,
    Run,
    check_together,
    running,
)
from method_cases import (
    BY_NAME,
    FORMS,
    MSGD,
    PULLS,
    SGD,
    Vector,
    by_free,
    by_free_and_transport,
    by_layout,
    by_transport,
    close,
    free,
    one_rank,
    refused,
    several,
    work,
)
from problems import LeastSquares, Quadratic, TanhNet
from simulation import Local

from mpilsgd import ADMM, EASGD, LSGD, AllreduceSGD, Downpour, LocalSGD
from mpilsgd.comm import MPI

pytestmark = pytest.mark.mpi
by_device = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])

# In turns


@pytest.mark.brief(1, 2, 3)
@by_transport
@pytest.mark.parametrize(
    "case", [case for case in FORMS if case.asynchronous and case.method is not LSGD], ids=str
)
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


# Free order: what every order has to keep


def kick(run: Run, gradient: Vector) -> None:
    (parameter,) = run.model.parameters()
    parameter.grad = torch.from_numpy(gradient.copy()).to(parameter)
    run.opt.step(loss=float(run.rank))


def conserve(
    layout: Layout,
    exchanges: int,
    rate: float,
    gradients: bool,
    size: int = 8,
    device: str = "cpu",
    **options: Any,
) -> None:
    """Σx + c, less what the workers' own steps add, over exchanges of all ranks on a vector of some values.

    At zero gradient the workers soon agree, and then nothing is left to be lost. With α = 1 they never do: x and c
    change places. Exchanges of a long vector are more often under way at the same time.
    """
    each = -(-exchanges // WORLD.size)
    case = free(EASGD, "", period=1, center_rate=rate * WORLD.size, moving_rate=rate, **options)
    problem, local = Quadratic(0.0, size=size), Local(lr=0.125)
    with running(case, problem, local, layout, same=False, device=device) as run:
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


@pytest.mark.brief(1, 2, 3)
@by_transport
@pytest.mark.parametrize("overlap", [False, True], ids=["", "overlap"])
def test_easgd_conserves_the_sum_but_for_gradients(overlap: bool, layout: Layout) -> None:
    conserve(layout, 200, 0.15, True, overlap=overlap)


@pytest.mark.gpu
@pytest.mark.brief(2)
@by_layout
def test_easgd_conserves_the_sum_on_devices(layout: Layout) -> None:
    conserve(layout, 60, 1.0, False, device="cuda")
    conserve(layout, 60, 0.15, True, device="cuda", overlap=True)


@pytest.mark.slow
@by_layout
def test_easgd_conserves_the_sum_over_100000_exchanges(layout: Layout) -> None:
    conserve(layout, 100_000, 1.0, False)


@pytest.mark.brief(1, 2, 3)
@by_transport
@by_device
@pytest.mark.parametrize("period", [1, 3])
def test_downpour_loses_no_gradient(period: int, device: str, layout: Layout) -> None:
    """c + Σ (x − a) = c₀ − η Σ g over all gradients, also of workers in mid-period and with unequal clocks."""
    case, local = free(Downpour, "", period=period), Local(lr=0.01)
    with running(case, TanhNet(), local, layout, same=False, device=device) as run:
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


@pytest.mark.brief(1, 2, 3)
@by_device
@by_layout
def test_admm_keeps_its_centre(device: str, layout: Layout) -> None:
    """c is the mean of all x − λ (3.54); each worker's λ follows from its own x alone."""
    eta, rho = 0.5, 2.0
    r = eta * rho
    case, problem, local = free(ADMM, "", rho=rho), Quadratic(0.4, optimum=1.0), Local(lr=eta)
    with running(case, problem, local, layout, same=False, device=device) as run:
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


@pytest.mark.brief(1, 2, 3, "4x2")
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


@pytest.mark.brief(1, 2, 3)
@pytest.mark.parametrize(
    "case",
    [
        Case(AllreduceSGD),
        Case(LocalSGD),
        Case(LSGD),
        Case(EASGD),
        BY_NAME["EASGD-turns-3"],
        Case(ADMM, {"rho": 1.0}),
    ],
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


@pytest.mark.brief(1, 2, 3, "4x2")
@several
@pytest.mark.processes
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


@pytest.mark.brief(1, 2, 3, "4x2")
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


@pytest.mark.brief(1, 2, 3)
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


@pytest.mark.brief(1, 2, 3, "4x2")
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


@pytest.mark.brief(1, 2, 3)
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


@several
def test_rounds_by_the_total_are_not_held_again_after_loading() -> None:
    """A state says how far the rounds have come: the total of steps is not at its start."""
    case = Case(LSGD, {"asynchronous": True, "period": 2, "global_period": 2})
    errors: list[str] = []
    with running(case, TanhNet(), SGD, LAYOUTS[0]) as run:
        run.run(10)
        run.center()
        state = copy.deepcopy(run.opt.state_dict())
        rounds = run.opt.metrics.rounds
    with running(case, TanhNet(), SGD, LAYOUTS[0]) as run:
        run.opt.load_state_dict(state)
        run.run(1)
        run.center()
        more = run.opt.metrics.rounds - rounds
        errors += [] if 0 <= more <= 1 else [f"{more} rounds in one step"]
    check_together(errors)

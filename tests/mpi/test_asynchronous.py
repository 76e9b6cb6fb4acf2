"""The asynchronous methods in round-robin order, against the oracle, and saved and resumed."""

from __future__ import annotations

import io
import time
from collections import Counter

import numpy as np
import pytest
import torch
from asynchronous_cases import (
    BY_NAME,
    CASES,
    FREE,
    LOCALS,
    MESSAGES,
    MSGD,
    ONE_EACH,
    SGD,
    SOME,
    by_transport,
    close,
    several,
)
from harness import (
    FEW,
    LAYOUTS,
    TOLERANCE,
    WORLD,
    Case,
    Layout,
    check_together,
    compare,
    distance,
    running,
)
from problems import Buffered, LeastSquares, Problem, TanhNet
from simulation import Local

from mpilsgd import ADMM, LSGD, Downpour, LocalSGD

pytestmark = pytest.mark.mpi

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
        own = run.opt.state_dict()
        for foreign in ([run.rank], [0]):  # every rank's, or one's: all are told
            with pytest.raises(ValueError, match="state of"):
                run.opt.load_state_dict(other if run.rank in foreign else own)
        check_together([])

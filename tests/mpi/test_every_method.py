"""The checks that every method goes through, in every form, exchange, transport, device and precision."""

from __future__ import annotations

import io
import math
import time
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from harness import (
    FEW,
    LAYOUTS,
    MESSAGES,
    MOST,
    TOLERANCE,
    WORLD,
    Case,
    Layout,
    check_together,
    compare,
    distance,
    layouts,
    running,
)
from method_cases import (
    BOTH,
    CASES,
    EXCHANGES,
    FORMS,
    FREE,
    LOCALS,
    MSGD,
    PULLS,
    SGD,
    by_exchange,
    by_form,
    by_free,
    by_transport,
    close,
    free,
    in_turns,
    named,
    several,
    work,
)
from problems import Accumulated, Buffered, LeastSquares, Problem, Quadratic, TanhNet
from simulation import Local, Simulation

from mpilsgd import ADMM, EASGD, LSGD, AllreduceSGD, DiLoCo, Downpour, LocalSGD
from mpilsgd.comm import MPI
from mpilsgd.methods import Diverged

pytestmark = pytest.mark.mpi
by_device = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])

# Equal to the sequential simulation


@by_device
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_simulation(case: Case, device: str) -> None:
    """In windows and by messages, in groups where there are any; convex and not, both precisions and starts."""
    errors: list[str] = []
    if case.method is LSGD and not case.asynchronous:
        places = MOST
    elif case in FORMS or not case.asynchronous:
        places = [LAYOUTS[0], FEW[-1]]
    else:  # numbers that differ from a form's
        places = [MESSAGES] if len(str(case)) % 2 else [LAYOUTS[0]]
    runs: list[tuple[Problem, torch.dtype, bool, Layout]] = [
        (TanhNet(), torch.float64, False, layout) for layout in places
    ]
    if case in FORMS or not case.asynchronous:
        runs.append((LeastSquares(), torch.float64, True, FEW[-1]))
        runs.append((TanhNet(), torch.float32, True, FEW[1]))
        runs.append((LeastSquares(), torch.float32, False, FEW[0]))
    if "fragments" in case.options:  # they begin elsewhere in float32, as tensors begin at cache lines
        runs = [run for run in runs if run[1] is torch.float64]
    for problem, dtype, same, layout in runs:
        label = f"{type(problem).__name__} {dtype} {'same' if same else 'different'} start, {layout}"
        with running(case, problem, SGD, layout, same=same, dtype=dtype, device=device) as run:
            errors += compare(run, case.simulate(problem, SGD, layout, same=same), 7, TOLERANCE[dtype], label)
    check_together(errors)


@pytest.mark.brief(1, 2, 3)
@by_exchange
def test_local_optimizers(case: Case) -> None:
    """Momentum is the worker's own; of MSGD the iterate is exchanged, not the look-ahead."""
    errors: list[str] = []
    for name, local in LOCALS.items():
        with running(case, TanhNet(), local, LAYOUTS[0], same=False) as run:
            simulated = case.simulate(TanhNet(), local, LAYOUTS[0], same=False)
            errors += compare(run, simulated, 6, 1e-12, name)
    check_together(errors)


@pytest.mark.brief(1, 2, "4x2")
@by_form
def test_float_buffers_follow_the_exchange(case: Case) -> None:
    """Not those of parameters that are added up or have multipliers: see the oracle's `statistics`."""
    more: dict[str, Any] = {"statistics": 3} if case.method in (DiLoCo, Downpour, ADMM) else {}
    local = Local(lr=0.05)
    errors: list[str] = []
    for layout in BOTH if case in EXCHANGES else [MESSAGES]:
        with running(case, Buffered(), local, layout) as run:
            simulated = case.simulate(Buffered(), local, layout, **more)
            if case.method is AllreduceSGD:  # no exchange of parameters in its steps: the centre says it all
                run.run(7)
                simulated.run(7)
                errors += close(run.center(), simulated.center(), f"{layout}, centre")
            else:
                errors += compare(run, simulated, 7, 1e-12, str(layout))
    check_together(errors)


@pytest.mark.brief(1, 2, 3)
@by_exchange
def test_scheduler_and_accumulation(case: Case) -> None:
    """A schedule set on the method reaches the wrapped optimizer (and ADMM's η); two backward passes are one step."""
    problem = Accumulated(TanhNet(), 2)
    rate = lambda t: 0.04 * 0.5 ** (t // 3)  # noqa: E731
    local = Local(lr=rate) if case.method is ADMM else Local("msgd", rate, 0.7, True, 0.02)
    errors: list[str] = []
    with running(case, problem, local, LAYOUTS[0]) as run:
        simulated = case.simulate(problem, local, LAYOUTS[0])
        scheduler = torch.optim.lr_scheduler.StepLR(run.opt, step_size=3, gamma=0.5)
        for t in range(7):
            run.opt.zero_grad()
            total = 0.0
            for part in range(2):
                loss = problem.problem.loss(run.model, run.rank, 2 * t + part)
                loss.backward()
                total += loss.item()
            run.opt.step(loss=total)
            scheduler.step()
            simulated.step()
            errors += close(run.x(), simulated.x[run.rank], f"t={t}")
    check_together(errors)


@pytest.mark.brief(1, 2)
@by_exchange
def test_closure(case: Case) -> None:
    with running(case, TanhNet(), SGD, LAYOUTS[0]) as run:
        simulated = case.simulate(TanhNet(), SGD, LAYOUTS[0]).run(6)

        def closure() -> torch.Tensor:
            run.opt.zero_grad()
            loss = run.problem.loss(run.model, run.rank, run.t)
            loss.backward()
            return loss

        for _ in range(6):
            assert math.isfinite(run.opt.step(closure).item())
            run.t += 1
        errors = close(run.x(), simulated.x[run.rank])
    check_together(errors)


@by_device
@pytest.mark.brief(1, 2, 3, "4x2")
@by_form
def test_half_precision(case: Case, device: str) -> None:
    """Near the float64 run; the leaders come from given losses, which rounding cannot change."""

    def losses(worker: int, t: int) -> float:
        return float((worker + t) % WORLD.size)

    local, layout = Local(lr=0.05), FEW[-1]
    errors: list[str] = []
    for dtype in (torch.bfloat16, torch.float16) if case in EXCHANGES else (torch.bfloat16,):
        with running(case, TanhNet(), local, layout, dtype=dtype, device=device, losses=losses) as run:
            simulated = case.simulate(TanhNet(), local, layout, losses=losses)
            errors += compare(run, simulated, 6, TOLERANCE[dtype], str(dtype))
            if next(run.model.parameters()).dtype != dtype:
                errors.append(f"the model is {next(run.model.parameters()).dtype} now")
    check_together(errors)


# Fixed points and degenerate cases


@by_transport
@by_form
def test_consensus_is_a_fixed_point(case: Case, layout: Layout) -> None:
    """Under zero gradient, bit for bit."""
    problem = Quadratic(0.0)
    layout = layout if layout.shared else FEW[-1]
    with running(case, problem, Local(lr=0.1), layout) as run:
        run.run(7)
        start = problem.start(0)
        tight = 1e-15 if case.method in (ADMM, DiLoCo, Downpour) else 0.0  # they add up what they took apart
        errors = close(run.held(), start, "x", tight) + close(run.center(), start, "centre", tight)
    check_together(errors)


@pytest.mark.brief(2, 3)
@by_free
def test_consensus_is_a_fixed_point_in_any_order(case: Case) -> None:
    problem = Quadratic(0.0)
    layout = LAYOUTS[0] if case.name else MESSAGES
    with running(case, problem, Local(lr=0.1), layout) as run:
        work(run, 12 * run.size, longest=1e-3, step=run.still)
        start = problem.start(0)
        errors = close(run.held(), start, "x", 1e-15) + close(run.center(), start, "centre", 1e-15)
    check_together(errors)


ALONE = [
    Case(AllreduceSGD),
    Case(LocalSGD, {"period": 2}),
    *(Case(LSGD, {"pull": 0.4, "period": 2, "when": when}, when) for when in ("after_step", "with_step")),
    Case(LSGD, {"pull": 0.4, "period": 1, "global_period": 1, "when": "every_step"}, "every-step"),
    *(
        Case(EASGD, {"center_rate": 0, "period": 2, "form": form}, form)
        for form in ("jacobi", "gauss-seidel")
    ),
    Case(EASGD, {"center_rate": 0, "period": 2, "overlap": True}, "overlap"),
    Case(Downpour, {"period": 2, "asynchronous": False}, "synchronous"),
    *(case for case in FREE if case.method not in (ADMM, DiLoCo, EASGD)),
    Case(DiLoCo, {"period": 2, "outer_lr": 1.0, "outer_momentum": 0.0}, "averaging"),
    free(DiLoCo, "free-averaging", period=2, outer_lr=1.0, outer_momentum=0.0),
    *(free(EASGD, f"free-{form}", center_rate=0, period=2, form=form) for form in ("jacobi", "gauss-seidel")),
    free(EASGD, "free-overlap", center_rate=0, period=2, overlap=True),
]


@pytest.mark.brief(1, 2)
@pytest.mark.parametrize("case", ALONE, ids=str)
def test_one_worker_is_its_optimizer(case: Case) -> None:
    """Each rank alone in a world of its own (COMM_SELF): SGD or MSGD; momentum on the centre is MSGD."""
    delta = case.options.get("momentum", 0.0)
    errors: list[str] = []
    for layout in layouts(MPI.COMM_SELF):
        for local in (SGD,) if delta else (SGD, MSGD):
            plain = Simulation(TanhNet(), 1, Local("msgd", 0.05, delta, True, 0.02) if delta else local).run(
                7
            )
            with running(case, TanhNet(), local, layout, comm=MPI.COMM_SELF) as run:
                x = run.run(7).x()
                errors += close(x, (plain.points() if delta else plain.x)[0], f"{case} {layout} {local.kind}")
    check_together(errors)


# Saved and resumed


SAVED = [
    *FORMS,
    *named(
        "Downpour-turns-momentum-running",
        "Downpour-synchronous-momentum",
        "LSGD-turns-with-step",
        "LSGD-wait-free-3",
    ),
]


@by_device
@pytest.mark.brief(1, 2, 3, "4x2")
@pytest.mark.parametrize("case", SAVED, ids=str)
def test_resume_is_uninterrupted(case: Case, device: str) -> None:
    """Model and method saved in mid-period, loaded into fresh ones by ranks that come late: the same bits."""
    ways = [(LAYOUTS[0], MSGD), (FEW[-1], Local("momentum", lr=0.05, momentum=0.7))]
    if case.method is ADMM:
        ways = [(layout, SGD) for layout, _ in ways]
    errors: list[str] = []
    for layout, local in ways if case in EXCHANGES else ways[1:]:
        with running(case, Buffered(), local, layout, same=False, device=device) as run:
            run.run(5)
            if case.asynchronous:
                run.center()  # nobody may step meanwhile
            WORLD.Barrier()  # ADMM's workers take turns at a centre in its synchronous form, too
            file = io.BytesIO()
            torch.save({"model": run.model.state_dict(), "method": run.opt.state_dict()}, file)
            WORLD.Barrier()
            run.run(8)
            x, center = run.x(), run.center()
        file.seek(0)
        saved = torch.load(file)
        with running(case, Buffered(), local, layout, same=False, device=device) as run:
            run.run(1)  # whatever it did before must not matter
            if case.asynchronous:
                run.center()
            time.sleep(0.02 * run.rank)
            run.model.load_state_dict(saved["model"])
            run.opt.load_state_dict(saved["method"])
            run.t = 5
            run.run(8)
            errors += [] if (run.x() == x).all() else [f"{layout}: x differs by {distance(run.x(), x):.1e}"]
            again = run.center()
            same = (again == center).all()
            errors += [] if same else [f"{layout}: centre differs by {distance(again, center):.1e}"]
    check_together(errors)


@pytest.mark.brief(1, 2)
@by_exchange
def test_the_state_of_something_else_is_refused(case: Case) -> None:
    """Of another method on all ranks, or on one where loading is collective; of another memory format."""
    other = Case(LSGD) if case.method is LocalSGD else Case(LocalSGD)
    with running(other, TanhNet(), SGD, LAYOUTS[0]) as run:
        foreign = run.opt.state_dict()
    with running(case, TanhNet(), SGD, LAYOUTS[0]) as run:
        own = run.opt.state_dict()
        for ranks in (range(run.size), [0] if case.asynchronous else range(run.size)):
            with pytest.raises(ValueError, match="state of"):
                run.opt.load_state_dict(foreign if run.rank in ranks else own)
        run.opt.load_state_dict(own)
    models = [
        torch.nn.Conv2d(2, 3, 3).to(memory_format=f) for f in (torch.contiguous_format, torch.channels_last)
    ]
    saved: list[Any] = []
    for model in models:
        opt: Any = case.method(torch.optim.SGD(model.parameters(), lr=0.1), **case.options)
        saved.append(opt.state_dict())
        with pytest.raises(ValueError, match="the state of other parameters") if saved[1:] else nullcontext():
            opt.load_state_dict(saved[0])
        opt.load_state_dict(saved[-1])
        opt.close()


# Centres, and ranks that end early


@by_transport
@by_exchange
def test_center_comes_and_goes(case: Case, layout: Layout) -> None:
    """Inside, every rank holds the same centre; afterwards, and in the run that follows, nothing has changed."""
    layout = layout if layout.shared else FEW[-1]
    local = SGD if case.method is ADMM else MSGD
    with running(case, Buffered(), local, layout, same=False) as run:
        run.run(7)
        x = run.x()
    with running(case, Buffered(), local, layout, same=False) as run:
        run.run(4)
        held, first = run.held(), run.center()
        errors = [] if (run.held() == held).all() else ["the model changed"]
        errors += [] if (run.center() == first).all() else ["a second look differs"]
        same = all((first == other).all() for other in WORLD.allgather(first))
        errors += [] if same else ["the ranks differ"]
        try:
            with run.opt.center():
                raise KeyError("in the user's evaluation")
        except KeyError:
            errors += [] if (run.held() == held).all() else ["the model changed with an exception"]
        run.run(3)
        errors += [] if (run.x() == x).all() else ["the run went on otherwise"]
    check_together(errors)


@several
@pytest.mark.brief(2, 3, "4x2")
@by_transport
@by_exchange
def test_a_rank_runs_out_of_data(case: Case, layout: Layout) -> None:
    """It takes part in the others' rounds, or its turns are left out, in center() and close(): nothing hangs."""
    for last in (WORLD.size - 1, 0):
        with running(case, TanhNet(), SGD if case.method is ADMM else MSGD, layout) as run:
            run.run(3 + (4 if run.rank != last else 0))
            first = run.center()
            run.run(2 + 2 * (run.rank % 2))
            second = run.center()  # all are there again: now the ranks may talk
            errors = [] if all(np.isfinite(v).all() for v in (run.held(), first, second)) else ["not finite"]
            for mine in (first, second):
                same = all((mine == v).all() for v in WORLD.allgather(mine))
                errors += [] if same else ["the centres differ"]
            run.run(3 * (run.rank == last))  # and then straight into close()
        check_together(errors)


@pytest.mark.brief(1, 2)
@by_exchange
def test_metrics_start_at_nothing_and_grow(case: Case) -> None:
    errors = []
    with running(case, TanhNet(), SGD, LAYOUTS[0]) as run:
        metrics = run.opt.metrics
        if any((metrics.rounds, metrics.bytes_group, metrics.bytes_across, metrics.resets, metrics.leads)):
            errors.append(f"at the start {metrics}")
        with run.opt.center():  # to look at the centre counts no bytes
            pass
        with pytest.raises(RuntimeError, match="inside center"), run.opt.center():
            run.opt.step(loss=1.0)
        if any((metrics.rounds, metrics.bytes_group, metrics.bytes_across)):
            errors.append(f"after a look at the centre {metrics}")
        run.run(6)
        metrics = run.opt.metrics
        if not (metrics.rounds or metrics.staleness) or not 0 <= metrics.t_wait <= metrics.t_comm:
            errors.append(f"after six steps {metrics}")
        if run.topo.n_groups == 1 and metrics.bytes_across:
            errors.append(f"{metrics.bytes_across} bytes across groups, but there is one group")
        if not math.isfinite(metrics.distance):
            errors.append(f"distance {metrics.distance}")
        if run.opt.t != 6:
            errors.append(f"the clock is at {run.opt.t}")
    check_together(errors)


# Broken workers


BREAKABLE = [
    Case(AllreduceSGD),
    Case(LocalSGD, {"period": 1}),
    *(
        Case(LSGD, {**PULLS, "period": 1, "when": when}, when)
        for when in ("after_step", "with_step", "every_step")
    ),
    Case(EASGD, {"period": 1}, "jacobi"),
    Case(EASGD, {"period": 1, "overlap": True}, "overlap"),
    Case(EASGD, {"period": 1, "form": "gauss-seidel"}, "gauss-seidel"),
    Case(DiLoCo, {"period": 1, "mixing": 0.2}),
    Case(DiLoCo, {"period": 2, "overlap": 1, "mixing": 0.5}, "overlap"),
    *FREE,
    *(
        in_turns(case.method, f"turns-{case.name}", **{**case.options, "order": "round-robin"})
        for case in FREE
    ),
]


@several
@pytest.mark.brief(2, 3)
@pytest.mark.parametrize("case", BREAKABLE, ids=str)
def test_training_goes_on_after_a_nan(case: Case) -> None:
    """One worker's parameters break, with momentum and gradient; it is set back, the others never see any of it."""
    errors: list[str] = []
    ways = BOTH if not case.asynchronous else [FEW[-1]] if case.options.get("order") else [FEW[0]]
    for layout in ways:
        with running(case, TanhNet(), SGD if case.method is ADMM else MSGD, layout) as run:
            run.run(6)
            for round_ in range(2):
                if run.rank == 1:
                    for parameter in run.model.parameters():
                        parameter.data.fill_(math.nan if round_ else math.inf)
                for _ in range(8):
                    run.step()
                    if run.rank != 1 and not np.isfinite(run.held()).all():
                        errors.append(f"{layout}: NaN came over")
                center = run.center()
                if not (np.isfinite(center).all() and np.isfinite(run.held()).all()):
                    errors.append(f"{layout}: x is {run.held()}, the centre {center}")
                resets = (run.rank == 1) * (round_ + 1)
                if run.opt.metrics.resets != resets:
                    errors.append(f"{layout}: {run.opt.metrics.resets} resets, not {resets}")
    check_together(errors)


@pytest.mark.brief(1, 2)
@pytest.mark.parametrize("case", [case for case in BREAKABLE if not case.asynchronous], ids=str)
def test_all_broken_ends_on_every_rank(case: Case) -> None:
    for layout in FEW[:2]:
        with running(case, Quadratic(0.5), Local(lr=0.1), layout, same=False) as run:
            run.run(2)
            for parameter in run.model.parameters():
                parameter.data.fill_(math.nan)
            with pytest.raises(Diverged):
                for _ in range(2):
                    run.still(math.nan)
        check_together([])


@several
@by_transport
def test_diloco_is_model_averaging_at_a_rate_of_1(layout: Layout) -> None:
    """Bit for bit, as c takes the mean itself: outer_lr=1, outer_momentum=0."""
    with running(Case(LocalSGD, {"period": 3}), TanhNet(), MSGD, layout) as run:
        expected = run.run(10).held()
    options = {"period": 3, "outer_lr": 1.0, "outer_momentum": 0.0}
    with running(Case(DiLoCo, options), TanhNet(), MSGD, layout) as run:
        check_together([] if np.array_equal(run.run(10).held(), expected) else ["not the mean"])

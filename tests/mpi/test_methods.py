"""Every synchronous method against its sequential simulation, over groups, transports, optimizers and precisions."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from harness import (
    FEW,
    LAYOUTS,
    MOST,
    TOLERANCE,
    WORLD,
    Case,
    Layout,
    check_together,
    compare,
    distance,
    running,
)
from problems import Accumulated, Buffered, LeastSquares, Problem, Quadratic, TanhNet
from simulation import LSGD as SimulatedLSGD
from simulation import Local
from simulation import LocalSGD as SimulatedLocalSGD

from mpilsgd import EASGD, LSGD, AllreduceSGD, LocalSGD, Topology

pytestmark = pytest.mark.mpi

WAYS = ("after-step", "with-step", "every-step", "jacobi", "overlap", "gauss-seidel")
TWO_PULLS = {"pull": 0.3, "global_pull": 0.2, "period": 2, "global_period": 4, "loss_window": 3}
CASES = [
    Case(AllreduceSGD),
    Case(LocalSGD, {"period": 3}, "period"),
    Case(LocalSGD, {"period": {2, 5, 6, 11}}, "set"),
    Case(LocalSGD, {"period": lambda t: t % 4 == 1}, "callable"),
    Case(LocalSGD, {"period": None}, "one-shot"),
    Case(LocalSGD, {"period": 3, "average": "quadratic", "a": 5.0}, "quadratic"),
    Case(LSGD, {**TWO_PULLS}, "after-step"),
    Case(LSGD, {**TWO_PULLS, "sequential": True, "loss_window": 1}, "sequential"),
    Case(LSGD, {**TWO_PULLS, "global_pull": None, "global_period": None}, "defaults"),
    Case(LSGD, {**TWO_PULLS, "period": 3, "global_period": 2}, "global-oftener"),
    Case(LSGD, {**TWO_PULLS, "when": "with_step"}, "with-step"),
    Case(LSGD, {**TWO_PULLS, "when": "with_step", "sequential": True}, "with-step-sequential"),
    Case(LSGD, {**TWO_PULLS, "when": "every_step"}, "every-step"),
    Case(EASGD, {"period": 3}, "jacobi"),
    Case(EASGD, {"period": 2, "center_rate": 0.5, "moving_rate": 0.2}, "jacobi-rates"),
    Case(EASGD, {"period": 2, "overlap": True}, "overlap"),
    Case(EASGD, {"period": 3, "form": "gauss-seidel"}, "gauss-seidel"),
    Case(
        EASGD,
        {"period": 1, "form": "gauss-seidel", "center_rate": 0.5, "moving_rate": 0.2},
        "gauss-seidel-rates",
    ),
]
SGD = Local(lr=0.05, weight_decay=0.02)
LOCALS = {
    "SGD": Local(lr=0.05),
    "torch momentum": Local("momentum", lr=0.05, momentum=0.7, weight_decay=0.02),
    "torch nesterov": Local("momentum", lr=0.05, momentum=0.7, nesterov=True, weight_decay=0.02),
    "MSGD nesterov": Local("msgd", lr=0.05, momentum=0.7, nesterov=True, weight_decay=0.02),
    "MSGD heavy ball": Local("msgd", lr=0.05, momentum=0.7),
}
SOME = [case for case in CASES if case.name in ("", "period", "quadratic", *WAYS)]
by_case = pytest.mark.parametrize("case", CASES, ids=str)
by_way = pytest.mark.parametrize("case", SOME, ids=str)
by_layout = pytest.mark.parametrize("layout", FEW, ids=str)


@pytest.mark.parametrize("layout", MOST, ids=str)
@by_case
def test_equals_simulation(case: Case, layout: Layout) -> None:
    """Convex and not, both precisions, both ways to start."""
    errors: list[str] = []
    runs: list[tuple[Problem, torch.dtype, bool]] = [
        (LeastSquares(), torch.float64, True),
        (LeastSquares(), torch.float32, False),
        (TanhNet(), torch.float64, False),
        (TanhNet(), torch.float32, True),
    ]
    for problem, dtype, same in runs:
        label = f"{type(problem).__name__} {dtype} {'same' if same else 'different'} start"
        with running(case, problem, SGD, layout, same=same, dtype=dtype) as run:
            errors += compare(run, case.simulate(problem, SGD, layout, same=same), 7, TOLERANCE[dtype], label)
    check_together(errors)


@pytest.mark.parametrize("name", LOCALS)
@by_way
def test_local_optimizers(case: Case, name: str) -> None:
    """Momentum is the worker's own; with MSGD the iterate is exchanged, not the look-ahead."""
    with running(case, TanhNet(), LOCALS[name], LAYOUTS[0], same=False) as run:
        simulated = case.simulate(TanhNet(), LOCALS[name], LAYOUTS[0], same=False)
        errors = compare(run, simulated, 6, 1e-12)
    check_together(errors)


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("shared", [True, False], ids=["windows", "messages"])
def test_overlap_changes_nothing(shared: bool) -> None:
    """EASGD's sum goes on while the next period computes: the same, bit for bit by messages."""

    def final(overlap: bool) -> list[torch.Tensor]:
        torch.manual_seed(WORLD.rank)
        narrow, wide, half = (
            torch.nn.Linear(7, 5).to(d) for d in (torch.float32, torch.float64, torch.bfloat16)
        )
        layers = (narrow, wide, half)
        topology = Topology(shared=shared)
        inner = torch.optim.SGD([p for layer in layers for p in layer.parameters()], lr=0.1)
        opt = EASGD(inner, topology, period=3, overlap=overlap, init="different")
        for _ in range(10):
            for p in opt.flat.parameters:
                p.grad = torch.randn_like(p)
            opt.step()
        with opt.center():
            found = [p.detach().clone() for p in opt.flat.parameters]
        found += [p.detach().clone() for p in opt.flat.parameters]
        opt.close()
        topology.free()
        return found

    same = torch.allclose if shared else torch.equal
    pairs = zip(final(False), final(True), strict=True)
    check_together([f"{a} became {b}" for a, b in pairs if not same(a, b)])


@pytest.mark.mpi(min_size=2)
@by_layout
def test_overlap_waits_for_nobody_within_a_period(layout: Layout) -> None:
    """The others take their first step when rank 0 has taken all of its first period."""
    case = Case(EASGD, {"period": 3, "overlap": True})
    with running(case, Quadratic(), SGD, layout) as run:
        if WORLD.rank == 0:
            run.run(3)
            for other in range(1, WORLD.size):
                WORLD.send(None, other)
        else:
            WORLD.recv(source=0)
            run.run(3)
        run.run(3)
        simulated = case.simulate(Quadratic(), SGD, layout).run(6)
        gap = distance(run.x(), simulated.x[run.rank])
    check_together([f"differs by {gap:.1e}"] if gap > 1e-12 else [])


@by_layout
def test_until_grad_norm(layout: Layout) -> None:
    """T = ∞: a worker below the threshold waits for the others; when all are below, they average.

    Workers may need unlike numbers of steps for a round, so the runs are compared after every round.
    """
    case = Case(LocalSGD, {"until_grad_norm": 0.05})
    local, problem = Local(lr=0.2), LeastSquares(full=True)
    errors: list[str] = []
    with running(case, problem, local, layout) as run:
        simulated = case.simulate(problem, local, layout)
        assert isinstance(simulated, SimulatedLocalSGD)
        for count in range(1, 4):
            for _ in range(1000):
                run.step()
                if run.opt.metrics.rounds >= count:
                    break
            else:
                errors.append("no round")
            while simulated.rounds < count:
                simulated.step()
            gap = distance(run.x(), simulated.x[run.rank])
            errors += [f"round {count}: x differs by {gap:.1e}"] if gap > 1e-12 else []
    check_together(errors)


def test_until_grad_norm_freezes() -> None:
    """Once the mean is below the threshold for all, nothing moves any more."""
    with running(
        Case(LocalSGD, {"until_grad_norm": 1e-3}), Quadratic(), Local(lr=0.3), LAYOUTS[0], same=False
    ) as run:
        while run.opt.metrics.rounds < 1:
            run.step()
        frozen = run.x()
        run.run(3)
        errors = (
            [] if (run.x() == frozen).all() and frozen @ frozen <= 1e-3 else [f"{frozen} became {run.x()}"]
        )
    check_together(errors)


@by_layout
def test_leaders(layout: Layout) -> None:
    """Ties go to the lowest rank, a non-finite loss never leads, and the metrics say who did."""
    table = [
        [1.0, 1.0, 3.0, 2.0],
        [2.0, 0.5, math.nan, 1.0],
        [1.0, math.inf, 0.5, 0.5],
        [0.1, 4.0, -2.0, math.nan],
    ]

    def losses(worker: int, t: int) -> float:
        # At least one worker in each group has a finite loss: the groups' first members always do.
        value = table[t % 4][worker]
        return (
            2.5 if not math.isfinite(value) and any(group[0] == worker for group in layout.groups) else value
        )

    errors: list[str] = []
    for when in ("after_step", "with_step", "every_step"):
        for window in (1, 2) if when == "after_step" else (2,):
            options = {"when": when, "loss_window": window, "period": 1, "global_period": 1}
            case = Case(LSGD, {"pull": 0.3, "global_pull": 0.2, **options})
            leads = 0
            with running(case, TanhNet(), SGD, layout, same=False, losses=losses) as run:
                simulated = case.simulate(TanhNet(), SGD, layout, same=False, losses=losses)
                assert isinstance(simulated, SimulatedLSGD)
                for t in range(8):
                    errors += compare(run, simulated, 1, 1e-12, f"{when} {window} t={t}")
                    local, best = simulated.elections[-1][1:]
                    assert local is not None
                    leads += run.rank in (*local, best)
                    if run.opt.metrics.leader != best:
                        errors.append(f"{when} {window} t={t}: leader {run.opt.metrics.leader}, not {best}")
                if not 0 < run.opt.metrics.rounds <= 16:
                    errors.append(f"{when}: {run.opt.metrics.rounds} rounds after 8 steps")
                if (run.opt.metrics.leads > 0) != (leads > 0):
                    errors.append(f"{when}: leads={run.opt.metrics.leads}, the simulation's {leads}")
    check_together(errors)


@pytest.mark.parametrize("when", ["after_step", "with_step"])
def test_score_in_place_of_losses(when: str) -> None:
    """`score` is asked for this worker's value now, and no loss is needed."""
    layout, problem = LAYOUTS[0], LeastSquares(full=True)
    case = Case(LSGD, {**TWO_PULLS, "when": when})
    held: list[Any] = []
    score = lambda: problem.gradient(held[0].x(), held[0].rank, 0)[0]  # noqa: E731
    with running(case, problem, SGD, layout, same=False, losses=lambda worker, t: None, score=score) as run:
        held.append(run)
        own = lambda worker, x: problem.gradient(x, worker, 0)[0]  # noqa: E731
        simulated = case.simulate(problem, SGD, layout, same=False, score=own)
        errors = compare(run, simulated, 8, 1e-12)
    check_together(errors)


@by_way
def test_float_buffers_follow_the_exchange(case: Case) -> None:
    local = Local(lr=0.05)
    errors: list[str] = []
    for layout in FEW[:2]:
        with running(case, Buffered(), local, layout) as run:
            simulated = case.simulate(Buffered(), local, layout)
            if case.method is AllreduceSGD:  # no exchange of parameters in its steps: the centre says it all
                run.run(8)
                simulated.run(8)
                gap = distance(run.center(), simulated.center())
                errors += [f"{layout}: centre differs by {gap:.1e}"] if gap > 1e-12 else []
            else:
                errors += compare(run, simulated, 8, 1e-12, str(layout))
    check_together(errors)


@by_way
def test_scheduler_and_accumulation(case: Case) -> None:
    """A schedule set on the method reaches the wrapped optimizer, and two backward passes are one step."""
    problem = Accumulated(TanhNet(), 2)
    base = LOCALS["MSGD nesterov"]
    local = Local(
        base.kind, lambda t: 0.04 * 0.5 ** (t // 3), base.momentum, base.nesterov, base.weight_decay
    )
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
            gap = distance(run.x(), simulated.x[run.rank])
            errors += [f"t={t}: differs by {gap:.1e}"] if gap > 1e-12 else []
    check_together(errors)


@by_way
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
        gap = distance(run.x(), simulated.x[run.rank])
    check_together([f"differs by {gap:.1e}"] if gap > 1e-12 else [])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@by_way
def test_half_precision(case: Case, dtype: torch.dtype) -> None:
    """Near the float64 run; the leaders come from given losses, which rounding cannot change."""

    def losses(worker: int, t: int) -> float:
        return float((worker + t) % WORLD.size)

    local = Local(lr=0.05)
    layout = FEW[-1]
    with running(case, TanhNet(), local, layout, dtype=dtype, losses=losses) as run:
        simulated = case.simulate(TanhNet(), local, layout, losses=losses)
        errors = compare(run, simulated, 6, TOLERANCE[dtype])
        if next(run.model.parameters()).dtype != dtype:
            errors.append(f"the model is {next(run.model.parameters()).dtype} now")
    check_together(errors)


@by_layout
@by_way
def test_consensus_is_a_fixed_point(case: Case, layout: Layout) -> None:
    """Under zero gradient, bit for bit."""
    problem = Quadratic(0.0)
    with running(case, problem, Local(lr=0.1), layout) as run:
        run.run(7)
        start = problem.start(0)
        errors = [] if (run.held() == start).all() else [f"x moved to {run.held()}"]
        errors += [] if (run.center() == start).all() else ["the centre moved"]
    check_together(errors)

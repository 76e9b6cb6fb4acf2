"""What only some synchronous methods have: overlap, T = ∞, leaders and scores. See test_every_method.py."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from harness import (
    LAYOUTS,
    WORLD,
    Case,
    Layout,
    check_together,
    compare,
    distance,
    running,
)
from method_cases import SGD, TWO, by_layout, in_turns
from problems import LeastSquares, Quadratic, TanhNet, flatten
from simulation import LSGD as SimulatedLSGD
from simulation import Local
from simulation import LocalSGD as SimulatedLocalSGD

from mpilsgd import EASGD, LSGD, DiLoCo, LocalSGD, Topology

pytestmark = pytest.mark.mpi


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
        parameters = [p for layer in layers for p in layer.parameters()]
        inner = torch.optim.SGD(parameters, lr=0.1)
        opt = EASGD(inner, topology, period=3, overlap=overlap, init="different")
        for _ in range(10):
            for p in parameters:
                p.grad = torch.randn_like(p)
            opt.step()
        with opt.center():
            found = [p.detach().clone() for p in parameters]
        found += [p.detach().clone() for p in parameters]
        opt.close()
        topology.free()
        return found

    same = torch.allclose if shared else torch.equal
    pairs = zip(final(False), final(True), strict=True)
    check_together([f"{a} became {b}" for a, b in pairs if not same(a, b)])


@pytest.mark.mpi(min_size=2)
@by_layout
@pytest.mark.parametrize(
    "case", [Case(EASGD, {"period": 3, "overlap": True}), Case(DiLoCo, {"period": 3, "overlap": 2})], ids=str
)
def test_overlap_waits_for_nobody_within_a_period(layout: Layout, case: Case) -> None:
    """The others take their first step when rank 0 has taken all of its first period."""
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


@pytest.mark.mpi(min_size=2)
@by_layout
@pytest.mark.parametrize(
    "case",
    [
        Case(DiLoCo, {"period": 5, "overlap": 2}),
        Case(DiLoCo, {"period": 5, "overlap": 2, "mixing": 0.5}),
        in_turns(EASGD, "turns-overlap", period=5, overlap=True),
    ],
    ids=str,
)
def test_a_run_that_ends_takes_what_is_under_way(layout: Layout, case: Case) -> None:
    """As if it had gone on without moving."""

    def after(more: int) -> Any:
        with running(case, LeastSquares(), SGD, layout) as run:
            run.run(8 if case.method is EASGD else 5)
            for group in run.opt.param_groups:
                group["lr"] = 0.0
            run.run(more)
            run.opt.close()
            return flatten(list(run.model.parameters()))

    ends = after(0), after(2)
    check_together([] if np.abs(ends[0] - ends[1]).max() < 1e-12 else [f"{ends[0]} and not {ends[1]}"])


class InPlace(torch.optim.Optimizer):
    """An optimizer of the plainest kind: who calls it turns gradients off."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for p in self.param_groups[0]["params"]:
            p.sub_(p.grad)


@by_layout
@pytest.mark.parametrize("overlap", [0, 2])
def test_an_outer_optimizer_needs_no_care_for_gradients(layout: Layout, overlap: int) -> None:
    found = []
    for outer in (lambda c: InPlace(c, {}), lambda c: torch.optim.SGD(c, lr=1.0)):
        case = Case(DiLoCo, {"period": 4, "overlap": overlap, "outer": outer})
        with running(case, LeastSquares(), SGD, layout) as run:
            found.append(run.run(9).x())
    check_together([] if (found[0] == found[1]).all() else ["differs"])


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
    case = Case(LSGD, {**TWO, "when": when})
    held: list[Any] = []
    score = lambda: problem.gradient(held[0].x(), held[0].rank, 0)[0]  # noqa: E731
    with running(case, problem, SGD, layout, same=False, losses=lambda worker, t: None, score=score) as run:
        held.append(run)
        own = lambda worker, x: problem.gradient(x, worker, 0)[0]  # noqa: E731
        simulated = case.simulate(problem, SGD, layout, same=False, score=own)
        errors = compare(run, simulated, 8, 1e-12)
    check_together(errors)

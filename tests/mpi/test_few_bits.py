"""8 and 4 bits between nodes: equal to the simulation with the same codes, near the exact one, resumed to the bit."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import torch
from few_bits import LEVELS, CodedCentre, FewBits
from harness import WORLD, Case, Layout, Run, check_together, distance, on_every_rank
from method_cases import SGD, in_turns
from problems import Buffered, LeastSquares, Quadratic, flatten, state_of
from simulation import Local

import mpilsgd
from mpilsgd import ADMM, EASGD, LSGD, AllreduceSGD, DiLoCo, Downpour, EASGDTree, LocalSGD

pytestmark = [pytest.mark.mpi(min_size=2), pytest.mark.brief("4x2", "2 tasks")]

PULLS = {"pull": 0.3, "global_pull": 0.2, "loss_window": 3}
TOGETHER = [
    Case(AllreduceSGD),
    Case(LocalSGD, {"period": 2}),
    Case(DiLoCo, {"period": 2, "outer_lr": 0.7, "outer_momentum": 0.5}),
    Case(LSGD, {**PULLS, "period": 2, "global_period": 4}, "after-step"),
    Case(LSGD, {**PULLS, "period": 2, "global_period": 4, "when": "with_step"}, "with-step"),
    Case(LSGD, {**PULLS, "period": 2, "global_period": 4, "when": "every_step"}, "every-step"),
    Case(EASGD, {"period": 2}, "jacobi"),
    Case(EASGD, {"period": 2, "form": "gauss-seidel"}, "gauss-seidel"),
    Case(EASGD, {"period": 2, "overlap": True}, "overlap"),
    Case(Downpour, {"period": 2, "asynchronous": False}, "synchronous"),
    in_turns(LSGD, "wait-free", asynchronous="wait-free", period=1, global_period=2, **PULLS),
]
VISITS = [
    in_turns(EASGD, "turns", period=2),
    in_turns(EASGD, "turns-gauss-seidel", period=1, form="gauss-seidel"),
    in_turns(Downpour, "turns", period=1),
]
OTHERS = [
    in_turns(Downpour, "turns-momentum", momentum=0.6, average="running"),
    in_turns(EASGD, "turns-overlap", period=2, overlap=True),
    in_turns(DiLoCo, "turns", period=2),
    Case(DiLoCo, {"period": 2, "fragments": 2, "mixing": 0.3}, "fragments"),
    in_turns(ADMM, "turns", rho=0.5),
]
TREE = Case(EASGDTree, {"degree": 2, "period": 1, "upper_period": 2, "order": "lock-step"})
by_across = pytest.mark.parametrize("across", ["int8", "int4"])


class Wide(LeastSquares):
    """Four blocks of 128 values and a part of one."""

    inputs, outputs = 64, 8
    shapes = ((8, 64), (8,))


def islands(topo: mpilsgd.Topology, shared: bool) -> list[list[int]]:
    return topo.nodes if shared else [[rank] for rank in range(WORLD.size)]


def nodes() -> int:
    topo = mpilsgd.Topology()
    count = len(topo.nodes)
    topo.free()
    return count


NODES = on_every_rank(nodes)
by_shared = pytest.mark.parametrize(
    "shared", [False, *([True] if NODES > 1 else [])], ids=lambda v: "windows" if v else "messages"
)
by_both = pytest.mark.parametrize(
    ("across", "shared"),
    [("int8", False), ("int4", NODES > 1)],
    ids=lambda v: v if isinstance(v, str) else "windows" if v else "messages",
)


def started(
    case: Case, across: Any, shared: bool, problem: Any = None, local: Local = SGD, **options: Any
) -> Run:
    topo = mpilsgd.Topology(shared=shared, across_dtype=across)
    layout = Layout(None, shared, tuple(map(tuple, topo.groups)))
    run = Run(case, problem or Wide(), local, layout, topo=topo, **options)
    run.owned = True
    return run


def simulated(case: Case, run: Run, across: str, shared: bool) -> Any:
    layout = Layout(None, shared, tuple(map(tuple, run.topo.groups)))
    other = case.simulate(run.problem, SGD, layout)
    lie = islands(run.topo, shared)
    other.wire = FewBits(across, lie, run.problem.start(0))
    if case in VISITS:
        centre, plain = CodedCentre(across, len(lie), WORLD.size, other.c.copy()), type(other)

        class Visited(plain):  # type: ignore[misc, valid-type]
            """Its centre is what a visit leaves."""

            def before_step(self, i: int, t: int) -> None:
                self._visit(i, super().before_step, t)

            def after_step(self, i: int, t: int) -> None:
                self._visit(i, super().after_step, t)

            def _visit(self, i: int, do: Any, t: int) -> None:
                before = self.c
                do(i, t)
                if self.c is not before:
                    self.c = centre.visit(i, self.c)

        other.__class__ = Visited
    return other


@by_shared
@by_across
@pytest.mark.parametrize("case", [*TOGETHER, *VISITS], ids=str)
def test_equals_the_simulation_with_the_same_codes(case: Case, across: str, shared: bool) -> None:
    run = started(case, across, shared)
    other, errors = simulated(case, run, across, shared), []
    for t in range(1, 25):
        run.step()
        other.step()
        gap = distance(run.x(), other.x[run.rank])
        if gap > 1e-9:
            errors.append(f"t={t}: x differs by {gap:.1e}")
        if t in (11, 24):
            gap = distance(run.center(), other.center())
            errors += [] if gap < 1e-9 else [f"t={t}: centre differs by {gap:.1e}"]
    run.close()
    check_together(errors)


@by_both
@pytest.mark.parametrize("case", [*TOGETHER, *VISITS, *OTHERS, TREE], ids=str)
def test_near_the_exact_run_and_alike_on_all(case: Case, across: str, shared: bool) -> None:
    """As near as the codes of one exchange are: errors do not add up. All ranks see the same centre, to the bit."""
    centres, moved = [], 0.0
    for form in (None, across):
        run = started(case, form, shared, local=Local(lr=0.02))  # where all are stable
        for _ in range(40):
            if run.opt.computes:
                run.step()
            else:
                run.opt.step()
        centres.append(run.center())
        moved = float(np.abs(centres[0] - run.problem.start(0)).max())
        run.close()
    gap = float(np.abs(centres[1] - centres[0]).max())
    # a step of the codes of all that moved, twice: what is kept, and what the others did of it
    bound = 2 * moved / LEVELS[across]
    errors = [] if 0 < gap < bound else [f"differs by {gap:.1e}, bound {bound:.1e}"]
    same = all(np.array_equal(centres[1], other) for other in WORLD.allgather(centres[1]))
    check_together(errors + ([] if same else ["the ranks' centres differ"]))


@by_across
@pytest.mark.parametrize("case", [*TOGETHER, *VISITS, *OTHERS], ids=str)
def test_consensus_is_a_fixed_point(case: Case, across: str) -> None:
    problem = Quadratic(0.0, 300)
    run = started(case, across, False, problem, Local(lr=0.1))
    run.run(7)
    gaps = [np.abs(v - problem.start(0)).max() for v in (run.held(), run.center())]
    run.close()
    check_together([] if max(gaps) < 1e-14 else [f"moved by {gaps}"])


@pytest.mark.brief("2 tasks", "4x2 tasks")
@by_both
@pytest.mark.parametrize("case", [*TOGETHER, *VISITS, *OTHERS], ids=str)
def test_resume_is_uninterrupted(case: Case, across: str, shared: bool) -> None:
    """What is kept is saved, too; a look at the centre changes nothing of it."""
    if case.method is ADMM and not case.asynchronous:
        return
    run = started(case, across, shared, Buffered(), dtype=torch.float32)
    run.run(9)
    first = run.center()
    WORLD.Barrier()
    file = io.BytesIO()
    torch.save({"model": run.model.state_dict(), "method": run.opt.state_dict()}, file)
    WORLD.Barrier()
    run.run(12)
    x, center = run.x(), run.center()
    run.close()
    file.seek(0)
    saved = torch.load(file)
    run = started(case, across, shared, Buffered(), dtype=torch.float32)
    run.run(3)  # whatever it did before must not matter
    run.center()
    run.model.load_state_dict(saved["model"])
    run.opt.load_state_dict(saved["method"])
    run.t = 9
    found = {"first centre": run.center() == first}
    run.run(12)
    found |= {"x": run.x() == x, "centre": run.center() == center}
    run.close()
    check_together([f"{name} differs" for name, equal in found.items() if not equal.all()])


@by_across
@pytest.mark.parametrize("case", [*TOGETHER, *VISITS], ids=str)
def test_a_broken_worker_poisons_nothing(case: Case, across: str) -> None:
    """It is set back, and the run goes on with what was kept."""
    run = started(case, across, False, Wide())
    run.run(5)
    if run.rank == 1:
        with torch.no_grad():
            next(run.model.parameters()).view(-1)[200] = float("nan")
    run.run(16)
    ends = [run.held(), run.center()]
    run.close()
    check_together([] if all(np.isfinite(v).all() and np.abs(v).max() < 10 for v in ends) else ["broken"])


@by_across
def test_a_leader_that_breaks_before_the_first_round(across: str) -> None:
    """The first vector travels as it is, and is what the next ones go by: but for the values that were not finite."""
    topo = mpilsgd.Topology(shared=False, across_dtype=across)
    p = torch.nn.Parameter(torch.zeros(300))
    p.grad = torch.ones(300)
    opt = LSGD(torch.optim.SGD([p], lr=0.01), topo, pull=0.2, global_pull=0.2, period=1, global_period=1)
    if WORLD.rank == 0:
        with torch.no_grad():
            p[10] = float("inf")
    for _ in range(60):
        opt.step(loss=float(WORLD.rank))
    x, resets = flatten([p]), opt.metrics.resets
    gap = abs(x[10] - x[200])
    opt.close()
    topo.free()
    errors = [] if resets == (WORLD.rank == 0) else [f"set back {resets} times"]
    errors += [] if gap < 0.02 else [f"broken values stay {gap} behind"]
    check_together(errors + ([] if np.isfinite(x).all() else ["not finite"]))


@by_across
@pytest.mark.parametrize("method", ["EASGD", "Downpour", "turns"])
def test_what_is_not_sent_follows(across: str, method: str) -> None:
    """EASGD's alpha = beta/p, DOWNPOUR: workers and centre together neither win nor lose, but for what is kept."""
    options: dict[str, Any] = {"period": 1, "asynchronous": method == "turns"}
    if method != "Downpour":
        options |= {"center_rate": 0.8, "init": "different"}
    topo = mpilsgd.Topology(shared=False, across_dtype=across)
    random = torch.Generator().manual_seed(WORLD.rank)
    parameter = torch.nn.Parameter(torch.randn(1000, generator=random))
    make = Downpour if method == "Downpour" else EASGD
    opt = make(torch.optim.SGD([parameter], lr=0.1), topo, **options)

    def total() -> Any:
        own = 0.0 * flatten([parameter]) if method == "Downpour" else flatten([parameter])
        with opt.center():
            centre = flatten([parameter])
        return np.sum(WORLD.allgather(own), 0) + centre

    before, moved = total(), np.zeros(1000)
    for _ in range(300):
        parameter.grad = torch.randn(1000, generator=random)
        moved -= 0.1 * flatten([parameter.grad])
        opt.step(loss=1.0)
    gap = np.abs(total() - before - np.sum(WORLD.allgather(moved), 0))
    opt.close()
    topo.free()
    # What is kept, in steps of the codes: three times what it is for four workers. Roundings that were lost would add
    # up to some ten times as much.
    bound = {"EASGD": 0.13, "Downpour": 0.5, "turns": 0.75}[method] / LEVELS[across]
    check_together([] if gap.mean() < bound else [f"the sum moved by {gap.mean():.1e}, bound {bound:.1e}"])


@by_across
def test_the_state_of_another_layout_is_refused(across: str) -> None:
    """What each had still to send belongs to its island."""
    run = started(TOGETHER[1], across, False)
    run.run(5)
    saved = run.opt.state_dict()
    saved["mpilsgd"]["kept"]["islands"] = [0] * WORLD.size
    with pytest.raises(ValueError, match="lay otherwise on nodes"):
        run.opt.load_state_dict(saved)
    run.close()
    assert len(state_of(run.model)) == 2

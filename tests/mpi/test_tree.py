"""EASGD Tree: against its oracle in lock-step, its invariants in free order, faults, checkpoints."""

from __future__ import annotations

import dataclasses
import io
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from harness import WORLD, check_together, distance, optimizer
from internals import hosted_inner_nodes, lost_messages, strides
from problems import Buffered, LeastSquares, Problem, TanhNet, flatten, state_of
from simulation import Local
from tree_simulation import Tree as Oracle

from mpilsgd import EASGDTree, Topology
from mpilsgd.comm import Inbox, Links, Outbox, wait_until
from mpilsgd.methods import Diverged
from mpilsgd.transport import Fabric
from mpilsgd.tree import Periods

pytestmark = [pytest.mark.mpi(min_size=2)]

SGD = Local("msgd", lr=0.05)
NESTEROV = Local("msgd", lr=0.05, momentum=0.7, nesterov=True, weight_decay=0.02)
SCHEMES = [
    Periods("multi-scale", period=1, upper_period=2),
    Periods("multi-scale", period=2, upper_period=6),
    Periods("up-down", up_period=1, down_period=3),
    Periods("up-down", up_period=2, down_period=2),
]
# of many ranks, what fits them exactly
DEGREES = [d for d in (2, 3, 4) if WORLD.size <= 8 or 1 + d + d * d == WORLD.size] or [4]
by_scheme = pytest.mark.parametrize("periods", SCHEMES, ids=lambda p: f"{p.scheme}-{p.period}-{p.up_period}")
by_inner = pytest.mark.parametrize("inner", ["ranks", "hosted"])


class Run:
    """This rank's node of the tree."""

    def __init__(
        self,
        problem: Problem,
        local: Local,
        periods: Periods,
        degree: int = 2,
        alpha: float | None = 0.3,
        dtype: torch.dtype = torch.float64,
        same: bool = True,
        shared: bool = True,
        **options: Any,
    ):
        self.topology = Topology(shared=shared)
        self.problem, self.t = problem, 0
        self.model = problem.build(dtype, problem.start(WORLD.rank))
        self.inner = optimizer(local, self.model.parameters())
        settings = dataclasses.asdict(periods)
        self.opt = EASGDTree(
            self.inner,
            self.topology,
            degree=degree,
            moving_rate=alpha,
            init="same" if same else "different",
            **settings,
            **options,  # type: ignore[arg-type]
        )

    def step(self) -> None:
        if self.opt.computes:
            self.opt.zero_grad()
            loss = self.problem.loss(self.model, WORLD.rank, self.t)
            loss.backward()
            self.opt.step(loss=loss)
        else:
            self.opt.step()
        self.t += 1

    def still(self) -> None:
        for parameter in self.model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        self.opt.step(loss=1.0)
        self.t += 1

    def held(self) -> np.ndarray:
        return flatten(state_of(self.model))

    def center(self) -> np.ndarray:
        with self.opt.center():
            return self.held()

    def close(self) -> None:
        self.opt.close()
        self.topology.free()


@contextmanager
def running(*args: Any, **options: Any) -> Iterator[Run]:
    run = Run(*args, **options)
    yield run
    run.close()


@by_scheme
@by_inner
@pytest.mark.parametrize("degree", DEGREES)
def test_lock_step_equals_the_oracle(periods: Periods, inner: str, degree: int) -> None:
    """The root in the middle of the run and at its end, and inner ranks all the way."""
    errors: list[str] = []
    for local, same in ((SGD, False), (NESTEROV, True)):
        problem = TanhNet()
        with running(problem, local, periods, degree, order="lock-step", inner=inner, same=same) as run:
            tree = run.opt.tree
            oracle = Oracle(problem, tree.parent, local, 0.3, periods.of, same=same)
            for t in range(1, 15):
                run.step()
                oracle.step()
                if not run.opt.computes:
                    gap = distance(run.held(), oracle.x[WORLD.rank])
                    errors += [f"inner rank, t={t}: {gap:.1e}"] if gap > 1e-12 else []
                if t in (7, 14):
                    gap = distance(run.center(), oracle.x[oracle.root])
                    errors += [f"root, t={t}: {gap:.1e}"] if gap > 1e-12 else []
    check_together(errors)


@pytest.mark.brief(2, 3, 5, "4x2")
def test_float32_and_messages() -> None:
    errors: list[str] = []
    problem, periods = LeastSquares(), SCHEMES[0]
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        with running(problem, SGD, periods, order="lock-step", dtype=dtype, shared=False) as run:
            oracle = Oracle(problem, run.opt.tree.parent, SGD, 0.3, periods.of)
            for _ in range(9):
                run.step()
                oracle.step()
            gap = distance(run.center(), oracle.x[oracle.root])
            errors += [f"{dtype}: {gap:.1e}"] if gap > tolerance else []
    check_together(errors)


@pytest.mark.brief(2, 3, 5, "4x2")
@by_inner
@pytest.mark.parametrize("order", ["free", "lock-step"])
def test_equal_nodes_stay_equal_without_gradient(inner: str, order: str) -> None:
    """ERRATA: zero gradient and equal start stay constant."""
    with running(TanhNet(), SGD, SCHEMES[0], inner=inner, order=order) as run:
        start = run.held()
        for _ in range(30):
            run.still()
        gaps = [float(np.abs(run.held() - start).max()), float(np.abs(run.center() - start).max())]
        check_together([] if max(gaps) <= 1e-14 else [f"moved by {gaps}"])


@pytest.mark.brief(2, 3, 5, "4x2")
@by_inner
def test_without_coupling_leaves_are_sgd(inner: str) -> None:
    """ERRATA: alpha = 0 leaves = SGD."""
    problem = TanhNet()
    with running(problem, NESTEROV, SCHEMES[1], alpha=0.0, inner=inner) as run:
        alone = problem.build(torch.float64, problem.start(0))
        own = optimizer(NESTEROV, alone.parameters())
        for t in range(12):
            run.step()
            own.zero_grad()
            problem.loss(alone, WORLD.rank, t).backward()
            own.step()
        expected = flatten(state_of(alone)) if run.opt.computes else problem.start(0)
        gap = distance(run.held(), expected)
        check_together([] if gap <= 1e-12 else [f"differs by {gap:.1e}"])


@by_scheme
@by_inner
def test_free_order_stays_in_the_hull_and_meets(periods: Periods, inner: str) -> None:
    """Averages only: nobody leaves the box that the starts span, and all come together; nothing is lost at the end."""
    with running(TanhNet(), SGD, periods, inner=inner, same=False) as run:
        starts = np.stack(WORLD.allgather(run.held()))
        low, high = starts.min(0) - 1e-12, starts.max(0) + 1e-12
        errors: list[str] = []
        spread = float(np.ptp(starts, 0).max())
        for _ in range(3):
            for _ in range(150):
                run.still()
            own, center = run.held(), run.center()
            if not ((own >= low) & (own <= high)).all() or not ((center >= low) & (center <= high)).all():
                errors.append("outside the hull")
            lost = lost_messages(run.opt, WORLD)
            errors += [f"lost messages on {lost}"] if lost else []
        ends = np.stack(WORLD.allgather(run.held()))
        if np.ptp(ends, 0).max() > 0.5 * spread:
            errors.append(f"the nodes do not come together: {np.ptp(ends, 0).max():.3f} of {spread:.3f}")
        check_together(errors)


@pytest.mark.parametrize("shared", [True, False])
def test_the_run_ends_by_the_total_of_leaf_steps(shared: bool) -> None:
    """Not shared: an inner rank alone, where nobody takes steps, learns of the total, too."""
    with running(TanhNet(), NESTEROV, SCHEMES[0], same=True, shared=shared) as run:
        steps = 0
        while not run.opt.reached(20 * len(run.opt.workers)):
            run.step()
            steps += run.opt.computes
        total = sum(WORLD.allgather(steps))
        fine = 20 * len(run.opt.workers) <= total <= 20 * len(run.opt.workers) + 4 * WORLD.size
        check_together([] if fine else [f"{total} steps"])


@pytest.mark.brief(2, 3, 5, "4x2")
@by_inner
@pytest.mark.parametrize("saved", [0, 7])
def test_resumes_bit_for_bit(inner: str, saved: int) -> None:
    """Lock-step: a run that is saved and taken up by another equals the one that went on."""
    errors: list[str] = []
    problem = TanhNet()
    with running(problem, NESTEROV, SCHEMES[1], order="lock-step", inner=inner) as run:
        for _ in range(saved):
            run.step()
        run.center()
        buffer = io.BytesIO()
        torch.save((run.model.state_dict(), run.opt.state_dict()), buffer)
        for _ in range(6):
            run.step()
        went_on, center = run.held(), run.center()
    with running(problem, NESTEROV, SCHEMES[1], order="lock-step", inner=inner) as run:
        run.step()
        run.center()
        buffer.seek(0)
        model, state = torch.load(buffer, weights_only=False)
        run.model.load_state_dict(model)
        run.opt.load_state_dict(state)
        run.t = saved
        for _ in range(6):
            run.step()
        errors += [] if np.array_equal(run.held(), went_on) else ["x differs"]
        errors += [] if np.array_equal(run.center(), center) else ["the root differs"]
    check_together(errors)


def test_a_broken_leaf_never_reaches_the_root() -> None:
    errors: list[str] = []
    for order, inner in itertools.product(("free", "lock-step"), ("ranks", "hosted")):
        with running(TanhNet(), NESTEROV, SCHEMES[0], order=order, inner=inner) as run:
            for _ in range(5):
                run.step()
            if WORLD.rank == run.opt.workers[-1]:
                for parameter in run.model.parameters():
                    parameter.data.fill_(float("nan"))
            for _ in range(100):  # how soon a message comes is not ours to say
                for _ in range(60):
                    run.step()
                if sum(WORLD.allgather(run.opt.metrics.resets)):
                    break
            if not (np.isfinite(run.center()).all() and np.isfinite(run.held()).all()):
                errors.append(f"{order} {inner}: not finite")
            resets = sum(WORLD.allgather(run.opt.metrics.resets))
            errors += [] if resets >= 1 else [f"{order} {inner}: not set back"]
    check_together(errors)


@pytest.mark.brief(2, 3, 5, "4x2")
@by_inner
@pytest.mark.parametrize("steps", [8, 9])
def test_a_tree_whose_leaves_all_break_has_diverged(inner: str, steps: int) -> None:
    """Also where they have just been set back. Those that have recovered are no such case."""
    with running(TanhNet(), SGD, SCHEMES[1], inner=inner, order="lock-step") as run:
        for t in range(2 * steps):
            run.problem.loss(run.model, WORLD.rank, t).backward()
            if run.opt.computes and (t >= steps or t == 1):
                for parameter in run.model.parameters():
                    parameter.grad = torch.full_like(parameter, float("nan"))
            run.opt.step(loss=1.0)
            if t == steps - 1:
                run.center()
        with pytest.raises(Diverged, match="every worker"):
            run.center()


def test_broken_inner_nodes_take_over_finite_messages() -> None:
    """Finite leaves may overflow what they pull; the root has no parent to begin anew from."""
    with running(TanhNet(), SGD, SCHEMES[0], order="lock-step", inner="hosted") as run:
        for x in hosted_inner_nodes(run.opt):
            x.fill_(float("nan"))
        for _ in range(12):
            run.step()
        check_together([] if np.isfinite(run.center()).all() else ["not finite"])


def test_the_newest_message_is_taken() -> None:
    """What came while the receiver looked away gives way to what came last."""
    topology = Topology()
    fabric = Fabric(topology, 4096, torch.device("cpu"))
    links = Links(fabric.world, newest=True, tags=2)
    out = links.out(1, 0) if WORLD.rank == 0 else None
    into = links.into(0, 0, 8) if WORLD.rank == 1 else None
    errors: list[str] = []
    for value in range(1, 4):
        if isinstance(out, Outbox):
            wait_until(out.ready)
            memory = links.fresh(8)
            memory[:] = value
            out.send(memory)
            wait_until(out.ready)
        elif isinstance(into, Inbox):
            while into.received < value:
                into.has()
    if isinstance(into, Inbox):
        taken = int(into.message()[0])
        into.release()
        errors += [] if taken == 3 and not into.has() else [f"took {taken}"]
    links.deliver()
    links.free()
    fabric.free()
    topology.free()
    check_together(errors)


@pytest.mark.brief(2, 3, 5, "4x2")
def test_a_sender_backs_off_and_comes_back() -> None:
    """A message left out now and then changes nothing; many in a row do, and once they get through it is over."""
    free = [True, False, True, False, False, True] + 9 * [False] + 3 * [True]
    assert strides(free) == 6 * [1] + [1, 1, 2, 2, 2, 4, 4, 4, 8] + [4, 2, 1]


@pytest.mark.brief(2, 3, 5, "4x2")
def test_a_state_of_another_tree_is_refused() -> None:
    with running(TanhNet(), SGD, SCHEMES[0], order="lock-step") as run:
        run.center()
        state = run.opt.state_dict()
    other = running(TanhNet(), SGD, SCHEMES[0], inner="hosted", order="lock-step")
    with other as run, pytest.raises(ValueError, match="the state is of another tree"):
        run.opt.load_state_dict(state)


def test_uneven_steps_end_well_or_say_so() -> None:
    """Free: who has ended waits for the others. BatchNorm's buffers travel with the parameters."""
    with running(Buffered(), SGD, SCHEMES[0]) as run:
        for _ in range(10 + 15 * (WORLD.rank % 2)):
            run.step()
        finite = np.isfinite(run.center()).all()
        check_together([] if finite else ["not finite"])

"""What synchronous methods live through: broken workers by the papers' equations, BatchNorm, models that differ."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from harness import FEW, WORLD, Case, Layout, Run, check_together, distance, running
from numpy.typing import NDArray
from problems import LeastSquares, Quadratic, TanhNet, fill
from simulation import Local

from mpilsgd import EASGD, LSGD, AllreduceSGD, DiLoCo, LocalSGD, Topology
from mpilsgd.exchange import centre
from mpilsgd.methods import Method

pytestmark = pytest.mark.mpi

TWO_PULLS = {"pull": 0.3, "global_pull": 0.2, "period": 2, "global_period": 4, "loss_window": 3}
METHODS = [
    Case(AllreduceSGD),
    Case(LocalSGD, {"period": 3}),
    Case(LocalSGD, {"period": 3, "average": "quadratic", "a": 5.0}, "quadratic"),
    Case(LSGD, {**TWO_PULLS}, "after-step"),
    Case(LSGD, {**TWO_PULLS, "when": "with_step"}, "with-step"),
    Case(LSGD, {**TWO_PULLS, "period": 3, "global_period": 6, "when": "every_step"}, "every-step"),
    Case(EASGD, {"period": 3}, "jacobi"),
    Case(EASGD, {"period": 3, "overlap": True}, "overlap"),
    Case(EASGD, {"period": 3, "form": "gauss-seidel"}, "gauss-seidel"),
    Case(DiLoCo, {"period": 6, "fragments": 2, "mixing": 0.5, "overlap": 2}, "overlap"),
]
LOCALS = {
    "SGD": Local(lr=0.05),
    "momentum": Local("momentum", lr=0.05, momentum=0.7),
    "MSGD": Local("msgd", lr=0.05, momentum=0.7, nesterov=True),
}
by_method = pytest.mark.parametrize("case", METHODS, ids=str)
by_layout = pytest.mark.parametrize("layout", FEW, ids=str)
by_local = pytest.mark.parametrize("name", ["momentum", "MSGD"])


@by_layout
def test_the_model_outlives_the_method(layout: Layout) -> None:
    with running(Case(LSGD, {**TWO_PULLS}), TanhNet(), LOCALS["SGD"], layout) as run:
        run.run(3)
        held = run.held()
    assert (run.held() == held).all()
    copied = copy.deepcopy(run.model)
    run.problem.loss(copied, 0, 0).backward()
    torch.optim.SGD(copied.parameters(), lr=0.1).step()
    assert (run.held() == held).all()


def break_down(run: Run, kind: str) -> None:
    """A worker's parameters, or its next gradient, or an only element of them, become non-finite."""
    for parameter in run.model.parameters():
        if kind == "element":
            parameter.data.view(-1)[0] = math.inf
        else:
            parameter.data.fill_(math.nan)


NAN_CASES = [
    Case(AllreduceSGD),
    Case(LocalSGD, {"period": 1}),
    *(
        Case(
            LSGD,
            {"pull": 0.3, "global_pull": 0.2, "period": 1, "global_period": 1, "loss_window": 1, "when": w},
            w,
        )
        for w in ("after_step", "with_step", "every_step")
    ),
    Case(EASGD, {"period": 1, "center_rate": 0.6}, "jacobi"),
    Case(EASGD, {"period": 1, "center_rate": 0.6, "overlap": True}, "overlap"),
    Case(EASGD, {"period": 1, "center_rate": 0.6, "form": "gauss-seidel"}, "gauss-seidel"),
    Case(DiLoCo, {"period": 1}),
]


def without(
    case: Case, layout: Layout, bad: int, x: NDArray[np.float64], c: NDArray[np.float64]
) -> tuple[Any, Any, Any]:
    """One round without worker `bad` by the papers: the others' x after it, centre, what the bad one may become."""
    fine = [i for i in range(len(x)) if i != bad]
    new = x.copy()
    if case.method is AllreduceSGD:
        return new, new[fine].mean(0), [new[i] for i in fine]
    if case.method is LocalSGD:
        new[:] = x[fine].mean(0)
        return new, new[0], [new[0]]
    if case.method is DiLoCo:
        g = c - x[fine].mean(0)
        new[:] = c - 0.7 * (g + 0.9 * g)
        return new, new[0], [new[0]]
    if case.method is EASGD:
        alpha = 0.6 / len(x)
        moved = c + alpha * (x[fine] - c).sum(0)
        new = x - alpha * (x - (moved if case.options.get("form") else c))
        return new, moved, [moved, c]
    best = fine[0]  # the losses grow with the rank
    for group in layout.groups:
        leader = next((i for i in group if i in fine), best)
        for i in group:
            new[i] = x[i] - 0.3 * (x[i] - x[leader]) - 0.2 * (x[i] - x[best])
    (own,) = (group for group in layout.groups if bad in group)
    leader = next((i for i in own if i in fine), best)
    # It becomes the local or the global leader, and may then be pulled as the others are in this round.
    becomes = [x[leader], x[best], new[leader], x[best] - 0.3 * (x[best] - x[leader])]
    if case.options.get("when") == "every_step":
        # A group with nobody left to lead it may hold on to the leader it had, which here stood at its start.
        becomes.append(x[best] - 0.3 * (x[best] - Quadratic(0.0).start(bad)))
    return new, None, becomes


@pytest.mark.mpi(min_size=2)
@pytest.mark.brief(2, 3, 4, "3x2")
@pytest.mark.parametrize("bad", [0, 1])
@pytest.mark.parametrize("case", NAN_CASES, ids=str)
def test_a_broken_worker_is_set_back(case: Case, bad: int) -> None:
    """To its leader or centre, at the next round, counted; the others go on as if it were not there."""
    errors: list[str] = []
    for layout in FEW:
        with running(
            case, Quadratic(0.0), Local("momentum", lr=0.1, momentum=0.5), layout, same=False
        ) as run:
            if case.method is AllreduceSGD:  # its workers are equal
                fill(list(run.model.parameters()), run.problem.start(9))
            run.still(float(run.rank))
            x, c = np.stack(WORLD.allgather(run.held())), run.center()
            if run.rank == bad:
                break_down(run, "all")
            run.still(math.nan if run.rank == bad else float(run.rank))
            after, center, allowed = without(case, layout, bad, x, c)
            got = run.held()
            if run.rank == bad:
                if min(distance(got, value) for value in allowed) > 1e-12:
                    errors.append(f"{layout}: became {got}, none of {allowed}")
            elif distance(got, after[run.rank]) > 1e-12:
                errors.append(f"{layout}: x is {got} without NaN it were {after[run.rank]}")
            resets = run.opt.metrics.resets
            if resets != (run.rank == bad):
                errors.append(f"{layout}: {resets} resets counted")
            if center is not None and distance(run.center(), center) > 1e-12:
                errors.append(f"{layout}: the centre is not the others'")
            for _ in range(3):
                run.still(float(run.rank))
            if not (np.isfinite(run.held()).all() and np.isfinite(run.center()).all()):
                errors.append(f"{layout}: not finite later")
            if run.opt.metrics.resets != resets:
                errors.append(f"{layout}: reset again")
    check_together(errors)


@pytest.mark.mpi(min_size=2)
@pytest.mark.brief(2, 3)
@by_local
@pytest.mark.parametrize("case", NAN_CASES[1:], ids=str)
def test_a_broken_gradient(case: Case, name: str) -> None:
    """A NaN gradient of the worker that leads breaks parameters and momentum; two rounds later all are finite."""
    errors: list[str] = []
    for layout in FEW[:1] if name == "MSGD" else FEW[-1:]:
        with running(
            case, Quadratic(0.5), LOCALS[name], layout, same=False, losses=lambda w, t: float(w)
        ) as run:
            run.run(2)
            for parameter in run.model.parameters():
                parameter.grad = torch.full_like(parameter, math.nan if run.rank == 0 else 0.0)
                if run.rank == 0:
                    parameter.grad[1:] = 0.0
            run.opt.step(loss=float(run.rank))
            if run.rank != 0 and not np.isfinite(run.held()).all():
                errors.append(f"{layout}: NaN came over at once")
            for t in range(2):
                if run.rank == 0:
                    run.still(0.0)
                else:
                    run.step()
                if run.rank != 0 and not np.isfinite(run.held()).all():
                    errors.append(f"{layout}: NaN came over in round {t}")
            if not (np.isfinite(run.held()).all() and np.isfinite(run.center()).all()):
                errors.append(f"{layout}: still not finite")
            if run.opt.metrics.resets != (run.rank == 0):
                errors.append(f"{layout}: {run.opt.metrics.resets} resets counted")
            run.run(3)
            if not np.isfinite(run.held()).all():
                errors.append(f"{layout}: not finite later")
    check_together(errors)


def batch_norm_run(case: Case, buffers: str) -> tuple[Any, Any, list[torch.Tensor]]:
    topo = Topology()
    torch.manual_seed(topo.world.rank)
    model = torch.nn.Sequential(torch.nn.BatchNorm1d(5), torch.nn.Linear(5, 3)).double()
    opt: Any = case.method(torch.optim.SGD(model.parameters(), lr=0.1), topo, **case.options, buffers=buffers)
    problem = LeastSquares()
    seen = []
    for t in range(6):
        opt.zero_grad()
        loss = problem.loss(model, topo.world.rank, t)
        seen.append(torch.from_numpy(problem.batch(topo.world.rank, t)[0]))
        loss.backward()
        opt.step(loss=loss)
    return topo, (model, opt), seen


@pytest.mark.brief(1, 2)
@by_method
def test_batch_norm_kept(case: Case) -> None:
    """buffers="keep": the statistics are the worker's own, as if it were alone."""
    topo, (model, opt), seen = batch_norm_run(case, "keep")
    alone = torch.nn.BatchNorm1d(5).double()
    for inputs in seen:
        alone(inputs)
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        assert torch.equal(getattr(model[0], name), getattr(alone, name)), name
    opt.close()
    topo.free()


@pytest.mark.brief(1, 2)
@by_method
def test_batch_norm_recalibrated(case: Case) -> None:
    """buffers="recalibrate": in center(batches) the statistics are those of the batches, then the old ones again."""
    topo, (model, opt), _ = batch_norm_run(case, "recalibrate")
    before = {name: value.clone() for name, value in model[0].named_buffers()}
    inputs = torch.from_numpy(LeastSquares().data(0)[0])
    with opt.center([inputs]):
        assert torch.allclose(model[0].running_mean, inputs.mean(0), rtol=1e-12)
        assert torch.allclose(model[0].running_var, inputs.var(0), rtol=1e-12)
        assert model.training
        model.eval()
        model(inputs)
    for name, value in model[0].named_buffers():
        assert torch.equal(value, before[name]), name
    opt.close()
    topo.free()


@pytest.mark.brief(1, 2)
@by_method
def test_batch_norm_averaged(case: Case) -> None:
    """buffers="average": at the centre all ranks have the same finite statistics, variances positive."""
    topo, (model, opt), _ = batch_norm_run(case, "average")
    with opt.center():
        own = torch.cat([model[0].running_mean, model[0].running_var])
        assert all(torch.equal(own, other) for other in WORLD.allgather(own))
        assert (model[0].running_var > 0).all()
    opt.close()
    topo.free()


ENTERED = [
    "by rank 0",
    "by rank 0, in 2 of 2",
    "by rank 0, once",
    "by all",
    "by all, of uneven data",
    "by all, once",
]


@pytest.mark.parametrize("entered", [*ENTERED, "by all, who end early", "at the end"])
@pytest.mark.parametrize(
    "case", [*(METHODS[k] for k in (0, 1, 3, 6)), Case(EASGD, {"period": 3, "asynchronous": True})], ids=str
)
@pytest.mark.mpi(min_size=2)
@pytest.mark.brief(2)
def test_a_centre_that_some_ranks_do_not_enter_is_told(
    case: Case, entered: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the rank that waits in it alone for the others' end, and goes on; not where nothing is wrong."""
    topo = Topology()
    model, first, alone = linear(5, 3), topo.world.rank == 0, "by rank 0" in entered
    opt = case.method(torch.optim.SGD(model.parameters(), lr=0.01), topo, **case.options)
    counted, to_tell = centre._steps_of_all, list(range(1, topo.world.size))

    def rests(m: Method) -> int:
        steps = counted(m)
        while to_tell:
            topo.world.send(None, to_tell.pop())
        return steps

    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("default")
        for epoch in range(2 if "in 2" in entered or ("early" in entered and not first) else 5):
            for _ in range(9 - 3 * (first and "uneven" in entered)):
                opt.zero_grad()
                loss = model(torch.ones(2, 5)).square().mean()
                loss.backward()
                opt.step(loss=loss)
            if alone and first:
                monkeypatch.setattr(centre, "_steps_of_all", rests)
            elif alone and epoch == 0:
                topo.world.recv(source=0)  # else all may have ended before rank 0 comes
            if ("once" not in entered or epoch == 0) and (
                "by all" in entered or (first and (alone or epoch == 4))
            ):
                with opt.center():
                    pass
        opt.close()
    told = [str(w.message) for w in seen if "enter center()" in str(w.message)]
    assert len(told) == (first and alone), told
    topo.free()


def linear(inputs: int, outputs: int, *more: torch.nn.Module) -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(inputs, outputs), *more)


@pytest.mark.parametrize(
    "other",
    [
        lambda: linear(4, 3),
        lambda: linear(5, 2),
        lambda: linear(5, 3, torch.nn.Linear(3, 3)),
        lambda: linear(5, 3).double(),
        lambda: linear(5, 3, torch.nn.BatchNorm1d(3, affine=False)),
        lambda: torch.nn.Sequential(
            torch.nn.Linear(3, 5, bias=False), torch.nn.Linear(1, 3)
        ),  # as many values
    ],
    ids=["inputs", "outputs", "count", "dtype", "buffers", "shapes"],
)
@pytest.mark.parametrize("case", [METHODS[0], METHODS[1], METHODS[3], METHODS[6]], ids=str)
@pytest.mark.brief(2, 3)
@pytest.mark.mpi(min_size=2)
def test_models_that_differ_are_refused(case: Case, other: Callable[[], torch.nn.Module]) -> None:
    """Everywhere, before anything is exchanged; and a topology goes on working after it."""
    for shared in (True, False) if case is METHODS[3] else (True,):
        topo = Topology(shared=shared)
        model = other() if topo.world.rank == topo.world.size - 1 else linear(5, 3)
        with pytest.raises(ValueError, match=r"(?i)differ|rank"):
            case.method(torch.optim.SGD(model.parameters(), lr=0.1), topo, **case.options)
        good = linear(5, 3)
        opt = case.method(torch.optim.SGD(good.parameters(), lr=0.1), topo, **case.options)
        opt.close()
        topo.free()


@pytest.mark.parametrize("case", [METHODS[0], METHODS[3], METHODS[7]], ids=str)
@pytest.mark.parametrize("own", [False, True], ids=["a topology", "its own topology"])
@pytest.mark.brief(1, 2)
def test_wrapped_anew(case: Case, own: bool) -> None:
    """On every rank, as where a notebook's cell is run again: the method before is closed. On some only: refused."""
    topo = Topology()
    given = () if own else (topo,)
    model = linear(5, 3)

    def wrap(of: torch.nn.Module) -> Any:
        return case.method(torch.optim.SGD(of.parameters(), lr=0.1), *given, **case.options)

    def steps(opt: Any) -> None:
        for _ in range(4):
            opt.zero_grad()
            loss = model(torch.ones(2, 5)).square().mean()
            loss.backward()
            opt.step(loss=loss)

    first = wrap(model)
    steps(first)
    with wrap(model) as second:
        steps(second)
        with pytest.raises(RuntimeError, match="closed, as its parameters were wrapped anew"):
            steps(first)
    if WORLD.size > 1:
        with wrap(model) as third:
            with pytest.raises(ValueError, match="lies in another flat vector"):
                wrap(model if WORLD.rank == 0 else linear(5, 3))
            steps(third)
    topo.free()

"""A method beside what else a training script does: another method, gradient clipping, forked processes."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from harness import FEW, LAYOUTS, MESSAGES, WORLD, Case, Layout, Run, check_together, distance, running
from numpy.typing import NDArray
from problems import LeastSquares, Problem, TanhNet
from simulation import Local
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.utils.data import DataLoader, Dataset

from mpilsgd import EASGD, LSGD, AllreduceSGD, Downpour, LocalSGD, Topology

pytestmark = [pytest.mark.mpi, pytest.mark.ranks(1, 2, 3)]

SGD = Local(lr=0.05, weight_decay=0.02)
NESTEROV = Local("msgd", lr=0.05, momentum=0.7, nesterov=True, weight_decay=0.02)
TURNS = {"asynchronous": True, "order": "round-robin"}
REDUCE, MEAN = Case(AllreduceSGD), Case(LocalSGD, {"period": 3})
LEADER = Case(LSGD, {"pull": 0.3, "global_pull": 0.2, "period": 2, "global_period": 4, "loss_window": 3})
ELASTIC, OVERLAP = Case(EASGD, {"period": 3}), Case(EASGD, {"period": 2, "overlap": True}, "overlap")
ELASTIC_TURNS, PUSH = Case(EASGD, {"period": 2, **TURNS}, "turns"), Case(Downpour, {"period": 2, **TURNS})
by_transport = pytest.mark.parametrize("layout", [LAYOUTS[0], MESSAGES], ids=str)

# Two methods


@pytest.mark.brief(1, 2, 3)
@pytest.mark.parametrize("first", ["the first", "the second"])
@pytest.mark.parametrize("together", [True, False], ids=["one topology", "two"])
@pytest.mark.parametrize(
    "cases",
    [(LEADER, ELASTIC), (REDUCE, MEAN), (OVERLAP, LEADER), (ELASTIC_TURNS, PUSH)],
    ids=lambda cases: "-".join(map(str, cases)),
)
def test_two_methods_at_once(cases: tuple[Case, Case], together: bool, first: str) -> None:
    """Each as if it were alone; one is closed before the other, which goes on."""
    layout = LAYOUTS[0] if first == "the first" else MESSAGES
    problems: tuple[Problem, Problem] = (TanhNet(), LeastSquares())
    topo = Topology(group_size=layout.group_size, shared=layout.shared) if together else None
    runs = [
        Run(case, problem, local, layout, topo=topo)
        for case, problem, local in zip(cases, problems, (SGD, NESTEROV), strict=True)
    ]
    simulated = [
        case.simulate(problem, local, layout)
        for case, problem, local in zip(cases, problems, (SGD, NESTEROV), strict=True)
    ]
    errors: list[str] = []

    def both(which: tuple[int, ...], steps: int, where: str) -> None:
        for _ in range(steps):
            for k in which:
                runs[k].step()
                simulated[k].step()
        for k in which:
            gap = distance(runs[k].x(), simulated[k].x[WORLD.rank])
            errors.extend([f"{where}, method {k}: differs by {gap:.1e}"] if gap > 1e-12 else [])

    both((0, 1), 5, "both")
    with runs[0].opt.center(), runs[1].opt.center():  # a GAN draws with one and judges with the other
        for run, expected in zip(runs, simulated, strict=True):
            gap = distance(run.held(), expected.center())
            errors += [f"centre differs by {gap:.1e}"] if gap > 1e-12 else []
    both((0, 1), 2, "after the centres")
    ends = 0 if first == "the first" else 1
    runs[ends].close()
    both((1 - ends,), 5, f"after {first} was closed")
    runs[1 - ends].close()
    if topo is not None:
        topo.free()
    check_together(errors)


def adversaries(wrap: Callable[[int, Any], Any]) -> tuple[list[torch.Tensor], list[Any]]:
    """A GAN on equal data: what it came to, and its two methods."""
    torch.manual_seed(0)
    generator = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    judge = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    opt_g = wrap(0, torch.optim.Adam(generator.parameters(), lr=0.01, betas=(0.5, 0.9)))
    opt_d = wrap(1, torch.optim.SGD(judge.parameters(), lr=0.1))
    random = torch.Generator().manual_seed(5)
    one, zero = torch.ones(8, 1).double(), torch.zeros(8, 1).double()
    for _ in range(8):
        real = torch.randn(8, 3, generator=random).double() + 1.0
        drawn = generator(torch.randn(8, 2, generator=random).double())
        opt_d.zero_grad()
        loss = binary_cross_entropy_with_logits(judge(real), one)
        loss = loss + binary_cross_entropy_with_logits(judge(drawn.detach()), zero)
        loss.backward()
        opt_d.step(**given(opt_d, loss))
        opt_g.zero_grad()
        loss = binary_cross_entropy_with_logits(judge(drawn), one)
        loss.backward()
        opt_g.step(**given(opt_g, loss))
    return [p.detach().clone() for m in (generator, judge) for p in m.parameters()], [opt_g, opt_d]


def given(opt: Any, loss: torch.Tensor) -> dict[str, Any]:
    return {"loss": loss} if hasattr(opt, "metrics") else {}


@pytest.mark.brief(2, 3)
@by_transport
def test_a_gan_on_equal_data_is_the_plain_gan(layout: Layout) -> None:
    plain, _ = adversaries(lambda k, inner: inner)
    errors: list[str] = []
    topo = Topology(group_size=layout.group_size, shared=layout.shared)
    ways: list[tuple[Any, Any]] = [
        (lambda o: LSGD(o, topo, period=2), lambda o: LSGD(o, topo, period=3)),
        (lambda o: LocalSGD(o, topo, period=2), lambda o: AllreduceSGD(o, topo)),
    ]
    for way in ways:
        trained, methods = adversaries(lambda k, inner: way[k](inner))  # noqa: B023
        gap = max(float((a - b).abs().max()) for a, b in zip(trained, plain, strict=True))
        errors += [f"differs by {gap:.1e}"] if gap > 1e-10 else []
        for opt in methods:
            opt.close()
    topo.free()
    check_together(errors)


# Clipping


class Clipped(Problem):
    """Another problem whose gradients are clipped as torch.nn.utils.clip_grad_norm_ does."""

    def __init__(self, problem: Problem, largest: float) -> None:
        self.problem, self.largest, self.shapes = problem, largest, problem.shapes

    def model(self) -> nn.Module:
        return self.problem.model()

    def loss(self, model: nn.Module, worker: int, step: int) -> torch.Tensor:
        return self.problem.loss(model, worker, step)

    def gradient(self, x: NDArray[np.float64], worker: int, step: int) -> tuple[float, NDArray[np.float64]]:
        loss, gradient = self.problem.gradient(x, worker, step)
        return loss, clip(gradient, self.largest)


def clip(gradient: NDArray[np.float64], largest: float) -> NDArray[np.float64]:
    return gradient * min(1.0, largest / (float(np.linalg.norm(gradient)) + 1e-6))


@pytest.mark.brief(1, 2)
@pytest.mark.parametrize("local", [SGD, NESTEROV], ids=["SGD", "MSGD"])
@pytest.mark.parametrize("case", [REDUCE, MEAN, LEADER, ELASTIC, OVERLAP, ELASTIC_TURNS, PUSH], ids=str)
def test_clipping_the_worker_s_gradient(case: Case, local: Local) -> None:
    """Between backward and step, as ever: the gradient that is clipped is this worker's own."""
    problem = Clipped(TanhNet(), 0.4)
    errors: list[str] = []
    hit = 0
    for layout in (LAYOUTS[0], MESSAGES):
        with running(case, problem, local, layout) as run:
            simulated = case.simulate(problem, local, layout)
            for t in range(7):
                run.opt.zero_grad()
                loss = problem.loss(run.model, run.rank, t)
                loss.backward()
                norm = torch.nn.utils.clip_grad_norm_(run.model.parameters(), problem.largest)
                hit += float(norm) > problem.largest
                run.opt.step(loss=loss)
                simulated.step()
                gap = distance(run.x(), simulated.x[run.rank])
                errors += [f"{layout} t={t}: differs by {gap:.1e}"] if gap > 1e-12 else []
    check_together(errors)
    assert any(WORLD.allgather(hit)), "no gradient was clipped"


@pytest.mark.parametrize("largest", [0.3, 1e9])
@pytest.mark.parametrize("layout", FEW, ids=str)
def test_clipping_the_mean_gradient(layout: Layout, largest: float) -> None:
    """AllreduceSGD(max_grad_norm=...): the mean of all gradients is what is clipped, on every rank alike."""
    problem, case = TanhNet(), Case(AllreduceSGD, {"max_grad_norm": largest})
    errors: list[str] = []
    clipped = 0
    x = problem.start(0)
    with running(case, problem, Local(lr=0.1), layout) as run:
        for t in range(6):
            mean = np.mean([problem.gradient(x, worker, t)[1] for worker in range(WORLD.size)], axis=0)
            clipped += float(np.linalg.norm(mean)) > largest
            x = x - 0.1 * clip(mean, largest)
            run.step()
            gap = distance(run.x(), x)
            errors += [f"t={t}: differs by {gap:.1e}"] if gap > 1e-12 else []
    assert bool(clipped) == (largest < 1)
    check_together(errors)


@pytest.mark.mpi(min_size=2)
def test_clipping_the_mean_leaves_a_broken_gradient_out() -> None:
    """A gradient that is not finite has no norm: it is left out before the mean is clipped."""
    problem, case = TanhNet(), Case(AllreduceSGD, {"max_grad_norm": 0.3})
    with running(case, problem, Local(lr=0.1), LAYOUTS[0]) as run:
        run.step()
        x = run.x()
        run.opt.zero_grad()
        problem.loss(run.model, run.rank, 1).backward()
        if run.rank == 1:
            next(run.model.parameters()).grad.fill_(math.nan)
        run.opt.step()
        rest = [worker for worker in range(run.size) if worker != 1]
        mean = np.mean([problem.gradient(x, worker, 1)[1] for worker in rest], axis=0)
        gap = distance(run.x(), x - 0.1 * clip(mean, 0.3))
    check_together([f"differs by {gap:.1e}"] if gap > 1e-12 else [])


@pytest.mark.brief(1, 2)
@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, "1", True])
def test_no_norm_to_clip_to(value: Any) -> None:
    topo = Topology()
    for own in (value, value if WORLD.rank == WORLD.size - 1 else None):
        with pytest.raises(ValueError, match="max_grad_norm"):
            AllreduceSGD(torch.optim.SGD(nn.Linear(2, 1).parameters(), lr=0.1), topo, max_grad_norm=own)
    topo.free()


# Forked processes


def forked(child: Callable[[], bool]) -> Callable[[], bool]:
    """Runs `child` in a fork; the answer, whether it was True, when it is asked for."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12: threads are there
        pid = os.fork()
    if pid == 0:
        status = 1
        try:
            status = 0 if child() else 1
        finally:
            os._exit(status)
    return lambda: os.waitpid(pid, 0)[1] == 0


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)).double()


FORKED: dict[str, Callable[[Any, Topology], Any]] = {
    "AllreduceSGD": AllreduceSGD,
    "LSGD": lambda o, t: LSGD(o, t, period=2),
    "EASGD": lambda o, t: EASGD(o, t, period=2),
    "EASGD-turns": lambda o, t: EASGD(o, t, period=2, **TURNS),
}
by_forked = pytest.mark.parametrize("name", FORKED)


@pytest.fixture(params=[True, False], ids=["windows", "messages"])
def forking(request: pytest.FixtureRequest) -> Iterator[Callable[[str, Any], Any]]:
    """Wraps an optimizer; closed at the end."""
    topo = Topology(shared=request.param)
    made: list[Any] = []

    def wrap(name: str, inner: Any) -> Any:
        made.append(FORKED[name](inner, topo))
        return made[-1]

    yield wrap
    for opt in made:
        opt.close()
    topo.free()


def step(opt: Any, model: nn.Module, t: int) -> None:
    inputs = torch.randn(8, 4, generator=torch.Generator().manual_seed(100 * t + WORLD.rank)).double()
    opt.zero_grad()
    loss = model(inputs).square().mean()
    loss.backward()
    opt.step(loss=loss)


@pytest.mark.brief(2)
@pytest.mark.processes
@by_forked
def test_what_a_forked_child_writes_is_its_own(name: str, forking: Any) -> None:
    """Its parameters and gradients, as of any tensor; and it sees its own."""
    model = network()
    opt = forking(name, torch.optim.SGD(model.parameters(), lr=0.1))
    step(opt, model, 0)
    held = [p.detach().clone() for p in model.parameters()]
    grads = [p.grad.clone() for p in model.parameters()]

    def child() -> bool:
        with torch.no_grad():
            for p in model.parameters():
                p.fill_(7.0)
                p.grad.fill_(7.0)
        return all(bool((p == 7.0).all()) for p in model.parameters())

    answer = forked(child)
    errors = [] if answer() else ["the child does not see what it wrote"]
    for p, x, g in zip(model.parameters(), held, grads, strict=True):
        errors += [] if torch.equal(p, x) else ["the child wrote this rank's parameters"]
        errors += [] if torch.equal(p.grad, g) else ["the child wrote this rank's gradients"]
    check_together(errors)
    for t in range(1, 5):
        step(opt, model, t)
    with opt.center():
        finite = all(bool(p.isfinite().all()) for p in model.parameters())
    check_together([] if finite else ["not finite"])


@pytest.mark.brief(2)
@pytest.mark.processes
@by_forked
def test_a_forked_child_keeps_what_there_was(name: str, forking: Any) -> None:
    """As of any tensor: it sees the parameters of the moment of the fork, while training goes on."""
    model = network()
    opt = forking(name, torch.optim.SGD(model.parameters(), lr=0.1))
    step(opt, model, 0)
    held = [p.detach().clone() for p in model.parameters()]
    read, write = os.pipe()

    def child() -> bool:
        os.read(read, 1)  # until the training has gone on
        return all(torch.equal(p, x) for p, x in zip(model.parameters(), held, strict=True))

    answer = forked(child)
    for t in range(1, 5):
        step(opt, model, t)
    os.write(write, b".")
    errors = [] if answer() else ["the child's parameters changed"]
    errors += [] if not torch.equal(next(model.parameters()), held[0]) else ["nothing was trained"]
    os.close(read)
    os.close(write)
    check_together(errors)


class Scored(Dataset[Any]):
    """A data set that asks the model itself (hard examples), in the loader's forked processes; and touches it."""

    def __init__(self, model: nn.Module):
        self.model = model

    def __len__(self) -> int:
        return 16

    def __getitem__(self, i: int) -> tuple[torch.Tensor, float]:
        inputs = torch.full((4,), i / 16).double()
        with torch.no_grad():
            score = float(self.model(inputs))
            next(self.model.parameters()).mul_(1.0)
        return inputs, score


@pytest.mark.brief(2)
def test_forked_data_loaders_that_hold_the_model(forking: Any) -> None:
    model = network()
    opt = forking("LSGD", torch.optim.SGD(model.parameters(), lr=0.1))
    seen = 0
    for workers in (0, 1):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            loader = DataLoader(
                Scored(model), 4, num_workers=workers, multiprocessing_context="fork" if workers else None
            )
            for t, (_, scores) in enumerate(loader):
                seen += int(scores.isfinite().all())
                step(opt, model, t)
    check_together([] if seen == 8 else [f"{seen} of 8 batches"])

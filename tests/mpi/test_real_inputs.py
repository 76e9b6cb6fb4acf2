"""What real training scripts do: parameters that come and go, foreign optimizers, copies, BatchNorm, half types."""

from __future__ import annotations

import copy
import gc
import io
import math
import os
import pickle
import resource
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from harness import WORLD, check_together
from torch import nn
from torch.nn.functional import mse_loss

from mpilsgd import ADMM, EASGD, LSGD, MSGD, AllreduceSGD, Downpour, EASGDTree, LocalSGD, Topology
from mpilsgd.methods import Diverged

pytestmark = [pytest.mark.mpi, pytest.mark.ranks(1, 2, 3), pytest.mark.brief(1, 2)]

METHODS: dict[str, Callable[..., Any]] = {
    "AllreduceSGD": AllreduceSGD,
    "LocalSGD": lambda o, t=None, **more: LocalSGD(o, t, period=1, **more),
    "LSGD": lambda o, t=None, **more: LSGD(o, t, period=1, **more),
    "EASGD": lambda o, t=None, **more: EASGD(o, t, period=1, **more),
    "EASGD-overlap": lambda o, t=None, **more: EASGD(o, t, period=2, overlap=True, **more),
    "EASGD-turns": lambda o, t=None, **more: EASGD(
        o, t, period=1, asynchronous=True, order="round-robin", **more
    ),
    "Downpour": lambda o, t=None, **more: Downpour(o, t, order="round-robin", **more),
    "ADMM": lambda o, t=None, **more: ADMM(o, t, rho=1.0, **more),
}
FOUR = ("AllreduceSGD", "LocalSGD", "LSGD", "EASGD")
by_method = pytest.mark.parametrize("name", METHODS)
by_four = pytest.mark.parametrize("name", FOUR)
several = pytest.mark.mpi(min_size=2)


@contextmanager
def wrapped(
    name: str, optimizer: torch.optim.Optimizer, shared: bool = True, **options: Any
) -> Iterator[Any]:
    """The method in its topology; closed at the end."""
    topo = Topology(shared=shared)
    opt = METHODS[name](optimizer, topo, **options)
    yield opt
    opt.close()
    topo.free()


def network(*more: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1), *more).double()


def batch(t: int, rank: int = WORLD.rank) -> tuple[torch.Tensor, torch.Tensor]:
    inputs = torch.randn(8, 4, generator=torch.Generator().manual_seed(100 * t + rank)).double()
    return inputs, inputs[:, :1] * (1 + rank)


def step(opt: Any, model: nn.Module, t: int) -> None:
    inputs, targets = batch(t)
    opt.zero_grad()
    loss = mse_loss(model(inputs), targets)
    loss.backward()
    opt.step(loss=loss)


def weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()]).clone()


def told(action: Callable[[], Any], *parts: str, kind: Any = ValueError) -> list[str]:
    """Errors, if the action does not raise this with all these parts in its message."""
    try:
        action()
    except kind as error:
        return [f"{part!r} is not in {str(error)!r}" for part in parts if part not in str(error)]
    return [f"no {kind.__name__} with {parts}"]


# Parameters


@pytest.mark.parametrize("how", ["unfrozen", "a new group"])
@by_method
def test_a_parameter_that_comes_in_later_is_refused(name: str, how: str) -> None:
    """By its name, at the next step: it would never be exchanged."""
    model = network()
    model[0].requires_grad_(False)
    frozen = how == "unfrozen"  # in the optimizer from the start, as in gradual unfreezing, or not
    inner = torch.optim.SGD(model.parameters() if frozen else model[2].parameters(), lr=0.1)
    with wrapped(name, inner) as opt:
        for t in range(2):
            step(opt, model, t)
        model[0].weight.requires_grad_(True)
        if not frozen:
            inner.add_param_group({"params": [model[0].weight]})
        errors = told(lambda: step(opt, model, 2), "0.weight")
        model[0].weight.requires_grad_(False)  # so that it can be ended
        check_together(errors)


@by_four
def test_a_group_given_to_the_method_is_refused(name: str) -> None:
    model = network()
    with wrapped(name, torch.optim.SGD(model[2].parameters(), lr=0.1)) as opt:
        group = {"params": list(model[0].parameters())}
        check_together(told(lambda: opt.add_param_group(group), "before", kind=(ValueError, RuntimeError)))


@by_four
def test_a_parameter_that_is_frozen_later_is_still_exchanged(name: str) -> None:
    model = network()
    with wrapped(name, torch.optim.SGD(model.parameters(), lr=0.1)) as opt:
        step(opt, model, 0)
        model[0].requires_grad_(False)
        for t in range(1, 5):
            step(opt, model, t)
        with opt.center():
            own = weights(model)
            check_together(
                [] if all(torch.equal(own, o) for o in WORLD.allgather(own)) else ["centres differ"]
            )


def grouped(model: nn.Module, turn: int) -> list[dict[str, Any]]:
    """Decay and no decay, each in an order of this rank's own, as sets give it."""
    groups = [[p for p in model.parameters() if p.ndim > 1], [p for p in model.parameters() if p.ndim == 1]]
    turned = [group[turn % len(group) :] + group[: turn % len(group)] for group in groups]
    made = [{"params": group, "weight_decay": 1e-2 * (k == 0)} for k, group in enumerate(turned)]
    return made[::-1] if turn % 2 else made


def equal_layers() -> nn.Module:
    """Layers of one width: the shapes alone do not tell them apart."""
    torch.manual_seed(0)
    return nn.Sequential(*(m for _ in range(3) for m in (nn.Linear(4, 4), nn.Tanh()))).double()


@several
@pytest.mark.parametrize("shared", [True, False], ids=["windows", "messages"])
@by_method
def test_parameters_are_matched_by_their_names(name: str, shared: bool) -> None:
    """Groups in another order on every rank train as groups in one order do, and are resumed so."""

    def final(turn: int, same: bool) -> torch.Tensor:
        model = equal_layers()
        if not same:  # some keep rank 0's start, the others show whether it comes to the right layer
            with torch.no_grad():
                for p in model.parameters():
                    p.mul_(1 + WORLD.rank)
        inner = torch.optim.SGD(grouped(model, turn), lr=0.1, momentum=0.5)
        with wrapped(name, inner, shared) as opt:
            for t in range(5):
                step_of_layers(opt, model, t)
            opt.settle()
            WORLD.Barrier()  # nobody may step while asynchronous workers save
            state = copy.deepcopy(opt.state_dict())
            opt.load_state_dict(state)
            step_of_layers(opt, model, 5)
            with opt.center():
                return torch.cat([weights(model), *(p.grad.flatten() for p in model.parameters())])

    errors = []
    for same in (True, False):
        expected, found = final(0, same), final(WORLD.rank, same)
        gap = float((expected - found).abs().max())
        errors += [] if gap < 1e-12 else [f"{'same' if same else 'other'} start: differs by {gap:.1e}"]
    check_together(errors)


def step_of_layers(opt: Any, model: nn.Module, t: int) -> None:
    inputs, _ = batch(t)
    opt.zero_grad()
    loss = mse_loss(model(inputs), inputs.flip(1) * (1 + WORLD.rank))
    loss.backward()
    opt.step(loss=loss)


class Named(nn.Module):
    """Three layers of one shape under names of one's choice."""

    def __init__(self, *names: str):
        super().__init__()
        for name in names:
            self.add_module(name, nn.Linear(4, 4))


@several
def test_other_names_are_refused_by_the_first_that_differs() -> None:
    """Of modules, and of the parameters that the optimizer was given."""
    topo = Topology()
    last = WORLD.rank == WORLD.size - 1
    model = Named("stem", "body", "tail" if last else "head")
    errors = told(
        lambda: LSGD(torch.optim.SGD(model.parameters(), lr=0.1), topo), "head.weight", "tail.weight"
    )
    model = Named("stem", "body", "head")
    given = [p for n, p in model.named_parameters() if not (last and n == "body.bias")]
    errors += told(lambda: LSGD(torch.optim.SGD(given, lr=0.1), topo, model=model), "body.bias")
    topo.free()
    check_together(errors)


# Optimizers


class Foreign(torch.optim.Optimizer):
    """SGD that keeps one tensor of every parameter's shape, under a name of one's choice."""

    def __init__(self, params: Any, lr: float = 0.1, key: str = "z", lazily: bool = False):
        super().__init__(params, {"lr": lr})
        self.key = key
        if not lazily:
            self.start()

    def start(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if not self.state[p]:
                    fresh = torch.clone if self.key == "z" else torch.zeros_like
                    self.state[p][self.key] = fresh(p.detach())

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.start()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    z = self.state[p][self.key]
                    z.add_(p.grad, alpha=-group["lr"])
                    if self.key == "z":
                        p.lerp_(z, 0.1)
                    else:
                        p.add_(z)
                        z.mul_(0.5)


class ScheduleFree(Foreign):
    """As schedule-free optimizers: the model holds y in training and x in evaluation."""

    def train(self) -> None: ...

    def eval(self) -> None: ...


@pytest.mark.parametrize(
    "make",
    [
        Foreign,
        lambda params: Foreign(params, lazily=True),
        lambda params: ScheduleFree(params, lazily=True),
        lambda params: ScheduleFree(params, key="exp_avg"),
    ],
    ids=["state z", "state z later", "state z and modes", "modes"],
)
@by_four
def test_an_optimizer_of_several_points_is_refused(name: str, make: Any) -> None:
    """Its other points (z) would not be exchanged and be zeroed after a NaN; a moment looks just the same."""
    model = network()
    topo = Topology()

    def begin() -> None:
        opt = METHODS[name](make(model.parameters()), topo)
        try:
            for t in range(2):
                step(opt, model, t)
        finally:
            opt.close()

    errors = told(begin, "point")
    topo.free()
    check_together(errors)


@by_four
def test_an_optimizer_of_ones_own_is_welcome(name: str) -> None:
    model = network()
    with wrapped(name, Foreign(model.parameters(), key="exp_avg")) as opt:
        for t in range(4):
            step(opt, model, t)
        with opt.center():
            check_together([] if weights(model).isfinite().all() else ["not finite"])


class Sharpness(torch.optim.Optimizer):
    """As SAM: the gradient is taken a second time, at x + rho g/|g|, by a closure that it needs."""

    def __init__(self, params: Any, lr: float = 0.05, rho: float = 0.05):
        super().__init__(params, {"lr": lr, "rho": rho})

    def step(self, closure: Any) -> Any:  # type: ignore[override]
        loss = closure()
        parameters = [p for g in self.param_groups for p in g["params"]]
        start = [p.detach().clone() for p in parameters]
        with torch.no_grad():
            norm = torch.stack([p.grad.norm() for p in parameters]).norm() + 1e-12
            for p in parameters:
                p.add_(p.grad * (self.defaults["rho"] / norm))
        closure()
        with torch.no_grad():
            for p, x in zip(parameters, start, strict=True):
                p.copy_(x - self.defaults["lr"] * p.grad)
        return loss


def lbfgs(params: Any) -> torch.optim.Optimizer:
    return torch.optim.LBFGS(params, lr=0.5, max_iter=4, line_search_fn="strong_wolfe")


EVERY = {
    **METHODS,
    "LSGD-with-step": lambda o, t: LSGD(o, t, period=1, when="with_step"),
    "LSGD-every-step": lambda o, t: LSGD(o, t, period=1, when="every_step"),
    "LSGD-wait-free": lambda o, t: LSGD(o, t, period=1, asynchronous="wait-free", order="round-robin"),
    "LocalSGD-until": lambda o, t: LocalSGD(o, t, until_grad_norm=1e-9),
    "EASGD-gauss-seidel": lambda o, t: EASGD(o, t, period=1, form="gauss-seidel"),
    "Downpour-momentum": lambda o, t: Downpour(o, t, momentum=0.5, order="round-robin"),
    "EASGDTree": lambda o, t: EASGDTree(o, t, degree=2, period=1, inner="hosted", order="lock-step"),
}


@pytest.mark.parametrize("make", [lbfgs, Sharpness], ids=["LBFGS", "SAM"])
@pytest.mark.parametrize("broken", [False, True], ids=["", "with a NaN"])
@pytest.mark.parametrize("name", EVERY)
def test_optimizers_that_need_a_closure(name: str, broken: bool, make: Any) -> None:
    """They work, or are refused when they are wrapped, with the reason, on all ranks alike."""
    if name == "EASGDTree" and WORLD.size == 1:
        return  # a tree has at least two nodes
    model = network()
    topo = Topology()
    try:
        opt = EVERY[name](make(model.parameters()), topo)
    except ValueError as refusal:
        reason = str(refusal)
    else:
        reason = ""
    check_together([] if len(set(WORLD.allgather(reason))) == 1 else [f"unequal answers: {reason!r}"])
    if reason:
        topo.free()
        return
    first = last = math.nan
    diverged = ""
    for t in range(8):
        inputs, targets = batch(0, rank=0)
        if broken and t == 4 and WORLD.rank == WORLD.size - 1:
            inputs = inputs * math.nan

        def closure(inputs: torch.Tensor = inputs, targets: torch.Tensor = targets) -> torch.Tensor:
            opt.zero_grad()
            loss = mse_loss(model(inputs), targets)
            loss.backward()
            return loss

        try:
            last = float(opt.step(closure).detach())
        except Diverged as error:
            diverged = str(error)
            break
        first = last if t == 0 else first
    if diverged:
        check_together([] if broken and WORLD.size == 1 else [diverged])
    else:
        errors = [] if weights(model).isfinite().all() else ["not finite"]
        # DOWNPOUR adds up the workers' moves, which diverges where each is as long as L-BFGS's
        errors += (
            [] if broken or last < first or "Downpour" in name else [f"the loss went from {first} to {last}"]
        )
        with opt.center():
            errors += [] if weights(model).isfinite().all() else ["the centre is not finite"]
        check_together(errors)
        opt.close()
    topo.free()


# Copies


@pytest.mark.parametrize(
    "take",
    [pickle.dumps, copy.deepcopy, copy.copy, lambda opt: torch.save(opt, io.BytesIO())],
    ids=["pickle", "deepcopy", "copy", "torch.save"],
)
@by_four
def test_a_method_is_not_copied_but_its_state_is(name: str, take: Any) -> None:
    model = network()
    with wrapped(name, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5)) as opt:
        step(opt, model, 0)
        errors = told(lambda: take(opt), "state_dict()", kind=TypeError)
        file = io.BytesIO()
        torch.save(opt.state_dict(), file)
        file.seek(0)
        opt.load_state_dict(torch.load(file))
        step(opt, model, 1)
        check_together(errors)


@by_four
def test_models_are_copied_as_ever(name: str) -> None:
    """With memory of their own, and no more of it in a file than they have."""
    model = nn.Sequential(nn.Linear(4, 400), nn.BatchNorm1d(400), nn.Linear(400, 1))
    with wrapped(name, torch.optim.SGD(model.parameters(), lr=0.1)):
        before = weights(model)
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        errors = []
        for other in (torch.load(file, weights_only=False), copy.deepcopy(model)):
            errors += [] if torch.equal(weights(other), before) else ["the copy differs"]
            with torch.no_grad():
                next(other.parameters()).fill_(7.0)
            errors += [] if torch.equal(weights(model), before) else ["the copy's memory is the model's"]
        layer = io.BytesIO()
        torch.save(copy.deepcopy(model[2]).state_dict(), layer)
        errors += [] if len(layer.getvalue()) < 4000 else [f"{len(layer.getvalue())} bytes for 1604"]
        check_together(errors)


# Many


# One kind goes beyond the communicators that an MPI has; of the others what leaks would show earlier.
TRIALS = {"plain": 280, "cycles": 80, "refused": 80, "own topologies": 80, "asynchronous": 80}


def trial(kind: str, topo: Topology) -> list[str]:
    """A model and a method that go out of scope at the end."""
    model = nn.Linear(64, 64)
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    if kind == "refused":
        return told(lambda: LSGD(inner, topo, pull=2.0), "pull") + told(
            lambda: LSGD(inner, topo, pull=0.1 + 0.1 * WORLD.rank), "pull"
        )
    if kind == "asynchronous":
        opt: Any = EASGD(inner, topo, asynchronous=True, order="round-robin")
    elif kind == "own topologies":
        opt = LocalSGD(inner, period=2)
    else:
        opt = LSGD(inner, topo, period=2)
    if kind == "cycles":
        model.optimizer = opt  # as some training loops keep it
    model.weight.grad = torch.zeros_like(model.weight)
    opt.step(loss=0.0)
    return []


def held_by_this_process() -> tuple[int, int, float]:
    """Shared files and open files, and the most MB of memory so far."""
    gc.collect()
    WORLD.Barrier()
    found = (
        Path("/proc/self/maps").read_text().count("/dev/shm/"),  # of this process: others may have theirs
        len(os.listdir("/proc/self/fd")),
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    )
    WORLD.Barrier()
    return found


@several
@pytest.mark.ranks(2)
@pytest.mark.parametrize("kind", TRIALS)
def test_trials_that_are_never_closed(kind: str) -> None:
    """A search in one job: what goes out of scope is freed, with its windows and communicators."""
    topo = Topology()
    errors: list[str] = []
    trials = TRIALS[kind]
    for _ in range(trials // 4):
        errors += trial(kind, topo)
    before = held_by_this_process()
    for _ in range(trials - trials // 4):
        errors += trial(kind, topo)
    grown = np.subtract(held_by_this_process(), before)
    topo.free()
    if (grown > (16, 16, 30)).any():
        errors.append(f"grown by {grown[0]:.0f} shared files, {grown[1]:.0f} open files, {grown[2]:.0f} MB")
    check_together(errors[:3])


# Autograd


@pytest.mark.parametrize("own", ["SGD", "MSGD"])
@by_method
def test_a_graph_from_before_a_step_is_stale(name: str, own: str) -> None:
    """A loss of before the step, its backward after it (a classic mistake with GANs): torch's own error."""
    model = network()
    make = MSGD if own == "MSGD" else torch.optim.SGD
    with wrapped(name, make(model.parameters(), lr=0.5)) as opt:
        for t in range(2):
            inputs = batch(t)[0].requires_grad_()
            old = model(inputs).mean()
            step(opt, model, t)
            errors = told(old.backward, "modified by an inplace", kind=RuntimeError)
            check_together([f"step {t}: {error}" for error in errors])


@several
@pytest.mark.parametrize("own", ["SGD", "MSGD"])
@pytest.mark.parametrize("shared", [True, False], ids=["windows", "messages"])
@pytest.mark.parametrize("name", ["LocalSGD", "LSGD", "EASGD", "EASGD-turns"])
def test_a_graph_from_before_a_round_is_stale(name: str, shared: bool, own: str) -> None:
    """Also where only the round changed the parameters: the optimizer has no gradient."""
    model = network()
    make = MSGD if own == "MSGD" else torch.optim.SGD
    with wrapped(name, make(model.parameters(), lr=0.5), shared, init="different") as opt:
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1 + WORLD.rank)
        inputs = batch(0)[0].requires_grad_()
        before, old = weights(model), model(inputs).mean()
        for _ in range(2):
            opt.zero_grad()
            opt.step(loss=float(WORLD.rank))
        changed = not torch.equal(weights(model), before)  # a leader's or a centre's own are not
        errors = told(old.backward, "modified by an inplace", kind=RuntimeError) if changed else []
        check_together(errors)
        check_together([] if any(WORLD.allgather(changed)) else ["nothing moved"])


def test_a_graph_from_before_an_evaluation_is_right_or_stale() -> None:
    """center() lends the model the centre and gives it back."""
    model = network()
    with wrapped("EASGD", torch.optim.SGD(model.parameters(), lr=0.1)) as opt:
        for t in range(3):
            step(opt, model, t)
        inputs = batch(9)[0].requires_grad_()
        (right,) = torch.autograd.grad(model(inputs).mean(), inputs)
        old = model(inputs).mean()
        with opt.center():
            pass
        try:
            (found,) = torch.autograd.grad(old, inputs)
        except RuntimeError as error:
            assert "modified by an inplace" in str(error)
        else:
            assert torch.equal(found, right)


# Launchers


@pytest.mark.ranks(1)
@pytest.mark.parametrize(("size", "said"), [("2", True), ("1", False)])
def test_torchrun_s_variables_are_told_of(size: str, said: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from mpilsgd.comm import inquiry

    for variable, value in {
        "RANK": "0",
        "WORLD_SIZE": size,
        "LOCAL_RANK": "0",
        "TORCHELASTIC_RUN_ID": "none",
    }.items():
        monkeypatch.setenv(variable, value)
    for launcher in inquiry.LAUNCHER_SIZES:
        monkeypatch.delenv(launcher, raising=False)
    forget = getattr(inquiry.warn_if_apart, "cache_clear", lambda: None)  # it is said once in a process
    forget()
    try:
        with pytest.warns(RuntimeWarning, match="torchrun") if said else warnings.catch_warnings():
            LSGD(torch.optim.SGD(network().parameters(), lr=0.1)).close()
    finally:
        forget()


# BatchNorm


RATES: dict[str, Callable[[Any, Any], Any]] = {
    "EASGD-gauss-seidel": lambda o, t: EASGD(
        o, t, center_rate=4.0, moving_rate=1.0, form="gauss-seidel", period=5
    ),
    "EASGD-jacobi": lambda o, t: EASGD(o, t, center_rate=1.5, moving_rate=1.0, period=5),
    "EASGD-overlap": lambda o, t: EASGD(o, t, center_rate=1.5, moving_rate=1.0, period=5, overlap=True),
    "EASGD-turns": lambda o, t: EASGD(
        o, t, center_rate=1.5 * WORLD.size, moving_rate=1.0, period=5, asynchronous=True, order="round-robin"
    ),
    "LSGD": lambda o, t: LSGD(o, t, pull=0.9, global_pull=0.9, period=4, global_period=4),
    "LSGD-with-step": lambda o, t: LSGD(
        o, t, pull=0.9, global_pull=0.9, period=4, global_period=4, when="with_step"
    ),
    "LSGD-every-step": lambda o, t: LSGD(
        o, t, pull=0.9, global_pull=0.9, period=4, global_period=4, when="every_step"
    ),
    "LSGD-wait-free": lambda o, t: LSGD(
        o,
        t,
        pull=0.9,
        global_pull=0.9,
        period=4,
        global_period=4,
        asynchronous="wait-free",
        order="round-robin",
    ),
    "LSGD-sequential": lambda o, t: LSGD(
        o, t, pull=0.9, global_pull=0.9, period=4, global_period=4, sequential=True
    ),
    "Downpour": lambda o, t: Downpour(o, t, period=3, order="round-robin"),
    "Downpour-synchronous": lambda o, t: Downpour(o, t, period=3, asynchronous=False),
    "Downpour-momentum": lambda o, t: Downpour(o, t, momentum=0.9, order="round-robin"),
    "ADMM": lambda o, t: ADMM(o, t, rho=50.0),
    "EASGDTree": lambda o, t: EASGDTree(
        o, t, degree=2, period=2, upper_period=2, moving_rate=1.0, inner="hosted", order="lock-step"
    ),
}


@several
@pytest.mark.brief(2, 3)
@pytest.mark.parametrize("shared", [True, False], ids=["windows", "messages"])
@pytest.mark.parametrize("name", RATES)
def test_variances_never_become_negative(name: str, shared: bool) -> None:
    """Whatever the parameters' rates: statistics move by convex ones. The workers' data spread unlike, and change."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 2))
    topo = Topology(shared=shared, group_size=1 if "LSGD" in name and not shared else None)
    opt = RATES[name](torch.optim.SGD(model.parameters(), lr=0.001), topo)
    random = torch.Generator().manual_seed(WORLD.rank)
    statistics = model[0]
    errors: list[str] = []

    def look(where: str) -> None:
        least = float(statistics.running_var.min())
        if not (least >= 0 and statistics.running_var.isfinite().all()):
            errors.append(f"{where}: {statistics.running_var.tolist()}")

    for t in range(60):
        spread = 3.0 if (WORLD.rank + t // 20) % WORLD.size == 0 else 0.05
        inputs = torch.randn(16, 4, generator=random) * spread
        opt.zero_grad()
        loss = model(inputs).square().mean()
        loss.backward()
        opt.step(loss=float(WORLD.rank) if t < 40 else -float(WORLD.rank))
        look(f"t={t}")
        if (t + 1) % 20 == 0:
            with opt.center():
                look(f"t={t}, centre")
    opt.close()
    topo.free()
    check_together(errors)


# Bytes


NUMEL = 100_000


def vectors_read(shared: bool, group_size: int | None, **options: Any) -> float:
    """Vectors that all ranks together read or received in 8 steps."""
    topo = Topology(shared=shared, group_size=group_size)
    parameter = nn.Parameter(torch.zeros(NUMEL))
    opt = LSGD(torch.optim.SGD([parameter], lr=0.0), topo, period=4, global_period=8, **options)
    for _ in range(8):
        parameter.grad = torch.zeros_like(parameter)
        opt.step(loss=float(WORLD.rank))
    found = sum(WORLD.allgather(opt.metrics.bytes_group + opt.metrics.bytes_across)) / (4 * NUMEL)
    opt.close()
    topo.free()
    return found


@several
@pytest.mark.brief(2, 3)
@pytest.mark.parametrize("when", ["after_step", "with_step"])
@pytest.mark.parametrize("shared", [True, False], ids=["windows", "messages"])
def test_nothing_is_sent_for_a_rate_of_0(shared: bool, when: str) -> None:
    """And where the local and the global leader are one, it comes once."""
    topo = Topology(shared=shared)
    one, alone = topo.n_groups == 1, all(len(node) == 1 for node in topo.nodes)  # the same on every rank
    topo.free()
    if not (one or alone):
        return  # how much crosses between some nodes of some ranks is another test's
    others = WORLD.size - 1
    rounds = (2, 1)  # local and global: at 4 and 8, and at 8; with the step at 0 and 4, and at 0
    errors: list[str] = []
    for group_size in (None, 1):
        groups_of_one = group_size == 1 or alone
        for pull, global_pull in ((0.1, 0.0), (0.0, 0.1), (0.1, 0.1), (0.0, 0.0)):
            found = vectors_read(shared, group_size, pull=pull, global_pull=global_pull, when=when)
            local = pull > 0 and not groups_of_one
            expected = others * (rounds[0] if local else rounds[1] if global_pull > 0 else 0)
            if abs(found - expected) > 0.02:
                errors.append(f"group_size {group_size}, {pull}, {global_pull}: {found:.2f}, not {expected}")
    check_together(errors)


# Half types


@several
@pytest.mark.parametrize("shared", [True, False], ids=["windows", "messages"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("EASGD", {"center_rate": 0.02, "moving_rate": 0.02}),
        ("EASGD", {"center_rate": 0.02, "moving_rate": 0.02, "form": "gauss-seidel"}),
        ("EASGD", {"center_rate": 0.02, "moving_rate": 0.02, "asynchronous": True, "order": "round-robin"}),
        ("LSGD", {"pull": 0.02, "global_pull": 0.0}),
    ],
    ids=["EASGD-jacobi", "EASGD-gauss-seidel", "EASGD-turns", "LSGD"],
)
def test_small_pulls_are_felt(name: str, options: dict[str, Any], dtype: torch.dtype, shared: bool) -> None:
    """Each below half a unit in the last place: over many elements the mean moves as in float32."""
    method = {"EASGD": EASGD, "LSGD": LSGD}[name]
    reach = {torch.bfloat16: 0.08, torch.float16: 0.01}[dtype]  # times 0.02: below half a ulp

    def moved(dtype: torch.dtype) -> float:
        topo = Topology(shared=shared)
        # equal values are rounded alike, so many different ones
        wide = torch.linspace(1, 1.9, 1 << 15)
        if WORLD.rank == 0:
            wide -= reach * torch.rand(1 << 15, generator=torch.Generator().manual_seed(0))
        parameter = nn.Parameter(wide.to(torch.float16).to(dtype))
        opt = method(torch.optim.SGD([parameter], lr=0.0), topo, period=1, init="different", **options)
        start = parameter.detach().double().clone()
        for _ in range(10):
            parameter.grad = torch.zeros_like(parameter)
            opt.step(loss=float(WORLD.rank))  # rank 0 leads
        found = float((parameter.detach().double() - start).mean())
        opt.close()
        topo.free()
        return found

    expected, found = moved(torch.float32), moved(dtype)
    fine = abs(found - expected) <= 0.2 * abs(expected) + 1e-6  # rounded to nearest it would not move
    check_together([] if fine else [f"moved by {found:.2e}, in float32 by {expected:.2e}"])


# Gradients that are not numbers


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_that_is_no_number_is_not_below_any_norm(value: float) -> None:
    """until_grad_norm: of all workers, the run has diverged or is set back; it has not converged."""
    model = network()
    with wrapped_until(model, 1e-6) as opt:
        try:
            for _ in range(3):
                for p in model.parameters():
                    p.grad = torch.full_like(p, value)
                opt.step()
        except Diverged:
            assert not opt.converged
            return
        check_together([] if opt.metrics.resets and not opt.converged else [f"converged: {opt.converged}"])


@several
def test_one_gradient_that_is_no_number_holds_no_one_up() -> None:
    """Its worker is no voice for convergence, nor does it break the others."""
    model = network()
    with wrapped_until(model, 1e30) as opt:  # all others are below at once
        for t in range(4):
            for p in model.parameters():
                bad = WORLD.rank == WORLD.size - 1 and t == 0
                p.grad = torch.full_like(p, math.nan if bad else 1e-3)
            opt.step()
        check_together([] if weights(model).isfinite().all() else ["not finite"])


@contextmanager
def wrapped_until(model: nn.Module, norm: float) -> Iterator[Any]:
    topo = Topology()
    opt = LocalSGD(torch.optim.SGD(model.parameters(), lr=0.1), topo, until_grad_norm=norm)
    yield opt
    opt.close()
    topo.free()

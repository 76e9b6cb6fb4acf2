"""Broken workers, unequal workers and misuse: what must not spread, hang or go unsaid."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from harness import WORLD, check_together
from torch import nn

import mpilsgd

pytestmark = [pytest.mark.mpi(min_size=2), pytest.mark.brief(2, 3, "4x2")]

METHODS: dict[str, Callable[[Any, Any], Any]] = {
    "AllreduceSGD": lambda o, t: mpilsgd.AllreduceSGD(o, t),
    "LocalSGD": lambda o, t: mpilsgd.LocalSGD(o, t, period=1),
    "LSGD-after": lambda o, t: mpilsgd.LSGD(o, t, period=1),
    "LSGD-with": lambda o, t: mpilsgd.LSGD(o, t, period=1, when="with_step"),
    "LSGD-every": lambda o, t: mpilsgd.LSGD(o, t, period=1, when="every_step"),
    "EASGD-jacobi": lambda o, t: mpilsgd.EASGD(o, t, period=1),
    "EASGD-overlap": lambda o, t: mpilsgd.EASGD(o, t, period=1, overlap=True),
    "DiLoCo": lambda o, t: mpilsgd.DiLoCo(o, t, period=1),
    "DiLoCo-overlap": lambda o, t: mpilsgd.DiLoCo(o, t, period=2, overlap=1),
    "EASGD-seidel": lambda o, t: mpilsgd.EASGD(o, t, period=1, form="gauss-seidel"),
}
by_method = pytest.mark.parametrize("name", METHODS)
by_transport = pytest.mark.parametrize("shared", [True, False], ids=["windows", "messages"])


@contextmanager
def method(name: str, model: nn.Module, shared: bool = True, optimizer: Any = None) -> Iterator[Any]:
    """The method around the model's optimizer; closed at the end."""
    topo = mpilsgd.Topology(shared=shared)
    inner = optimizer or torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-2)
    opt = METHODS[name](inner, topo)
    yield opt
    opt.close()
    topo.free()


def train(opt: Any, model: nn.Module, steps: int, schedule: Any = None) -> None:
    data = torch.Generator().manual_seed(WORLD.rank)
    for _ in range(steps):
        x = torch.randn(8, 4, generator=data)
        opt.zero_grad()
        loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
        loss.backward()
        opt.step(loss=loss)
        if schedule is not None:
            schedule.step()


def weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()]).clone()


def on_all(value: Any) -> list[Any]:
    return WORLD.allgather(value)


@by_transport
@pytest.mark.parametrize("name", ["LocalSGD", "EASGD-seidel"])
def test_a_diverging_worker_adds_nothing(name: str, shared: bool) -> None:
    """One infinite value: the worker's other, huge values stay out of the mean and the centre, too."""
    model = nn.Linear(4, 1, bias=False)
    with method(name, model, shared) as opt:
        with torch.no_grad():
            model.weight.fill_(0.5)
            if WORLD.rank == 1:
                model.weight.copy_(torch.tensor([[math.inf, 1e30, 1.0, 1.0]]))
        model.weight.grad = torch.zeros_like(model.weight)
        for group in opt.param_groups:
            group["weight_decay"] = 0.0
        opt.step(loss=0.0)
        largest = float(weights(model).abs().max())
        check_together([] if largest < 10 else [f"{weights(model)}"])


def test_quadratic_average_of_a_worker_without_steps() -> None:
    model = nn.Linear(4, 1)
    topo = mpilsgd.Topology()
    opt = mpilsgd.LocalSGD(torch.optim.SGD(model.parameters(), lr=0.1), topo, period=2, average="quadratic")
    train(opt, model, 3 * WORLD.rank)
    with opt.center():
        centers = on_all(weights(model))
    assert all(torch.equal(c, centers[0]) for c in centers)
    opt.close()
    topo.free()


@by_transport
def test_allreduce_workers_stay_equal_with_unequal_data_and_schedules(shared: bool) -> None:
    model = nn.Linear(4, 1)
    with method("AllreduceSGD", model, shared) as opt:
        schedule = torch.optim.lr_scheduler.ExponentialLR(opt, 0.5)
        for _ in range(2):
            train(opt, model, 3 + WORLD.rank, schedule)
            with opt.center():
                pass
            after = on_all(weights(model))
            assert all(torch.equal(w, after[0]) for w in after)


def test_one_bad_gradient_while_others_are_out_of_data() -> None:
    model = nn.Linear(4, 1)
    with method("AllreduceSGD", model) as opt:
        train(opt, model, 1)
        if WORLD.rank == WORLD.size - 1:
            for p in model.parameters():
                p.grad = torch.full_like(p, math.nan)
            opt.step(loss=math.nan)
        with opt.center():
            assert all(torch.isfinite(w).all() for w in on_all(weights(model)))


@by_method
def test_memory_that_was_swapped_is_taken_back(name: str) -> None:
    """As RNN.flatten_parameters does; the training since then must survive center()."""
    model = nn.Linear(4, 1)
    with method(name, model) as opt:
        model.weight.data = model.weight.data.clone()
        train(opt, model, 3)
        before = weights(model)
        with opt.center():
            pass
        check_together([] if torch.equal(before, weights(model)) else [f"{before} became {weights(model)}"])


def test_frozen_parameters_and_counters_start_equal() -> None:
    torch.manual_seed(WORLD.rank)
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    model[0].requires_grad_(False)
    model[1].num_batches_tracked.fill_(WORLD.rank + 7)
    inner = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    with method("LSGD-after", model, optimizer=inner):
        states = on_all(copy.deepcopy(model.state_dict()))
        assert all(torch.equal(s[k], states[0][k]) for s in states for k in s)
        assert int(states[-1]["1.num_batches_tracked"]) == 7


def test_every_step_pulls_parameters_without_a_gradient() -> None:
    model = nn.Sequential(nn.Linear(4, 1, bias=False), nn.Linear(4, 1, bias=False))
    topo = mpilsgd.Topology()
    inner = mpilsgd.MSGD(model.parameters(), lr=0.1)
    opt = mpilsgd.LSGD(inner, topo, pull=0.5, global_pull=0.0, period=1, when="every_step", init="different")
    with torch.no_grad():
        model[1].weight.fill_(float(topo.world.rank))
    for _ in range(2):
        opt.zero_grad()
        model[0](torch.ones(2, 4)).square().mean().backward()
        opt.step(loss=float(topo.group.rank))
    lead = on_all(float(model[1].weight.detach()[0, 0]))
    groups = topo.groups
    expected = {r: ranks[0] + (r - ranks[0]) / 4 for ranks in groups for r in ranks}
    assert lead == pytest.approx([expected[r] for r in range(WORLD.size)])
    opt.close()
    topo.free()


@pytest.mark.brief(2)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_averages_over_time_of_half_types(dtype: torch.dtype) -> None:
    """0 for 300 steps, then 1 for 300: the averages are 1/2 and, with weights (t+1)^2, 7/8."""
    for quadratic in (False, True):
        model = nn.Linear(2, 1, bias=False).to(dtype)
        topo = mpilsgd.Topology()
        inner: Any = torch.optim.SGD(model.parameters(), lr=0.0)
        if quadratic:
            opt: Any = mpilsgd.LocalSGD(inner, topo, period=50, average="quadratic", a=1.0)
        else:
            opt = mpilsgd.LocalSGD(mpilsgd.RunningAverage(inner), topo, period=50)
        for t in range(600):
            with torch.no_grad():
                model.weight.fill_(float(t >= 300))
            model.weight.grad = torch.zeros_like(model.weight)
            opt.step()
        with opt.center():
            held = float(model.weight.detach()[0, 0])
        check_together([] if abs(held - (0.875 if quadratic else 0.5)) < 0.02 else [f"{quadratic}: {held}"])
        opt.close()
        topo.free()


def test_easgd_measures_the_distance_to_the_centre() -> None:
    for shared in (True, False):
        model = nn.Linear(4, 1, bias=False)
        with method("EASGD-jacobi", model, shared) as opt:
            train(opt, model, 3)
            with opt.center():
                center = weights(model)
            assert opt.metrics.distance == pytest.approx(float((weights(model) - center).norm()), rel=1e-5)


def test_settings_of_a_topology_that_differ() -> None:
    with pytest.raises(ValueError, match="same on every rank"):
        mpilsgd.Topology(shared=WORLD.rank == 0)
    with pytest.raises(ValueError, match="same on every rank"):
        mpilsgd.Topology(group_size=1 if WORLD.rank == 0 else None)


def linear(*sizes: int, **options: Any) -> nn.Module:
    return nn.Sequential(*(nn.Linear(a, b, **options) for a, b in itertools.pairwise(sizes)))


def tied() -> nn.Module:
    model = linear(3, 3, 3, 3)
    model[2].weight.data = model[0].weight.data
    return model


@pytest.mark.parametrize(
    ("first", "last", "difference"),
    [
        (
            lambda: linear(4, 5, 3),
            lambda: linear(4, 5, 2),
            r"parameter 1.weight is (3, 5) torch.float32 on rank 0 and (2, 5) torch.float32 on rank {}",
        ),
        (
            lambda: linear(4, 5),
            lambda: linear(4, 5, dtype=torch.float64),
            r"parameter 0.weight is (5, 4) torch.float32 on rank 0 and (5, 4) torch.float64 on rank {}",
        ),
        (
            lambda: linear(4, 5),
            lambda: linear(4, 5, 3),
            r"parameter 0.weight ((5, 4) torch.float32) is there on rank {}, but not on rank 0, "
            r"which has parameter weight",
        ),
        (
            lambda: nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5, affine=False)),
            lambda: linear(4, 5),
            r"buffer 1.running_mean ((5,) torch.float32) is there on rank 0, but not on rank {}",
        ),
        (
            lambda: nn.Conv2d(2, 3, 3),
            lambda: nn.Conv2d(2, 3, 3).to(memory_format=torch.channels_last),
            r"parameter weight has strides (18, 9, 3, 1) on rank 0 and (18, 1, 6, 2) on rank {}",
        ),
        (lambda: linear(3, 3, 3, 3), tied, r"other tensors share their memory on rank {} than on rank 0"),
    ],
    ids=["shape", "dtype", "number", "buffers", "strides", "ties"],
)
def test_models_that_differ_are_told_apart(first: Any, last: Any, difference: str) -> None:
    topo = mpilsgd.Topology()
    model = (last if WORLD.rank == WORLD.size - 1 else first)()
    with pytest.raises(ValueError) as told:
        mpilsgd.LSGD(torch.optim.SGD(model.parameters(), lr=0.1), topo)
    assert str(told.value) == f"the models differ: {difference.format(WORLD.size - 1)}"
    topo.free()


def test_settings_that_differ_are_named() -> None:
    topo = mpilsgd.Topology()
    last = WORLD.rank == WORLD.size - 1
    with pytest.raises(ValueError) as told:
        inner = torch.optim.SGD(nn.Linear(4, 1).parameters(), lr=0.1)
        mpilsgd.LSGD(inner, topo, pull=0.3 if last else 0.1, global_pull=0.1, period=16 if last else 64)
    r = WORLD.size - 1
    assert str(told.value).startswith("the settings differ: ")
    assert f"pull is 0.1 on rank 0 and 0.3 on rank {r}" in str(told.value)
    assert f"period is 64 on rank 0 and 16 on rank {r}" in str(told.value)
    assert "loss_window" not in str(told.value) and "{" not in str(told.value)
    with pytest.raises(ValueError, match=rf"differ: method is 'LocalSGD' on rank 0 and 'LSGD' on rank {r}"):
        inner = torch.optim.SGD(nn.Linear(4, 1).parameters(), lr=0.1)
        (mpilsgd.LSGD if last else mpilsgd.LocalSGD)(inner, topo)
    topo.free()


def test_recalibration_without_any_batch() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    topo = mpilsgd.Topology()
    opt = mpilsgd.LocalSGD(torch.optim.SGD(model.parameters(), lr=0.1), topo, buffers="recalibrate")
    with pytest.raises(ValueError, match="no worker had any batch"), opt.center([]):
        pass
    opt.close()
    topo.free()

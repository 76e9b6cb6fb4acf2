"""Thousands of workers as rows of an array: what the real methods give, and how long it takes."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
import torch

from mpilsgd import EASGD, LSGD, MSGD, AllreduceSGD, Downpour, LocalSGD, Topology, in_process
from mpilsgd.simulation import DoubleWell, Quadratic, SmallNet, many
from mpilsgd.simulation.objectives import Objective, noise_of

P, STEPS, LR = 4, 13, 0.05
OBJECTIVES: dict[str, Objective] = {
    "quadratic": Quadratic([0.5, 1.0, 2.0], noise=0.3, multiplicative=0.4),
    "double well": DoubleWell(dim=2, noise=0.5),
    "small network": SmallNet(inputs=3, hidden=4, batch=5),
}
METHODS: dict[str, tuple[Any, dict[str, Any]]] = {
    "AllreduceSGD": (AllreduceSGD, {}),
    "LocalSGD": (LocalSGD, {"period": 3}),
    "Downpour": (Downpour, {"period": 2, "asynchronous": False}),
    "EASGD": (EASGD, {"period": 3}),
    "EASGD-rates": (EASGD, {"period": 2, "center_rate": 0.5, "moving_rate": 0.2}),
    "EASGD-gauss-seidel": (EASGD, {"period": 3, "form": "gauss-seidel"}),
    "EASGD-turns": (EASGD, {"period": 3, "asynchronous": True, "order": "round-robin"}),
    "LSGD": (LSGD, {"pull": 0.3, "global_pull": 0.2, "period": 2, "global_period": 4, "loss_window": 3}),
    "LSGD-groups": (LSGD, {"pull": 0.3, "period": 2, "global_period": 3, "loss_window": 3, "groups": 2}),
}


def real(name: str, objective: Objective, momentum: float, seed: int) -> tuple[Any, Any]:
    """The same with a task for each worker; all draw the noise of all, and take their row."""
    method, options = METHODS[name]
    groups = options.get("groups", 1)
    options = {key: value for key, value in options.items() if key != "groups"}

    def worker() -> tuple[Any, Any]:
        topology = Topology(group_size=P // groups)
        rank = topology.world.rank
        x = torch.nn.Parameter(objective.start(P, seed)[rank].clone())
        own: Any = MSGD([x], lr=LR, momentum=momentum) if momentum else torch.optim.SGD([x], lr=LR)
        opt = method(own, topology, **options)
        for t in range(STEPS):
            noise = objective.draw(noise_of(seed, t), P)
            noise = type(noise)(*(v if v is None else v[rank : rank + 1] for v in noise))
            x.grad = objective.gradient(x.detach()[None], noise)[0]
            opt.step(loss=float(objective.loss(x.detach()[None], noise)))
        with own.iterate() if momentum else torch.no_grad():
            found = x.detach().clone()
        with opt.center():
            return found, x.detach().clone()

    every = in_process(worker, P)
    return torch.stack([x for x, _ in every]), every[0][1]


@pytest.mark.parametrize(
    ("name", "objective", "momentum"),
    [
        *((name, "quadratic", 0.0) for name in METHODS),
        *((name, "small network", 0.7) for name in ("EASGD", "EASGD-gauss-seidel", "LocalSGD", "LSGD")),
        *((name, "double well", 0.0) for name in ("LSGD-groups", "EASGD")),
    ],
)
def test_the_real_methods_give_the_same(name: str, objective: str, momentum: float) -> None:
    f, (method, options) = OBJECTIVES[objective], METHODS[name]
    options = {key: value for key, value in options.items() if key != "order"}
    if method is Downpour:
        options.pop("asynchronous")
    x, centre = real(name, f, momentum, seed=5)
    crowd = many(method, f, P, STEPS, lr=LR, momentum=momentum, seed=5, **options)
    assert float((crowd.x - x).abs().max()) < 1e-12
    assert float((crowd.centre - centre).abs().max()) < 1e-12


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_gradients_are_those_of_the_losses(objective: str) -> None:
    f = OBJECTIVES[objective]
    x = (f.start(6, 1) + torch.linspace(-1, 1, 6)[:, None]).requires_grad_()
    noise = f.draw(noise_of(0, 0), 6)
    f.loss(x, noise).sum().backward()
    assert torch.allclose(x.grad, f.gradient(x.detach(), noise), atol=1e-14)


def test_noise_is_of_the_seed_and_the_step_alone() -> None:
    f = Quadratic(noise=1.0, multiplicative=0.5)
    one, again, other = (f.draw(noise_of(3, t), 1000) for t in (7, 7, 8))
    assert torch.equal(one.additive, again.additive) and not torch.equal(one.additive, other.additive)
    assert abs(float(one.factor.mean()) - 1) < 0.1 and abs(float(one.factor.std()) - 0.5) < 0.1
    assert abs(float(one.additive.std()) - 1) < 0.1


def test_the_spread_of_independent_workers_is_what_it_should_be() -> None:
    """x <- x - eta (x + z): variance eta^2/(1 - (1 - eta)^2) in the end; the mean of p workers has a p-th of it."""
    watched = many(
        "LocalSGD",
        Quadratic(noise=1.0),
        2000,
        300,
        lr=0.2,
        period=10**9,
        watch=lambda t, x, c: (t, float(x.var())),
        every=100,
    ).seen
    assert [t for t, _ in watched] == [100, 200, 300]
    assert watched[-1][1] == pytest.approx(0.04 / (1 - 0.64), rel=0.1)


def test_workers_in_turn_when_they_are_many() -> None:
    """The sums are made in parts: as one after the other."""
    x = torch.from_numpy(np.random.default_rng(0).standard_normal((50, 2)))
    crowd = many(
        "EASGD", Quadratic(0.0, dim=2), 50, 1, start=x, center_rate=20.0, moving_rate=0.3, asynchronous=True
    )
    c, rows = x.mean(0), []
    for row in x:
        rows.append(row - 0.3 * (row - c))
        c = c + 0.4 * (row - c)
    assert torch.allclose(crowd.x, torch.stack(rows), atol=1e-12) and torch.allclose(
        crowd.centre, c, atol=1e-12
    )


@pytest.mark.parametrize(
    ("name", "options", "match"),
    [
        ("ADMM", {}, "method must be one of EASGD, LSGD"),
        ("EASGD", {"tau": 3}, "EASGD: .*unexpected keyword argument 'tau'"),
        ("EASGD", {"form": "other"}, "form must be jacobi"),
        ("LSGD", {"groups": 3}, "groups=3 must divide the number of workers, 4"),
    ],
)
def test_bad_arguments_are_refused(name: str, options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        many(name, Quadratic(), 4, 1, **options)


@pytest.mark.slow
def test_ten_thousand_workers_take_ten_thousand_steps_in_a_minute() -> None:
    start = time.perf_counter()
    crowd = many("EASGD", Quadratic(noise=1.0), 10_000, 10_000, period=10)
    assert time.perf_counter() - start < 60 and abs(float(crowd.centre)) < 0.1

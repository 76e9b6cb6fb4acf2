"""Wrong arguments of every method: refused on every rank, by name, before anything is exchanged."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from harness import LAYOUTS, WORLD, Case, check_together, running
from method_cases import refused, refuses, several
from problems import Quadratic, TanhNet
from simulation import Local

from mpilsgd import ADMM, EASGD, LSGD, AllreduceSGD, DiLoCo, Downpour, EASGDTree, LocalSGD, Topology

pytestmark = [pytest.mark.mpi, pytest.mark.ranks(1, 2, 3), pytest.mark.brief(1, 2)]

ASYNCHRONOUS: dict[str, Any] = {"asynchronous": True}
METHODS = (AllreduceSGD, LocalSGD, LSGD, EASGD, Downpour, ADMM)
FINE: dict[Any, dict[str, Any]] = {ADMM: {"rho": 1.0}}  # what a method cannot be made without
# The argument that has to be named is the first, unless a pattern stands before the options.
WRONG: list[tuple[Any, ...]] = [
    *((LSGD, {"pull": value}) for value in (1.5, -0.1, math.nan)),
    *((LSGD, {"global_pull": value}) for value in (2.0, -1.0)),
    *((method, {"period": value}) for method in (LSGD, EASGD, LocalSGD) for value in (0, -3, 2.5)),
    *((LSGD, {"global_period": value}) for value in (0, 1.5)),
    (LSGD, {"loss_window": 0}),
    (LSGD, {"when": "sometimes"}),
    (LSGD, {"score": 3}),
    *((LSGD, {"asynchronous": value}) for value in ("sometimes", None, 2)),
    *((LSGD, {"when": when, "asynchronous": "wait-free"}) for when in ("with_step", "every_step")),
    (LocalSGD, {"average": "cubic"}),
    (LocalSGD, {"until_grad_norm": -1.0}),
    (LocalSGD, {"period": "never"}),
    (LocalSGD, {"a": -5.0, "average": "quadratic"}),
    *((EASGD, {"center_rate": value}) for value in (-0.1, math.nan)),
    (EASGD, {"moving_rate": math.inf}),
    (EASGD, {"form": "sor"}),
    *((EASGD, {"overlap": value}) for value in (None, "")),
    (EASGD, {"overlap": True, "form": "gauss-seidel"}),
    (EASGD, {"overlap": True, "form": "gauss-seidel", **ASYNCHRONOUS}),
    *((EASGD, {"asynchronous": value}) for value in ("wait-free", None, 2)),
    (DiLoCo, {"fragments": 10_000, "period": 10_000}),
    (DiLoCo, {"fragments": 3, "period": 10}),
    (DiLoCo, {"outer_momentum": 1.5}),
    (DiLoCo, {"fragments": 2, "period": 8, "overlap": 4}),
    (DiLoCo, {"overlap": -1}),
    (DiLoCo, {"overlap": True, "period": 8}),
    (DiLoCo, {"mixing": -0.1}),
    (DiLoCo, {"outer": lambda parameters: parameters}),
    (DiLoCo, {"outer": lambda parameters: torch.optim.SGD(parameters[:1], lr=1.0)}),
    (DiLoCo, {"outer": lambda parameters: 1 / 0}),
    (DiLoCo, {"outer": lambda parameters: torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)}),
    (DiLoCo, {"outer": torch.optim.LBFGS}),  # its step takes a closure
    *(
        (DiLoCo, {**more, **ASYNCHRONOUS})
        for more in ({"mixing": 0.5}, {"fragments": 2}, {"overlap": 1}, {"outer": torch.optim.Adam})
    ),
    (Downpour, {"period": 2, "momentum": 0.5}),
    *((Downpour, {"momentum": value}) for value in (-0.1, 1.5, math.nan, "much")),
    *((Downpour, {"average": value}) for value in ("mean", 0, -0.1, 1.5, math.nan, True)),
    *((Downpour, {"period": value}) for value in (0, 1.5)),
    *((ADMM, {"rho": value}) for value in (0, -1.0, math.inf, math.nan, "1")),
    *((method, {"order": "random", **ASYNCHRONOUS}) for method in (EASGD, Downpour, LSGD)),
    (ADMM, {"order": "random", "rho": 1.0, **ASYNCHRONOUS}),
    *((method, {"order": "round-robin"}) for method in (EASGD, LSGD)),
    (Downpour, {"order": "round-robin", "asynchronous": False}),
    *((method, {word: "file"}) for method in (EASGD, LSGD) for word in ("record", "replay")),
    *((method, {"record": 3, **ASYNCHRONOUS}) for method in (EASGD, Downpour, LSGD)),
    (EASGD, "record|replay", {"record": "file", "replay": "file", **ASYNCHRONOUS}),
    (EASGD, {"replay": "file", "order": "round-robin", **ASYNCHRONOUS}),
    *((method, {word: "drop", **FINE.get(method, {})}) for method in METHODS for word in ("init", "buffers")),
]
TREE: list[tuple[dict[str, Any], str]] = [
    ({"degree": 1}, "degree"),
    ({"degree": 2.5}, "degree"),
    ({"moving_rate": 1.5}, "moving_rate"),
    ({"scheme": "down-up"}, "scheme"),
    ({"scheme": "up-down", "up_period": 9, "down_period": 3}, "up_period=9 is larger"),
    ({"period": 0}, "period"),
    ({"scheme": "up-down", "period": 3}, 'period is of scheme="multi-scale"'),
    ({"up_period": 2}, 'up_period is of scheme="up-down"'),
    ({"inner": "guests"}, "inner"),
    ({"order": "round-robin"}, "order"),
    ({"buffers": "keep"}, "buffers must be one of"),
]


@pytest.mark.parametrize("method", METHODS)
def test_wrong_arguments_are_refused(method: Any) -> None:
    """Also where only one rank's are wrong; and the topology goes on working after it."""
    topo = Topology()
    for kind, *match, options in WRONG:
        if kind is method:
            for own in (options, options if WORLD.rank == WORLD.size - 1 else FINE.get(method, {})):
                refuses(topo, method, (*match, next(iter(options)))[0], Quadratic(), own)
    topo.free()


@several
def test_wrong_arguments_of_a_tree_are_refused() -> None:
    topo = Topology()
    for options, match in TREE:
        refuses(topo, EASGDTree, match, Quadratic(), options)
    topo.free()


def test_group_sizes_that_do_not_fit() -> None:
    for size in (0, -1, 1.5, WORLD.size + 1):
        with pytest.raises(ValueError, match="group_size"):
            Topology(group_size=size)  # type: ignore[arg-type]


def test_leader_sgd_needs_a_loss() -> None:
    with running(Case(LSGD), TanhNet(), Local(), LAYOUTS[0]) as run:
        run.problem.loss(run.model, 0, 0).backward()
        with pytest.raises((TypeError, ValueError), match="loss"):
            run.opt.step()
        check_together([])


@several
def test_settings_that_differ_are_refused() -> None:
    mine = WORLD.rank == 0
    refused(EASGD, "differ", asynchronous=mine)
    refused(EASGD, "differ", asynchronous=True, order="free" if mine else "round-robin")
    refused(EASGD, "differ", asynchronous=True, overlap=mine)
    refused(EASGD, "differ", asynchronous=True, record="file" if mine else None)
    refused(LSGD, "differ", asynchronous="wait-free" if mine else True)
    refused(Downpour, "differ", momentum=0.5 * mine)
    refused(Downpour, "differ", average="running" if mine else None)
    refused(ADMM, "differ", rho=1.0 + mine)


def test_admm_has_one_rate() -> None:
    """η stands in the centre's pull, for all parameters alike."""
    topo = Topology()
    model = torch.nn.Linear(3, 2)
    sgd = torch.optim.SGD([{"params": [model.weight], "lr": 0.1}, {"params": [model.bias]}], lr=0.2)
    with pytest.raises(ValueError, match=r"lr|learning rate"):
        ADMM(sgd, topo, rho=1.0)
    topo.free()

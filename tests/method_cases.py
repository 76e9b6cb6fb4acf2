"""The list of methods that the tests under MPI go through: every class, form and exchange, and the shorter lists of it.

Asynchronous methods come twice: in turns (`in_turns`, round-robin order), where an oracle says what each step gives,
and in free order (`FREE`), where only what every order keeps can be asked.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from harness import FEW, LAYOUTS, MESSAGES, WORLD, Case, Layout, Run, distance
from numpy.typing import NDArray
from problems import Problem, TanhNet
from simulation import Local

from mpilsgd import ADMM, EASGD, LSGD, AllreduceSGD, DiLoCo, Downpour, LocalSGD, Topology

Vector = NDArray[np.float64]


def in_turns(method: Any, name: str, **options: Any) -> Case:
    return Case(method, {"asynchronous": True, "order": "round-robin", **options}, name)


def free(method: Any, name: str, **options: Any) -> Case:
    return Case(method, {"asynchronous": True, **options}, name)


def nesterov(parameters: list[torch.Tensor]) -> torch.optim.Optimizer:
    """DiLoCo's default, made by torch."""
    return torch.optim.SGD(parameters, lr=0.7, momentum=0.9, nesterov=True)


PULLS = {"pull": 0.3, "global_pull": 0.2, "loss_window": 3}
TWO = {**PULLS, "period": 2, "global_period": 4}
RATES = {"center_rate": 0.5, "moving_rate": 0.2}
SYNCHRONOUS = [
    Case(AllreduceSGD),
    Case(LocalSGD, {"period": 3}, "period"),
    Case(LocalSGD, {"period": {2, 5, 6, 11}}, "set"),
    Case(LocalSGD, {"period": lambda t: t % 4 == 1}, "callable"),
    Case(LocalSGD, {"period": None}, "one-shot"),
    Case(LocalSGD, {"period": 3, "average": "quadratic", "a": 5.0}, "quadratic"),
    Case(DiLoCo, {"period": 3}, "nesterov"),
    Case(DiLoCo, {"period": 4, "fragments": 2, "mixing": 0.3}, "fragments"),
    Case(DiLoCo, {"period": 2, "outer": nesterov}, "outer"),
    Case(DiLoCo, {"period": 6, "fragments": 2, "mixing": 0.5, "overlap": 2}, "overlap"),
    Case(LSGD, TWO, "after-step"),
    Case(LSGD, {**TWO, "sequential": True, "loss_window": 1}, "sequential"),
    Case(LSGD, {**TWO, "global_pull": None, "global_period": None}, "defaults"),
    Case(LSGD, {**TWO, "period": 3, "global_period": 2}, "global-oftener"),
    Case(LSGD, {**TWO, "when": "with_step"}, "with-step"),
    Case(LSGD, {**TWO, "when": "with_step", "sequential": True}, "with-step-sequential"),
    Case(LSGD, {**TWO, "when": "every_step"}, "every-step"),
    Case(EASGD, {"period": 3}, "jacobi"),
    Case(EASGD, {"period": 2, **RATES}, "jacobi-rates"),
    Case(EASGD, {"period": 2, "overlap": True}, "overlap"),
    Case(EASGD, {"period": 3, "form": "gauss-seidel"}, "gauss-seidel"),
    Case(EASGD, {"period": 1, "form": "gauss-seidel", **RATES}, "gauss-seidel-rates"),
    *(Case(Downpour, {"period": tau, "asynchronous": False}, f"synchronous-{tau}") for tau in (1, 3)),
    Case(Downpour, {"momentum": 0.6, "average": 0.3, "asynchronous": False}, "synchronous-momentum"),
    Case(Downpour, {"period": 3, "average": "running", "asynchronous": False}, "synchronous-running"),
    Case(ADMM, {"rho": 0.4}, "synchronous"),
]
TURNS = [
    *(in_turns(EASGD, f"turns-{tau}", period=tau) for tau in (1, 3)),
    in_turns(EASGD, "turns-rates", period=2, center_rate=0.5, moving_rate=0.3),
    *(in_turns(EASGD, f"turns-gauss-seidel-{tau}", period=tau, form="gauss-seidel") for tau in (1, 3)),
    *(in_turns(EASGD, f"turns-overlap-{tau}", period=tau, overlap=True) for tau in (1, 3)),
    *(in_turns(Downpour, f"turns-{tau}", period=tau) for tau in (1, 3)),
    in_turns(Downpour, "turns-momentum", momentum=0.6),
    *(in_turns(Downpour, f"turns-running-{tau}", period=tau, average="running") for tau in (1, 3)),
    in_turns(Downpour, "turns-moving", period=2, average=0.3),
    in_turns(Downpour, "turns-momentum-running", momentum=0.6, average="running"),
    in_turns(DiLoCo, "turns-3", period=3),
    in_turns(DiLoCo, "turns-1", period=1, outer_momentum=0.6),
    in_turns(ADMM, "turns", rho=1.5),
    in_turns(LSGD, "turns-1", period=1, global_period=2, **PULLS),
    in_turns(LSGD, "turns-3", period=3, global_period=6, sequential=True, **PULLS),
    in_turns(LSGD, "turns-with-step", period=3, global_period=3, when="with_step", **PULLS),
    in_turns(LSGD, "wait-free-1", asynchronous="wait-free", period=1, global_period=1, **PULLS),
    in_turns(LSGD, "wait-free-3", asynchronous="wait-free", period=3, global_period=2, **PULLS),
    in_turns(LSGD, "wait-free-pair", asynchronous="wait-free", period=2, sequential=True, **PULLS),
]
CASES = [*SYNCHRONOUS, *TURNS]
BY_NAME = {str(case): case for case in CASES}


def named(*names: str) -> list[Case]:
    return [BY_NAME[name] for name in names]


# Every form once: what moves where, and when. The rest of the list differs in numbers only.
FORMS = named(
    "AllreduceSGD",
    "LocalSGD-period",
    "LocalSGD-quadratic",
    "DiLoCo-fragments",
    "DiLoCo-outer",
    "DiLoCo-overlap",
    "LSGD-after-step",
    "LSGD-with-step",
    "LSGD-every-step",
    "EASGD-jacobi",
    "EASGD-overlap",
    "EASGD-gauss-seidel",
    "Downpour-synchronous-3",
    "ADMM-synchronous",
    "EASGD-turns-3",
    "EASGD-turns-gauss-seidel-3",
    "EASGD-turns-overlap-3",
    "DiLoCo-turns-3",
    "Downpour-turns-3",
    "Downpour-turns-running-3",
    "Downpour-turns-momentum",
    "ADMM-turns",
    "LSGD-turns-1",
    "LSGD-wait-free-1",
)
# One of every exchange: together, behind, in turn (windows of one or of several vectors), published.
EXCHANGES = named(
    "AllreduceSGD",
    "LocalSGD-period",
    "LSGD-after-step",
    "EASGD-jacobi",
    "EASGD-overlap",
    "EASGD-gauss-seidel",
    "EASGD-turns-3",
    "EASGD-turns-overlap-3",
    "Downpour-turns-3",
    "ADMM-turns",
    "LSGD-turns-1",
    "LSGD-wait-free-1",
)
FREE = [
    free(EASGD, "", period=2),
    free(EASGD, "gauss-seidel", period=2, form="gauss-seidel"),
    free(EASGD, "overlap", period=2, overlap=True),
    free(Downpour, "", period=2),
    free(Downpour, "momentum-running", momentum=0.6, average="running"),
    free(DiLoCo, "", period=2),
    free(ADMM, "", rho=0.5),
    free(LSGD, "", period=2, global_period=4, **PULLS),
    free(LSGD, "wait-free", asynchronous="wait-free", period=2, global_period=4, **PULLS),
]
SGD = Local(lr=0.05, weight_decay=0.02)
MSGD = Local("msgd", lr=0.05, momentum=0.7, nesterov=True, weight_decay=0.02)
LOCALS = {
    "SGD": Local(lr=0.05),
    "torch momentum": Local("momentum", lr=0.05, momentum=0.7, weight_decay=0.02),
    "torch nesterov": Local("momentum", lr=0.05, momentum=0.7, nesterov=True, weight_decay=0.02),
    "MSGD nesterov": MSGD,
    "MSGD heavy ball": Local("msgd", lr=0.05, momentum=0.7),
}
BOTH = [LAYOUTS[0], MESSAGES]
by_form = pytest.mark.parametrize("case", FORMS, ids=str)
by_exchange = pytest.mark.parametrize("case", EXCHANGES, ids=str)
by_layout = pytest.mark.parametrize("layout", FEW, ids=str)
by_transport = pytest.mark.parametrize("layout", BOTH, ids=str)
by_free = pytest.mark.parametrize("case", FREE, ids=str)
# Every method through windows, some through messages, too: a run of four ranks on two cores takes its time.
by_free_and_transport = pytest.mark.parametrize(
    ("case", "layout"),
    [
        *((case, LAYOUTS[0]) for case in FREE),
        *(
            (case, MESSAGES)
            for case in FREE
            if case.name in ("", "wait-free") and case.method is not Downpour
        ),
    ],
    ids=str,
)
several = pytest.mark.mpi(min_size=2)


def close(a: Vector, b: Vector, label: str = "", tolerance: float = 1e-12) -> list[str]:
    gap = distance(a, b)
    return [] if gap <= tolerance else [f"{label}: differs by {gap:.1e}"]


def work(
    run: Run, total: int, seed: int = 0, longest: float = 0.0, step: Callable[[], Any] | None = None
) -> None:
    """Steps until all workers together have taken `total`, each with pauses of up to `longest` seconds."""
    pauses = np.random.default_rng([seed, run.rank])
    while not run.opt.reached(total):
        if longest:
            time.sleep(pauses.uniform(0, longest))
        (step or run.step)()


def one_rank(layout: Layout) -> Layout:
    return Layout(None, layout.shared, ((0,),))


def refused(method: Any, match: str, *, problem: Problem | None = None, **options: Any) -> None:
    """On every rank; and the topology goes on working after it."""
    topo = Topology()
    refuses(topo, method, match, problem or TanhNet(), options)
    topo.free()


def refuses(topo: Topology, method: Any, match: str, problem: Problem, options: dict[str, Any]) -> None:
    model = problem.build(torch.float64, problem.start(0))
    with pytest.raises(ValueError, match=match):
        method(torch.optim.SGD(model.parameters(), lr=0.05), topo, **options)
    assert topo.allgather(1) == [1] * WORLD.size

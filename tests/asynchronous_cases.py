"""The asynchronous methods that the tests under MPI run, in turns beside the oracle and freely."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import asynchronous_simulation as turns
import numpy as np
import pytest
import torch
from harness import (
    FEW,
    LAYOUTS,
    Case,
    Layout,
    Run,
    distance,
)
from numpy.typing import NDArray
from problems import Problem, TanhNet
from simulation import LSGD as SimulatedLSGD
from simulation import Local, Simulation

from mpilsgd import ADMM, EASGD, LSGD, Downpour, Topology

Vector = NDArray[np.float64]


class Turns(Case):
    """A method in round-robin order, where it is asynchronous; its simulation is the oracle's."""

    def simulate(self, problem: Problem, local: Local, layout: Layout, **options: Any) -> Simulation:
        own = {name: value for name, value in self.options.items() if name not in ("order", "asynchronous")}
        workers = sum(len(group) for group in layout.groups)
        if self.method is LSGD:
            wait_free = self.options["asynchronous"] == "wait-free"
            kind: Any = turns.WaitFreeLSGD if wait_free else SimulatedLSGD
            return kind(problem, workers, local, groups=layout.groups, **own, **options)
        if self.method is Downpour:
            own["asynchronous"] = self.options.get("asynchronous", True)
        made: Simulation = getattr(turns, self.method.__name__)(problem, workers, local, **own, **options)
        return made


def in_turns(method: Any, name: str, **options: Any) -> Turns:
    return Turns(method, {"asynchronous": True, "order": "round-robin", **options}, name)


def free(method: Any, name: str, **options: Any) -> Case:
    return Case(method, {"asynchronous": True, **options}, name)


PULLS = {"pull": 0.3, "global_pull": 0.2, "loss_window": 3}
CASES = [
    *(in_turns(EASGD, f"{tau}", period=tau) for tau in (1, 3)),
    in_turns(EASGD, "rates", period=2, center_rate=0.5, moving_rate=0.3),
    *(in_turns(EASGD, f"gauss-seidel-{tau}", period=tau, form="gauss-seidel") for tau in (1, 3)),
    *(in_turns(EASGD, f"overlap-{tau}", period=tau, overlap=True) for tau in (1, 3)),
    *(in_turns(Downpour, f"{tau}", period=tau) for tau in (1, 3)),
    in_turns(Downpour, "momentum", momentum=0.6),
    *(in_turns(Downpour, f"running-{tau}", period=tau, average="running") for tau in (1, 3)),
    in_turns(Downpour, "moving", period=2, average=0.3),
    in_turns(Downpour, "momentum-running", momentum=0.6, average="running"),
    *(Turns(Downpour, {"period": tau, "asynchronous": False}, f"synchronous-{tau}") for tau in (1, 3)),
    Turns(Downpour, {"momentum": 0.6, "average": 0.3, "asynchronous": False}, "synchronous-momentum"),
    Turns(Downpour, {"period": 3, "average": "running", "asynchronous": False}, "synchronous-running"),
    in_turns(ADMM, "asynchronous", rho=1.5),
    Turns(ADMM, {"rho": 0.4}),
    in_turns(LSGD, "1", period=1, global_period=2, **PULLS),
    in_turns(LSGD, "3", period=3, global_period=6, sequential=True, **PULLS),
    in_turns(LSGD, "with-step", period=3, global_period=3, when="with_step", **PULLS),
    in_turns(LSGD, "wait-free-1", asynchronous="wait-free", period=1, global_period=1, **PULLS),
    in_turns(LSGD, "wait-free-3", asynchronous="wait-free", period=3, global_period=2, **PULLS),
    in_turns(LSGD, "wait-free-pair", asynchronous="wait-free", period=2, sequential=True, **PULLS),
]
BY_NAME = {str(case): case for case in CASES}
SOME = [
    BY_NAME[name]
    for name in (
        "EASGD-3",
        "EASGD-gauss-seidel-3",
        "EASGD-overlap-3",
        "Downpour-3",
        "Downpour-running-3",
        "Downpour-momentum",
        "ADMM-asynchronous",
        "LSGD-1",
        "LSGD-wait-free-1",
    )
]
ONE_EACH = [case for case in SOME if case.name in ("3", "overlap-3", "asynchronous", "wait-free-1", "1")]
FREE = [
    free(EASGD, "", period=2),
    free(EASGD, "gauss-seidel", period=2, form="gauss-seidel"),
    free(EASGD, "overlap", period=2, overlap=True),
    free(Downpour, "", period=2),
    free(Downpour, "momentum-running", momentum=0.6, average="running"),
    free(ADMM, "", rho=0.5),
    free(LSGD, "", period=2, global_period=4, **PULLS),
    free(LSGD, "wait-free", asynchronous="wait-free", period=2, global_period=4, **PULLS),
]
SGD = Local(lr=0.05, weight_decay=0.02)
MSGD = Local("msgd", lr=0.05, momentum=0.7, nesterov=True, weight_decay=0.02)
LOCALS = {
    "torch nesterov": Local("momentum", lr=0.05, momentum=0.7, nesterov=True, weight_decay=0.02),
    "MSGD nesterov": MSGD,
    "MSGD heavy ball": Local("msgd", lr=0.05, momentum=0.7),
}
MESSAGES = next(layout for layout in LAYOUTS if not layout.shared)
BOTH = [LAYOUTS[0], MESSAGES]
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


def refused(method: Any, match: str, *, problem: Problem | None = None, **options: Any) -> None:
    """On every rank; and the topology goes on working after it."""
    topo = Topology()
    refuses(topo, method, match, problem or TanhNet(), options)
    topo.free()


def refuses(topo: Topology, method: Any, match: str, problem: Problem, options: dict[str, Any]) -> None:
    model = problem.build(torch.float64, problem.start(0))
    with pytest.raises(ValueError, match=match):
        method(torch.optim.SGD(model.parameters(), lr=0.05), topo, **options)
    assert topo.allgather(1) == [1] * topo.world.size

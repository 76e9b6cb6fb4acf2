"""A cluster, and methods on it, for the tests of simulations."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from test_in_process import Worker

from mpilsgd import ADMM, EASGD, LSGD, AllreduceSGD, DiLoCo, Downpour, EASGDTree, LocalSGD
from mpilsgd.simulation import Network, clock

FREE = Network(math.inf, 0.0, math.inf, 0.0)
SLOW = Network(bandwidth=1e6, latency=1e-3, memory=1e7, local_latency=1e-5)
MB = 1_000_000
near = pytest.approx


def step_seconds(rank: int, step: int, random: Any) -> float:
    return random.uniform(0.001, 0.02)  # type: ignore[no-any-return]


def trains(method: Any, steps: int = 8, size: int = 5, **options: Any) -> Any:
    """Gives where every worker ended, and its method's metrics; `steps` are those of each, or of all together."""

    def worker() -> Any:
        w = Worker(method, options, np.linspace(-1, 1, size), init="same")
        begun, total = clock(), steps * len(w.opt.workers)
        while not w.opt.reached(total):
            w.step(np.sin(w.x() + w.world.rank), loss=float(np.square(w.x() + w.world.rank).sum()))
        return w.x().tobytes(), clock() - begun, w.opt.metrics, w.opt.t

    return worker


SYNCHRONOUS: dict[str, tuple[Any, dict[str, Any]]] = {
    "AllreduceSGD": (AllreduceSGD, {}),
    "LocalSGD": (LocalSGD, {"period": 3}),
    "DiLoCo": (DiLoCo, {"period": 3}),
    "DiLoCo-overlap": (DiLoCo, {"period": 6, "fragments": 2, "overlap": 2}),
    "LSGD": (LSGD, {"period": 2, "global_period": 4, "pull": 0.3}),
    "LSGD-every-step": (LSGD, {"period": 2, "when": "every_step"}),
    "EASGD": (EASGD, {"period": 2}),
    "EASGD-overlap": (EASGD, {"period": 2, "overlap": True}),
    "EASGD-gauss-seidel": (EASGD, {"period": 2, "form": "gauss-seidel"}),
    "Downpour": (Downpour, {"period": 2, "asynchronous": False}),
    "ADMM": (ADMM, {"rho": 0.5}),
    "EASGDTree": (EASGDTree, {"degree": 2, "period": 1, "upper_period": 2, "order": "lock-step"}),
}

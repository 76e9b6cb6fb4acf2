"""mpilsgd: train PyTorch models on many MPI processes that talk rarely.

Importing this starts no MPI: what it names is loaded when it is first used.
"""

from __future__ import annotations

import importlib
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mpilsgd.comm import Deadlock, NoMPI, Topology, WorkerFailed, in_process
    from mpilsgd.extension import FallbackWarning
    from mpilsgd.flat import FlatParameters
    from mpilsgd.methods import (
        ADMM,
        EASGD,
        LSGD,
        AllreduceSGD,
        DiLoCo,
        Diverged,
        Downpour,
        EASGDTree,
        LocalSGD,
        Method,
        Metrics,
    )
    from mpilsgd.optimizers import MSGD, RunningAverage
    from mpilsgd.simulation import Died, Network, Simulated, lognormal, simulate, stragglers

try:
    __version__ = version("mpilsgd")
except PackageNotFoundError:  # run from a checkout that is not installed
    __version__ = "0+unknown"

__all__ = [
    "ADMM",
    "EASGD",
    "LSGD",
    "MSGD",
    "AllreduceSGD",
    "Deadlock",
    "DiLoCo",
    "Died",
    "Diverged",
    "Downpour",
    "EASGDTree",
    "FallbackWarning",
    "FlatParameters",
    "LocalSGD",
    "Method",
    "Metrics",
    "Network",
    "NoMPI",
    "RunningAverage",
    "Simulated",
    "Topology",
    "WorkerFailed",
    "__version__",
    "in_process",
    "lognormal",
    "simulate",
    "stragglers",
]

_HOMES = {  # of the others: mpilsgd.methods
    "comm": ("Deadlock", "NoMPI", "Topology", "WorkerFailed", "in_process"),
    "extension": ("FallbackWarning",),
    "flat": ("FlatParameters",),
    "optimizers": ("MSGD", "RunningAverage"),
    "simulation": ("Died", "Network", "Simulated", "lognormal", "simulate", "stragglers"),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"mpilsgd.{_HOME.get(name, 'methods')}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

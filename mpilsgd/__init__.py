"""mpilsgd: train PyTorch models on many MPI processes that talk rarely.

Importing this starts no MPI: what it names is loaded when it is first used.
"""

from __future__ import annotations

import importlib
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mpilsgd.comm import Topology, in_process
    from mpilsgd.flat import FlatParameters
    from mpilsgd.methods import (
        ADMM,
        EASGD,
        LSGD,
        AllreduceSGD,
        DiLoCo,
        Downpour,
        EASGDTree,
        LocalSGD,
    )
    from mpilsgd.optimizers import MSGD, RunningAverage
    from mpilsgd.simulation import simulate

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
    "DiLoCo",
    "Downpour",
    "EASGDTree",
    "FlatParameters",
    "LocalSGD",
    "RunningAverage",
    "Topology",
    "__version__",
    "in_process",
    "simulate",
]

_ELSEWHERE = {"Topology": "mpilsgd.comm", "in_process": "mpilsgd.comm", "FlatParameters": "mpilsgd.flat"}
_ELSEWHERE["simulate"] = "mpilsgd.simulation"
_ELSEWHERE |= dict.fromkeys(("MSGD", "RunningAverage"), "mpilsgd.optimizers")


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_ELSEWHERE.get(name, "mpilsgd.methods")), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

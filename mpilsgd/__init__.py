"""mpilsgd: train PyTorch models on many MPI processes that talk rarely."""

from importlib.metadata import PackageNotFoundError, version

from mpilsgd.comm import Topology
from mpilsgd.flat import FlatParameters
from mpilsgd.methods import (
    ADMM,
    EASGD,
    LSGD,
    MSGD,
    AllreduceSGD,
    Downpour,
    EASGDTree,
    LocalSGD,
    RunningAverage,
)

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
    "Downpour",
    "EASGDTree",
    "FlatParameters",
    "LocalSGD",
    "RunningAverage",
    "Topology",
    "__version__",
]

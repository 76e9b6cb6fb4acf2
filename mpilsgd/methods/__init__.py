"""The training methods: each a `torch.optim.Optimizer` that wraps another one."""

from mpilsgd.methods.admm import ADMM
from mpilsgd.methods.allreduce import AllreduceSGD
from mpilsgd.methods.base import Diverged, Method
from mpilsgd.methods.downpour import Downpour
from mpilsgd.methods.easgd import EASGD
from mpilsgd.methods.easgd_tree import EASGDTree
from mpilsgd.methods.localsgd import LocalSGD
from mpilsgd.methods.lsgd import LSGD
from mpilsgd.methods.metrics import Metrics
from mpilsgd.methods.msgd import MSGD
from mpilsgd.methods.running_average import RunningAverage

__all__ = [
    "ADMM",
    "EASGD",
    "LSGD",
    "MSGD",
    "AllreduceSGD",
    "Diverged",
    "Downpour",
    "EASGDTree",
    "LocalSGD",
    "Method",
    "Metrics",
    "RunningAverage",
]

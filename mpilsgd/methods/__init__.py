"""The training methods: each a `torch.optim.Optimizer` that wraps another one."""

from mpilsgd.methods.allreduce import AllreduceSGD
from mpilsgd.methods.base import Diverged, Method, Metrics
from mpilsgd.methods.easgd import EASGD
from mpilsgd.methods.local import MSGD, RunningAverage
from mpilsgd.methods.localsgd import LocalSGD
from mpilsgd.methods.lsgd import LSGD

__all__ = [
    "EASGD",
    "LSGD",
    "MSGD",
    "AllreduceSGD",
    "Diverged",
    "LocalSGD",
    "Method",
    "Metrics",
    "RunningAverage",
]

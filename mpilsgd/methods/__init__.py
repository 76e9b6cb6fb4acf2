"""The training methods: each a rule, in the equations of its paper."""

from mpilsgd.exchange import Diverged, Method, Metrics
from mpilsgd.methods.admm import ADMM
from mpilsgd.methods.allreduce import AllreduceSGD
from mpilsgd.methods.diloco import DiLoCo
from mpilsgd.methods.downpour import Downpour
from mpilsgd.methods.easgd import EASGD
from mpilsgd.methods.easgd_tree import EASGDTree
from mpilsgd.methods.localsgd import LocalSGD
from mpilsgd.methods.lsgd import LSGD

__all__ = [
    "ADMM",
    "EASGD",
    "LSGD",
    "AllreduceSGD",
    "DiLoCo",
    "Diverged",
    "Downpour",
    "EASGDTree",
    "LocalSGD",
    "Method",
    "Metrics",
]

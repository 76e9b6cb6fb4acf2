"""The memory table of `mpilsgd bench exchange`: what each method holds beyond what training needs anyway."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import statistics
from collections.abc import Callable
from typing import Any

import torch

from mpilsgd.comm import Topology
from mpilsgd.methods import ADMM, EASGD, LSGD, AllreduceSGD, DiLoCo, Downpour, LocalSGD
from mpilsgd.train.table import columns, in_bytes

PULL, CENTER_RATE = 0.1, 0.9
PARAMETERS = 16  # tensors of the synthetic model
METHODS: dict[str, Callable[..., Any]] = {
    "LSGD": lambda optimizer, topology: LSGD(optimizer, topology, pull=PULL, period=1, global_period=10**9),
    'LSGD when="every_step"': lambda optimizer, topology: LSGD(
        optimizer, topology, pull=PULL, when="every_step"
    ),
    "EASGD": lambda optimizer, topology: EASGD(optimizer, topology, center_rate=CENTER_RATE, period=1),
    "EASGD overlap": lambda optimizer, topology: EASGD(
        optimizer, topology, center_rate=CENTER_RATE, period=1, overlap=True
    ),
    "LocalSGD": lambda optimizer, topology: LocalSGD(optimizer, topology, period=1),
    'LocalSGD average="quadratic"': lambda optimizer, topology: LocalSGD(
        optimizer, topology, period=1, average="quadratic", a=1.0
    ),
    "DiLoCo": lambda optimizer, topology: DiLoCo(optimizer, topology, period=1),
    "DiLoCo overlap": lambda optimizer, topology: DiLoCo(optimizer, topology, period=2, overlap=1),
    "AllreduceSGD": lambda optimizer, topology: AllreduceSGD(optimizer, topology),
    "EASGD asynchronous": lambda optimizer, topology: EASGD(optimizer, topology, period=1, asynchronous=True),
    "EASGD asynchronous, overlap": lambda optimizer, topology: EASGD(
        optimizer, topology, period=2, asynchronous=True, overlap=True
    ),
    "Downpour": lambda optimizer, topology: Downpour(optimizer, topology),
    "ADMM": lambda optimizer, topology: ADMM(optimizer, topology, rho=1.0, asynchronous=True),
    "LSGD wait-free, one leader": lambda optimizer, topology: LSGD(
        optimizer, topology, period=1, global_pull=0, asynchronous="wait-free"
    ),
}


class Model(torch.nn.Module):
    """A model of so many float32 values, in equal tensors."""

    def __init__(self, numel: int):
        super().__init__()
        pieces = torch.rand(numel).tensor_split(min(PARAMETERS, numel))
        self.parts = torch.nn.ParameterList(piece.clone() for piece in pieces)
        for parameter in self.parts:
            parameter.grad = torch.full_like(parameter, 0.0)


def measure(topology: Topology, numel: int) -> list[tuple[str, float, float]]:
    """(method, private bytes, shared bytes) that a rank holds more with each method. Collective."""
    gc.collect()
    gc.freeze()  # torch has a million objects that need not be looked at again for each method
    try:
        return [(name, *_memory(topology, numel, build)) for name, build in METHODS.items()]
    finally:
        gc.unfreeze()


def text(memory: list[tuple[str, float, float]], nbytes: int) -> str:
    """What each method holds, in bytes a rank and as a multiple of the model."""
    rows = [
        ["memory beyond model, gradients, optimizer state (a rank)", "private", "shared", "both", "models"]
    ]
    for name, private, shared in memory:
        both = private + shared
        signed = [("-" if size < 0 else "") + in_bytes(abs(size)) for size in (private, shared, both)]
        rows.append([name, *signed, f"{both / nbytes:+.2f}"])
    return columns(rows)


def _memory(topology: Topology, numel: int, build: Callable[..., Any]) -> tuple[float, float]:
    """Bytes a rank holds more with the method than without: in private and in shared memory. Collective.

    What is there without it: the model, its gradients, the state of SGD with momentum. Shared pages count in
    equal parts for those who map them (the proportional set size of Linux).
    """
    model = Model(numel)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)
    optimizer.step()
    before = _held(topology)
    method = build(optimizer, topology)
    for _ in range(3):
        method.step(loss=float(topology.world.rank))
    after = _held(topology)
    method.close()
    private, shared = (now - then for now, then in zip(after, before, strict=True))
    return private, shared


def _held(topology: Topology) -> tuple[float, float]:
    """Mean over the ranks of the private and of the shared bytes held. Collective."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # what was freed goes back to the system (glibc)
    topology.barrier()
    sizes = dict.fromkeys(("Pss", "Pss_Anon"), float("nan"))
    try:
        with open("/proc/self/smaps_rollup") as file:
            for line in file:
                key, _, value = line.partition(":")
                if key in sizes:
                    sizes[key] = float(value.split()[0]) * 1024
    except OSError:
        pass
    every = topology.allgather((sizes["Pss_Anon"], sizes["Pss"] - sizes["Pss_Anon"]))
    return statistics.mean(row[0] for row in every), statistics.mean(row[1] for row in every)

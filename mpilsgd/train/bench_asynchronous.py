"""The third table of `mpilsgd bench exchange`: what asynchronous exchanges cost."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from mpilsgd import kernels
from mpilsgd.comm import Counter, Progress, Topology, wait_until
from mpilsgd.methods import EASGD, LSGD, Downpour
from mpilsgd.train.bench_memory import CENTER_RATE, Model
from mpilsgd.train.table import columns, in_ms
from mpilsgd.transport import Fabric

_STEPS = 200  # of the counter, in a row


def measure(topology: Topology, numel: int, repetitions: int, still: Any) -> dict[str, float]:
    """Median seconds of rank 0, which exchanges alone while the others wait; by name. Collective."""
    rank = topology.world.rank
    x, center = (torch.rand(numel) for _ in range(2))
    rate = CENTER_RATE / topology.world.size
    methods = {
        "EASGD": EASGD(still(Model(numel).parameters()), topology, period=1, asynchronous=True),
        "Downpour": Downpour(still(Model(numel).parameters()), topology),
        "LSGD wait-free": LSGD(
            still(Model(numel).parameters()), topology, period=1, global_pull=0, asynchronous="wait-free"
        ),
    }
    calls: dict[str, Callable[[], object]] = {
        "one elastic pass": lambda: kernels.elastic(center, [x], rate, rate)
    }
    calls |= {f"{name} exchange": _stepper(method, rank) for name, method in methods.items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for repetition in range(repetitions + 2):
        for name in calls if repetition % 2 == 0 else reversed(calls):
            topology.barrier()
            if rank == 0:
                start = time.perf_counter()
                calls[name]()
                if repetition >= 2:
                    times[name].append(time.perf_counter() - start)
            wait_until(topology.world.Ibarrier().Test)  # asleep: the others leave their cores to rank 0
    for method in methods.values():
        method.close()
    seconds = {name: statistics.median(each) if each else 0.0 for name, each in times.items()}
    fabric = Fabric(topology, 0, torch.device("cpu"))
    seconds["counter, a step"] = _counter(fabric)
    fabric.free()
    seconds |= _progress(topology)
    every = topology.allgather(seconds)
    return {name: every[0][name] for name in seconds} | {
        "counter, a step": statistics.median(row["counter, a step"] for row in every)
    }


def _stepper(method: Any, rank: int) -> Callable[[], object]:
    return lambda: method.step(loss=float(rank))


def _counter(fabric: Fabric) -> float:
    """Seconds to count a step and to look at the total, all ranks at it."""
    counter = Counter(fabric.world, 64)
    progress = Progress(fabric.world.comm) if fabric.world.n_islands > 1 else None
    fabric.world.barrier()
    start = time.perf_counter()
    for _ in range(_STEPS):
        counter.add()
        counter.read()
    taken = (time.perf_counter() - start) / _STEPS
    fabric.world.barrier()
    if progress is not None:
        progress.free()
    counter.free()
    return taken


def _progress(topology: Topology) -> dict[str, float]:
    """Rank 0's seconds for the same arithmetic, alone and beside the polling thread."""
    a = torch.rand(192, 192)

    def work() -> float:
        start = time.perf_counter()
        for _ in range(200):
            torch.mm(a, a)
        return time.perf_counter() - start

    alone, beside = [], []
    for _ in range(5):
        topology.barrier()
        alone.append(work() if topology.world.rank == 0 else 0.0)
        progress = Progress(topology.world)
        beside.append(work() if topology.world.rank == 0 else 0.0)
        topology.barrier()
        progress.free()
    return {
        "arithmetic": statistics.median(alone),
        "arithmetic beside the polling thread": statistics.median(beside),
    }


def text(seconds: dict[str, float]) -> str:
    """The table."""
    rows = [["rank 0 alone, the others wait", "ms", "ratio", "to", "target"]]
    base = seconds["one elastic pass"]
    for name, taken in seconds.items():
        ratio = [f"{taken / base:.2f}", "the elastic pass", "<= 1.5" if name == "EASGD exchange" else ""]
        if name.startswith("counter"):
            ratio = ["", "", "<= 0.02 in a node, 0.1 across"]
        elif name.endswith("thread"):
            ratio = [f"{taken / seconds['arithmetic']:.2f}", "the arithmetic alone", ""]
        elif name in ("one elastic pass", "arithmetic"):
            ratio = ["", "", ""]
        rows.append([name, in_ms(taken), *ratio])
    return columns(rows)

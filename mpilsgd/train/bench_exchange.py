"""`mpilsgd bench exchange`: a round of each method against Bcast, Allreduce and gloo."""

from __future__ import annotations

import argparse
import functools
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from mpilsgd import kernels
from mpilsgd.comm import Topology, Window
from mpilsgd.train import bench_asynchronous, bench_memory
from mpilsgd.train.bench_memory import CENTER_RATE, METHODS, PARAMETERS, PULL, Model
from mpilsgd.train.bench_torch import process_group
from mpilsgd.train.table import columns, in_bytes, in_ms


class Ratio(NamedTuple):
    """One line of the table: how much faster `ours` is than `theirs`."""

    ours: str
    theirs: str
    target: str = ""


RATIOS = [
    Ratio("LSGD round", "Bcast, lerp_", ">= 6"),
    Ratio("LSGD round", "gloo all_reduce, div_", ">= 10"),
    Ratio("bare pull", "Bcast, lerp_", ">= 6"),
    Ratio("bare pull", "gloo all_reduce, div_", ">= 10"),
    Ratio("LSGD round", "bare pull", ">= 0.83"),
    Ratio("EASGD exchange", "d, Allreduce, update", ">= 5"),
    Ratio("EASGD exchange", "as many bytes by triad", ">= 0.67"),
    Ratio("AllreduceSGD exchange", "gloo all_reduce, div_", ">= 1"),
    Ratio("AllreduceSGD exchange", "Allreduce, div_"),
    Ratio("LocalSGD average", "Allreduce, div_"),
    Ratio("LocalSGD average", "gloo all_reduce, div_"),
]


class Still(torch.optim.Optimizer):
    """Leaves the parameters alone, so that a method's step is its exchange and nothing else."""

    def __init__(self, parameters: Any):
        super().__init__(parameters, {})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        return None

    step.hooked = True  # type: ignore[attr-defined]  # torch's hooks are no part of an exchange


def run(args: argparse.Namespace) -> int:
    """Measures, rank 0 prints the tables; exit status 2 on one rank, or where a rank has no such device."""
    topology = Topology()
    if args.device == "cuda":
        from mpilsgd.train import bench_rounds

        try:
            return bench_rounds.run(args, topology)
        finally:
            topology.free()
    size = topology.world.size
    if size < 2:
        topology.free()
        print(
            "mpilsgd bench: start it on several ranks: mpiexec -n 4 mpilsgd bench exchange", file=sys.stderr
        )
        return 2
    torch.set_num_threads(max(1, _cores() // topology.node.size))
    numel = max(args.bytes // 4, PARAMETERS)
    gloo, contestants = process_group(topology, "gloo"), functools.partial(_contestants, topology, numel)
    with gloo as (started, trouble), contestants(started) as (calls, methods):
        for call in [*calls.values(), *calls.values()]:  # connections, buffers
            call()
        before = {name: _traffic(method) for name, method in methods.items()}
        seconds = _measure(topology, calls, args.repetitions)
        traffic = topology.gather({name: _traffic(methods[name]) - before[name] for name in methods})
    alone = bench_asynchronous.measure(topology, numel, args.repetitions, Still)
    memory = bench_memory.measure(topology, numel)
    if traffic is not None:
        print(
            f"{size} ranks in {topology.n_groups} node(s), {in_bytes(4 * numel)} of float32 parameters, "
            f"{torch.get_num_threads()} thread(s) a rank,\n"
            f"slowest rank, medians of {args.repetitions} interleaved repetitions\n"
        )
        if trouble:
            print(f"gloo could not start and is left out: {trouble}\n")
        print(_times_text(seconds, traffic, args.repetitions))
        print()
        print(_ratios_text(seconds))
        print()
        print(bench_asynchronous.text(alone))
        print()
        print(bench_memory.text(memory, 4 * numel))
    topology.free()
    return 0


@contextmanager
def _contestants(
    topology: Topology, numel: int, gloo: bool
) -> Iterator[tuple[dict[str, Callable[[], object]], dict[str, Any]]]:
    """What is timed, by name, and the methods among it. Collective."""
    world, size = topology.world, topology.world.size
    torch.manual_seed(world.rank)
    loss = float((world.rank - 1) % size)  # rank 1 leads each time
    methods = {
        name: METHODS[kind](Still(Model(numel).parameters()), topology)
        for name, kind in (
            ("LSGD round", "LSGD"),
            ("EASGD exchange", "EASGD"),
            ("AllreduceSGD exchange", "AllreduceSGD"),
            ("LocalSGD average", "LocalSGD"),
        )
    }
    window = Window(topology.node, torch.float32, numel)
    window.mine.uniform_()
    x, other, total, center = (torch.rand(numel) for _ in range(4))
    moving_rate = CENTER_RATE / size
    step = -(-numel // topology.node.size)
    mine = slice(topology.node.rank * step, (topology.node.rank + 1) * step)  # of every vector in the node
    # EASGD reads and writes a slice of the centre and of all workers, a triad's 12 bytes a value are what memory can do
    a, b, c = (torch.rand(8 * step * (topology.node.size + 1) // 12) for _ in range(3))

    def bare_pull() -> None:
        if len(window.views) > 1:
            kernels.pull([view[mine] for view in window.views[1:]], window.views[0][mine], PULL)

    def bcast_lerp() -> None:
        leader = x if world.rank == 0 else other
        world.Bcast(leader.numpy(), root=0)
        if world.rank:
            x.lerp_(leader, PULL)

    def allreduce_mean() -> None:
        world.Allreduce(x.numpy(), total.numpy())
        torch.div(total, size, out=x)

    def allreduce_elastic() -> None:
        torch.sub(x, center, out=other)
        x.sub_(other, alpha=moving_rate)
        world.Allreduce(other.numpy(), total.numpy())
        center.add_(total, alpha=moving_rate)

    def gloo_mean() -> None:
        torch.distributed.all_reduce(x)
        x.div_(size)

    calls: dict[str, Callable[[], object]] = {
        name: functools.partial(method.step, loss=loss) for name, method in methods.items()
    }
    calls |= {"bare pull": bare_pull, "Bcast, lerp_": bcast_lerp, "Allreduce, div_": allreduce_mean}
    calls |= {"d, Allreduce, update": allreduce_elastic}
    calls["as many bytes by triad"] = lambda: kernels.triad(a, b, c, 0.5)
    if gloo:
        calls["gloo all_reduce, div_"] = gloo_mean
    try:
        yield calls, methods
    finally:
        for method in methods.values():
            method.close()
        window.free()


def _measure(
    topology: Topology, calls: dict[str, Callable[[], object]], repetitions: int
) -> dict[str, float]:
    """Median over the repetitions of the slowest rank's seconds, a call; the calls in turn. Collective."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for repetition in range(repetitions):
        for name in calls if repetition % 2 == 0 else reversed(calls):
            topology.barrier()
            start = time.perf_counter()
            calls[name]()
            times[name].append(time.perf_counter() - start)
    every = topology.allgather(times)
    return {name: statistics.median(map(max, *(rank[name] for rank in every))) for name in calls}


def _traffic(method: Any) -> int:
    return method.metrics.bytes_group + method.metrics.bytes_across


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _times_text(seconds: dict[str, float], traffic: list[dict[str, int]], rounds: int) -> str:
    rows = [["exchange", "ms", "bytes that a rank takes in, mean"]]
    for name, taken in seconds.items():
        rows.append([name, in_ms(taken), ""])
        if name in traffic[0]:
            rows[-1][2] = in_bytes(statistics.mean(row[name] for row in traffic) / rounds)
    return columns(rows)


def _ratios_text(seconds: dict[str, float]) -> str:
    rows = [["ratio", "against", "faster by", "target"]]
    for ours, theirs, target in RATIOS:
        if theirs in seconds:
            rows.append([ours, theirs, f"{seconds[theirs] / seconds[ours]:.2f}", target])
    return columns(rows)

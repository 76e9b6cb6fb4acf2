"""`mpilsgd bench exchange --device cuda`: rounds of each method on GPUs, by every path that their bytes can take."""

from __future__ import annotations

import argparse
import functools
import math
import socket
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch

from mpilsgd import devices, kernels
from mpilsgd.comm import Topology
from mpilsgd.train import bench_device
from mpilsgd.train.bench_device import clock_of, finish
from mpilsgd.train.bench_exchange import Still
from mpilsgd.train.bench_memory import METHODS, PARAMETERS, PULL, Model
from mpilsgd.train.bench_torch import process_group
from mpilsgd.train.table import columns, in_bytes, in_ms
from mpilsgd.transport import probe
from mpilsgd.transport.devices import DeviceWindow, DeviceWindows

KINDS = {"LSGD round": "LSGD", "EASGD exchange": "EASGD", "LocalSGD average": "LocalSGD"}
KINDS |= {"AllreduceSGD exchange": "AllreduceSGD"}
IPC, PINNED = "device memory (IPC)", "pinned memory of the node"
STAGED, DIRECT = "messages through the host", "messages from device memory"
BARE, COPY, NCCL = "bare pull", "copy of as many bytes", "NCCL all_reduce, div_"


class Times(NamedTuple):
    """Seconds of the slowest rank: on the device; until the call returns, until all is done, by the host's clock."""

    device: float
    returned: float
    done: float


class Row(NamedTuple):
    """One call; its bytes' path; bytes that a rank takes in from others, the mean."""

    name: str
    path: str
    times: Times
    taken: float


RATIOS = [
    *(((name, IPC), (name, STAGED), ">= 4" if name == "LSGD round" else "") for name in KINDS),
    *(((name, way), (name, STAGED), "") for way in (PINNED, DIRECT) for name in KINDS),
    (("LSGD round", IPC), (BARE, ""), ""),
    ((BARE, ""), (COPY, ""), ">= 0.9"),
    (("AllreduceSGD exchange", IPC), (NCCL, ""), ""),
    (("LocalSGD average", IPC), (NCCL, ""), ""),
]


def run(args: argparse.Namespace, topology: Topology) -> int:
    """Measures, rank 0 prints the tables; exit status 2 where a rank has no GPU. Collective."""
    world = topology.world
    place = bench_device.place("cuda", topology.node.rank)
    without = [rank for rank, missing in enumerate(topology.allgather(place is None)) if missing]
    if without or place is None:
        if world.rank == 0:
            print(f"mpilsgd bench: there is no CUDA device for rank {without[0]}", file=sys.stderr)
        return 2
    torch.manual_seed(world.rank)
    numel = max(args.bytes // 4, PARAMETERS)
    gpus = topology.allgather((socket.gethostname(), devices.identity(place) or place.index))
    own = place.type == "cuda" and len(set(gpus)) == world.size > 1
    with process_group(topology, "nccl", "" if own else "it takes several ranks, with a GPU each") as (
        started,
        nccl,
    ):
        rows = _by_methods(
            topology, place, numel, args.repetitions, functools.partial(_beside, started=started)
        )
    why = "one rank sends none"
    if world.size > 1:
        apart = Topology(shared=False, cuda_aware=False)
        rows += _by_methods(apart, place, numel, args.repetitions)
        apart.free()
        asking = Topology(shared=False, cuda_aware=True if args.cuda_aware else None)
        takes, why = probe.path(asking, place)
        if takes:
            rows += _by_methods(asking, place, numel, args.repetitions)
        asking.free()
    if world.rank == 0:
        print(
            f"{world.size} rank(s) in {topology.n_groups} node(s) on {len(set(gpus))} GPU(s), "
            f"{bench_device.title(place)}, {in_bytes(4 * numel)} of float32 parameters,\n"
            f"slowest rank, medians of {args.repetitions} interleaved repetitions"
        )
        print(f"messages from device memory: {why}" + (f"\nNCCL is left out: {nccl}" if nccl else ""))
        print(f"\n{_text(rows)}\n\n{_ratios(rows)}")
    return 0


@contextmanager
def _beside(
    topology: Topology, place: torch.device, numel: int, reached: bool, started: bool
) -> Iterator[dict[str, Callable[[], object]]]:
    """What bounds a round. The kernel of a pull alone: where the node's vectors are reached each rank moves a slice of
    all of them, else its own vector; a copy on the device of as many bytes; NCCL's mean if it has started. Collective.
    """
    node, window = topology.node, None
    views = [torch.rand(numel, device=place) for _ in range(2)]
    mine = slice(None)
    if reached:
        window = DeviceWindow(node, place, torch.float32, numel)
        window.mine.uniform_()
        views, step = window.views, -(-numel // node.size)
        mine = slice(node.rank * step, (node.rank + 1) * step)
    leader, *others = [view[mine] for view in views]
    moved = leader.numel() + 2 * sum(other.numel() for other in others)
    a, b, x = (torch.rand(n, device=place) for n in (moved // 2, moved // 2, numel))

    def nccl_mean() -> None:
        torch.distributed.all_reduce(x)
        x.div_(topology.world.size)

    calls: dict[str, Callable[[], object]] = {BARE: lambda: kernels.pull(others, leader, PULL)}
    calls[COPY] = lambda: b.copy_(a)
    if started:
        calls[NCCL] = nccl_mean
    finish(place)
    topology.barrier()
    yield calls
    finish(place)
    topology.barrier()
    if window is not None:
        window.free()


def _by_methods(
    topology: Topology, place: torch.device, numel: int, repetitions: int, beside: Any = None
) -> list[Row]:
    """A round of each method; beside: what else is to be measured with them, as `_beside`. Collective."""
    methods: dict[str, Any] = {}
    for name, kind in KINDS.items():
        model = Model(numel).to(place)
        for parameter in model.parameters():
            parameter.grad = torch.rand_like(parameter)
        methods[name] = METHODS[kind](Still(model.parameters()), topology)
    loss = float((topology.world.rank - 1) % topology.world.size)  # rank 1 leads each time
    calls: dict[str, Callable[[], object]] = {
        name: functools.partial(method.step, loss=loss) for name, method in methods.items()
    }
    reached = isinstance(methods["LSGD round"].fabric.place, DeviceWindows)
    with nullcontext({}) if beside is None else beside(topology, place, numel, reached) as more:
        calls |= more
        for call in [*calls.values(), *calls.values()]:  # connections, buffers
            call()
        before = {name: _traffic(method) for name, method in methods.items()}
        times = _measure(topology, place, calls, repetitions)
        every = topology.allgather({name: _traffic(methods[name]) - before[name] for name in methods})
    taken = {name: statistics.mean(one[name] for one in every) / repetitions for name in methods}
    paths = {name: _path(method.fabric) for name, method in methods.items()}
    for method in methods.values():
        method.close()
    return [Row(name, paths.get(name, ""), times[name], taken.get(name, math.nan)) for name in calls]


def _path(fabric: Any) -> str:
    """Of the bytes that a rank takes in."""
    messages = DIRECT if fabric.reaches else STAGED
    if fabric.world.stage is not None:
        return PINNED
    if not isinstance(fabric.place, DeviceWindows):
        return messages if fabric.world.n_islands > 1 else ""
    return IPC if fabric.world.n_islands == 1 else f"{IPC}, between nodes {messages}"


def _measure(
    topology: Topology, place: torch.device, calls: dict[str, Callable[[], object]], repetitions: int
) -> dict[str, Times]:
    """Medians over the repetitions of the slowest rank, the calls in turn. Collective."""
    clock = clock_of(place)
    every: dict[str, list[Times]] = {name: [] for name in calls}
    for repetition in range(repetitions):
        for name in calls if repetition % 2 == 0 else reversed(calls):
            finish(place)
            topology.barrier()
            begun = time.perf_counter()
            start = clock.mark()
            calls[name]()
            returned = time.perf_counter()
            end = clock.mark()
            finish(place)
            done = time.perf_counter()
            every[name].append(Times(clock.between(start, end), returned - begun, done - begun))
    told = topology.allgather(every)

    def median(name: str, kind: int) -> float:
        slowest = (
            max(times[kind] for times in ranks) for ranks in zip(*(one[name] for one in told), strict=True)
        )
        return statistics.median(slowest)

    return {name: Times(*(median(name, kind) for kind in range(3))) for name in calls}


def _traffic(method: Any) -> int:
    return int(method.metrics.bytes_group + method.metrics.bytes_across)


def _text(rows: list[Row]) -> str:
    table = [["ms", "its bytes go by", "on the device", "step returns", "all done", "a rank takes in"]]
    for row in rows:
        times = [in_ms(seconds) for seconds in row.times]
        table.append([row.name, row.path, *times, in_bytes(row.taken) if row.path else ""])
    return columns(table)


def _ratios(rows: list[Row]) -> str:
    """Of what was measured on the device, as a table and in one line."""
    seconds = {(row.name, row.path): row.times.device for row in rows}
    table, figures = [["ratio, on the device", "against", "faster by", "target"]], []
    for ours, theirs, target in RATIOS:
        if ours in seconds and theirs in seconds:
            ratio = f"{seconds[theirs] / seconds[ours]:.2f}"
            names = [", ".join(filter(None, one)) for one in (ours, theirs)]
            table.append([*names, ratio, target])
            told = target or ours == ("LSGD round", DIRECT)
            figures += [f"{names[0]} {ratio} x {names[1]}"] if told else []
    return columns(table) + "\n\nfigures: " + "; ".join(figures)

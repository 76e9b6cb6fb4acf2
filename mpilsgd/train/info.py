"""`mpilsgd info`: what this machine offers, before anything is trained on it."""

from __future__ import annotations

import argparse
import os
import platform
import sys
from collections.abc import Hashable, Sequence
from typing import Any

import torch

from mpilsgd import kernels
from mpilsgd.comm import NoMPI, Topology, inquiry
from mpilsgd.train import tree_text
from mpilsgd.train.table import ranges
from mpilsgd.transport import probe
from mpilsgd.transport.devices import unreachable


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `mpilsgd info`."""
    parser.description = (
        "Shows the MPI library, the ranks by node and group, shared memory, torch, CUDA and the extension. "
        "Works on one process and under a launcher: mpiexec -n 4 mpilsgd info"
    )
    parser.add_argument(
        "--tree",
        action="store_true",
        help="show the tree of EASGDTree instead: which rank is what, where it runs, what its edges will carry",
    )
    tree_text.add_arguments(parser.add_argument_group("with --tree"))
    parser.add_argument(
        "--group_size",
        "--group-size",
        type=int,
        metavar="L",
        help="show the groups that group_size=L makes (default: a group is a node)",
    )


def run(args: argparse.Namespace) -> int:
    """Gathers the facts of all ranks; rank 0 prints them. Exit status 2: `group_size` does not fit."""
    try:
        nodes = Topology()
    except NoMPI as missing:
        if args.tree:
            raise
        print(_aligned([*_versions([_own_facts()], f"none: {missing}"), *_machine([_own_facts()])]))
        return 0
    try:
        if args.tree:
            return tree_text.run(args, nodes)
        if idle := tree_text.given(args):
            if nodes.world.rank == 0:
                print(f"mpilsgd info: {', '.join(idle)} only with --tree", file=sys.stderr)
            return 2
        facts = inquiry.info(nodes.world)
        paths = _device_paths(nodes)
        rows = nodes.gather(_own_facts())
        try:
            topology = Topology(group_size=args.group_size)
        except ValueError as error:
            if rows is not None:
                print(f"mpilsgd info: {error}", file=sys.stderr)
            return 2
        if rows is not None:
            print(_text(facts, paths, topology.groups, rows))
        topology.free()
    finally:
        nodes.free()
    return 0


def _own_facts() -> dict[str, Any]:
    """What may differ between ranks, as values that can be compared."""
    return {
        "python": f"{platform.python_version()}, torch {torch.__version__}",
        "threads": _threads(),
        "devices": _devices(),
        "extension": _extension(),
    }


def _device_paths(topology: Topology) -> list[str]:
    """The way that GPUs' vectors take within a node and between nodes, and why. Collective."""
    if not all(
        topology.allgather(
            torch.cuda.is_available() and kernels.backend(torch.empty(0, device="cuda")) == "cuda"
        )
    ):
        return []
    place = torch.device("cuda", topology.node.rank % torch.cuda.device_count())
    problems = [problem for problem in topology.allgather(unreachable(topology, place)) if problem]
    direct, why = probe.path(topology, place)
    return [
        "within a node: through pinned memory that its ranks share, but rounds of several nodes by messages, as ranks "
        f"cannot read each other's GPU memory ({problems[0]})"
        if problems
        else "within a node: ranks read each other's GPU memory where it lies (CUDA IPC)",
        f"between nodes: {'from and into GPU memory' if direct else 'through pinned memory of the host'} ({why})",
        "sums are taken on the GPU",
    ]


def _threads() -> str:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    chosen = os.environ.get("OMP_NUM_THREADS")
    why = f"OMP_NUM_THREADS={chosen}" if chosen else "OMP_NUM_THREADS is not set"
    return f"{torch.get_num_threads()} torch thread(s) a rank, {cores} core(s) to run on; {why}"


def _devices() -> tuple[str, ...]:
    if torch.version.cuda is None:
        return ("none: this torch is built without CUDA",)
    if not torch.cuda.is_available():
        return (f"none found (torch is built for CUDA {torch.version.cuda})",)
    found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return tuple(f"{i}: {one.name}, {one.total_memory / 1e9:.0f} GB" for i, one in enumerate(found))


def _extension() -> str:
    instructions = kernels.instruction_set()
    if instructions == "reference":
        return "not there: the slower torch reference is used; `pip install .` builds it"
    cuda = kernels.backend(torch.empty(0, device="cuda")) if torch.cuda.is_available() else None
    return f"CPU instructions: {instructions}" + (f"; CUDA tensors: {cuda}" if cuda else "")


def _text(
    facts: dict[str, Any],
    paths: Sequence[str],
    groups: Sequence[Sequence[int]],
    rows: Sequence[dict[str, Any]],
) -> str:
    library = "{library} {library_version} (standard {standard}), mpi4py {mpi4py}".format(**facts)
    lines = [
        *_versions(rows, library),
        ("thread level", facts["thread_level"]),
        ("progress", _progress_text(facts["progresses_alone"], len(facts["nodes"]))),
        ("ranks", f"{facts['size']} on {len(facts['nodes'])} node(s) in {len(groups)} group(s)"),
    ]
    if facts["apart"] is not None:
        lines.append(("  WARNING", facts["apart"]))
    for ranks, shared, memory in zip(facts["nodes"], facts["shared_memory"], facts["memory"], strict=True):
        lines.append((f"  {facts['hosts'][ranks[0]]}", _node_text(ranks, groups)))
        lines += [("", text) for text in _memory_text(len(ranks), shared, memory)]
    cuda = [
        ("CUDA and MPI", _cuda_text(facts["cuda"])),
        ("", facts["cuda"].why),
        *(("", path) for path in paths),
    ]
    return _aligned([*lines, *_machine(rows, cuda)])


def _versions(rows: Sequence[dict[str, Any]], library: str) -> list[tuple[str, str]]:
    from mpilsgd import __version__

    return [("mpilsgd", __version__), ("Python", _by_rank([row["python"] for row in rows])), ("MPI", library)]


def _machine(rows: Sequence[dict[str, Any]], cuda: Sequence[tuple[str, str]] = ()) -> list[tuple[str, str]]:
    """What is known without MPI; cuda: what is known with it."""
    return [
        ("threads", _by_rank([row["threads"] for row in rows])),
        ("CUDA devices", _by_rank(["; ".join(row["devices"]) for row in rows])),
        *cuda,
        ("extension", _by_rank([row["extension"] for row in rows])),
    ]


def _aligned(lines: Sequence[tuple[str, str]]) -> str:
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name:{width}}  {text}".rstrip() for name, text in lines)


def _progress_text(alone: bool, nodes: int) -> str:
    """What serves one-sided operations on a rank that computes."""
    if nodes == 1:
        return "one-sided operations within a node need no help"
    if alone:
        return "MPI serves one-sided operations from other nodes by itself (measured)"
    return (
        "MPI serves one-sided operations from other nodes only when called (measured): in asynchronous runs a "
        "polling thread calls it"
    )


def _node_text(ranks: Sequence[int], groups: Sequence[Sequence[int]]) -> str:
    parts = [f"group {j}: rank {ranges(mates)}" for j, mates in enumerate(groups) if set(mates) <= set(ranks)]
    return "; ".join(parts)


def _memory_text(ranks: int, shared: int, memory: int) -> list[str]:
    """Free shared memory, and the model that fits: a window of the model's size for each rank of the node."""
    free = min(shared, memory) if memory else shared
    largest = free // ranks
    text = f"{shared / 1e9:.2f} GB shared memory (/dev/shm) free"
    if memory:
        text += f", {memory / 1e9:.2f} GB memory available"
    if ranks == 1:
        return [text, "one rank needs no shared windows"]
    return [
        text,
        f"shared windows hold models of up to {_count(largest // 4)} float32 parameters, else messages",
    ]


def _cuda_text(support: inquiry.CudaSupport) -> str:
    if support.aware:
        return "MPI says that it is CUDA-aware"
    return "MPI is not CUDA-aware: CUDA tensors are staged through pinned host memory"


def _by_rank(values: Sequence[Hashable]) -> str:
    """One value if all ranks have the same, else each with the ranks that have it."""
    ranks: dict[Hashable, list[int]] = {}
    for rank, value in enumerate(values):
        ranks.setdefault(value, []).append(rank)
    if len(ranks) == 1:
        return str(values[0])
    return "; ".join(f"rank {ranges(which)}: {value}" for value, which in ranks.items())


def _count(number: float) -> str:
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.0f}"

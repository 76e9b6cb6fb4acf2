"""Whether the ranks of a node share memory, of the host or of devices."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from mpilsgd import devices
from mpilsgd.comm import Topology, free_shared_memory, here
from mpilsgd.devices import on_host
from mpilsgd.transport.devices import unreachable
from mpilsgd.transport.staged import SLOT, SLOTS, Stage


class SharedMemoryWarning(UserWarning):
    """The ranks of a node cannot share memory, of the host or of devices, as they should; slower ways are used."""


def way(topology: Topology, nbytes: int, device: torch.device, hosted: int) -> str:
    """How this node's ranks exchange: "windows", where they can share so much memory each; "staged", where they share
    pinned memory as their devices cannot reach each other; or "messages". Collective over the world.
    """
    node, gpu, problem = topology.node, b"", None
    try:
        gpu = b"" if on_host(device) else devices.identity(device)
    except RuntimeError as error:
        problem = str(error)
    topology.agree(problem)
    asked = node.allgather((gpu, on_host(device), nbytes - hosted))
    try:
        wanted = sum(n for other, _, n in asked if other == gpu)
        problem = devices.shortage(device, wanted) if gpu else None
    except RuntimeError as error:
        problem = str(error)
    topology.agree(problem)
    on_hosts = {host for _, host, _ in asked}
    knows_all = on_hosts == {True} or b"" not in {other for other, *_ in asked}
    # tasks of one process would have to be told of each other's devices by other means
    if not topology.shared or len(on_hosts) > 1 or not knows_all or (gpu and not here.rank.is_process):
        return "messages"
    if node.size == 1:
        return "windows"
    found, problem = "windows", unreachable(topology, device) if gpu else None
    wanted, room = topology.node_sum(hosted if gpu else nbytes), topology.node_first(free_shared_memory())
    if problem:
        problem = f"this node's ranks cannot read each other's device memory ({problem})"
        levels = 1 + len(set(node.allgather(topology.group_index)))  # the world, and the groups of this node
        found, wanted = "staged", levels * SLOTS * SLOT
    if wanted > room:
        little = (
            f"{wanted / 1e6:.0f} MB of shared windows do not fit into the {room / 1e6:.0f} MB that /dev/shm has "
            "left on this node"
        )
        found, problem = "messages", f"{problem}, and {little}" if problem else little
    if problem and node.rank == 0:
        instead = "through pinned memory that they share" if found == "staged" else "messages"
        warnings.warn(
            f"{problem}: its workers exchange {instead} instead (slower)", SharedMemoryWarning, stacklevel=6
        )
    return found


def stage(topology: Topology, level: Any, place: torch.device) -> Stage | None:
    """For a `Level` whose ranks lie on one node; None, with a notice, where pinned memory cannot be had. Collective."""
    if level.size == 1 or not any(set(level.world_ranks) <= set(ranks) for ranks in topology.nodes):
        return None
    try:
        return Stage(level.channel.comm, place, level.barrier)
    except RuntimeError as error:
        if level.rank == 0:
            problem = f"this node's ranks cannot share pinned memory ({error})"
            told = f"{problem}: its workers exchange messages instead (slower)"
            warnings.warn(told, SharedMemoryWarning, stacklevel=6)
        return None

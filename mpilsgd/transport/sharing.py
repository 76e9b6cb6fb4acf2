"""Whether the ranks of a node share memory, of the host or of devices."""

from __future__ import annotations

import warnings

import torch

from mpilsgd import devices
from mpilsgd.comm import Topology, free_shared_memory, here
from mpilsgd.devices import on_host
from mpilsgd.transport.devices import unreachable


class SharedMemoryWarning(UserWarning):
    """The ranks of a node cannot share memory, of the host or of devices, as they should; messages are used."""


def shareable(topology: Topology, nbytes: int, device: torch.device, hosted: int) -> bool:
    """Whether this node's ranks can share so much memory each. Collective over the world."""
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
        return False
    if node.size == 1:
        return True
    problem = unreachable(topology, device) if gpu else None
    if problem:
        problem = f"this node's ranks cannot read each other's device memory ({problem})"
    wanted, room = topology.node_sum(hosted if gpu else nbytes), topology.node_first(free_shared_memory())
    if wanted > room:
        problem = (
            f"{wanted / 1e6:.0f} MB of shared windows do not fit into the {room / 1e6:.0f} MB that /dev/shm has "
            "left on this node"
        )
    if problem and node.rank == 0:
        warnings.warn(
            f"{problem}: its workers exchange messages instead (slower)", SharedMemoryWarning, stacklevel=6
        )
    return problem is None

"""What hosts receive in a round of each method: python -m mpi4py rounds.py INTERFACE BYTES ROUNDS.

A line each, of all hosts together: method, type across, bytes on the interface less those that TCP sent twice, those
sent twice, bytes counted, bytes by the theory.
"""

from __future__ import annotations

import gc
import itertools
import sys
import time
from pathlib import Path

import torch
from mpi4py import MPI

import mpilsgd
from mpilsgd.methods import Method

SEGMENT = 1448  # bytes: an Ethernet's 1500 less the headers of IP and TCP

# of a float32's bytes; in few bits, with a float32 for every 128 values
SHARE = {None: 1.0, "bfloat16": 1 / 2, "int8": (128 + 4) / 512, "int4": (64 + 4) / 512}
METHODS = {
    "LSGD": lambda optimizer, topology: mpilsgd.LSGD(optimizer, topology, period=1, global_period=1),
    "EASGD": lambda optimizer, topology: mpilsgd.EASGD(optimizer, topology, period=1),
    "DiLoCo": lambda optimizer, topology: mpilsgd.DiLoCo(optimizer, topology, period=1),
    "LocalSGD": lambda optimizer, topology: mpilsgd.LocalSGD(optimizer, topology, period=1),
    "AllreduceSGD": mpilsgd.AllreduceSGD,
    "EASGDTree": lambda optimizer, topology: mpilsgd.EASGDTree(
        optimizer, topology, degree=topology.node.size, period=1, upper_period=1, order="lock-step"
    ),
}


def copies(opt: Method, topology: mpilsgd.Topology) -> int:
    """Of the vector, that all n hosts together receive a round: a leader's goes to all, a sum is 2 (n-1)/n to each."""
    if not isinstance(opt, mpilsgd.EASGDTree):
        return (len(topology.nodes) - 1) * (1 if isinstance(opt, mpilsgd.LSGD) else 2)
    node = {rank: k for k, ranks in enumerate(topology.nodes) for rank in ranks}
    edges = enumerate(opt.tree.parent)
    return 2 * sum(parent >= 0 and node[i] != node[parent] for i, parent in edges)


def received(interface: str) -> int:
    lines = Path("/proc/net/dev").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.strip().startswith(f"{interface}:"))


def sent_twice() -> int:
    """Bytes: where cores are busy, TCP takes a late acknowledgement for a lost segment."""
    lines = Path("/proc/net/snmp").read_text().splitlines()
    names, values = (line.split() for line in lines if line.startswith("Tcp:"))
    return SEGMENT * int(values[names.index("RetransSegs")])


def settled(topology: mpilsgd.Topology, interface: str) -> int:
    """`received` when nothing is under way: no host's has grown by more than 20 kB between two meetings.

    A meeting also drives the messages that MPI has accepted and not yet sent; its own bytes are few.
    """
    before, now = -(10**9), received(interface)
    while max(topology.allgather(now - before)) > 20_000:
        time.sleep(0.2)
        before, now = now, received(interface)
    return now


def measure(name: str, across: str | None, interface: str, nbytes: int, rounds: int) -> str:
    topology = mpilsgd.Topology(across_dtype=across)
    parameter = torch.nn.Parameter(torch.zeros(nbytes // 4))
    opt = METHODS[name](torch.optim.SGD([parameter], lr=0.0), topology)
    readings = []
    for k in range(rounds + 1):
        if opt.computes:
            parameter.grad = torch.zeros_like(parameter)
        opt.step(loss=float((topology.world.rank + k) % topology.world.size))
        if k in (0, rounds):
            opt.r.wakes()  # returns when a tree's messages have arrived, for which nobody has waited
            readings.append((settled(topology, interface), sent_twice(), opt.metrics.bytes_across))
    rows = topology.allgather([after - before for before, after in zip(*readings, strict=True)])
    arrived, twice = (sum(rows[ranks[0]][i] for ranks in topology.nodes) / rounds for i in (0, 1))
    counted = sum(row[2] for row in rows) / rounds
    theory = copies(opt, topology) * nbytes * SHARE[across]
    opt.close()
    topology.free()
    return f"{name} {across or 'float32'} {arrived - twice:.0f} {twice:.0f} {counted:.0f} {theory:.0f}"


if __name__ == "__main__":
    gc.freeze()  # each method looks for its module among all that is alive
    for name, across in itertools.product(METHODS, SHARE):
        line = measure(name, across, sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
        if MPI.COMM_WORLD.rank == 0:
            print(line, flush=True)

"""What hosts receive in a round of each method: python -m mpi4py rounds.py INTERFACE BYTES ROUNDS.

A line each, of all hosts together: method, type across, bytes on the interface, bytes counted, bytes by the theory.
"""

from __future__ import annotations

import itertools
import sys
import time
from pathlib import Path

import torch

import mpilsgd

METHODS = {
    "LSGD": lambda optimizer, topology: mpilsgd.LSGD(optimizer, topology, period=1, global_period=1),
    "EASGD": lambda optimizer, topology: mpilsgd.EASGD(optimizer, topology, period=1),
    "LocalSGD": lambda optimizer, topology: mpilsgd.LocalSGD(optimizer, topology, period=1),
    "AllreduceSGD": mpilsgd.AllreduceSGD,
    "EASGDTree": lambda optimizer, topology: mpilsgd.EASGDTree(
        optimizer, topology, degree=topology.node.size, period=1, upper_period=1, order="lock-step"
    ),
}
# copies of the vector that n hosts receive a round, all together
THEORY = {
    "LSGD": lambda n: n - 1,
    "EASGD": lambda n: 2 * (n - 1),
    "LocalSGD": lambda n: 2 * (n - 1),
    "AllreduceSGD": lambda n: 2 * (n - 1),
    "EASGDTree": lambda n: 2 * (n - 1),
}


def received(interface: str) -> int:
    lines = Path("/proc/net/dev").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.strip().startswith(f"{interface}:"))


def main(interface: str, nbytes: int, rounds: int) -> None:
    for name, across in itertools.product(METHODS, (None, "bfloat16")):
        topology = mpilsgd.Topology(across_dtype=across)
        rank, hosts = topology.world.rank, len(topology.nodes)
        parameter = torch.nn.Parameter(torch.zeros(nbytes // 4))
        opt = METHODS[name](torch.optim.SGD([parameter], lr=0.0), topology)

        def step(k: int) -> None:
            if opt.computes:
                parameter.grad = torch.zeros_like(parameter)
            opt.step(loss=float((rank + k) % topology.world.size))

        def far() -> tuple[int, int]:
            time.sleep(0.1)  # what is under way
            topology.barrier()
            return received(interface), opt.metrics.bytes_across

        step(0)
        before = far()
        for k in range(1, rounds + 1):
            step(k)
        rows = topology.allgather([after - start for start, after in zip(before, far(), strict=True)])
        if rank == 0:
            measured = sum(rows[ranks[0]][0] for ranks in topology.nodes) / rounds
            counted = sum(row[1] for row in rows) / rounds
            theory = THEORY[name](hosts) * nbytes * (0.5 if across else 1.0)
            print(f"{name} {across or 'float32'} {measured:.0f} {counted:.0f} {theory:.0f}", flush=True)
        opt.close()
        topology.free()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))

"""Rounds of one method over a vector: python -m mpi4py rounds.py METHOD BYTES ROUNDS [across_dtype]."""

from __future__ import annotations

import sys

import torch

import mpilsgd

METHODS = {
    "LSGD": lambda optimizer, topology: mpilsgd.LSGD(optimizer, topology, period=1, global_period=1),
    "EASGD": lambda optimizer, topology: mpilsgd.EASGD(optimizer, topology, period=1),
    "LocalSGD": lambda optimizer, topology: mpilsgd.LocalSGD(optimizer, topology, period=1),
    "AllreduceSGD": mpilsgd.AllreduceSGD,
}

name, nbytes, rounds, *across = sys.argv[1:]
topology = mpilsgd.Topology(across_dtype=across[0] if across else None)
parameter = torch.nn.Parameter(torch.zeros(int(nbytes) // 4))
opt = METHODS[name](torch.optim.SGD([parameter], lr=0.0), topology)
before = opt.metrics.bytes_across
for k in range(int(rounds)):
    parameter.grad = torch.zeros_like(parameter)
    opt.step(loss=float((topology.world.rank + k) % topology.world.size))
counted = topology.gather(opt.metrics.bytes_across - before)
if counted is not None:
    print("counted", sum(counted))
opt.close()

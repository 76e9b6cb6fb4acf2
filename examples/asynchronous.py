"""Asynchronous EASGD: nobody waits for the slow rank.

mpiexec -n 4 python -m mpi4py examples/asynchronous.py
"""

import time

import torch

import mpilsgd

topo = mpilsgd.Topology()
rank, size = topo.world.rank, topo.world.size
torch.manual_seed(0)
x = torch.randn(4000, 10)
y = x @ torch.randn(10, 1) + 0.1 * torch.randn(4000, 1)

model = torch.nn.Linear(10, 1)
opt = mpilsgd.EASGD(torch.optim.SGD(model.parameters(), lr=0.05), topo, period=5, asynchronous=True)
batches = torch.randperm(4000)[rank::size].split(20)
while not opt.reached(200 * size):  # steps of all ranks together
    batch = batches[opt.t % len(batches)]
    opt.zero_grad()
    loss = torch.nn.functional.mse_loss(model(x[batch]), y[batch])
    loss.backward()
    opt.step(loss=loss)
    time.sleep(0.004 if rank == size - 1 else 0.001)  # the last rank is slower
steps = topo.gather(opt.t)
with opt.center(), torch.no_grad():
    if rank == 0:
        print(f"steps of each rank: {steps}")
        print(f"mean squared error {torch.nn.functional.mse_loss(model(x), y):.3f}: 0.010 is noise")

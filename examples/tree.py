"""EASGD on a tree: leaves compute gradients, inner ranks average what arrives.

mpiexec -n 7 python -m mpi4py examples/tree.py
"""

import torch

import mpilsgd

topo = mpilsgd.Topology()
rank = topo.world.rank
torch.manual_seed(0)
x = torch.randn(4000, 10)
y = x @ torch.randn(10, 1) + 0.1 * torch.randn(4000, 1)

model = torch.nn.Linear(10, 1)
opt = mpilsgd.EASGDTree(
    torch.optim.SGD(model.parameters(), lr=0.05), topo, degree=4, period=2, upper_period=4, order="lock-step"
)  # order="lock-step": the same every time; leave it out for a real run
torch.manual_seed(rank)
while not opt.reached(1000):  # steps of all leaves together
    if opt.computes:  # a leaf works as in every other loop
        batch = torch.randint(4000, (20,))
        opt.zero_grad()
        torch.nn.functional.mse_loss(model(x[batch]), y[batch]).backward()
    opt.step()
with opt.center(), torch.no_grad():  # all ranks; the model holds the root
    if rank == 0:
        print(f"the parent of each rank: {opt.tree.parent}")
        print(f"mean squared error {torch.nn.functional.mse_loss(model(x), y):.3f}: 0.010 is noise")

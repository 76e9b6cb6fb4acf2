"""What a wheel has to do where it is installed, on two ranks: mpiexec -n 2 python -m mpi4py installed.py."""

import sys
import sysconfig
import warnings

import torch

import mpilsgd
from mpilsgd import kernels

warnings.simplefilter("error")
assert mpilsgd.__file__.startswith(sysconfig.get_path("purelib")), mpilsgd.__file__
assert kernels.instruction_set() != "reference", "the extension is not there"

topology = mpilsgd.Topology()
rank, size = topology.world.rank, topology.world.size
assert size == 2, f"{size} rank(s) see each other, not 2"

torch.manual_seed(rank)
target = torch.tensor([[1.0, -2.0]])
model = torch.nn.Linear(2, 1, bias=False)
with mpilsgd.LSGD(torch.optim.SGD(model.parameters(), lr=0.1), topology, period=4) as opt:
    for _ in range(200):
        x = torch.randn(16, 2)
        opt.zero_grad()
        loss = torch.nn.functional.mse_loss(model(x), x @ target.T)
        loss.backward()
        opt.step(loss=loss)
    with opt.center():
        error = float((model.weight - target).detach().norm())
assert error < 1e-3, error
if rank == 0:
    python, own = sys.version.split()[0], mpilsgd.__version__
    print(f"two ranks have trained: mpilsgd {own}, Python {python}, torch {torch.__version__}")

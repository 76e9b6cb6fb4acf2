"""A GAN with a method for each network: the generator learns to put points on a circle.

mpiexec -n 4 python -m mpi4py examples/gan.py [STEPS]
"""

import math
import sys

import torch
from torch import nn

import mpilsgd

topo = mpilsgd.Topology()
torch.manual_seed(topo.world.rank)  # each rank draws other points


def network(inputs, outputs):
    wide = [nn.Linear(inputs, 64), nn.LeakyReLU(0.2), nn.Linear(64, 64), nn.LeakyReLU(0.2)]
    return nn.Sequential(*wide, nn.Linear(64, outputs))


def method(model):
    return mpilsgd.EASGD(torch.optim.Adam(model.parameters(), lr=1e-3, betas=(0.5, 0.9)), topo, period=8)


def real(count):
    angle = 2 * math.pi * torch.rand(count)
    return torch.stack([angle.cos(), angle.sin()], dim=1)


loss_of = nn.functional.softplus  # of a score that should be low
generator, critic = network(2, 2), network(2, 1)
g, c = method(generator), method(critic)  # two methods over the same ranks
for _ in range(int(sys.argv[1]) if len(sys.argv) > 1 else 1000):  # equally many steps on every rank
    fake = generator(torch.randn(64, 2))
    c.zero_grad()
    (loss_of(-critic(real(64))) + loss_of(critic(fake.detach()))).mean().backward()
    c.step()
    g.zero_grad()
    loss_of(-critic(fake)).mean().backward()
    g.step()
with g.center(), torch.no_grad():
    if topo.world.rank == 0:
        radius = generator(torch.randn(1000, 2)).norm(dim=1)
        print(f"radius {radius.mean():.2f}, give or take {radius.std():.2f}: should be 1 and 0")

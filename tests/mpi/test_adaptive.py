"""Adaptive periods by measured times: every rank comes to the same rounds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from harness import WORLD
from problems import TanhNet

from mpilsgd import EASGD, LSGD, LocalSGD, Topology

pytestmark = [pytest.mark.mpi, pytest.mark.brief(1, 2)]


@pytest.mark.parametrize("method", [LocalSGD, EASGD, LSGD], ids=lambda method: method.__name__)
def test_the_same_period_on_every_rank(method: Any) -> None:
    """Also of ranks that have run out of data, and after a state was taken up."""
    topology, problem = Topology(), TanhNet()
    model = problem.build(torch.float64, problem.start(0))
    opt = method(torch.optim.SGD(model.parameters(), lr=0.05), topology, period="adaptive")
    for leg in range(3):
        for t in range(40 + 15 * ((WORLD.rank + leg) % 2)):
            opt.zero_grad()
            loss = problem.loss(model, WORLD.rank, t)
            loss.backward()
            opt.step(loss=loss)
        with opt.center():
            pass
        told = topology.allgather((opt.t, opt.clock.period, opt.pace["last"], opt.metrics.periods))
        assert all(other == told[0] for other in told) and opt.metrics.rounds > leg
        opt.load_state_dict(opt.state_dict())
    opt.close()
    topology.free()

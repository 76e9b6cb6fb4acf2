"""RunningAverage against the thesis' ASGD and MVASGD, around MSGD and other optimizers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from thesis_msgd import (
    STEPS,
    TOLERANCE,
    close,
    constant,
    distance,
    net,
    parameter,
    run,
    simulate,
    start,
    step,
)
from torch import Tensor, nn

from mpilsgd.flat import FlatParameters
from mpilsgd.optimizers.msgd import MSGD
from mpilsgd.optimizers.running_average import RunningAverage

torch.set_num_threads(1)


@pytest.mark.parametrize("rate", [None, 0.05])
@pytest.mark.parametrize("delta", [0.0, 0.9])
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("layout", ["plain", "gaps", "flat"])
def test_running_average_against_numpy(
    rate: float | None, delta: float, nesterov: bool, dtype: torch.dtype, layout: str
) -> None:
    p = parameter(dtype, layout)
    flat = FlatParameters([p], grads=True) if layout == "flat" else None
    optimizer = RunningAverage(MSGD([p], 0.1, delta, nesterov), rate)
    with optimizer.center():
        assert distance(p.detach().double().numpy(), start()) < TOLERANCE[dtype]  # z_0 = x_0
    xs = simulate(constant(0.1, delta), nesterov)
    z = xs[0]
    for t in range(STEPS):
        run(optimizer, p, constant(0.1, delta), range(t, t + 1))
        a = 1 / (t + 2) if rate is None else rate
        z = (1 - a) * z + a * xs[t + 1]  # the thesis' z_{t+2} from z_{t+1}
        held = p.detach().clone()
        with optimizer.center(), optimizer.center(), optimizer.iterate():
            assert distance(p.detach().double().numpy(), z) < TOLERANCE[dtype]
            p.detach().fill_(5.0)  # whatever is done there, as by an average over the workers
        assert torch.equal(p, held)  # bit for bit: looking does not change the training
    if rate is None:
        assert np.allclose(z, np.mean(xs, 0), rtol=1e-12)
    assert (FlatParameters.of(p) is not None) == (flat is not None)


def test_running_average_of_other_optimizers() -> None:
    model, plain = net(), net()
    optimizer = RunningAverage(torch.optim.Adam(model.parameters(), lr=0.01))
    xs: list[list[Tensor]] = [[p.detach().clone() for p in model.parameters()]]
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    theirs = torch.optim.Adam(plain.parameters(), lr=0.01)
    other = torch.optim.lr_scheduler.ExponentialLR(theirs, 0.9)
    for t in range(6):
        step(model, optimizer, 1, t)
        step(plain, theirs, 1, t)
        scheduler.step()
        other.step()
        xs.append([p.detach().clone() for p in model.parameters()])
    close(model, plain, 0.0)
    with optimizer.center():
        for p, *values in zip(model.parameters(), *xs, strict=True):
            torch.testing.assert_close(p.detach(), torch.stack(values).mean(0))
        with pytest.raises(RuntimeError, match="inside center"):
            optimizer.step()
        with pytest.raises(RuntimeError, match="inside center"):
            optimizer.load_state_dict({})
        z = [p.detach().clone() for p in model.parameters()]
        assert all(torch.equal(a, b) for a, b in zip(optimizer.state_dict()["average"], z, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(optimizer.state_dict()["average"], z, strict=True))
    assert optimizer.param_groups is optimizer.optimizer.param_groups
    assert isinstance(optimizer, torch.optim.Optimizer) and "lr" in repr(optimizer)


def test_average_of_two_parameters_on_one_memory() -> None:
    a = nn.Parameter(torch.tensor([1.0, 2.0]))
    b = nn.Parameter(a.data)
    optimizer = RunningAverage(torch.optim.SGD([a, b], lr=0.5))
    a.grad, b.grad = torch.ones(2), torch.ones(2)
    optimizer.step()
    with optimizer.center():
        assert torch.equal(a, torch.tensor([0.5, 1.5])) and torch.equal(a, b)
    assert torch.equal(a, torch.tensor([0.0, 1.0])) and torch.equal(a, b)


def test_average_passes_over_what_is_not_finite() -> None:
    p = nn.Parameter(torch.zeros(3))
    optimizer = RunningAverage(MSGD([p], 0.1, 0.9), rate=0.5)
    p.grad = torch.tensor([1.0, float("nan"), float("inf")])
    optimizer.step()
    with optimizer.center():
        torch.testing.assert_close(p.detach(), torch.tensor([-0.05, 0.0, 0.0]))


def test_closure_and_late_group() -> None:
    p, q = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = RunningAverage(MSGD([p], 0.1, 0.9))

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (p**2).sum() + (q**2).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == 4 and (p < 1).all() and (q == 1).all()
    optimizer.add_param_group({"params": [q], "lr": 0.2})
    optimizer.step(closure)
    assert (q < 1).all() and len(optimizer.state_dict()["average"]) == 2

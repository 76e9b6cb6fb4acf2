"""The learning rate over time."""

from __future__ import annotations

import pytest
import torch

from mpilsgd.train.schedule import Schedule


def test_constant_by_default() -> None:
    assert Schedule()(0, 0.0) == Schedule()(10**6, 500.0) == 1.0


@pytest.mark.parametrize(
    ("epoch", "factor"), [(0, 1), (29.99, 1), (30, 0.1), (39, 0.1), (40, 0.01), (99, 0.01)]
)
def test_drops(epoch: float, factor: float) -> None:
    assert Schedule([30, 40], 0.1)(0, epoch) == pytest.approx(factor)


def test_decay_is_the_thesis_formula() -> None:
    schedule = Schedule(gamma=1e-2)
    assert [schedule(t, 0) for t in (0, 100, 300)] == pytest.approx([1, 2**-0.5, 0.5])


def test_both_multiply() -> None:
    assert Schedule([1], 0.5, 1e-2)(300, 2) == pytest.approx(0.25)


def test_it_sets_every_group_from_its_own_initial_rate_and_survives_a_state_dict() -> None:
    a, b = (torch.nn.Parameter(torch.zeros(1)) for _ in range(2))
    optimizer = torch.optim.SGD([{"params": [a], "lr": 1.0}, {"params": [b], "lr": 0.5}], lr=0.1)
    schedule = Schedule([2], 0.1)
    schedule.apply(optimizer.param_groups, 0, 0.0)
    assert [group["lr"] for group in optimizer.param_groups] == [1.0, 0.5]
    schedule.apply(optimizer.param_groups, 10, 2.0)
    resumed = torch.optim.SGD([{"params": [a]}, {"params": [b]}], lr=7.0)
    resumed.load_state_dict(optimizer.state_dict())
    for one in (optimizer, resumed):
        schedule.apply(one.param_groups, 20, 3.0)
        assert [group["lr"] for group in one.param_groups] == pytest.approx([0.1, 0.05])

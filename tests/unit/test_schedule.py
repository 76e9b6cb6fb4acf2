"""The learning rate over time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mpilsgd.train.callables import InputError
from mpilsgd.train.config import Config
from mpilsgd.train.schedule import Schedule, Scheduler, scheduled


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


def rates(schedule: Schedule | Scheduler, optimizer: torch.optim.Optimizer, steps: range) -> list[float]:
    """Of every step, as the loop applies it."""
    found = []
    for step in steps:
        schedule.apply(optimizer.param_groups, step, step / 10)
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.stepped(step + 1)
    return found


def sgd() -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)


@pytest.mark.parametrize("shape", ["cosine", "linear"])
def test_shapes_are_torch_s_after_a_warm_up(shape: str) -> None:
    theirs = sgd()
    warm = torch.optim.lr_scheduler.LinearLR(theirs, 1 / 5, 1.0, 4)
    fall = (
        torch.optim.lr_scheduler.CosineAnnealingLR(theirs, 15)
        if shape == "cosine"
        else torch.optim.lr_scheduler.LinearLR(theirs, 1.0, 0.0, 15)
    )
    both = torch.optim.lr_scheduler.SequentialLR(theirs, [warm, fall], [5])
    expected = []
    for _ in range(20):
        expected.append(theirs.param_groups[0]["lr"])
        theirs.step()
        both.step()
    own = scheduled(Config(schedule=shape, warmup="5 steps", lr=0.5), sgd(), 20, 10)
    assert rates(own, sgd(), range(20)) == pytest.approx(expected)
    assert own(19, 0) > 0 and own(20, 0) == own(25, 0) == pytest.approx(0)  # in an asynchronous run


def test_a_warm_up_in_epochs_and_drops() -> None:
    own = scheduled(Config(warmup=0.4, lr_drops=[1.0]), sgd(), 30, 10)
    assert rates(own, sgd(), range(12)) == pytest.approx([0.125, 0.25, 0.375] + [0.5] * 7 + [0.05] * 2)


def test_a_torch_scheduler_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "users_schedule.py").write_text(
        "from torch.optim import lr_scheduler as s\n"
        "def wave(optimizer, total_steps, steps_per_epoch):\n"
        "    assert (total_steps, steps_per_epoch) == (12, 10)\n"
        "    return s.SequentialLR(optimizer, [s.LinearLR(optimizer), s.CosineAnnealingLR(optimizer, 5)], [4])\n"
        "def plateau(optimizer): return s.ReduceLROnPlateau(optimizer)\n"
        "def nothing(optimizer): pass\n"
        "def other(optimizer, gamma): pass\n"
    )
    config = Config(schedule="users_schedule:wave")
    whole, first = sgd(), sgd()
    expected = rates(scheduled(config, whole, 12, 10), whole, range(12))
    assert len(set(expected)) == 12
    schedule = scheduled(config, first, 12, 10)
    assert rates(schedule, first, range(5)) == expected[:5]
    second = sgd()
    resumed = scheduled(config, second, 12, 10)
    second.load_state_dict(first.state_dict())
    resumed.load_state_dict(schedule.state_dict())
    assert rates(resumed, second, range(5, 12)) == expected[5:]
    for name, message in {
        "plateau": "ReduceLROnPlateau goes by a measure",
        "nothing": "must return a scheduler",
        "other": r"is called with \(optimizer\), and by name, if it takes them, with total_steps",
    }.items():
        with pytest.raises(InputError, match=message):
            Scheduler(f"users_schedule:{name}", sgd(), 12, 10)

"""Small parts of the training job: threads, intervals, leaders' lines, random states, what is displayed."""

from __future__ import annotations

import io
import random
from typing import Any

import numpy as np
import pytest
import torch

from mpilsgd.train.config import Config
from mpilsgd.train.data import TensorSet
from mpilsgd.train.display import Display, closing, duration, opening, size
from mpilsgd.train.evaluation import evaluate, evaluating
from mpilsgd.train.job import fair_share
from mpilsgd.train.loop import merged, random_state, restore_random_state, steps_of


@pytest.mark.parametrize(
    ("cores", "everyone", "threads"),
    [
        ([0, 1, 2, 3], [[0, 1, 2, 3]] * 2, 2),  # unbound ranks share
        ([0, 1], [[0, 1]] * 4, 1),  # more ranks than cores
        ([0, 1, 2], [[0, 1, 2]] * 2, 1),
        ([2, 3], [[0, 1], [2, 3]], 2),  # bound ranks keep their own
        ([0, 1, 2, 3], [[0, 1, 2, 3], [0, 1]], 3),
        ([5], [[5]], 1),
    ],
)
def test_fair_share(cores: list[int], everyone: list[list[int]], threads: int) -> None:
    assert fair_share(cores, everyone) == threads


@pytest.mark.parametrize(
    ("every", "steps"), [(None, 0), (1.0, 40), (0.5, 20), ("2 epochs", 80), ("7 steps", 7), (1e-9, 1)]
)
def test_steps_of(every: Any, steps: int) -> None:
    assert steps_of(every, 40) == steps


def test_merged_elections() -> None:
    first = [(8, 0, 1, -1), (12, 0, 0, 3)]
    second = [(8, 1, 2, -1), (12, 1, 3, 3), (16, 1, 2, -1)]
    assert merged([first, [], second, []], 2) == [
        {"step": 8, "leaders": [1, 2], "leader": None},
        {"step": 12, "leaders": [0, 3], "leader": 3},
        {"step": 16, "leaders": [None, 2], "leader": None},
    ]
    assert merged([[], []], 1) == []


def test_random_state_round_trip() -> None:
    def draw() -> list[float]:
        return [random.random(), float(np.random.rand()), float(np.random.randn()), float(torch.rand(()))]

    np.random.randn()
    state = random_state()
    first = draw()
    restore_random_state(state)
    assert draw() == first


def test_evaluating_keeps_every_mode() -> None:
    model = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.BatchNorm1d(3))
    model.train()
    model[1].eval()
    with evaluating(model):
        assert not model[0].training
    assert model.training and model[0].training and not model[1].training


def test_evaluate_counts_what_is_wrong_and_what_is_not_a_number() -> None:
    scores = torch.tensor([[2.0, 0.0], [0.0, 2.0], [2.0, 0.0], [float("nan"), 0.0]])
    test = TensorSet(scores, torch.tensor([0, 1, 1, 0]), 2)
    assert evaluate(torch.nn.Identity(), test).error == 0.5
    test = TensorSet(scores[:3], torch.tensor([0, 1, 1]), 2)
    expected = torch.nn.functional.cross_entropy(scores[:3], torch.tensor([0, 1, 1]))
    assert evaluate(torch.nn.Identity(), test).loss == pytest.approx(float(expected))


ROW: dict[str, Any] = {
    "step": 20,
    "epoch": 0.5,
    "wall_s": 3.21,
    "train_loss": None,
    "test_loss": 0.25,
    "test_error": 0.0425,
    "leader": 3,
}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_log_file_gets_a_line_an_evaluation() -> None:
    log = io.StringIO()
    display = Display(0, 100, 40, log)
    display.step(1, 0.5)
    display.evaluation(ROW)
    display.evaluation({**ROW, "leader": None})
    lines = log.getvalue().splitlines()
    assert len(lines) == 2 and "\r" not in log.getvalue()
    assert "epoch   0.50  step  20     3.2 s" in lines[0] and "test error  4.25 %  leader 3" in lines[0]
    assert "leader" not in lines[1]


def test_a_terminal_gets_a_live_line_too() -> None:
    terminal = Terminal()
    display = Display(0, 100, 40, terminal)
    display.step(1, 0.5)
    display.say("done")
    assert terminal.getvalue().startswith("step 1/100  epoch 0.03  loss 0.5000")
    assert terminal.getvalue().endswith("\rdone\n")


def test_other_ranks_are_silent() -> None:
    terminal = Terminal()
    display = Display(1, 100, 40, terminal)
    display.step(1, 0.5)
    display.evaluation(ROW)
    assert terminal.getvalue() == ""


def test_opening_and_closing() -> None:
    text = opening(Config(method_options={"pull": 0.2}), 4, [[0, 1], [2, 3]], 1, 1437, 85002)
    assert "LSGD pull=0.2: mlp (85002 parameters) on digits (1437 samples)" in text
    assert "4 rank(s) in 2 groups of 2, 1 thread(s) each" in text
    summary = {
        "world_size": 2,
        "test_error": 0.03,
        "test_loss": 0.1,
        "best_worker": {"rank": 1, "test_error": 0.02},
        "leads": [3, 1],
        "resets": [0, 2],
        "wall_s": 130.0,
        "steps": 9,
        "t_compute": [1.0, 3.0],
        "t_data": [0.0, 0.0],
        "t_comm": [2.0, 2.0],
        "t_wait": [1.0, 2.0],
        "bytes_group": 12_300_000,
        "bytes_across": 0,
        "rounds": 4,
    }
    text = closing(summary, "runs/x")
    for part in (
        "3.00 %",
        "2.00 %   (rank 1)",
        "0: 3  1: 1",
        "1: 2",
        "2 min 10 s",
        "computing 2.0 s (50.0 %)",
        "12.3 MB",
        "runs/x",
    ):
        assert part in text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.04, "0.0 s"), (99.9, "99.9 s"), (125, "2 min 05 s"), (7380, "2 h 03 min")]
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_size() -> None:
    assert [size(n) for n in (0, 999, 1500, 2.5e9)] == ["0 B", "999 B", "1.5 kB", "2.5 GB"]

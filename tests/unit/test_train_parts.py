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
from mpilsgd.train.elections import Election, merged, on_common_clock
from mpilsgd.train.evaluation import evaluate, evaluating
from mpilsgd.train.events import Event, events_between, steps_of
from mpilsgd.train.job import fair_share
from mpilsgd.train.progress import histogram, mean
from mpilsgd.train.sampling import random_state, restore_random_state
from mpilsgd.train.stragglers import Slowdown, parse_slow
from mpilsgd.train.table import in_ms


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


def test_events_in_order() -> None:
    assert events_between(0, 30, 10, 15) == [
        Event(10, "evaluate"),
        Event(15, "save"),
        Event(20, "evaluate"),
    ]
    assert events_between(0, 21, 10, 10) == [
        Event(10, "evaluate"),
        Event(10, "save"),
        Event(20, "evaluate"),
        Event(20, "save"),
    ]
    assert events_between(15, 40, 10, 15) == [Event(20, "evaluate"), Event(30, "evaluate"), Event(30, "save")]
    assert events_between(0, 10, 10, 0) == events_between(20, 10, 1, 1) == []


def test_the_mean_step_is_whole_where_it_can_be() -> None:
    assert mean([4, 4], 2) == 4 and isinstance(mean([4, 4], 2), int)
    assert isinstance(mean([3, 5], 2), int)
    assert mean([3, 4, 4, 4], 4) == 3.75
    assert mean([0, 4, 5], 2) == 4.5  # one rank only averages


def test_histogram() -> None:
    assert histogram([{3: 1, 0: 2}, {}, {3: 4, 10: 1}]) == {"0": 2, "3": 5, "10": 1}
    assert list(histogram([{10: 1}, {9: 1}])) == ["9", "10"]


def test_a_worker_s_elections_by_the_common_clock() -> None:
    found = [Election(step, 0, 1, 1) for step in (12, 14)]
    assert on_common_clock(found, (10, 20), (10, 20)) == found
    assert [e.step for e in on_common_clock(found, (10, 14), (20, 21.5))] == [20.75, 21.5]
    assert on_common_clock([], (3, 3), (3, 5)) == []


def test_merged_elections() -> None:
    first = [Election(8, 0, 1, -1), Election(12, 0, 0, 3)]
    second = [Election(8, 1, 2, -1), Election(12, 1, 3, 3), Election(16, 1, 2, -1)]
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


def test_other_ranks_are_silent() -> None:
    terminal = Terminal()
    display = Display(1, 100, 40, terminal)
    display.step(1, 0.5)
    display.evaluation(ROW)
    assert terminal.getvalue() == ""


def test_opening_and_closing() -> None:
    text = opening(Config(method_options={"pull": 0.2}), 4, [[0, 1], [2, 3]], 1, 1437, 85002)
    assert "LSGD period=64 pull=0.2: mlp (85002 parameters) on digits (1437 samples)" in text
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
        "peak_memory": [3e8, 5e8],
        "skipped": [0, 7],
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
        "500 MB a rank at most, 800 MB in all",
        "1: 7",
        "runs/x",
    ):
        assert part in text


def test_an_asynchronous_run_says_what_it_did() -> None:
    config = Config(method="EASGD", method_options={"asynchronous": True}, slow="0:3,random:1.5")
    text = opening(config, 4, [[0, 1, 2, 3]], 1, 1437, 85002)
    assert "slowed down on purpose: rank 0 by 3, every step by a random factor of mean 1.5" in text
    summary = {
        **dict(world_size=2, test_error=0.03, test_loss=0.1, leads=[0, 0], resets=[0, 0], wall_s=1.0),
        **dict(steps=9.5, t_compute=[1.0, 3.0], t_data=[0.0, 0.0], t_comm=[2.0, 2.0], t_wait=[1.0, 2.0]),
        **dict(bytes_group=0, bytes_across=0, rounds=4, best_worker={"rank": 1, "test_error": 0.02}),
        **dict(peak_memory=[1, 1]),
        **dict(worker_steps=[6, 13], staleness={"0": 1, "2": 3, "10": 1}),
    }
    text = closing(summary, "runs/x")
    assert "6 to 13 steps a rank" in text
    assert "mean 3.20, at most 10" in text
    assert "7 steps a rank" in closing({**summary, "worker_steps": [7, 7]}, "runs/x")


def test_a_slow_rank_sleeps_for_its_share(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr("time.sleep", slept.append)
    slowdown = parse_slow("2:3,0:1.5")
    for rank in range(3):
        slowdown.sleep(0.1, 0, rank, 7)
    assert slept == pytest.approx([0.05, 0.0, 0.2])
    slept.clear()
    parse_slow(None).sleep(0.1, 0, 0, 0)
    assert slept == []


def test_random_slowness_has_its_mean_and_a_stream_of_its_own_for_each_rank() -> None:
    slowdown = parse_slow("random:3")
    factors = np.array([[slowdown.factor(5, rank, step) for step in range(2000)] for rank in (0, 1)])
    assert (factors >= 1).all()
    assert factors.mean(1) == pytest.approx([3, 3], rel=0.1)
    assert (factors - 1).std() == pytest.approx(2, rel=0.1)  # exponential: as large as the mean
    assert abs(np.corrcoef(factors)[0, 1]) < 0.1
    assert slowdown.factor(5, 1, 3) == factors[1, 3] != slowdown.factor(6, 1, 3)


@pytest.mark.parametrize(
    ("value", "slowdown"),
    [
        (None, Slowdown()),
        ("2:3", Slowdown({2: 3.0})),
        ("2:3, 0:1.5", Slowdown({0: 1.5, 2: 3.0})),
        ("random:2", Slowdown({}, 2.0)),
        (["1:2", "random:1.5,3:4"], Slowdown({1: 2.0, 3: 4.0}, 1.5)),
        ([], Slowdown()),
    ],
)
def test_slow(value: Any, slowdown: Slowdown) -> None:
    assert parse_slow(value) == slowdown
    assert parse_slow(str(slowdown) or None) == slowdown


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("2:0.5", "must be RANK:FACTOR or random:FACTOR, .* each FACTOR at least 1, not '2:0.5'"),
        ("2", "not '2'"),
        ("", "not ''"),
        ("2:", "not '2:'"),
        ("-1:2", "not '-1:2'"),
        ("one:2", "not 'one:2'"),
        ("1:2:3", "not '1:2:3'"),
        ("1:inf", "not '1:inf'"),
        ("1:nan", "not '1:nan'"),
        ("0:2,,1:2", "not ''"),
        ("0:2,0:3", "0 is given twice"),
        ("random:2,random:2", "random is given twice"),
        (123, "not 123; in a file put it in quotes: '2:3'"),
        ([61.5], "not 61.5; in a file"),
        ([["1:2"]], r"not \['1:2'\]"),
    ],
)
def test_slow_that_makes_no_sense(value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_slow(value)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.04, "0.0 s"), (99.9, "99.9 s"), (125, "2 min 05 s"), (7380, "2 h 03 min")]
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_size() -> None:
    assert [size(n) for n in (0, 999, 1500, 2.5e9)] == ["0 B", "999 B", "1.5 kB", "2.5 GB"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0"),
        (3.4e-7, "0.000340"),
        (0.00478, "4.78"),
        (0.009999, "10.0"),
        (0.0199, "19.9"),
        (12.0, "12000"),
        (float("nan"), "-"),
    ],
)
def test_milliseconds_have_three_digits(seconds: float, text: str) -> None:
    assert in_ms(seconds) == text

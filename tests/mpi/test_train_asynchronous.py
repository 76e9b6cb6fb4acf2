"""`mpilsgd train` with asynchronous methods: the total of steps, what is told of it, resuming, stragglers."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from job_harness import METHODS, QUICK, WORLD, as_a_process, everyone_got, lines, untimed

from mpilsgd.train import job, loop
from mpilsgd.train.run_directory import RunDirectory
from mpilsgd.train.together import FAILED, Stopped

pytestmark = pytest.mark.mpi

FREE: dict[str, tuple[str, ...]] = {
    "LSGD": ("--method", "LSGD", "--asynchronous", "--period", "5"),
    "LSGD-groups": ("--method", "LSGD", "--asynchronous", "--period", "5", "--group_size", "1"),
    "wait-free": ("--method", "LSGD", "--asynchronous", "wait-free", "--period", "5"),
    "EASGD": ("--method", "EASGD", "--asynchronous", "--period", "5"),
    "EAMSGD-overlap": (
        *("--method", "EASGD", "--asynchronous", "--period", "5", "--overlap"),
        *("--optimizer", "MSGD", "--momentum", "0.5", "--lr", "0.1"),
        *(
            "--moving_rate",
            "0.2",
        ),  # center_rate / ranks is 0.9 on one rank: x - c swings (factor 1 - 0.9 - 0.9)
    ),
    "Downpour": ("--method", "Downpour", "--period", "2", "--lr", "0.05"),
    "Downpour-momentum": ("--method", "Downpour", "--method_momentum", "0.5", "--lr", "0.02"),
    "ADMM": ("--method", "ADMM", "--asynchronous", "--rho", "0.5"),
}
COURSE = ("--steps", "47", "--eval_every", "10 steps", "--checkpoint_every", "13 steps")
CENTERED = [name for name in FREE if "LSGD" not in name and name != "wait-free"]


def trained(output: Path, *argv: str) -> dict[str, Any]:
    """Runs the job; gives its summary."""
    everyone_got(job.main([*QUICK, *argv, "--output", str(output)]), 0)
    return summary_of(output)


def summary_of(output: Path) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads((output / "summary.json").read_text())
    return summary


def check_totals(output: Path, summary: dict[str, Any], steps: int, expected: Sequence[int]) -> None:
    """The run took its total, was evaluated at the expected mean steps or a little later, and counts all."""
    rows = lines(output / "metrics.jsonl")
    assert len(rows) == len(expected)
    late = 2 * WORLD.size  # each worker is in the middle of a step; the counter may tell it a step later
    for row, step in zip(rows, expected, strict=True):
        assert step * WORLD.size <= row["grad_evals"] <= step * WORLD.size + late
        assert row["step"] == row["grad_evals"] / WORLD.size
    assert all(a["wall_s"] < b["wall_s"] for a, b in itertools.pairwise(rows))
    last = rows[-1]
    assert last["t_compute"] + last["t_data"] + last["t_comm"] == pytest.approx(last["wall_s"], rel=1e-6)
    assert sum(summary["worker_steps"]) == summary["grad_evals"] == last["grad_evals"] >= steps * WORLD.size
    assert len(summary["worker_steps"]) == WORLD.size


@pytest.mark.parametrize("name", FREE)
def test_a_free_run_ends_on_the_total(name: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = folder / "run"
    summary = trained(output, *FREE[name], "--steps", "103", "--eval_every", "25 steps")
    check_totals(output, summary, 103, [25, 50, 75, 100, 103])
    assert lines(output / "metrics.jsonl")[-1]["test_error"] < 0.35
    told = capsys.readouterr().out
    assert ("steps a rank" in told) == (WORLD.rank == 0)
    if name in CENTERED:
        counts = {int(key): count for key, count in summary["staleness"].items()}
        assert sum(counts.values()) > 0 and list(counts) == sorted(counts)
        assert ("staleness" in told) == (WORLD.rank == 0)
    elections = lines(output / "leaders.jsonl")
    assert bool(elections) == (name not in CENTERED)
    assert all(a["step"] < b["step"] for a, b in itertools.pairwise(elections))
    assert all(line["step"] <= summary["steps"] for line in elections)


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("name", ["LSGD", "wait-free", "EASGD", "Downpour"])
def test_without_shared_memory(name: str, folder: Path) -> None:
    summary = trained(folder / "run", *FREE[name], *COURSE, "--shared", "false")
    check_totals(folder / "run", summary, 47, [10, 20, 30, 40, 47])


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("name", ["LSGD", "wait-free", "EASGD", "Downpour"])
def test_a_slow_rank_takes_fewer_steps(name: str, folder: Path) -> None:
    options = (*FREE[name], "--slow", "0:12", "--steps", "60", "--eval_every", "20 steps")
    summary = trained(folder / "run", *options)
    check_totals(folder / "run", summary, 60, [20, 40, 60])
    slow, *others = summary["worker_steps"]
    assert slow < 0.7 * sum(others) / len(others)


@pytest.mark.parametrize("method", METHODS)
def test_synchronous_runs_with_a_slow_rank_only_take_longer(method: str, folder: Path) -> None:
    options = ("--method", method, *METHODS[method], "--steps", "20", "--eval_every", "7 steps")
    plain = trained(folder / "plain", *options)
    slow = trained(folder / "slow", *options, "--slow", "0:3,random:2")
    assert untimed(lines(folder / "slow" / "metrics.jsonl")) == untimed(
        lines(folder / "plain" / "metrics.jsonl")
    )
    assert [row["step"] for row in lines(folder / "slow" / "metrics.jsonl")] == [7, 14, 20]
    for summary in (plain, slow):
        assert "worker_steps" not in summary and "staleness" not in summary
        assert summary["steps"] == 20


def test_slow_ranks_are_ranks(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--slow", f"0:2,{WORLD.size}:2", "--lr", "0", "--output", str(folder / "run")]
    everyone_got(job.main(argv), 2)
    told = capsys.readouterr().err
    for part in (f"slow: there is no rank {WORLD.size}; the ranks are 0 to {WORLD.size - 1}", "lr: must be"):
        assert (part in told) == (WORLD.rank == 0), told
    everyone_got(job.main(["--slow", "often", "--output", str(folder / "run")]), 2)
    assert ("slow: must be RANK:FACTOR" in capsys.readouterr().err) == (WORLD.rank == 0)


ROUND_ROBIN = {
    name: (*options, "--order", "round-robin")
    for name, options in FREE.items()
    if name not in ("LSGD-groups", "EAMSGD-overlap")
}
ROUND_ROBIN["ADMM-synchronous"] = ("--method", "ADMM", "--rho", "0.5")


def killed(monkeypatch: pytest.MonkeyPatch, argv: list[str], at: int) -> None:
    """Runs the job until all together come to the evaluation at a mean step, where it ends without a word."""

    def kill(self: loop.Trainer, events: Any) -> None:
        if events[0] == (at, "evaluate"):
            with self._centre():  # all have come: none is left in a round
                pass
            raise Stopped("killed", FAILED)
        do(self, events)

    do = loop.Trainer._do
    with as_a_process(), monkeypatch.context() as patch:
        patch.setattr(loop.Trainer, "_do", kill)
        everyone_got(job.main(argv), FAILED)


@pytest.mark.parametrize("name", ROUND_ROBIN)
def test_a_resumed_round_robin_run_equals_an_uninterrupted_one(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = [*QUICK, *ROUND_ROBIN[name], *COURSE]
    whole, cut = folder / "whole", folder / "cut"
    everyone_got(job.main([*argv, "--output", str(whole)]), 0)
    killed(monkeypatch, [*argv, "--output", str(cut)], 40)
    everyone_got(job.main(["--resume", str(cut)]), 0)
    rows = lines(whole / "metrics.jsonl")
    assert [row["step"] for row in rows] == [10, 20, 30, 40, 47]
    assert untimed(lines(cut / "metrics.jsonl")) == untimed(rows)
    assert lines(cut / "leaders.jsonl") == lines(whole / "leaders.jsonl")
    assert summary_of(cut)["worker_steps" if name != "ADMM-synchronous" else "steps"] == (
        [47] * WORLD.size if name != "ADMM-synchronous" else 47
    )
    assert summary_of(cut).get("staleness") == summary_of(whole).get("staleness")


@pytest.mark.parametrize("name", FREE)
def test_a_free_run_can_be_resumed(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = folder / "run"
    killed(monkeypatch, [*QUICK, *FREE[name], *COURSE, "--slow", "0:3", "--output", str(output)], 40)
    before = RunDirectory(output).load(WORLD.rank, 39)["progress"]["step"]
    evaluated = lines(output / "metrics.jsonl")
    everyone_got(job.main(["--resume", str(output)]), 0)
    summary = summary_of(output)
    check_totals(output, summary, 47, [10, 20, 30, 40, 47])
    assert lines(output / "metrics.jsonl")[:3] == evaluated
    assert summary["worker_steps"][WORLD.rank] >= before > 0
    if name in CENTERED:
        period = 5 if "EA" in name else 2 if name == "Downpour" else 1
        exchanges = sum(summary["staleness"].values())
        assert exchanges == pytest.approx(summary["grad_evals"] / period, abs=WORLD.size + 1)
    rows = lines(output / "metrics.jsonl")
    everyone_got(job.main(["--resume", str(output)]), 0)  # a finished run: nothing is added
    assert lines(output / "metrics.jsonl") == rows
    assert summary_of(output)["worker_steps"] == summary["worker_steps"]
    everyone_got(job.main(["--resume", str(output), "--steps", "60"]), 0)
    check_totals(output, summary_of(output), 60, [10, 20, 30, 40, 47, 50, 60])


def test_a_resumed_run_is_recorded_no_more(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file, output = folder / "events.json", folder / "run"
    argv = [*QUICK, *FREE["EASGD"], *COURSE, "--record", str(file), "--output", str(output)]
    killed(monkeypatch, argv, 40)
    recorded = file.read_text()
    everyone_got(job.main(["--resume", str(output)]), 0)
    assert ("resumed without record" in capsys.readouterr().out) == (WORLD.rank == 0)
    assert file.read_text() == recorded


@pytest.mark.parametrize("name", FREE)
def test_a_recorded_run_can_be_replayed(name: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = str(folder / "events.json")
    options = (*FREE[name], *COURSE, "--slow", "0:2,random:1.5")
    first = trained(folder / "first", *options, "--record", file)
    second = trained(folder / "second", *options[:-2], "--replay", file)
    assert second["worker_steps"] == first["worker_steps"]
    keys = ("test_error", "test_loss", "train_loss", "step", "grad_evals")
    one, two = (
        [[row[key] for key in keys] for row in lines(folder / run / "metrics.jsonl")]
        for run in ("first", "second")
    )
    assert one == two
    capsys.readouterr()
    argv = [*QUICK, *options[:-2], "--replay", file, "--output", str(folder / "third")]
    everyone_got(job.main([*argv, "--init", "different"]), 2)
    assert (file in capsys.readouterr().err) == (WORLD.rank == 0)

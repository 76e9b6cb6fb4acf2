"""`mpilsgd train` on one and on several ranks: results and resuming."""

from __future__ import annotations

import itertools
import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from job_harness import METHODS, NET, QUICK, WORLD, everyone_got, killed, lines, same_run

from mpilsgd.train import job
from mpilsgd.train.command_line import parse
from mpilsgd.train.run_directory import METRICS, RunDirectory

pytestmark = pytest.mark.mpi


@pytest.mark.brief(2)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_learns_digits(method: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = folder / "run"
    argv = ["--method", method, *METHODS[method], *QUICK, "--epochs", "12", "--output", str(output)]
    everyone_got(job.main(argv), 0)
    told = capsys.readouterr().out
    assert ("test error of the centre" in told) == (WORLD.rank == 0)
    rows = lines(output / "metrics.jsonl")
    steps = 1437 // WORLD.size // 32 * 12
    assert [tuple(row) for row in rows] == [METRICS] * 6
    assert [row["epoch"] for row in rows] == [2, 4, 6, 8, 10, 12]
    assert rows[-1]["step"] == steps and rows[-1]["grad_evals"] == steps * WORLD.size
    assert rows[-1]["test_error"] < 0.12 and rows[-1]["train_loss"] < rows[0]["train_loss"]
    assert all(a["wall_s"] < b["wall_s"] for a, b in itertools.pairwise(rows))
    last = rows[-1]
    assert last["t_compute"] + last["t_data"] + last["t_comm"] == pytest.approx(last["wall_s"], rel=1e-6)
    summary = json.loads((output / "summary.json").read_text())
    assert summary["test_error"] == last["test_error"] and summary["method"] == method
    assert (
        len(summary["t_comm"])
        == len(summary["leads"])
        == len(summary["resets"])
        == summary["world_size"]
        == WORLD.size
    )
    assert summary["best_worker"]["test_error"] == min(summary["worker_test_errors"])
    best = min(rows, key=lambda row: row["test_error"])
    assert summary["best"] == {"step": best["step"], "test_error": best["test_error"]}
    ranks = json.loads((output / "ranks.json").read_text())
    assert ranks["steps"] == [steps] * WORLD.size and len(ranks["t_wait"]) == WORLD.size
    assert (output / "command").read_text().endswith(f"mpilsgd train {shlex.join(argv)}\n")
    assert yaml.safe_load((output / "config.yaml").read_text())["method"] == method
    elections = lines(output / "leaders.jsonl")
    assert bool(elections) == (method == "LSGD")
    if method == "LSGD":
        assert [line["step"] for line in elections] == list(range(5, steps + 1, 5))
        assert sum(summary["leads"]) == sum(len(line["leaders"]) for line in elections)
        assert last["leader"] in range(WORLD.size)
    assert (
        ("forecast / measured" in told)
        == (WORLD.rank == 0 and WORLD.size > 1)
        == ("forecast" in summary and not WORLD.rank)
    )
    for key in ("bytes_group", "bytes_across") if WORLD.size > 1 else ():
        if method != "EASGDTree":  # which leaves messages out
            foreseen, counted = summary["forecast"][key]
            # rounds that the last steps did not come to
            assert foreseen == pytest.approx(counted, rel=0.15, abs=1)


def test_the_centre_is_saved_as_evaluated(folder: Path) -> None:
    output = folder / "run"
    argv = [
        "--optimizer",
        "MSGD",
        "--momentum",
        "0.9",
        *QUICK,
        "--lr",
        "0.02",
        "--epochs",
        "3",
        "--output",
        str(output),
    ]
    everyone_got(job.main(argv), 0)
    from mpilsgd.train import data, evaluation, models

    train, test = data.load("digits")
    model = models.build("mlp", train.input_shape, train.classes)
    model.load_state_dict(torch.load(output / "checkpoint" / "center.pt", weights_only=True))
    summary = json.loads((output / "summary.json").read_text())
    assert evaluation.evaluate(model, test).error == summary["test_error"]


RESUMED = {
    "LSGD": ("--method", "LSGD", "--period", "3", "--global_period", "4", "--momentum", "0.5"),
    "LSGD-groups": ("--method", "LSGD", "--period", "3", "--global_period", "5", "--group_size", "1"),
    "LSGD-every-step": (
        "--method",
        "LSGD",
        "--period",
        "3",
        "--when",
        "every_step",
        "--optimizer",
        "MSGD",
        "--momentum",
        "0.5",
    ),
    "LocalSGD": ("--method", "LocalSGD", "--period", "7", "--lr_drops", "3"),
    "LocalSGD-quadratic": ("--method", "LocalSGD", "--period", "7", "--average", "quadratic"),
    "EAMSGD": ("--method", "EASGD", "--period", "4", "--optimizer", "MSGD", "--momentum", "0.5"),
    "Gauss-Seidel": ("--method", "EASGD", "--period", "4", "--form", "gauss-seidel", "--lr_gamma", "0.01"),
    "AllreduceSGD": ("--method", "AllreduceSGD", "--optimizer", "Adam", "--lr", "0.001"),
    "running-average": ("--method", "LocalSGD", "--period", "7", "--running_average", "running"),
    "replacement": ("--method", "LocalSGD", "--period", "7", "--sampling", "replacement"),
}


@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_run_equals_an_uninterrupted_one(
    name: str, folder: Path, module: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed at a step that is neither evaluation nor checkpoint; dropout and BatchNorm in the model."""
    argv = ["--model", f"{module(NET)}:net", *QUICK, "--lr", "0.05", *RESUMED[name], "--batch_size", "25"]
    argv += ["--steps", "47", "--eval_every", "10 steps", "--checkpoint_every", "13 steps"]
    whole, cut = folder / "whole", folder / "cut"
    everyone_got(job.main([*argv, "--output", str(whole)]), 0)

    killed(argv, cut, 33, monkeypatch)
    assert [row["step"] for row in lines(cut / "metrics.jsonl")] == [10, 20, 30]
    everyone_got(job.main(["--resume", str(cut)]), 0)
    same_run(cut, whole, 47)


def test_a_run_without_a_checkpoint_starts_anew_and_a_finished_one_goes_on(folder: Path, capsys: Any) -> None:
    output = folder / "run"
    if WORLD.rank == 0:
        RunDirectory(output).claim(parse([*QUICK, "--epochs", "2", "--eval_every", "1"]).text())
        (output / "metrics.jsonl").write_text('{"step": 3}\n{"st')
    WORLD.Barrier()
    everyone_got(job.main(["--resume", str(output)]), 0)
    assert ("no finished checkpoint: starting anew" in capsys.readouterr().out) == (WORLD.rank == 0)
    assert [row["epoch"] for row in lines(output / "metrics.jsonl")] == [1, 2]
    before = (output / "summary.json").read_text()
    everyone_got(job.main(["--resume", str(output)]), 0)
    assert ("nothing is left to do" in capsys.readouterr().out) == (WORLD.rank == 0)
    assert [row["epoch"] for row in lines(output / "metrics.jsonl")] == [1, 2]
    assert json.loads((output / "summary.json").read_text())["test_error"] == json.loads(before)["test_error"]
    everyone_got(job.main(["--resume", str(output), "--epochs", "3"]), 0)
    assert [row["epoch"] for row in lines(output / "metrics.jsonl")] == [1, 2, 3]


@pytest.mark.mpi(min_size=2)
def test_resuming_on_another_number_of_ranks_is_refused(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = folder / "run"
    if WORLD.rank == 0:
        run = RunDirectory(output)
        run.claim(parse([*QUICK, "--epochs", "1"]).text())
        run.seal(5, [run.save(0, 5, {})])
        before = (output / "config.yaml").read_text()
    WORLD.Barrier()
    everyone_got(job.main(["--resume", str(output), "--epochs", "7"]), 2)
    if WORLD.rank == 0:
        assert (output / "config.yaml").read_text() == before  # nothing is lost
        assert f"is a run of 1 rank(s); it cannot be resumed on {WORLD.size}" in capsys.readouterr().err


def test_threads_are_shared_fairly(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mpilsgd import Topology

    topology = Topology()
    before = torch.get_num_threads()
    try:
        monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)), raising=False)
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        job._set_threads(None, topology)
        assert torch.get_num_threads() == 8 // topology.node.size
        job._set_threads(3, topology)
        assert torch.get_num_threads() == 3
        monkeypatch.setenv("OMP_NUM_THREADS", "5")
        job._set_threads(None, topology)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
        topology.free()


@pytest.mark.brief(2)
@pytest.mark.parametrize("buffers", ["average", "keep", "recalibrate"])
def test_batchnorm_models_train_with_every_policy(
    buffers: str, folder: Path, module: Callable[[str], str]
) -> None:
    name = module(
        "def net(): return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 32), torch.nn.BatchNorm1d(32), "
        "torch.nn.ReLU(), torch.nn.Linear(32, 10))\n"
    )
    argv = [
        "--model",
        f"{name}:net",
        "--buffers",
        buffers,
        *QUICK,
        "--period",
        "5",
        "--epochs",
        "8",
        "--output",
        str(folder / "run"),
    ]
    everyone_got(job.main(argv), 0)
    assert lines(folder / "run" / "metrics.jsonl")[-1]["test_error"] < 0.15


@pytest.mark.brief(2)
@pytest.mark.parametrize(
    "extra",
    [
        ("--sampling", "shuffle"),
        ("--init", "different"),
        ("--shared", "false"),
        ("--optimizer", "AdamW", "--lr", "0.003"),
        ("--optimizer", "torch.optim:RMSprop", "--lr", "0.003"),
        ("--weight_decay", "0.001", "--momentum", "0.9", "--nesterov", "--lr", "0.05"),
        ("--running_average", "0.05"),
    ],
    ids=lambda extra: " ".join(extra[:2]),
)
def test_options_that_train(extra: tuple[str, ...], folder: Path) -> None:
    argv = [*QUICK, "--period", "5", "--epochs", "8", *extra, "--output", str(folder / "run")]
    everyone_got(job.main(argv), 0)
    assert lines(folder / "run" / "metrics.jsonl")[-1]["test_error"] < 0.25


def test_a_user_s_torch_dataset_trains(folder: Path, module: Callable[[str], str]) -> None:
    name = module(
        "class Sides(torch.utils.data.Dataset):\n"
        "    classes = ['no', 'yes']\n"
        "    def __len__(self): return 200\n"
        "    def __getitem__(self, i):\n"
        "        x = torch.randn(3, generator=torch.Generator().manual_seed(i))\n"
        "        return x, int(x.sum() > 0)\n"
        "def data(): return Sides(), Sides()\n"
    )
    argv = [
        "--data",
        f"{name}:data",
        *QUICK,
        "--batch_size",
        "10",
        "--epochs",
        "20",
        "--output",
        str(folder / "run"),
    ]
    everyone_got(job.main(argv), 0)
    assert lines(folder / "run" / "metrics.jsonl")[-1]["test_error"] < 0.1


def test_help_is_printed_once(capsys: pytest.CaptureFixture[str]) -> None:
    everyone_got(job.main(["--help"]), 0)
    assert capsys.readouterr().out.startswith("usage: mpilsgd train") == (WORLD.rank == 0)

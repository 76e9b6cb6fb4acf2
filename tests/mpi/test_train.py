"""`mpilsgd train` on one and on several ranks: results, resuming, and how it ends when something is wrong."""

from __future__ import annotations

import errno
import itertools
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from mpi4py import MPI

from mpilsgd.train import job, loop
from mpilsgd.train.command_line import parse
from mpilsgd.train.run_directory import METRICS, RunDirectory
from mpilsgd.train.together import FAILED, Stopped

pytestmark = pytest.mark.mpi
WORLD = MPI.COMM_WORLD
METHODS = {
    "AllreduceSGD": (),
    "LocalSGD": ("--period", "5"),
    "LSGD": ("--period", "5", "--pull", "0.2"),
    "EASGD": ("--period", "5"),
}
QUICK = ("--threads", "1", "--device", "cpu", "--eval_every", "2", "--lr", "0.2")


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder that all ranks see; user modules in it can be imported."""
    name = WORLD.bcast(tempfile.mkdtemp(prefix="mpilsgd-train-") if WORLD.rank == 0 else None)
    monkeypatch.syspath_prepend(name)
    threads = torch.get_num_threads()
    yield Path(name)
    torch.set_num_threads(threads)
    WORLD.Barrier()
    if WORLD.rank == 0:
        shutil.rmtree(name, ignore_errors=True)


@pytest.fixture
def module(folder: Path) -> Callable[[str], str]:
    """Writes a module of the user's; gives its name."""
    count = iter(range(100))

    def make(text: str) -> str:
        name = f"{folder.name.replace('-', '_')}_{next(count)}"
        if WORLD.rank == 0:
            (folder / f"{name}.py").write_text(f"import torch\n{text}")
        WORLD.Barrier()
        return name

    return make


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def untimed(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {key: value for key, value in row.items() if key not in ("wall_s", "t_compute", "t_data", "t_comm")}
        for row in rows
    ]


def everyone_got(status: int, expected: int) -> None:
    assert WORLD.allgather(status) == [expected] * WORLD.size


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
    assert yaml.safe_load((output / "config.yaml").read_text())["method"] == method
    elections = lines(output / "leaders.jsonl")
    assert bool(elections) == (method == "LSGD")
    if method == "LSGD":
        assert [line["step"] for line in elections] == list(range(5, steps + 1, 5))
        assert sum(summary["leads"]) == sum(len(line["leaders"]) for line in elections)
        assert last["leader"] in range(WORLD.size)


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
    text = (
        "def net(input_shape, classes):\n"
        "    layers = torch.nn.Linear(64, 32), torch.nn.BatchNorm1d(32), torch.nn.ReLU(), torch.nn.Dropout(0.2)\n"
        "    return torch.nn.Sequential(torch.nn.Flatten(), *layers, torch.nn.Linear(32, classes))\n"
    )
    argv = ["--model", f"{module(text)}:net", *QUICK, "--lr", "0.05", *RESUMED[name], "--batch_size", "25"]
    argv += ["--steps", "47", "--eval_every", "10 steps", "--checkpoint_every", "13 steps"]
    whole, cut = folder / "whole", folder / "cut"
    everyone_got(job.main([*argv, "--output", str(whole)]), 0)

    def kill(self: loop.Trainer, *arguments: Any) -> None:
        if self.progress.step == 33:
            raise Stopped("killed", FAILED)
        step(self, *arguments)

    step = loop.Trainer._step
    with monkeypatch.context() as patch:
        patch.setattr(loop.Trainer, "_step", kill)
        everyone_got(job.main([*argv, "--output", str(cut)]), FAILED)
    assert [row["step"] for row in lines(cut / "metrics.jsonl")] == [10, 20, 30]
    everyone_got(job.main(["--resume", str(cut)]), 0)
    assert untimed(lines(cut / "metrics.jsonl")) == untimed(lines(whole / "metrics.jsonl"))
    assert lines(cut / "leaders.jsonl") == lines(whole / "leaders.jsonl")
    states = [RunDirectory(run).load(WORLD.rank, 47) for run in (whole, cut)]
    assert states[0]["progress"]["step"] == states[1]["progress"]["step"] == 47
    for key in states[0]["model"]:
        assert torch.equal(states[0]["model"][key], states[1]["model"][key]), key
    equal(states[0]["optimizer"], states[1]["optimizer"])
    centres = [torch.load(run / "checkpoint" / "center.pt", weights_only=True) for run in (whole, cut)]
    equal(*centres)


def equal(one: Any, other: Any) -> None:
    """The same bits everywhere in two nested states."""
    assert type(one) is type(other)
    if isinstance(one, dict):
        assert list(one) == list(other)
        for key in one:
            equal(one[key], other[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            equal(a, b)
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    else:
        assert one == other


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
        run.save(0, 5, {})
        run.seal(5, 1)
    WORLD.Barrier()
    everyone_got(job.main(["--resume", str(output)]), 2)
    if WORLD.rank == 0:
        assert f"is a run of 1 rank(s); it cannot be resumed on {WORLD.size}" in capsys.readouterr().err


SMALL = "def data(n=1):\n    return ((torch.zeros({n}, 5), torch.zeros({n}).long()),) * 2\n"

BAD_INPUT: dict[str, tuple[list[str], list[str]]] = {
    "all at once": (
        [
            "--method",
            "lsgd",
            "--pull",
            "1.5",
            "--period",
            "0",
            "--when",
            "never",
            "--lr",
            "-1",
            "--group_size",
            "99",
        ],
        [
            "pull must be a number in [0, 1], not 1.5",
            "period must be",
            "when must be one of",
            "lr: must be above 0",
            "group_size=99",
        ],
    ),
    "unknown method": (["--method", "SGDD"], ["method: 'SGDD' is not one of"]),
    "unknown option": (["--pul", "0.1"], ["pul: unknown option; did you mean pull?"]),
    "unknown model": (["--model", "vgg"], ["model: 'vgg' is not one of"]),
    "option of another method": (["--method", "EASGD", "--pull", "0.1"], ["pull: not an option of EASGD"]),
    "period of a set": (["--method", "LocalSGD", "--period", "[0, 3]"], ["a step number in period must be"]),
    "group size": (["--group_size", "99"], ["group_size=99 does not fit"]),
    "group size 0": (["--group_size", "0"], ["group_size: must be a whole number of at least 1"]),
    "missing data": (["--data", "mnist", "--data_dir", "nowhere"], ["not found; looked in nowhere"]),
    "batch too big": (["--batch_size", "2000"], ["batch_size=2000 cannot be filled"]),
    "model and data": (
        ["--model", "cnn7"],
        ["cnn7 needs images of at least 24 x 24 pixels; the data has 1 x 8 x 8"],
    ),
    "no such device": (["--device", "cuda"], ["torch finds no GPU here"]),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_ends_every_rank_before_training(
    name: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv, parts = BAD_INPUT[name]
    if name == "no such device" and torch.cuda.is_available():
        pytest.skip("needs a machine without GPU")
    started = time.monotonic()
    everyone_got(job.main(["--output", str(folder / "run"), *argv]), 2)
    assert time.monotonic() - started < 10
    told = capsys.readouterr()
    assert told.out == ""
    for part in parts:
        assert (part in told.err) == (WORLD.rank == 0), told.err
    assert not (folder / "run").exists()


def test_more_ranks_than_samples(
    folder: Path, module: Callable[[str], str], capsys: pytest.CaptureFixture[str]
) -> None:
    name = module(SMALL.format(n=WORLD.size - 1))
    everyone_got(job.main(["--data", f"{name}:data", "--output", str(folder / "run")]), 2)
    message = (
        "holds no samples"
        if WORLD.size == 1
        else f"{WORLD.size} workers, but only {WORLD.size - 1} training sample"
    )
    assert (message in capsys.readouterr().err) == (WORLD.rank == 0)


def test_a_model_that_does_not_give_class_scores(
    folder: Path, module: Callable[[str], str], capsys: Any
) -> None:
    name = module("def net(): return torch.nn.Identity()\ndef flat(): return torch.nn.Linear(8, 10)\n")
    for function, message in (
        ("net", "has no trainable parameter"),
        ("flat", "must give scores of shape (batch, classes)"),
    ):
        everyone_got(job.main(["--model", f"{name}:{function}", "--output", str(folder / "run")]), 2)
        assert (message in capsys.readouterr().err) == (WORLD.rank == 0)


@pytest.mark.mpi(min_size=2)
def test_one_rank_s_trouble_is_named(
    folder: Path, module: Callable[[str], str], capsys: pytest.CaptureFixture[str]
) -> None:
    name = module(
        "from mpi4py import MPI\nlast = int(MPI.COMM_WORLD.rank == MPI.COMM_WORLD.size - 1)\n"
        "def data(): return ((torch.zeros(40, 5), torch.zeros(40).long() - last),) * 2\n"
        "def net():\n"
        "    layers = torch.nn.Linear(64, 10 + last), torch.nn.Linear(10 + last, 10)\n"
        "    return torch.nn.Sequential(torch.nn.Flatten(), *layers)\n"
    )
    everyone_got(job.main(["--data", f"{name}:data", "--output", str(folder / "run")]), 2)
    told = capsys.readouterr().err
    assert (f"rank {WORLD.size - 1}: " in told and "is below 0" in told) == (WORLD.rank == 0)
    everyone_got(job.main(["--model", f"{name}:net", "--output", str(folder / "run")]), 2)
    assert ("the models differ" in capsys.readouterr().err) == (WORLD.rank == 0)


@pytest.mark.parametrize("method", METHODS)
def test_a_loss_that_is_not_a_number_from_the_start(
    method: str, folder: Path, module: Callable[[str], str], capsys: pytest.CaptureFixture[str]
) -> None:
    name = module("def data(): return ((torch.full((64, 5), float('nan')), torch.arange(64) % 2),) * 2\n")
    argv = [
        "--data",
        f"{name}:data",
        "--batch_size",
        "4",
        "--method",
        method,
        "--output",
        str(folder / "run"),
    ]
    everyone_got(job.main(argv), FAILED)
    assert ("the loss is nan at the first step" in capsys.readouterr().err) == (WORLD.rank == 0)


@pytest.mark.parametrize("method", METHODS)
def test_a_run_that_diverges_says_so(method: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = [
        "--method",
        method,
        *METHODS[method],
        *QUICK,
        "--lr",
        "1e30",
        "--epochs",
        "3",
        "--output",
        str(folder / "run"),
    ]
    everyone_got(job.main(argv), FAILED)
    assert ("diverged" in capsys.readouterr().err) == (WORLD.rank == 0)


def test_a_directory_that_holds_a_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = [*QUICK, "--epochs", "1", "--output", str(folder / "run")]
    everyone_got(job.main(argv), 0)
    everyone_got(job.main(argv), 2)
    assert ("holds a run already" in capsys.readouterr().err) == (WORLD.rank == 0)
    everyone_got(job.main([*argv, "--overwrite"]), 0)


def test_a_directory_that_cannot_be_written(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if WORLD.rank == 0:
        (folder / "file").write_text("")
    WORLD.Barrier()
    everyone_got(job.main(["--output", str(folder / "file" / "run")]), 2)
    assert ("file/run: cannot be written: Not a directory" in capsys.readouterr().err) == (WORLD.rank == 0)


@pytest.mark.parametrize(
    ("writer", "who"), [("append", 0), ("save", -1), ("seal", 0), ("summarize", 0), ("save_center", 0)]
)
def test_a_disk_that_fills_up_ends_every_rank(
    writer: str, who: int, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "the/file")

    if WORLD.rank == who % WORLD.size:
        monkeypatch.setattr(RunDirectory, writer, full)
    started = time.monotonic()
    argv = [*QUICK, "--epochs", "4", "--checkpoint_every", "2", "--output", str(folder / "run")]
    everyone_got(job.main(argv), FAILED)
    assert time.monotonic() - started < 10
    assert ("the/file: No space left on device" in capsys.readouterr().err) == (WORLD.rank == 0)


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

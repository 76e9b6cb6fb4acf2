"""How `mpilsgd train` ends when something is wrong: on every rank, promptly, with a message."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from job_harness import METHODS, QUICK, WORLD, everyone_got
from launcher import job as launch

from mpilsgd.train import job
from mpilsgd.train.files import replace
from mpilsgd.train.manifest import file_name
from mpilsgd.train.run_directory import RunDirectory
from mpilsgd.train.together import FAILED

pytestmark = pytest.mark.mpi


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
@pytest.mark.parametrize("longest", [(), ("--period", "1000")], ids=["in a round", "in an evaluation"])
def test_a_run_that_diverges_says_so(
    method: str, longest: tuple[str, ...], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = METHODS[method] + longest if method != "AllreduceSGD" else ()
    argv = [
        "--method",
        method,
        *own,
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
    everyone_got(job.main(["--resume", str(folder / "run")]), FAILED)  # what has diverged is not saved


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


def test_what_was_changed_since_is_not_resumed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Refused with one line that names the file; nothing is written."""
    run = RunDirectory(folder / "run")
    everyone_got(job.main([*QUICK, "--steps", "4", "--output", str(run.path)]), 0)
    part = run.checkpoint / f"step-0000000004.rank{WORLD.size - 1:05d}.pt"
    for path, change in (
        (part, lambda content: content[:2000] + bytes([content[2000] ^ 16]) + content[2001:]),
        (part, lambda content: (run.checkpoint / "center.pt").read_bytes()),
        (run.config, lambda content: b""),
        (run.config, lambda content: content[:99]),
        (run.manifest, lambda content: None),
    ):
        content = path.read_bytes()
        WORLD.Barrier()
        if WORLD.rank == 0:
            changed = change(content)
            path.unlink() if changed is None else path.write_bytes(changed)
        before = {file: file.read_bytes() for file in run.path.rglob("*.*") if file.is_file()}
        capsys.readouterr()
        everyone_got(job.main(["--resume", str(run.path), "--steps", "6"]), 2)
        told = capsys.readouterr().err
        if WORLD.rank == 0:
            assert str(path) in told and "Traceback" not in told, told
            assert before == {file: file.read_bytes() for file in run.path.rglob("*.*") if file.is_file()}
            path.write_bytes(content)
        WORLD.Barrier()
    everyone_got(job.main(["--resume", str(run.path), "--steps", "6"]), 0)


NETS = "def net(): return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10, bias=False))\n"


def test_a_foreign_file_in_the_manifest_s_own_name_is_refused(
    folder: Path, module: Callable[[str], str], capsys: pytest.CaptureFixture[str]
) -> None:
    """One that somebody put there with a manifest that fits: of another model, method, version, or none of ours."""
    run, other, third = (RunDirectory(folder / name) for name in ("run", "other", "third"))
    argv = [*QUICK, "--steps", "4", "--output"]
    net = f"{module(NETS)}:net"
    for one, more in ((run, []), (other, ["--model", net]), (third, ["--method", "EASGD"])):
        everyone_got(job.main([*argv, str(one.path), *more]), 0)
    own, foreign, method = (one.load(WORLD.rank, 4) for one in (run, other, third))
    ahead = {**own, "progress": {**own["progress"], "unheard": 1}}
    for state, why in (
        (foreign, "another model"),
        (method, "EASGD"),
        (ahead, "another version"),
        ({}, "another version"),
        ([1, 2], "another version"),
        (b"no file of torch's", "can load"),
    ):
        if isinstance(state, bytes):
            written = replace(
                run.checkpoint / file_name(4, WORLD.rank), lambda file, state=state: file.write(state)
            )
        else:
            written = run.save(WORLD.rank, 4, state)  # type: ignore[arg-type]
        everyone = WORLD.allgather(written)
        if WORLD.rank == 0:
            run.seal(4, everyone)
        WORLD.Barrier()
        capsys.readouterr()
        everyone_got(job.main(["--resume", str(run.path), "--steps", "6"]), 2)
        told = capsys.readouterr().err
        if WORLD.rank == 0:
            assert str(run.path) in told and why in told and told.count("\n") == 1, told


JOB = "import sys\nfrom mpilsgd.train import job\nsys.exit(job.main(sys.argv[1:]))\n"
EXITS = """
import os, sys
from mpi4py import MPI
def interrupt(_): raise KeyboardInterrupt
class Net(torch.nn.Linear):
    calls = 0
    def forward(self, x):
        self.calls += self.training
        if MPI.COMM_WORLD.rank in {ranks} and self.calls == {call}: {leave}(0)
        return super().forward(x.flatten(1))
def net():
    return Net(64, 10)
"""


@pytest.mark.ranks(2)
@pytest.mark.parametrize("leave", ["sys.exit", "os._exit"])
@pytest.mark.parametrize("call", [1, 3])
def test_a_model_that_ends_its_rank_ends_the_job(
    leave: str, call: int, folder: Path, module: Callable[[str], str]
) -> None:
    """Though it calls that a success: the others would wait for it for ever, or be killed without a word."""
    name = module(EXITS.format(ranks=[1], leave=leave, call=call))
    ended = launch(folder, JOB, "--model", f"{name}:net", "--steps", 4, "--output", folder / "run")
    said = {"sys.exit": "SystemExit: 0", "os._exit": "os._exit(0) was called"}[leave]
    assert ended.status not in (0, 124) and "rank 1 failed" in ended.err and said in ended.err, ended


@pytest.mark.ranks(2)
def test_who_interrupts_a_run_learns_what_is_left(folder: Path, module: Callable[[str], str]) -> None:
    name = module(EXITS.format(ranks=[0, 1], leave="interrupt", call=3))
    ended = launch(folder, JOB, "--model", f"{name}:net", "--steps", 4, "--output", folder / "run")
    assert ended.status not in (0, 124) and "interrupted, the job ends" in ended.err, ended
    told = f"has the checkpoint of step 0. To go on: mpiexec -n 2 mpilsgd train --resume {folder / 'run'}"
    assert told in ended.err, ended

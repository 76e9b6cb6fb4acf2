"""`mpilsgd train` as on GPUs, as far as a CPU shows it: precision, memory format, compiling, steps that are queued."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from job_harness import NET, QUICK, WORLD, as_a_process, everyone_got, killed, lines, same_run, untimed

from mpilsgd.train import devices, job, loop
from mpilsgd.train.run_directory import RunDirectory
from mpilsgd.train.together import FAILED

pytestmark = pytest.mark.mpi

LAST = WORLD.size - 1
# A model whose gradient overflows at one step, on some ranks.
OVERFLOWING = """
class Net(torch.nn.Module):
    def __init__(self, here):
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 10))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.here = here

    def forward(self, x):
        x = self.layers[0](x.flatten(1))
        if self.training:
            self.seen += 1
            if self.here and int(self.seen) == 7:
                x.register_hook(lambda gradient: gradient * torch.inf)
        return self.layers[1:](x)

def one():
    from mpi4py import MPI
    return Net(MPI.COMM_WORLD.rank == MPI.COMM_WORLD.size - 1)

def all():
    return Net(True)
"""
# Images that the data set itself mirrors at random.
IMAGES = """
class Images(torch.utils.data.Dataset):
    def __init__(self, random):
        g = torch.Generator().manual_seed(0)
        self.x, self.random = torch.randn(60, 3, 4, 4, generator=g), random

    def __len__(self):
        return 60

    def __getitem__(self, i):
        x = self.x[i]
        return (x.flip(-1) if self.random and torch.rand(()) < 0.5 else x), int(x.mean() > 0)

def data():
    return Images(True), Images(False)

def net():
    layers = torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU(), torch.nn.Flatten()
    return torch.nn.Sequential(*layers, torch.nn.Linear(16, 2))

def sequences():
    pair = torch.randn(60, 64, 3), torch.arange(60) % 2
    return pair, pair

def reads_sequences():
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 2))
"""


def summary_of(run: Path) -> dict[str, Any]:
    return json.loads((run / "summary.json").read_text())


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_a_resumed_run_in_half_precision_equals_an_uninterrupted_one(
    amp: str, folder: Path, module: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    method = "--method", "LSGD", "--period", "3", "--momentum", "0.5"
    name = module(OVERFLOWING)
    argv = ["--model", f"{name}:one", *QUICK, *method, "--batch_size", "25", "--amp", amp, "--steps", "21"]
    argv += ["--eval_every", "10 steps", "--checkpoint_every", "9 steps"]
    if amp == "bf16":  # nothing is left out there
        argv[1] = f"{module(NET)}:net"
    whole, cut = folder / "whole", folder / "cut"
    everyone_got(job.main([*argv, "--output", str(whole)]), 0)
    killed(argv, cut, 17, monkeypatch)
    everyone_got(job.main(["--resume", str(cut)]), 0)
    same_run(cut, whole, 21)
    assert lines(whole / "metrics.jsonl")[-1]["train_loss"] < lines(whole / "metrics.jsonl")[0]["train_loss"]
    states = [RunDirectory(run).load(WORLD.rank, 21) for run in (whole, cut)]
    assert states[0]["scaler"] == states[1]["scaler"]
    assert all(p.dtype == torch.float32 for n, p in states[0]["model"].items() if n.endswith("weight"))
    if amp == "fp16":
        assert states[0]["scaler"]["scale"] == (2**15 if WORLD.rank == LAST else 2**16)
        assert summary_of(whole)["overflows"] == summary_of(cut)["overflows"] == [0] * LAST + [1]
    else:
        assert states[0]["scaler"] is None and "overflows" not in summary_of(whole)


ALONE = {
    "LSGD": ("--method", "LSGD", "--period", "1"),
    "LSGD-every-step": ("--method", "LSGD", "--period", "2", "--when", "every_step", "--optimizer", "MSGD"),
    "AllreduceSGD": ("--method", "AllreduceSGD", "--max_grad_norm", "1", "--optimizer", "Adam"),
    "EASGD": ("--method", "EASGD", "--period", "3", "--asynchronous", "true", "--weight_decay", "0.001"),
}


@pytest.mark.parametrize(
    ("name", "where"), [*((name, "one") for name in ALONE), ("LSGD", "all"), ("AllreduceSGD", "all")]
)
def test_a_gradient_that_overflows_keeps_no_rank_waiting(
    name: str, where: str, folder: Path, module: Callable[[str], str], capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [
        "--model",
        f"{module(OVERFLOWING)}:{where}",
        *QUICK,
        *ALONE[name],
        "--lr",
        "0.01",
        "--momentum",
        "0",
    ]
    argv += ["--amp", "fp16", "--steps", "12", "--output", str(folder / "run")]
    everyone_got(job.main(argv), 0)
    told = summary_of(folder / "run")
    assert told["grad_evals"] >= 12 * WORLD.size and told["resets"] == [0] * WORLD.size
    assert told["overflows"] == [int(where == "all" or rank == LAST) for rank in range(WORLD.size)]
    assert ("gradients overflowed in fp16" in capsys.readouterr().out) == (WORLD.rank == 0)


def test_a_step_that_is_left_out_leaves_parameters_and_momentum_and_moves_the_clock(
    folder: Path, module: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[torch.Tensor, torch.Tensor, int]] = []
    whole = loop.Trainer._step

    def step(self: loop.Trainer) -> None:
        whole(self)
        p = next(iter(self.model.parameters()))
        seen.append((p.detach().clone(), self.opt.state[p]["momentum_buffer"].clone(), self.opt.t))

    monkeypatch.setattr(loop.Trainer, "_step", step)
    argv = ["--model", f"{module(OVERFLOWING)}:all", *QUICK, "--method", "LocalSGD", "--period", "100"]
    argv += ["--momentum", "0.9", "--weight_decay", "0.01", "--amp", "fp16", "--steps", "9"]
    everyone_got(job.main([*argv, "--output", str(folder / "run")]), 0)
    (x, v, t), (y, u, s) = seen[5:7]
    assert torch.equal(x, y) and torch.equal(v, u) and (t, s) == (6, 7)
    assert not torch.equal(y, seen[7][0])


def test_channels_last_gives_the_same_model(
    folder: Path, module: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    name = module(IMAGES)
    formats: list[bool] = []
    whole = loop.Trainer._step

    def step(self: loop.Trainer) -> None:
        inputs, _ = self.batches._make(0)
        kernels = self.model[0].weight  # type: ignore[index]
        formats.append(all(t.is_contiguous(memory_format=torch.channels_last) for t in (inputs, kernels)))
        whole(self)

    monkeypatch.setattr(loop.Trainer, "_step", step)
    argv = ["--data", f"{name}:data", "--model", f"{name}:net", *QUICK, "--batch_size", "10", "--steps", "8"]
    for run, extra in (("plain", []), ("last", ["--channels_last"])):
        everyone_got(job.main([*argv, *extra, "--output", str(folder / run)]), 0)
    assert formats == [False] * 8 + [True] * 8
    plain, last = (lines(folder / run / "metrics.jsonl")[-1] for run in ("plain", "last"))
    assert last["train_loss"] == pytest.approx(plain["train_loss"], rel=1e-4)


class Passed:
    """An event that has passed when it is recorded, as on a GPU that is never behind."""

    def record(self) -> None:
        self.at = time.perf_counter()

    def query(self) -> bool:
        return True

    def synchronize(self) -> None: ...

    def elapsed_time(self, other: Passed) -> float:
        return 1000 * (other.at - self.at)


@pytest.fixture
def queued(monkeypatch: pytest.MonkeyPatch) -> Callable[[], contextlib.AbstractContextManager[None]]:
    """The CPU taken for a GPU: batches ahead, losses as tensors, times by events, checkpoints behind the steps."""

    @contextlib.contextmanager
    def taken() -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(devices, "queued", lambda device: True)
            patch.setattr(devices, "event", lambda timed=False: Passed())
            yield

    return taken


QUEUED = {
    "LSGD": ("--method", "LSGD", "--period", "3", "--momentum", "0.5"),
    "EASGD": ("--method", "EASGD", "--period", "3", "--asynchronous", "true", "--order", "round-robin"),
}


@pytest.mark.parametrize("method", QUEUED)
def test_a_run_whose_steps_are_queued_is_the_same_run(
    method: str,
    folder: Path,
    module: Callable[[str], str],
    queued: Callable[[], contextlib.AbstractContextManager[None]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    name = module(IMAGES)
    argv = ["--data", f"{name}:data", "--model", f"{name}:net", *QUICK, *QUEUED[method], "--batch_size", "10"]
    argv += ["--steps", "21", "--eval_every", "7 steps", "--checkpoint_every", "9 steps"]
    plain, whole, cut = (folder / run for run in ("plain", "whole", "cut"))
    everyone_got(job.main([*argv, "--output", str(plain)]), 0)
    with queued():
        everyone_got(job.main([*argv, "--output", str(whole)]), 0)
        killed(argv, cut, 20, monkeypatch)
        everyone_got(job.main(["--resume", str(cut)]), 0)
    same_run(plain, whole, 21)
    same_run(cut, whole, 21)
    last = lines(whole / "metrics.jsonl")[-1]
    parts = last["t_compute"] + last["t_data"] + last["t_comm"]
    assert parts == pytest.approx(last["wall_s"], rel=1e-6) and last["t_data"] > 0 and last["t_comm"] > 0
    assert sorted(path.name for path in (whole / "checkpoint").iterdir()) == sorted(
        path.name for path in (plain / "checkpoint").iterdir()
    )


def test_a_checkpoint_behind_the_steps_that_cannot_be_written_ends_every_rank(
    folder: Path,
    queued: Callable[[], contextlib.AbstractContextManager[None]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    save = RunDirectory.save

    def full(self: RunDirectory, rank: int, step: int, state: dict[str, Any]) -> Any:
        if step == 5 and rank == LAST:
            raise OSError(28, os.strerror(28), "a file")
        return save(self, rank, step, state)

    monkeypatch.setattr(RunDirectory, "save", full)
    argv = [*QUICK, "--steps", "20", "--checkpoint_every", "5 steps", "--output", str(folder / "run")]
    with queued(), as_a_process():
        everyone_got(job.main(argv), FAILED)
    assert ("a file: No space left on device" in capsys.readouterr().err) == (WORLD.rank == 0)
    assert RunDirectory(folder / "run").sealed_step(WORLD.size) == 0


@pytest.mark.mpi(min_size=2)
def test_a_gpu_on_some_ranks_only_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(devices, "_visible", lambda: () if WORLD.rank == LAST else ("a GPU",))
    for device in ("auto", "cuda"):
        everyone_got(job.main([*QUICK, "--device", device, "--output", str(folder / "run")]), 2)
        told = capsys.readouterr().err
        assert (f"device={device}: torch finds a GPU on rank" in told) == (WORLD.rank == 0)
        assert (f"but none on rank {LAST}: give every rank one" in told) == (WORLD.rank == 0)
    assert not (folder / "run").exists()


def test_what_does_not_fit_is_refused_by_name(
    folder: Path,
    module: Callable[[str], str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no compiler\nis here")

    monkeypatch.setattr(torch, "compile", broken)
    name = module(IMAGES)
    sequences = ["--data", f"{name}:sequences", "--model", f"{name}:reads_sequences", "--batch_size", "10"]
    for argv, message in (
        (
            [*sequences, "--channels_last"],
            f"{name}:reads_sequences is given inputs of 64 x 3 from {name}:sequences",
        ),
        (["--compile"], "compile: torch cannot compile mlp here: no compiler is here\n"),
        (["--amp", "fp8"], "amp: expected one of bf16, fp16 or null, found 'fp8'"),
    ):
        everyone_got(job.main([*QUICK, *argv, "--output", str(folder / "run")]), 2)
        told = capsys.readouterr().err
        assert (message in told) == (WORLD.rank == 0), told
    assert not (folder / "run").exists()


@pytest.mark.brief()
@pytest.mark.filterwarnings("ignore")  # of torch's own, while it compiles
def test_a_compiled_run_and_a_plain_one_take_up_each_other_s_checkpoints(
    folder: Path, module: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch._dynamo.utils import counters

    # the backend that makes code with a C++ compiler takes a minute
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    argv = [
        "--model",
        f"{module(NET)}:net",
        *QUICK,
        "--lr",
        "0.05",
        "--batch_size",
        "25",
        "--eval_every",
        "5 steps",
    ]
    runs = [folder / name for name in ("plain", "compiled")]
    for run, compile in zip(runs, ("false", "true"), strict=True):
        counters.clear()
        everyone_got(job.main([*argv, "--compile", compile, "--steps", "10", "--output", str(run)]), 0)
        assert bool(counters["frames"]["ok"]) == (compile == "true")
    states = [RunDirectory(run).load(WORLD.rank, 10)["model"] for run in runs]
    assert list(states[0]) == list(states[1])
    for run, compile in zip(runs, ("true", "false"), strict=True):
        everyone_got(job.main(["--resume", str(run), "--compile", compile, "--steps", "20"]), 0)
        rows = untimed(lines(run / "metrics.jsonl"))
        assert [row["step"] for row in rows] == [5, 10, 15, 20]
        assert rows[-1]["train_loss"] < rows[0]["train_loss"]

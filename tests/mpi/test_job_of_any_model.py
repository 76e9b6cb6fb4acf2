"""`mpilsgd train` with models, data, losses and tasks of the user's, and what docs/job.md shows."""

from __future__ import annotations

import json
import math
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from job_harness import QUICK, WORLD, everyone_got, killed, lines, same_run
from launcher import job as job_of_its_own

from mpilsgd.train import job

pytestmark = pytest.mark.mpi

PAGE = Path(__file__).parents[2] / "docs" / "job.md"
COMMANDS = re.findall(r"^mpiexec -n 4 mpilsgd train (.*)$", PAGE.read_text(), re.M)


def files(folder: Path) -> None:
    """What the page's commands name."""
    image = pytest.importorskip("PIL.Image")
    rows = np.random.default_rng(0).normal(size=(60, 3))
    np.savetxt(folder / "table.csv", rows, delimiter=",", header="a,b,c", comments="")
    x, y = np.zeros((64, 1, 16, 16), np.uint8), np.arange(64) % 3
    np.savez(folder / "arrays.npz", x_train=x, y_train=y, x_test=x[:8], y_test=y[:8])
    (folder / "notes.txt").write_text("all work and no play makes a text. " * 300)
    for part in ("train", "test"):
        for name in ("cat", "dog"):
            (folder / "pictures" / part / name).mkdir(parents=True)
            for i in range(4 if part == "train" else 1):
                image.new("RGB", (40, 30), (60 * i, 0, 99)).save(
                    folder / "pictures" / part / name / f"{i}.png"
                )
    (folder / "mine.py").write_text("\n".join(re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)))


@pytest.mark.brief(2)
@pytest.mark.parametrize("command", COMMANDS)
def test_the_page_s_commands(command: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "stdlib_module_names", {"abc", "bisect", "queue"})
    if WORLD.rank == 0:
        files(folder)
    WORLD.Barrier()
    sys.modules.pop("mine", None)
    argv = [*shlex.split(command), "--steps", "3", "--eval_every", "2 steps", "--batch_size", "2"]
    argv += ["--workers", "0", "--device", "cpu", "--threads", "1", "--output", str(folder / "run")]
    everyone_got(job.main(argv), 0)
    rows = lines(folder / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [2, 3]
    assert all(math.isfinite(row["test_loss"]) and math.isfinite(row["train_loss"]) for row in rows)
    further = {
        "gpt": "test_bits_per_character",
        "mine:metrics": "test_distance",
        "mine:Denoiser": "test_bias",
    }
    for name, figure in further.items():
        assert (figure in rows[0]) == (name in command)
    classified = "table" not in command and ("--loss" not in command and "--task" not in command)
    assert (rows[0]["test_error"] is not None) == classified


READS = """
class Counted(torch.utils.data.Dataset):
    classes = range(2)
    def __init__(self, count, file): self.count, self.file = count, file
    def __len__(self): return self.count
    def __getitem__(self, i):
        with open(self.file, "a") as file: print(i, file=file)
        return torch.full((3,), float(i % 5)), i % 2
def data(data_dir):
    return Counted(600, data_dir + "/train"), Counted(6, data_dir + "/test")
"""


@pytest.mark.mpi(min_size=2)
def test_samples_are_read_as_they_are_needed(folder: Path, module: Callable[[str], str]) -> None:
    """One step of batch 10: its samples, and three that each rank tries; never all 600."""
    argv = ["--data", f"{module(READS)}:data", "--data_dir", str(folder), *QUICK, "--steps", "1"]
    everyone_got(job.main([*argv, "--batch_size", "10", "--output", str(folder / "run")]), 0)
    read = [int(line) for line in (folder / "train").read_text().split()]
    assert len(read) == len(set(read) - {0, 1}) + read.count(0) + read.count(1)
    assert 10 * WORLD.size <= len(read) <= 13 * WORLD.size
    tested = (folder / "test").read_text().split()
    assert len(tested) == 6 + 6 * WORLD.size  # the centre's in shares, then each rank its own model's


YOURS = """
import random
import numpy as np
class Drawing(torch.utils.data.Dataset):
    def __len__(self): return 300
    def __getitem__(self, i):
        x = torch.randn(3) + float(np.random.rand()) + random.random()
        return x, x.sum().reshape(1)
class Stream(torch.utils.data.IterableDataset):
    def set_epoch(self, number): self.number = number
    def __iter__(self):
        for i in range(100):
            x = torch.randn(3) + i % 3
            yield x, x.sum().reshape(1)
def data(): return Drawing(), Drawing()
def stream(): return Stream(), Stream()
def net(): return torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Dropout(0.2), torch.nn.Linear(8, 1))
def schedule(optimizer): return torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 7)
"""
RESUMED = {
    "map": (
        "data",
        ["--schedule", "cosine", "--warmup", "10 steps", "--clip_norm", "0.5", "--accumulate", "2"],
    ),
    "stream": ("stream", ["--schedule", "schedule"]),
}


@pytest.mark.brief(2)
@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_run_equals_an_uninterrupted_one(
    name: str, folder: Path, module: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = module(YOURS)
    data, more = RESUMED[name]
    more = [f"{mine}:schedule" if option == "schedule" else option for option in more]
    argv = [
        "--model",
        f"{mine}:net",
        "--data",
        f"{mine}:{data}",
        "--loss",
        "mse",
        *QUICK,
        "--lr",
        "0.01",
        *more,
    ]
    argv += ["--batch_size", "5", "--period", "3", "--steps", "37", "--eval_every", "10 steps"]
    argv += ["--checkpoint_every", "13 steps"]
    whole, cut = folder / "whole", folder / "cut"
    everyone_got(job.main([*argv, "--output", str(whole)]), 0)

    killed(argv, cut, 33, monkeypatch)
    everyone_got(job.main(["--resume", str(cut)]), 0)
    same_run(cut, whole, 37)
    rows = lines(whole / "metrics.jsonl")
    assert rows[-1]["test_loss"] < rows[0]["test_loss"] and rows[-1]["test_error"] is None
    summary = json.loads((whole / "summary.json").read_text())
    assert summary["best_worker"]["test_loss"] == min(summary["worker_test_losses"])


def test_a_run_that_is_judged_by_its_loss_is_told(
    folder: Path, module: Callable[[str], str], capsys: pytest.CaptureFixture[str]
) -> None:
    mine = module(YOURS + "def metrics(outputs, targets): return {'far': (outputs - targets).abs().max()}\n")
    argv = [
        "--model",
        f"{mine}:net",
        "--data",
        f"{mine}:data",
        "--loss",
        "mse",
        "--metrics",
        f"{mine}:metrics",
    ]
    everyone_got(
        job.main(
            [
                *argv,
                *QUICK,
                "--lr",
                "0.01",
                "--epochs",
                "2",
                "--eval_every",
                "1",
                "--output",
                str(folder / "run"),
            ]
        ),
        0,
    )
    told = capsys.readouterr().out
    if WORLD.rank == 0:
        from mpilsgd.cli import main

        assert re.search(r"test loss +\d[.\d]+  far \d[.\d]+", told) and "test error" not in told
        assert "test loss of the centre" in told
        assert main(["report", str(folder / "run")]) == 0
        told = capsys.readouterr().out
        assert "test loss" in told.splitlines()[0] and re.search(r"\brun +LSGD .* \d\.\d+ ", told), told
        assert (folder / "run" / "report" / "curves.png").is_file()
    WORLD.Barrier()


def test_batches_a_step_are_one_large_batch(folder: Path) -> None:
    for batch, parts in ((20, 1), (5, 4)):
        argv = [
            "--batch_size",
            str(batch),
            "--accumulate",
            str(parts),
            *QUICK,
            "--steps",
            "9",
            "--period",
            "3",
        ]
        everyone_got(job.main([*argv, "--output", str(folder / str(parts))]), 0)
    one, four = (
        torch.load(folder / part / "checkpoint" / "center.pt", weights_only=True) for part in ("1", "4")
    )
    for name in one:
        torch.testing.assert_close(one[name], four[name])


BAD = """
class Late(torch.utils.data.Dataset):
    classes = range(3)
    def __len__(self): return 400
    def __getitem__(self, i): return torch.ones(2), 3 if i == 399 else i % 3
def late(): return Late(), Late()
def broken(outputs, targets): return outputs[:, 17].mean()
def few(): return ([(torch.ones(2), 1)] * 50,) * 2
def forever():
    class Items:
        def __iter__(self):
            while True: yield torch.ones(2), 1
    return Items(), [(torch.ones(2), 1)] * 4
"""
REFUSED = {
    "a loss that raises": (["--loss", "{}:broken"], "do not fit: IndexError: .*line 8"),
    "classes": (["--data", "{}:few"], "how many classes are there"),
    "no length": (["--data", "{}:forever", "--classes", "2"], "has no len.*give --steps instead"),
    "labels and scores": (["--data", "{}:few", "--classes", "1"], "label 1 of sample 0 is not below 1"),
    "signature": (["--loss", "{}:few"], r"is called with .outputs, targets."),
    "task and loss": (["--task", "{}:Late", "--loss", "mse"], "loss, task: a task brings its own"),
    "no such file": (["--data", "nowhere.csv"], "nowhere.csv: no such file"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused_before_training(
    name: str, folder: Path, module: Callable[[str], str], capsys: pytest.CaptureFixture[str]
) -> None:
    argv, message = REFUSED[name]
    mine = module(BAD)
    everyone_got(job.main([*(a.format(mine) for a in argv), *QUICK, "--output", str(folder / "run")]), 2)
    told = capsys.readouterr()
    assert bool(re.search(message, told.err)) == (WORLD.rank == 0), told.err
    assert told.out == "" and not (folder / "run").exists()


LATE = """
import sys
from mpilsgd.cli import main
if __name__ == "__main__":
    sys.exit(main(["train", "--data", "bad:late", "--device", "cpu", "--output", "run"]))
"""


@pytest.mark.ranks(2)
def test_a_label_that_comes_late_ends_the_job(folder: Path) -> None:
    """On all ranks, in one line, though one rank alone has seen it."""
    if WORLD.rank == 0:
        (folder / "bad.py").write_text("import torch\n" + BAD)
    ended = job_of_its_own(folder, LATE, seconds=120)
    assert ended.status not in (0, 124), ended
    assert re.search(
        r"error: rank \d: label 3 of sample 399 is not below 3, the number of classes", ended.err
    ), ended
    assert "Traceback" not in ended.err, ended

"""USR1 and TERM end `mpilsgd train` on all ranks with a checkpoint, whoever gets them."""

from __future__ import annotations

import itertools
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from job_harness import QUICK, WORLD, everyone_got, lines

from mpilsgd.train import job, loop
from mpilsgd.train.run_directory import RunDirectory
from mpilsgd.train.together import FAILED, TO_BE_RESUMED

pytestmark = pytest.mark.mpi

RUNS = {
    "LSGD": ("--method", "LSGD", "--period", "5"),
    "AllreduceSGD": ("--method", "AllreduceSGD", "--lr_gamma", "0.01"),
    "EASGD": ("--method", "EASGD", "--period", "3", "--asynchronous", "true"),
    "tree": ("--method", "EASGDTree", "--degree", "2", "--period", "2"),
    "lock-step": ("--method", "EASGDTree", "--degree", "2", "--period", "2", "--order", "lock-step"),
}


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize(("at", "to"), [(20, [-1]), (13, [0]), (20, range(WORLD.size))], ids=str)
def test_a_signal_ends_the_run_and_it_goes_on(
    name: str, at: int, to: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sent in the step before an evaluation, or between two: every evaluation is there once."""
    if name in ("tree", "lock-step") and WORLD.size == 1:
        return
    output = folder / "run"
    argv = [*RUNS[name], *QUICK, "--lr", "0.05", "--steps", "40", "--eval_every", "10 steps"]
    argv += ["--checkpoint_every", "null", "--output", str(output)]
    step = loop.Trainer._step

    def hit(self: loop.Trainer, *arguments: Any) -> None:
        if self.progress.step == at - 1 and WORLD.rank in [rank % WORLD.size for rank in to]:
            os.kill(os.getpid(), signal.SIGUSR1)
        step(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Trainer, "_step", hit)
        status = job.main(argv)
    heard = name not in ("tree", "lock-step") or any(status for status in WORLD.allgather(status))
    everyone_got(status, TO_BE_RESUMED if heard else 0)  # a rank that only averages takes no such step
    state = RunDirectory(output).load(WORLD.rank, RunDirectory(output).sealed_step(WORLD.size) or 0)
    if name in ("LSGD", "AllreduceSGD"):
        assert len(set(WORLD.allgather(state["progress"]["step"]))) == 1
    everyone_got(job.main(["--resume", str(output)]), 0)
    rows = lines(output / "metrics.jsonl")
    assert [int(row["step"]) // 10 for row in rows] == [1, 2, 3, 4] or name in ("EASGD", "tree")
    assert len(rows) == 4 and all(a["step"] < b["step"] for a, b in itertools.pairwise(rows))


SHORT = (*RUNS["LSGD"], *QUICK, "--lr", "0.05", "--steps", "40", "--eval_every", "10 steps")


def test_a_signal_in_the_last_evaluation_comes_too_late(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate = loop.Trainer.evaluate

    def hit(self: loop.Trainer, last: bool = False) -> Any:
        if last:
            os.kill(os.getpid(), signal.SIGUSR1)
        return evaluate(self, last)

    monkeypatch.setattr(loop.Trainer, "evaluate", hit)
    everyone_got(job.main([*SHORT, "--output", str(folder / "run")]), 0)
    assert (folder / "run" / "summary.json").is_file()


def test_what_was_trained_outlives_the_last_evaluation(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that ends in it, without checkpoints before, goes on with it: no step is taken again."""
    output = folder / "run"
    step = loop.Trainer._step

    def end(self: RunDirectory, summary: dict[str, Any]) -> None:
        raise OSError("it ends here")

    with monkeypatch.context() as patch:
        patch.setattr(RunDirectory, "summarize", end)
        everyone_got(job.main([*SHORT, "--checkpoint_every", "null", "--output", str(output)]), FAILED)
    before = lines(output / "metrics.jsonl")
    steps = []
    with monkeypatch.context() as patch:
        patch.setattr(loop.Trainer, "_step", lambda self, *rest: steps.append(step(self, *rest)))
        everyone_got(job.main(["--resume", str(output)]), 0)
    after = lines(output / "metrics.jsonl")
    assert not steps and len(after) == 4
    assert [row["test_error"] for row in after] == [row["test_error"] for row in before]
    assert [row["train_loss"] for row in after] == [row["train_loss"] for row in before]

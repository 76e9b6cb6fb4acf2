"""USR1 and TERM end `mpilsgd train` on all ranks with a checkpoint, whoever gets them."""

from __future__ import annotations

import itertools
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from harness import check_together
from job_harness import NET, QUICK, WORLD, everyone_got, lines, same_run

from mpilsgd import Topology
from mpilsgd.train import job, loop
from mpilsgd.train.run_directory import RunDirectory
from mpilsgd.train.stopping import AtCommonStep, Signals
from mpilsgd.train.together import FAILED, TO_BE_RESUMED

pytestmark = pytest.mark.mpi

# Where workers keep step: the run that goes on is the one that was never stopped.
SYNCHRONOUS = {
    "LSGD": "--method LSGD --period 5 --momentum 0.9 --buffers recalibrate",
    "LSGD-groups": "--method LSGD --period 3 --global_period 5 --group_size 1",
    "LSGD-every-step": "--method LSGD --period 3 --when every_step --optimizer MSGD --momentum 0.9",
    "EASGD": "--method EASGD --period 3 --optimizer Adam --lr 0.002",
    "EASGD-overlap": "--method EASGD --period 7 --overlap --optimizer MSGD --momentum 0.5",
    "Gauss-Seidel": "--method EASGD --period 4 --form gauss-seidel",
    "LocalSGD": "--method LocalSGD --period 7 --running_average running --buffers keep",
    "LocalSGD-set": "--method LocalSGD --period [3,20,21,39]",
    "LocalSGD-once": "--method LocalSGD --period null",
    "LocalSGD-norm": "--method LocalSGD --until_grad_norm 2",
    "AllreduceSGD": "--method AllreduceSGD --lr_gamma 0.01",
    "ADMM": "--method ADMM --rho 0.5",
    "Downpour": "--method Downpour --asynchronous false --period 2 --average running",
}
APART = {
    "EASGD": ("--method", "EASGD", "--period", "3", "--asynchronous", "true"),
    "tree": ("--method", "EASGDTree", "--degree", "2", "--period", "2"),
    "lock-step": ("--method", "EASGDTree", "--degree", "2", "--period", "2", "--order", "lock-step"),
}


class Stepping:
    """Counts this rank's steps; ranks in `to` get a signal at the beginning of step `at`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at: int = 0, to: Any = ()):
        self.count = 0
        step = loop.Trainer._step

        def counted(trainer: loop.Trainer, *arguments: Any) -> None:
            self.count += 1
            if trainer.progress.step == at - 1 and WORLD.rank in [rank % WORLD.size for rank in to]:
                os.kill(os.getpid(), signal.SIGTERM)
            step(trainer, *arguments)

        monkeypatch.setattr(loop.Trainer, "_step", counted)


@pytest.mark.parametrize("name", SYNCHRONOUS)
def test_a_stopped_run_goes_on_as_if_it_had_not_been_stopped(
    name: str, folder: Path, module: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One rank is slow, another is signalled. Checkpoints change nothing, but those until a gradient norm: there all
    meet for them, and a worker that has come takes part in the rounds of those who have not.
    """
    argv = ["--model", f"{module(NET)}:net", *QUICK, "--lr", "0.05", *SYNCHRONOUS[name].split()]
    argv += ["--batch_size", "25", "--steps", "47", "--eval_every", "10 steps", "--slow", "0:2,random:1.5"]
    whole, cut = folder / "whole", folder / "cut"
    everyone_got(job.main([*argv, "--checkpoint_every", "12 steps", "--output", str(whole)]), 0)
    saves = ["--checkpoint_every", "12 steps" if name == "LocalSGD-norm" else "null"]
    with monkeypatch.context() as patch:
        stepping = Stepping(patch, at=22, to=[-1])
        status = job.main([*argv, *saves, "--output", str(cut)])
        before = stepping.count
    everyone_got(status, TO_BE_RESUMED)
    assert len(set(WORLD.allgather(before))) == 1 and 22 <= before < 47
    with monkeypatch.context() as patch:
        stepping = Stepping(patch)
        everyone_got(job.main(["--resume", str(cut)]), 0)
    assert before + stepping.count == 47
    same_run(cut, whole, 47)


@pytest.mark.parametrize("name", APART)
@pytest.mark.parametrize(("at", "to"), [(20, [-1]), (13, [0]), (20, range(WORLD.size))], ids=str)
def test_a_signal_ends_a_run_whose_workers_do_not_keep_step(
    name: str, at: int, to: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sent in the step before an evaluation, or between two: every evaluation is there once."""
    if name in ("tree", "lock-step") and WORLD.size == 1:
        return
    output = folder / "run"
    argv = [*APART[name], *QUICK, "--lr", "0.05", "--steps", "40", "--eval_every", "10 steps"]
    argv += ["--checkpoint_every", "null", "--output", str(output)]
    with monkeypatch.context() as patch:
        Stepping(patch, at, to)
        status = job.main(argv)
    heard = name not in ("tree", "lock-step") or any(status for status in WORLD.allgather(status))
    everyone_got(status, TO_BE_RESUMED if heard else 0)  # a rank that only averages takes no such step
    everyone_got(job.main(["--resume", str(output)]), 0)
    rows = lines(output / "metrics.jsonl")
    assert [int(row["step"]) // 10 for row in rows] == [1, 2, 3, 4] or name in ("EASGD", "tree")
    assert len(rows) == 4 and all(a["step"] < b["step"] for a, b in itertools.pairwise(rows))


SHORT = (*QUICK, "--period", "5", "--lr", "0.05", "--steps", "40", "--eval_every", "10 steps")


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


@pytest.mark.mpi(min_size=2)
@pytest.mark.brief(2)
def test_a_question_outlives_the_run_that_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that ends in an error waits for no answer: what MPI writes then must not be anybody else's memory."""
    topology = Topology()
    ask = AtCommonStep._ask

    def late(self: AtCommonStep, seconds: float) -> None:
        if WORLD.rank:
            time.sleep(0.1)  # until rank 0 has let go of its own
        ask(self, seconds)

    monkeypatch.setattr(AtCommonStep, "_ask", late)
    asked: Any = AtCommonStep(topology, Signals(), 0)
    if WORLD.rank == 0:
        del asked
    others = [np.full(2, 7.0) for _ in range(2000)]
    topology.barrier()
    if WORLD.rank:
        asked._take()
    check_together([] if all((other == 7.0).all() for other in others) else ["memory was overwritten"])
    topology.free()

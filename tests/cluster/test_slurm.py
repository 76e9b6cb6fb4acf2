"""Batch jobs on a real Slurm of two nodes."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from emulation import EMULATED, ROOT, SECONDS, call, needs_slurm

pytestmark = needs_slurm


@pytest.fixture(scope="module")
def slurm() -> Iterator[None]:
    folder = Path(
        tempfile.mkdtemp(prefix="mpilsgd-slurm-")
    )  # not pytest's, into which munge's user may not look
    folder.chmod(0o755)
    before = os.environ.get("SLURM_CONF")
    started = call(EMULATED / "slurm.sh", "up", folder, 2)
    os.environ["SLURM_CONF"] = str(folder / "slurm.conf")
    try:
        assert started.returncode == 0, started.stdout + started.stderr
        yield
    finally:
        call("scancel", "-u", "root")
        end = time.monotonic() + 30
        while call("squeue", "-h").stdout.strip() and time.monotonic() < end:
            time.sleep(0.5)
        call(EMULATED / "slurm.sh", "down", folder)
        shutil.rmtree(folder, ignore_errors=True)
        os.environ.pop("SLURM_CONF")
        if before is not None:
            os.environ["SLURM_CONF"] = before


class Patience:
    """A test's waits end together, and before the watchdog ends all, which knows nothing of Slurm's jobs."""

    end = 0.0


@pytest.fixture(autouse=True)
def patience(slurm: None) -> Iterator[None]:
    Patience.end = time.monotonic() + SECONDS - 60  # the watchdog counts starting and ending Slurm, too
    yield
    call("scancel", "-u", "root")


def submit(*arguments: object) -> str:
    done = call("sbatch", "--parsable", *arguments, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().partition(";")[0]


def fields(job: str) -> dict[str, str]:
    text = call("scontrol", "show", "job", job).stdout
    return dict(word.split("=", 1) for word in text.split() if "=" in word)


def until(true: Callable[[], object], log: Path) -> None:
    while not true():
        assert time.monotonic() < Patience.end, told(log)
        time.sleep(0.5)


def told(log: Path) -> str:
    """What the job wrote, the state of all jobs and nodes, and the controller's last lines."""
    controller = Path(os.environ["SLURM_CONF"]).parent / "log" / "slurmctld"
    texts = [path.read_text() if path.is_file() else f"there is no {path}" for path in (log, controller)]
    texts[1] = "\n".join(texts[1].splitlines()[-40:])
    return "\n".join([*texts, call("scontrol", "show", "job").stdout, call("sinfo", "-N", "-l").stdout])


def wait_for(job: str, states: tuple[str, ...], log: Path) -> dict[str, str]:
    while (found := fields(job)).get("JobState") not in states:
        assert time.monotonic() < Patience.end, told(log)
        time.sleep(0.5)
    return found


ENDED = ("COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL")


def test_trains_on_two_nodes(slurm: None, tmp_path: Path) -> None:
    log, run = tmp_path / "log", tmp_path / "run"
    options = ["--epochs", 10, "--method", "LSGD", "--period", 8]
    job = submit(f"--output={log}", f"--export=ALL,OUTPUT={run}", "jobs/train.sbatch", *options)
    assert wait_for(job, ENDED, log)["JobState"] == "COMPLETED", log.read_text()
    summary = json.loads((run / "summary.json").read_text())
    assert summary["world_size"] == 4
    assert summary["test_error"] < 0.2


LATE = """
import ctypes, os
if os.environ.get("SLURM_PROCID") == "3":  # C's sleep(3), after Python and MPI
    c = ctypes.CDLL(None)
    getattr(c, "__cxa_atexit")(ctypes.cast(c.sleep, ctypes.c_void_p), ctypes.c_void_p(3), None)
"""
LONG = ("--epochs", 2000, "--eval_every", "20 steps")


def evaluated(run: Path) -> bool:
    """Whether the run has got so far that it heeds signals."""
    metrics = run / "metrics.jsonl"
    return metrics.is_file() and metrics.stat().st_size > 0


def test_a_signal_saves_and_the_job_goes_on(slurm: None, tmp_path: Path) -> None:
    """USR1: all save and end with status 75; the job requeues itself and goes on from there."""
    log, run = tmp_path / "log", tmp_path / "run"
    export = f"--export=ALL,OUTPUT={run}"
    job = submit(f"--output={log}", export, "jobs/train.sbatch", *LONG, "--method", "EASGD")
    until(lambda: evaluated(run), log)
    call("scancel", "--signal=USR1", job)
    until(lambda: "ended by a signal at step" in log.read_text(), log)
    until_resumed(job, log)


def test_a_job_whose_ranks_were_killed_can_be_requeued(slurm: None, tmp_path: Path) -> None:
    """Whatever MPI's dead ranks have left on the node."""
    log, run = tmp_path / "log", tmp_path / "run"
    job = submit(f"--output={log}", f"--export=ALL,OUTPUT={run}", "jobs/train.sbatch", *LONG)
    until(lambda: evaluated(run), log)
    assert call("pkill", "-KILL", "-f", f"bin/mpilsgd train .*{run}").returncode == 0
    assert wait_for(job, ENDED, log)["JobState"] == "FAILED", log.read_text()
    call("scontrol", "requeue", job)
    until_resumed(job, log)


def test_a_cancelled_job_does_not_requeue_itself(slurm: None, tmp_path: Path) -> None:
    """Its ranks save and end with 75, which the job's script may see before Slurm's signal ends it too."""
    log, run, late = tmp_path / "log", tmp_path / "run", tmp_path / "late"
    late.write_text("trap '' TERM; trap 'echo \"the script ends with $?\"' EXIT\n")
    export = f"--export=ALL,OUTPUT={run},BASH_ENV={late}"
    job = submit(f"--output={log}", export, "jobs/train.sbatch", *LONG)
    until(lambda: evaluated(run), log)
    call("scancel", job)
    until(lambda: "the script ends with 75" in log.read_text(), log)
    assert wait_for(job, (*ENDED, "PENDING"), log)["JobState"] == "CANCELLED", log.read_text()


def until_resumed(job: str, log: Path) -> None:
    until(lambda: fields(job).get("Restarts") == "1", log)
    requeued = time.monotonic()

    def resumed() -> bool:
        # It would wait two minutes, so that the first run's end is not taken for its own: seconds are enough here.
        if time.monotonic() > requeued + 10 and fields(job).get("JobState") == "PENDING":
            call("scontrol", "update", f"JobId={job}", "StartTime=now")
        return "resumed at step" in log.read_text()

    until(resumed, log)
    steps = call("squeue", "-s", "-h", "-j", job, "-o", "%i").stdout.split()
    assert f"{job}.1" in steps, steps  # not 0, whose shared memory may still lie there
    call("scancel", job)
    wait_for(job, ENDED, log)


def test_a_rank_that_leaves_late_does_not_hide_the_status(slurm: None, tmp_path: Path) -> None:
    """srun ends what still runs when the first rank has left with 75."""
    (tmp_path / "sitecustomize.py").write_text(LATE)
    log, run = tmp_path / "log", tmp_path / "run"
    export = f"--export=ALL,REQUEUE=0,OUTPUT={run},PYTHONPATH={tmp_path}"
    job = submit(f"--output={log}", export, "jobs/train.sbatch", *LONG)
    until(lambda: evaluated(run), log)
    assert call("scancel", "--signal=USR1", job).returncode == 0
    assert wait_for(job, ENDED, log)["ExitCode"] == "75:0", log.read_text()


@pytest.mark.brief()
def test_without_requeueing_the_status_is_75(slurm: None, tmp_path: Path) -> None:
    """Another job then goes on with the run."""
    log, run = tmp_path / "log", tmp_path / "run"
    export = f"--export=ALL,REQUEUE=0,OUTPUT={run}"
    job = submit(f"--output={log}", export, "jobs/train.sbatch", *LONG)
    until(lambda: evaluated(run), log)
    call("scancel", "--signal=USR1", job)
    found = wait_for(job, ENDED, log)
    assert found["JobState"] == "FAILED", found
    assert found["ExitCode"] == "75:0", found
    log = tmp_path / "next"
    job = submit(f"--output={log}", "jobs/train.sbatch", "--resume", run)
    until(lambda: log.is_file() and "resumed at step" in log.read_text(), log)
    call("scancel", job)
    wait_for(job, ENDED, log)


def test_a_sweep_gives_one_report(slurm: None, tmp_path: Path) -> None:
    """Also where a run diverges at once, a task of the array has no pair, and another sweep lies there already."""
    output = tmp_path / "sweep"
    (output / "ended" / "0" / "drawn").mkdir(parents=True)
    export = f"--export=ALL,OUTPUT={output},RATES=0.1 1e30,PULLS=0.1 0.5"
    options = ("--array=0-4", "--ntasks-per-node=2", f"--output={tmp_path}/log-%a", export)
    job = submit(*options, "jobs/sweep.sbatch", "--epochs", 3)
    until(lambda: not call("squeue", "-h", "-j", job).stdout.strip(), tmp_path / "log-0")
    logs = "\n".join(path.read_text() for path in sorted(tmp_path.glob("log-*")))
    assert len(list(output.glob("lr-0.1-*/summary.json"))) == 2, logs
    assert not list(output.glob("lr-1e30-*/summary.json")), logs
    assert (output / "report" / "curves.png").is_file(), logs
    assert logs.count("mpilsgd report: ") >= 1 and "no report was drawn" not in logs, logs
    assert "task 4 of the array, but 2 rates and 2 pulls make 4 pairs" in logs


@pytest.mark.brief()
def test_scaling_gives_a_table_and_one_report(slurm: None, tmp_path: Path) -> None:
    log, output = tmp_path / "log", tmp_path / "scaling"
    export = f"--export=ALL,STEPS=20,OUTPUT={output}"
    job = submit(
        f"--output={log}", export, "jobs/scaling.sh", "--method", "EASGDTree", "--degree", 2, "--period", 2
    )
    assert wait_for(job, ENDED, log)["JobState"] == "COMPLETED", log.read_text()
    rows = [line.split()[0] for line in log.read_text().splitlines() if line.endswith("%")]
    assert rows == ["2", "4"], log.read_text()
    assert (output / "report" / "curves.png").is_file(), log.read_text()

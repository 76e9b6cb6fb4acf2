"""The trainings of a deep figure, under the virtual clock of `mpilsgd simulate`: each worker has a device of its own.

Trainings run beside each other, one process a core. Each has a run directory of its own; what is complete is not
trained again, for another figure either. So an interrupted reproduction goes on where it was.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mpilsgd import __version__
from mpilsgd.reproduce.registry import Failed

if TYPE_CHECKING:
    from mpilsgd.train.run_reader import Run

Found = Mapping[str, "Run"]  # by label

EVALUATIONS = 12  # of a training, at least


@dataclass(frozen=True)
class Training:
    """One curve of a figure.

    Attributes:
        label: its name; workers: how many.
        options: of `mpilsgd train`. {half} in them stands for half of the training, in epochs of all workers.
        clock: options of `mpilsgd simulate`.
        images: of the training set.
        share: of the passes that are asked for.
    """

    label: str
    workers: int
    options: str
    clock: str = ""
    images: int = 50_000
    share: float = 1.0

    def words(self, passes: float) -> list[str]:
        """The options with the length: each worker takes the steps of so many passes by a single one."""
        options = shlex.split(self.options.replace("{half}", f"{passes * self.workers / 2:g}"))
        batch = int(options[options.index("--batch_size") + 1])
        steps = max(1, round(passes * self.share * self.images / batch))
        return [*options, "--steps", f"{steps}", "--eval_every", f"{max(1, steps // EVALUATIONS)} steps"]

    def job(self, passes: float, data_dir: Path) -> str:
        """The same as a job of MPI."""
        train = ["mpilsgd", "train", *self.words(passes), "--data_dir", f"{data_dir}"]
        return shlex.join(["mpiexec", "-n", f"{self.workers}", *train])

    def simulation(self, passes: float, data_dir: Path, seed: int) -> list[str]:
        """The arguments of `mpilsgd`, but for the run directory."""
        cluster = ["simulate", "--workers", f"{self.workers}", *shlex.split(self.clock)]
        data = ["--data_dir", f"{data_dir}", "--seed", f"{seed}"]
        rest = shlex.split("--checkpoint_every null --threads 1")
        return [*cluster, *self.words(passes), *data, *rest]


def train(trainings: Sequence[Training], passes: float, data_dir: Path, seed: int, output: Path) -> Found:
    """Trains all, the longest first, and reads the runs. One that diverges ends there, with the rows before.

    Raises:
        Failed: a training has ended with another error; the others are ended, too.
    """
    from mpilsgd.train.run_reader import RunError, read_runs

    running: set[subprocess.Popen[bytes]] = set()
    calls = {one: one.simulation(passes, data_dir, seed) for one in trainings}
    folders = {one: output / _folder(one, call) for one, call in calls.items()}
    ordered = sorted(trainings, key=lambda one: -one.workers)
    pool = ThreadPoolExecutor(len(os.sched_getaffinity(0)))
    try:
        output.mkdir(parents=True, exist_ok=True)
        jobs = [pool.submit(_train, one.label, calls[one], folders[one], running) for one in ordered]
        for job in as_completed(jobs):
            job.result()
        return dict(zip((one.label for one in trainings), read_runs(folders.values()), strict=True))
    except (RunError, OSError) as error:
        raise Failed(str(error)) from None
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in list(running):
            process.terminate()


def _folder(training: Training, call: Sequence[str]) -> str:
    """Another command, or version, another folder: what stands there is of this one."""
    method = re.findall(r"--method (\w+)", training.options)[0].lower()
    mark = hashlib.sha256(shlex.join([__version__, *call]).encode()).hexdigest()[:8]
    return f"{method}-{training.workers}-{mark}"


def _train(label: str, call: Sequence[str], folder: Path, running: set[subprocess.Popen[bytes]]) -> None:
    """The file `complete` says that the run came to its end. Its log is locked as long as it is being trained, also by
    a process whose parent was killed.
    """
    began, complete = time.perf_counter(), folder / "complete"
    command = [sys.executable, "-m", "mpilsgd.cli", *call, "--output", str(folder), "--overwrite", "true"]
    log = Path(f"{folder}.log")
    with open(log, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Failed(f"{label}: another process trains {folder}; wait for it, or end it") from None
        if complete.exists():
            print(f"  {label}: {folder.name}, kept", flush=True)
            return
        file.truncate(0)
        with subprocess.Popen(command, stdout=file, stderr=file) as process:
            running.add(process)
            status = process.wait()
            running.discard(process)
    if status and "the run has diverged" not in log.read_text():
        raise Failed(f"{label}: status {status} of {shlex.join(command)}:\n{log.read_text()[-1500:]}")
    complete.touch()
    print(f"  {label}: {folder.name}, {time.perf_counter() - began:.0f} s here", flush=True)

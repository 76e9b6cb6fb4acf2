"""The trainings of a deep figure, under the virtual clock of `mpilsgd simulate`: each worker has a device of its own.

Trainings run beside each other, one process a core. Each has a run directory of its own; what is complete is not
trained again, for another figure either. So an interrupted reproduction goes on where it was.
"""

from __future__ import annotations

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

from mpilsgd.reproduce.registry import Failed

if TYPE_CHECKING:
    from mpilsgd.train.run_reader import Run

Found = Mapping[str, "Run"]  # by label

EVALUATIONS = 12  # of a training


@dataclass(frozen=True)
class Training:
    """One curve of a figure.

    Attributes:
        label: its name; workers: how many.
        options: of `mpilsgd train`. {half} in them stands for half of the training, in epochs of all workers.
        clock: options of `mpilsgd simulate`.
        images: of the training set.
    """

    label: str
    workers: int
    options: str
    clock: str = ""
    images: int = 50_000

    def words(self, passes: float) -> list[str]:
        """The options with the length: each worker takes the steps of so many passes by a single one."""
        options = shlex.split(self.options.replace("{half}", f"{passes * self.workers / 2:g}"))
        batch = int(options[options.index("--batch_size") + 1])
        steps = max(1, round(passes * self.images / batch))
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
    """Trains all, the longest first, and reads the runs. One that diverged ends there, with the rows before.

    Raises:
        Failed: a training has ended with another error.
    """
    from mpilsgd.train.run_reader import read_runs

    output.mkdir(parents=True, exist_ok=True)
    calls = {one: one.simulation(passes, data_dir, seed) for one in trainings}
    folders = {one: output / _folder(one.label, call) for one, call in calls.items()}
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        ordered = sorted(trainings, key=lambda one: -one.workers)
        jobs = [pool.submit(_train, one.label, calls[one], folders[one]) for one in ordered]
        try:
            for job in as_completed(jobs):
                job.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return dict(zip((one.label for one in trainings), read_runs(folders.values()), strict=True))


def _folder(label: str, call: Sequence[str]) -> str:
    """Another command, another folder: what stands there is of this command."""
    mark = hashlib.sha256(shlex.join(call).encode()).hexdigest()[:8]
    return f"{re.sub('[^a-z0-9.]+', '-', label.lower())}-{mark}"


def _train(label: str, call: Sequence[str], folder: Path) -> None:
    log = Path(f"{folder}.log")
    if (folder / "summary.json").exists() or _diverged(log):
        return
    began = time.perf_counter()
    command = [sys.executable, "-m", "mpilsgd.cli", *call, "--output", str(folder), "--overwrite", "true"]
    with open(log, "w") as file:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        status = subprocess.run(command, stdout=file, stderr=file, env=environment).returncode
    if status and not _diverged(log):
        raise Failed(f"{label}: status {status} of {shlex.join(command)}:\n{log.read_text()[-1500:]}")
    print(f"  {label}: {time.perf_counter() - began:.0f} s here", flush=True)


def _diverged(log: Path) -> bool:
    return log.exists() and "the run has diverged" in log.read_text()

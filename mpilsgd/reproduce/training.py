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
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mpilsgd import __version__
from mpilsgd.reproduce.registry import Failed, Options

if TYPE_CHECKING:
    from mpilsgd.train.run_reader import Run


class LeftOut(Exception):
    """A check needs a training that was not asked for."""


class Found(dict[str, "Run"]):
    """The runs by label; left_out: the labels of those that were not asked for."""

    left_out: Sequence[str] = ()

    def __missing__(self, label: str) -> Run:
        if label in self.left_out:
            raise LeftOut(f"needs {label}, which --workers leaves out")
        raise KeyError(label)


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

    def simulation(self, passes: float, data_dir: Path, seed: int, amp: str | None = None) -> list[str]:
        """The arguments of `mpilsgd`, but for the run directory."""
        cluster = ["simulate", "--workers", f"{self.workers}", *shlex.split(self.clock)]
        data = ["--data_dir", f"{data_dir}", "--seed", f"{seed}"]
        rest = shlex.split("--checkpoint_every null --threads 1")
        half = ["--amp", amp] if amp else []
        return [*cluster, *self.words(passes), *data, *rest, *half]


def train(trainings: Sequence[Training], options: Options) -> Found:
    """Trains all, the longest first, and reads the runs. One that diverges ends there, with the rows before.

    SIGTERM ends them all, and this process. Only for the main thread.

    Raises:
        Failed: a training has ended with another error; the others are ended, too.
    """
    from mpilsgd.train.run_reader import RunError, read_runs

    assert options.passes is not None
    output = options.output / "runs"
    given = options.passes, options.data_dir, options.seed, options.amp
    calls = {one: one.simulation(*given) for one in trainings}
    folders = {one: output / _folder(one, call) for one, call in calls.items()}
    waiting, running = sorted(trainings, key=lambda one: one.workers), list[_Running]()
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        output.mkdir(parents=True, exist_ok=True)
        while waiting or running:
            while waiting and len(running) < len(os.sched_getaffinity(0)):
                one = waiting.pop()
                running.append(_Running(one.label, calls[one], folders[one]))
            running = [one for one in running if not one.ended()]
            time.sleep(0.1)
        runs = read_runs(folders.values())
        return Found(zip((one.label for one in trainings), runs, strict=True))
    except (RunError, OSError) as error:
        raise Failed(str(error)) from None
    finally:
        for left in running:
            left.end()
        signal.signal(signal.SIGTERM, before)


def _folder(training: Training, call: Sequence[str]) -> str:
    """Another command, or version, another folder: what stands there is of this one."""
    method = re.findall(r"--method (\w+)", training.options)[0].lower()
    mark = hashlib.sha256(shlex.join([__version__, *call]).encode()).hexdigest()[:8]
    return f"{method}-{training.workers}-{mark}"


class _Running:
    """One training in a process of its own, or a complete one that is kept.

    The file `complete` says that the run came to its end. Its log is locked as long as it is being trained, also by a
    process whose parent was killed.
    """

    def __init__(self, label: str, call: Sequence[str], folder: Path):
        self._label, self._folder, self._began = label, folder, time.perf_counter()
        command = [*call, "--output", str(folder), "--overwrite", "true"]
        self._command = [sys.executable, "-m", "mpilsgd.cli", *command]
        self._log, self._complete = Path(f"{folder}.log"), folder / "complete"
        self._process: subprocess.Popen[bytes] | None = None
        # the lock, until ended() or end()
        self._file = os.open(self._log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._file)
            raise Failed(f"{label}: another process trains {folder}; wait for it, or end it") from None
        if not self._complete.exists():
            os.truncate(self._file, 0)
            self._process = subprocess.Popen(self._command, stdout=self._file, stderr=self._file)

    def ended(self) -> bool:
        """Whether it has, and says so. Failed: with an error, where divergence is none."""
        took = "kept"
        if self._process is not None:
            status = self._process.poll()
            if status is None:
                return False
            if status and "the run has diverged" not in self._log.read_text():
                said = f"{shlex.join(self._command)}:\n{self._log.read_text()[-1500:]}"
                raise Failed(f"{self._label}: status {status} of {said}")
            self._complete.touch()
            took = f"{time.perf_counter() - self._began:.0f} s here"
        self._unlock()
        print(f"  {self._label}: {self._folder.name}, {took}", flush=True)
        return True

    def end(self) -> None:
        """Ends it, where it still runs."""
        if self._process is not None:
            self._process.terminate()
            self._process.wait()
        self._unlock()

    def _unlock(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

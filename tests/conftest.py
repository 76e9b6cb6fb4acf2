"""What every test run shares: the rank before each failure, a watchdog over hung ranks, a record of outcomes.

tests/run.sh sets the environment below and reads the record with tally.py; a plain `pytest` works without it.
"""

from __future__ import annotations

import faulthandler
import gc
import importlib.machinery
import importlib.util
import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from os import _exit  # now: within a job it is another function
from pathlib import Path

import pytest

RUN = os.environ.get("MPILSGD_TEST_RUN", "")  # the run's name, as tally.py prints it
RECORD = os.environ.get("MPILSGD_TEST_RECORD")  # the folder of the outcomes
RANKS = int(os.environ.get("MPILSGD_TEST_RANKS", "0"))  # the world's size, 0 for any
NODES = int(os.environ.get("MPILSGD_TEST_NODES", "0"))  # shared-memory nodes there have to be, 0 for any
ALL = os.environ.get("MPILSGD_TEST_ALL", "") == "1"  # also what is `brief` everywhere
# ranks are so many tasks of one process ("4"), on so many nodes ("4x2")
TASKS = os.environ.get("MPILSGD_TEST_TASKS", "")
SECONDS = float(os.environ.get("MPILSGD_TEST_SECONDS", "240"))  # the longest one test may take
# an extension with an emulated device in place of the one that is installed: tests marked `gpu` run on it
CORE = os.environ.get("MPILSGD_TEST_CORE", "")
SLOW = 15  # times as long for a test marked slow


def load_core(path: str) -> None:
    loader = importlib.machinery.ExtensionFileLoader("mpilsgd._core", path)
    spec = importlib.util.spec_from_loader("mpilsgd._core", loader)
    assert spec is not None
    sys.modules["mpilsgd._core"] = core = importlib.util.module_from_spec(spec)
    loader.exec_module(core)


if CORE:
    load_core(CORE)


class Watchdog(threading.Thread):
    """Ends the job when a test takes too long, after every rank has printed its stacks.

    A rank that sees the time pass leaves a file for the others, which may already wait in a later test. A
    rank that hangs with the interpreter's lock held cannot look; faulthandler's timer prints its stacks.
    """

    def __init__(self, name: str, rank: int, stderr: int):
        super().__init__(name="watchdog", daemon=True)
        self.label, self.stderr = name, stderr
        self.alarm = Path(RECORD or os.devnull) / f"{RUN}.alarm"
        self.own = Path(RECORD or os.devnull) / f"{RUN}.{rank}.jsonl"
        self.test, self.limit, self.started = "", SECONDS, time.monotonic()

    def begin(self, test: str, limit: float) -> None:
        self.limit, self.started, self.test = limit, time.monotonic(), test
        faulthandler.dump_traceback_later(limit + 2, exit=True, file=self.stderr)

    def end(self) -> None:
        self.test = ""
        faulthandler.cancel_dump_traceback_later()

    def run(self) -> None:
        while True:
            time.sleep(0.5)
            test, late = self.test, time.monotonic() - self.started > self.limit
            if not (test and late) and not self.alarm.exists():
                continue
            if RECORD:
                self.alarm.touch()
            faulthandler.cancel_dump_traceback_later()
            seconds = time.monotonic() - self.started
            where = f"for {seconds:.0f} s in {test}" if test else "between two tests"
            write(self.stderr, f"\n{self.label}: hung? {where}; all its stacks:\n")
            faulthandler.dump_traceback(file=self.stderr, all_threads=True)
            if test and RECORD:
                append(self.own, test, "failed", f"no end after {seconds:.0f} s")
            time.sleep(3)  # the others' turn to print
            _exit(70)


class Recorder:
    """Prints a failure at once, with the rank, and appends every outcome to this rank's file."""

    def __init__(self, name: str, rank: int, with_mpi: bool, stderr: int):
        self.label, self.with_mpi, self.stderr = name, with_mpi, stderr
        self.path = Path(RECORD) / f"{RUN}.{rank}.jsonl" if RECORD else None

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed or report.skipped or report.when == "call":
            self.take(report)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed or report.skipped:
            self.take(report)

    def take(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        if self.path:
            append(self.path, report.nodeid, report.outcome, reason(report), getattr(report, "duration", 0.0))
        if report.failed and self.with_mpi:  # a rank's failure ends the job before pytest's own summary
            parts = [f"\n{self.label}: FAILED {report.nodeid}", report.longreprtext]
            parts += [f"--- {title} ---\n{text}" for title, text in report.sections]
            write(self.stderr, "\n".join(parts) + "\n")


def reason(report: pytest.TestReport | pytest.CollectReport) -> str:
    """Why a test was skipped or failed, in a line."""
    if isinstance(report.longrepr, tuple):
        return report.longrepr[2]  # (file, line, reason)
    crash = getattr(report.longrepr, "reprcrash", None)
    text = crash.message if crash else getattr(report, "wasxfail", "")
    return (text.splitlines() or [""])[0]


def append(path: Path, test: str, outcome: str, reason: str, seconds: float = 0.0) -> None:
    entry = {"test": test, "outcome": outcome, "reason": reason, "seconds": round(seconds, 2)}
    with path.open("a") as file:
        file.write(json.dumps(entry) + "\n")


def write(descriptor: int, text: str) -> None:
    """One system call, so that the ranks' lines do not mix."""
    os.write(descriptor, text.encode(errors="replace"))


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    for marker in MARKERS:
        config.addinivalue_line("markers", marker)
    rank, label = 0, RUN or "pytest"
    with_mpi = bool(config.getoption("--with-mpi", False))
    if with_mpi:
        from mpi4py import MPI

        world = MPI.COMM_WORLD
        rank, label = world.rank, f"{RUN or 'pytest'}, rank {world.rank} of {world.size}"
        if RANKS and world.size != RANKS:
            pytest.exit(f"{label}, not of {RANKS}: launcher and MPI library do not match", returncode=3)
        if NODES:
            node = world.Split_type(MPI.COMM_TYPE_SHARED)
            nodes = world.allreduce(int(node.rank == 0))
            node.Free()
            if nodes != NODES:
                pytest.exit(f"{label}: {nodes} shared-memory nodes, should be {NODES}", returncode=3)
        # Ranks that make their temporary folders in one place get in each other's way.
        temporary = Path(os.environ.get("PYTEST_DEBUG_TEMPROOT", tempfile.gettempdir()), f"pytest-rank{rank}")
        temporary.mkdir(exist_ok=True)
        os.environ["PYTEST_DEBUG_TEMPROOT"] = str(temporary)
        if rank:
            config.pluginmanager.unregister(name="terminalreporter")
        for plugin in config.pluginmanager.get_plugins():
            if type(plugin).__name__ == "MPIPlugin":
                plugin._is_testing_mpi = False  # else pytest-mpi ends with a page about the MPI library
    stderr = os.dup(2)  # pytest captures 2 during the tests
    config.pluginmanager.register(Recorder(label, rank, with_mpi, stderr), "mpilsgd-recorder")
    if not config.getoption("usepdb"):
        config.stash[WATCHDOG] = watchdog = Watchdog(label, rank, stderr)
        watchdog.start()


WATCHDOG = pytest.StashKey[Watchdog]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    watchdog = item.config.stash.get(WATCHDOG, None)
    if watchdog is None:
        return (yield)
    watchdog.begin(item.nodeid, SECONDS * (SLOW if item.get_closest_marker("slow") else 1))
    try:
        return (yield)
    finally:
        watchdog.end()


@pytest.hookimpl(trylast=True)  # after -m and -k
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out, instead of skipping, what this run need not have: tally.py sees to it that another has it."""
    rank, size = 0, 1
    if config.getoption("--with-mpi", False):
        from mpi4py import MPI

        rank, size = MPI.COMM_WORLD.rank, MPI.COMM_WORLD.size
    elif "harness" in sys.modules:  # ranks that are tasks
        size = sys.modules["harness"].WORLD.size
    reasons = {item: why for item in items if (why := left_out(item, size))}
    if reasons:
        config.hook.pytest_deselected(items=list(reasons))
        if RECORD and rank == 0:
            for item, why in reasons.items():
                append(Path(RECORD, f"{RUN}.0.jsonl"), item.nodeid, "left out", why)
        items[:] = [item for item in items if item not in reasons]


@pytest.hookimpl(trylast=True)
def pytest_collection_finish(session: pytest.Session) -> None:
    """What the imports and the collection left, 450,000 objects, stays; frozen, nothing looks through it again.

    A method looks for its model among all live objects, and many tests collect garbage: most of the time of many.
    """
    gc.collect()
    gc.freeze()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Once more after a test that has undone it: `bench exchange` ends with gc.unfreeze()."""
    if not gc.get_freeze_count():
        gc.collect()
        gc.freeze()


def left_out(item: pytest.Item, size: int) -> str:
    """Why the markers leave this test out at so many ranks; else nothing. See MARKERS."""
    brief = item.get_closest_marker("brief")  # a test's own before its file's
    if brief and not brief.args and not ALL:
        return ONLY_ALL  # before the ranks, as no run at any number of them has it
    if item.get_closest_marker("gpu") and not gpu():
        return "needs a GPU"
    if TASKS and item.get_closest_marker("processes"):
        return "needs ranks that are processes"
    least = max((mark.kwargs.get("min_size") or 1 for mark in item.iter_markers("mpi")), default=1)
    if least > size:
        return f"needs {least} ranks"
    for mark in item.iter_markers("ranks"):
        if size not in mark.args:
            return f"needs {' or '.join(map(str, mark.args))} ranks"
    layouts = {TASKS, f"{TASKS} tasks"} if TASKS else {f"{size}x{NODES}" if NODES > 1 else str(size)}
    if brief and brief.args and not layouts.intersection(map(str, brief.args)):
        return f"needs {' or '.join(map(str, brief.args))} ranks"
    return ""


def gpu() -> bool:
    import torch

    return bool(CORE) or torch.cuda.is_available()


ONLY_ALL = "in bash tests/run.sh --all"
MARKERS = (
    "gpu: on a CUDA device, or an emulated one; left out where there is none",
    "processes: not where ranks are tasks of one process, for which time or a fork is another matter",
    "ranks(n, ...): only at these numbers of ranks",
    "brief(n, ...): only at so many ranks (2), ranks and nodes ('4x2') or tasks ('2 tasks'); none: with --all only",
)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """No test for this number of ranks is no failure; tally.py sees to it that something ran."""
    if RUN and exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED:
        session.exitstatus = pytest.ExitCode.OK

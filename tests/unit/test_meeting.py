"""Processes that meet in memory which they share, without MPI."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

_spec = importlib.util.find_spec("mpilsgd._core")
pytestmark = pytest.mark.skipif(_spec is None or not sys.platform.startswith("linux"), reason="no extension")

# What each process runs first: `me` is its seat, `meeting` where it meets the others, who are called 10, 11, ...
PRELUDE = """
import importlib.util, mmap, os, random, signal, sys, time
import numpy as np

spec = importlib.util.spec_from_file_location("_core", sys.argv[1])
core = importlib.util.module_from_spec(spec)
spec.loader.exec_module(core)
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored by what runs in the background
me, n, spins = int(sys.argv[3]), int(sys.argv[4]), sys.argv[5] == "spins"
memory = np.frombuffer(mmap.mmap(os.open(sys.argv[2], os.O_RDWR), 0), np.uint8)
meeting = core.Meeting(memory.ctypes.data, n, me, 5, spins, [10 + i for i in range(n)])
meeting.fence()
meeting.look_after()
def say(what):
    print(what, flush=True)
"""
Start = Callable[..., list["subprocess.Popen[str]"]]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    started: list[subprocess.Popen[str]] = []

    def run(n: int, script: str, spins: bool = False) -> list[subprocess.Popen[str]]:
        from mpilsgd import _core  # type: ignore[attr-defined]

        memory = tmp_path / "memory"
        memory.write_bytes(bytes(-(-_core.Meeting.bytes(n, 5) // 4096) * 4096))
        text = PRELUDE + textwrap.dedent(script)
        assert _spec is not None
        told = [_spec.origin or "", memory]
        new = [
            subprocess.Popen(
                [sys.executable, "-c", text, *map(str, (*told, me, n, "spins" if spins else "sleeps"))],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for me in range(n)
        ]
        started.extend(new)
        return new

    yield run
    for process in started:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def _heard(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def _end(process: subprocess.Popen[str], seconds: float = 60) -> str:
    return process.communicate(timeout=seconds)[0]


@pytest.mark.parametrize("spins", [False, True])
@pytest.mark.parametrize("n", [1, 2, 5])
def test_all_have_the_rows_of_all(start: Start, n: int, spins: bool) -> None:
    """With more processes than cores, rows of several pieces, and pauses; what was stored before is seen after."""
    script = """
    stored = np.frombuffer(mmap.mmap(os.open(sys.argv[2] + ".data", os.O_RDWR), 0), np.int64)
    chance = random.Random(me)
    for k in range(1500):
        if chance.random() < 0.02:
            time.sleep(chance.random() * 2e-3)
        count = (0, 1, 4, 5, 6, 13)[k % 6]
        rows = meeting.table([1000.0 * i + k + j for i in [me] for j in range(count)])
        assert rows.tolist() == [[1000.0 * i + k + j for j in range(count)] for i in range(n)], (k, rows)
        stored[me] = k
        meeting.fence()
        assert stored[:n].tolist() == [k] * n, (k, stored)
        given = np.arange(count) + k if not me else np.zeros(count)
        given = given.astype(float)
        meeting.share(given)
        assert given.tolist() == [float(k + j) for j in range(count)]
    say("done")
    """
    processes = []
    try:
        # beside the memory of the meeting
        processes = _with_data(start, n, script, spins)
        assert [_end(p) for p in processes] == ["done\n"] * n
    finally:
        for p in processes:
            p.kill()


def _with_data(start: Start, n: int, script: str, spins: bool) -> list[subprocess.Popen[str]]:
    create = """
    if me == 0:
        open(sys.argv[2] + ".data", "wb").write(bytes(4096))
    meeting.fence()
    """
    return start(n, textwrap.dedent(create) + textwrap.dedent(script), spins)


def test_a_killed_process_is_named(start: Start) -> None:
    script = """
    if me == 1:
        say("here")
        time.sleep(100)
    say("waits")
    try:
        meeting.fence()
    except RuntimeError as error:
        say(error)
    """
    first, killed, last = start(3, script)
    assert [_heard(p) for p in (first, killed, last)] == ["waits", "here", "waits"]
    time.sleep(1.5)  # looks at one that is alive
    killed.kill()  # its remains stay until it is waited for
    begin = time.monotonic()
    assert [_end(p) for p in (first, last)] == ["rank 11 is gone, and others wait for it\n"] * 2
    assert time.monotonic() - begin < 10
    _end(killed)


def test_signals_come_through(start: Start) -> None:
    """Ctrl-C ends a wait, and then there is no going on; a handler that returns does not."""
    script = """
    signal.signal(signal.SIGUSR1, lambda *_: say("handled"))
    say("here")
    if me == 1:
        time.sleep(100)
    try:
        meeting.table([1.0])
    except KeyboardInterrupt:
        say("interrupted")
    try:
        meeting.fence()
    except RuntimeError as error:
        say(error)
    """
    waiting, other = start(2, script)
    assert [_heard(p) for p in (waiting, other)] == ["here"] * 2
    time.sleep(0.3)
    begin = time.monotonic()
    os.kill(waiting.pid, signal.SIGUSR1)
    assert _heard(waiting) == "handled"
    os.kill(waiting.pid, signal.SIGINT)
    assert _heard(waiting) == "interrupted"
    assert time.monotonic() - begin < 5
    assert "left a meeting" in _heard(waiting)
    _end(waiting)
    other.kill()
    _end(other)


def test_wrong_use_is_told(start: Start) -> None:
    script = """
    def refused(call):
        try:
            call()
        except (ValueError, RuntimeError) as error:
            say(error)
        else:
            say("not refused")
    at = memory.ctypes.data
    refused(lambda: core.Meeting(at + 8, n, me, 5, spins, [0] * n))
    refused(lambda: core.Meeting(at, n, n, 5, spins, [0] * n))
    refused(lambda: core.Meeting(at, n, me, 5, spins, []))
    child = os.fork()
    refused(meeting.fence) if child == 0 else os.waitpid(child, 0)
    if child == 0:
        os._exit(0)
    refused(lambda: meeting.table([1.0] * (1 + me)))
    """
    for text in [_end(p) for p in start(2, script)]:
        told = text.splitlines()
        wanted = ("cache line", "seat", "seat", "a fork of a rank", "different meetings")
        assert len(told) == len(wanted), text
        assert all(part in line for part, line in zip(wanted, told, strict=True)), text

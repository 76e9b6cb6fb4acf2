"""Waiting that leaves the core to others, and work behind the work."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import torch

from mpilsgd.comm.mpi import MPI, here
from mpilsgd.devices import side

_SLEEP = 2e-5, 1e-3  # seconds between two looks: at first, at last


def wait_until(true: Callable[[], bool], alarm: float | None = None) -> float:
    """Returns when it is true; the seconds that took. Leaves the core to others meanwhile.

    alarm: a time of `clock` at which it may come true, or raise, though no other rank does anything.
    """
    start, pause = seconds(), _SLEEP[0]
    if here.task is not None:
        here.task.baton.wait(true, None, alarm)
        return seconds() - start
    for _ in range(20):
        if true():
            return time.perf_counter() - start
    while not true():
        time.sleep(pause)
        pause = min(2 * pause, _SLEEP[1])
    return time.perf_counter() - start


def give_way() -> None:
    """Ranks that are tasks of one process may take turns here."""
    if here.task is not None:
        here.task.baton.give_way()


def clock() -> float:
    """Seconds. Those of tasks pass by what they do, so that a run does not depend on how fast it is."""
    return time.perf_counter() if here.task is None else here.task.baton.now


def seconds() -> float:
    """What exchanges are timed by: as they pass, or as they would pass where time is simulated."""
    return time.perf_counter() if here.task is None else here.task.baton.seconds()


def reads(nbytes: int) -> None:
    """This rank reads so many bytes of others' memory, where that is simulated."""
    if here.task is not None:
        here.task.baton.reads(nbytes)


def pause(seconds: float) -> None:
    """Leaves the core to others for so long."""
    if here.task is None:
        time.sleep(seconds)
    else:
        here.task.baton.wait(None, None, clock() + seconds)


def _give_way_until(true: Callable[[], bool]) -> None:
    """Before a thread waits for another of its rank: where they are tasks it must not keep the others from running."""
    if here.task is not None:
        wait_until(true)


def result(future: Future[None]) -> None:
    """Waits for what a `Background` was given, and raises what it raised."""
    _give_way_until(future.done)
    future.result()


def complete(request: MPI.Request) -> None:
    """Waits for a request and leaves the core to others. An interrupt comes through when it is done, not before: its
    buffers would be gone."""
    if here.task is not None:
        request.Wait()
        return
    try:
        wait_until(request.Test)
    except BaseException:
        request.Wait()
        raise


def start_thread(work: Callable[[], None], name: str) -> threading.Thread:
    """A thread of this rank, which a process that ends does not wait for."""
    if here.task is not None:
        return here.task.helper(work, name)
    thread = threading.Thread(target=work, name=name, daemon=True)
    thread.start()
    return thread


class Background:
    """A thread that does what it is given, one after the other, without gradients. A process that ends does not wait
    for it.

    Its kernels go to a stream of its own, after those that were given to the stream of who gives the work; who needs
    them calls `join`.
    """

    def __init__(self, name: str, device: torch.device):
        self._side = side(device)
        self._ended = False
        self._todo: queue.SimpleQueue[tuple[Future[None], Callable[[], None]] | None] = queue.SimpleQueue()
        self._thread = start_thread(self._work, name)

    def _work(self) -> None:
        while (job := self._next()) is not None:
            future, do = job
            error = None
            try:
                do()
            except BaseException as failure:
                error = failure
            del job, do  # and what it holds, before anyone hears of its end
            if error is None:
                future.set_result(None)
            else:
                future.set_exception(error)
            del future, error
        self._ended = True

    def _next(self) -> tuple[Future[None], Callable[[], None]] | None:
        _give_way_until(lambda: not self._todo.empty())
        return self._todo.get()

    def submit(self, do: Callable[[Any], None], given: Any) -> Future[None]:
        future: Future[None] = Future()
        if self._side is not None:
            self._side.follows()

        def work() -> None:
            with torch.no_grad(), contextlib.nullcontext() if self._side is None else self._side.current():
                do(given)

        self._todo.put((future, work))
        return future

    def join(self) -> None:
        """What the current stream is given from now on comes after the kernels of what is done."""
        if self._side is not None:
            self._side.awaited()

    def end(self) -> None:
        """After what it was given. Joined: a daemon that the interpreter's end kills in C++ would abort the process."""
        self._todo.put(None)
        _give_way_until(lambda: self._ended)
        self._thread.join()
        if self._side is not None:
            self._side.free()

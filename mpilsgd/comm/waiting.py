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
from mpi4py import MPI

_SLEEP = 2e-5, 1e-3  # seconds between two looks: at first, at last


def wait_until(true: Callable[[], bool]) -> float:
    """Returns when it is true; the seconds that took. Leaves the core to others meanwhile."""
    start, pause = time.perf_counter(), _SLEEP[0]
    for _ in range(20):
        if true():
            return time.perf_counter() - start
    while not true():
        time.sleep(pause)
        pause = min(2 * pause, _SLEEP[1])
    return time.perf_counter() - start


def complete(request: MPI.Request) -> None:
    """Waits for a request and leaves the core to others. An interrupt comes through when it is done, not before: its
    buffers would be gone."""
    try:
        wait_until(request.Test)
    except BaseException:
        request.Wait()
        raise


class Background:
    """A thread that does what it is given, one after the other, on the CUDA stream of who gives it.

    A process that ends does not wait for it.
    """

    def __init__(self, name: str, device: torch.device):
        self._device = device
        self._todo: queue.SimpleQueue[tuple[Future[None], Callable[[], None]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def _work(self) -> None:
        while (job := self._todo.get()) is not None:
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

    def submit(self, do: Callable[[Any], None], given: Any) -> Future[None]:
        future: Future[None] = Future()
        stream = torch.cuda.current_stream(self._device) if self._device.type == "cuda" else None

        def work() -> None:
            with contextlib.nullcontext() if stream is None else torch.cuda.stream(stream):
                do(given)

        self._todo.put((future, work))
        return future

    def end(self) -> None:
        """After what it was given. Joined: a daemon that the interpreter's end kills in C++ would abort the process."""
        self._todo.put(None)
        self._thread.join()

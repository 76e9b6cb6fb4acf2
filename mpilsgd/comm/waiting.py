"""Waiting that leaves the core to others, and work behind the work."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

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


class Background:
    """A thread that does what it is given, one after the other. A process that ends does not wait for it."""

    def __init__(self, name: str):
        self._todo: queue.SimpleQueue[tuple[Future[None], Callable[..., None], Any] | None] = (
            queue.SimpleQueue()
        )
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def _work(self) -> None:
        while (job := self._todo.get()) is not None:
            future, do, given = job
            try:
                future.set_result(do(given))
            except BaseException as error:
                future.set_exception(error)

    def submit(self, do: Callable[[Any], None], given: Any) -> Future[None]:
        future: Future[None] = Future()
        self._todo.put((future, do, given))
        return future

    def end(self) -> None:
        """After what it was given. Joined: a daemon that the interpreter's end kills in C++ would abort the process."""
        self._todo.put(None)
        self._thread.join()

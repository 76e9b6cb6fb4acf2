"""Waiting that leaves the core to others."""

from __future__ import annotations

import time
from collections.abc import Callable

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

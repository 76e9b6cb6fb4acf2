"""Ending a job on all ranks at once: an error that all ranks know of, and what to do about one that they may not."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, TypeVar

from mpilsgd.comm import Topology
from mpilsgd.train.callables import InputError

T = TypeVar("T")
BAD_INPUT, FAILED, TO_BE_RESUMED = 2, 1, 75  # exit statuses; the last is sysexits.h's EX_TEMPFAIL


class Stopped(Exception):
    """The job ends here on every rank, for the same reason; rank 0 tells it."""

    def __init__(self, reason: str, status: int = BAD_INPUT):
        super().__init__(reason)
        self.status = status


def together(topology: Topology, function: Callable[..., T], *arguments: Any, status: int = BAD_INPUT) -> T:
    """Calls the function on every rank; if it finds something wrong on any of them, all are `Stopped`. Collective.

    Only `InputError` and `OSError` are the user's to mend; any other exception is a fault, and ends the job
    with its trace.
    """
    result, error = _attempt(function, arguments)
    stop_if(topology, error, status)
    return result  # type: ignore[return-value]


def on_first(topology: Topology, function: Callable[..., T], *arguments: Any, status: int = BAD_INPUT) -> T:
    """As `together`, but only rank 0 calls the function; all get what it returns. Collective."""
    result, error = topology.broadcast(_attempt(function, arguments) if topology.world.rank == 0 else None)
    if error is not None:
        raise Stopped(error, status)
    return result


def _attempt(function: Callable[..., T], arguments: tuple[Any, ...]) -> tuple[T | None, str | None]:
    try:
        return function(*arguments), None
    except InputError as wrong:
        return None, str(wrong)
    except OSError as wrong:
        return None, f"{wrong.filename}: {wrong.strerror}" if wrong.filename else str(wrong)


def stop_if(topology: Topology, error: str | None, status: int = BAD_INPUT) -> None:
    """Stops all ranks if any brings an error. Collective."""
    try:
        topology.agree(error)
    except ValueError as agreed:
        raise Stopped(str(agreed), status) from None


def all_here(topology: Topology, patience: float = 5.0) -> bool:
    """Whether every rank arrives here within some seconds: what is believed to be known to all may not be."""
    request = topology.world.Ibarrier()
    deadline = time.monotonic() + patience
    while not request.Test():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.001)
    return True

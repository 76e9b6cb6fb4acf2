"""USR1 and TERM, to any rank, end a run on all of them: how the others learn of it, and where all stop.

And a rank that the user's code ends, ends all.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn, Protocol

import numpy as np

from mpilsgd.comm import Bell, Topology, end_job
from mpilsgd.comm.mpi import MPI
from mpilsgd.methods import Method

_SECONDS = 1.0  # of training between two questions; a signal is followed after two such spans at most
_SHARE = (
    8  # a span is at most this part of the steps that were taken: before, nobody knows how long a step is
)
_LONGEST = 128  # steps: were they to become slow, the next question would be long in coming


@contextmanager
def no_silent_exit() -> Iterator[None]:
    """Inside, `os._exit` in this process is an error of its rank, whatever the status.

    It would end the rank at once. MPICH's launcher then kills the others and may call that a success.
    """
    leave, own = os._exit, os.getpid()

    def leave_aloud(status: int) -> NoReturn:
        os._exit = leave
        if os.getpid() == own:
            caller = "".join(traceback.format_stack(sys._getframe(1), limit=10))
            end_job(RuntimeError, RuntimeError(f"os._exit({status}) was called\n{caller}"), None)
            status = status or 1
        leave(status)

    os._exit = leave_aloud
    try:
        yield
    finally:
        os._exit = leave


class Signals:
    """Inside `with`, signals end nothing and are noted in `came`."""

    def __init__(self) -> None:
        self.came = False

    def __enter__(self) -> Signals:
        self._before = {n: signal.signal(n, self._note) for n in (signal.SIGUSR1, signal.SIGTERM)}
        return self

    def _note(self, *_: Any) -> None:
        self.came = True

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


class Stop(Protocol):
    """Says when all ranks are to meet because one was told to end the run. Collective: creation and `free`.

    apart: whether ranks may come to a meeting after different numbers of steps.
    """

    apart: bool

    def due(self, step: int) -> bool:
        """To be asked after every step, with the number of own steps: whether to meet now."""

    def free(self) -> None: ...


def stop_of(opt: Method, topology: Topology, signals: Signals, step: int) -> Stop:
    """The way of stopping that goes with a method, for a run that begins after `step` steps. Collective."""
    # in lock-step nobody may leave the others alone; until a gradient norm the workers have no step in common
    if getattr(opt, "order", "free") == "lock-step" or getattr(opt, "until_grad_norm", None) is not None:
        return AtEvents()
    return AtOnce(topology, signals) if opt.asynchronous else AtCommonStep(topology, signals, step)


# MPI reads and writes here until all have been asked, also where a run has ended in an error before that: it must not
# become anybody else's memory.
_unanswered: dict[int, tuple[np.ndarray, np.ndarray]] = {}


class AtEvents:
    """All stop at the next evaluation or checkpoint, where they meet anyway."""

    apart = True

    def due(self, step: int) -> bool:
        return False

    def free(self) -> None: ...


class AtOnce:
    """Each rank stops as soon as it hears of the signal, whatever its number of steps: asynchronous runs."""

    apart = True

    def __init__(self, topology: Topology, signals: Signals):
        self._bell, self._signals = Bell(topology.world), signals

    def due(self, step: int) -> bool:
        if self._signals.came:
            self._bell.ring()
        return self._bell.listen()

    def free(self) -> None:
        self._bell.free()


class AtCommonStep:
    """All stop after the same step, so that the run which goes on is the one that was never stopped.

    At some steps, the same ones on every rank, each asks all whether any of them was signalled, and goes on; the answer
    is taken at the next of these steps, and if it is yes all stop there. Nobody is held up: a rank waits only for
    others to have come to an earlier step than its own, and where workers keep step no rank needs another to go
    further than itself.
    """

    apart = False

    def __init__(self, topology: Topology, signals: Signals, step: int):
        self._comm, self._signals = topology.world.Dup(), signals
        self._own, self._all = (
            np.zeros(2),
            np.zeros(2),
        )  # whether signalled, seconds a step: the largest of all
        self._begin = self._last = step
        self._ask(np.inf)
        self._next = step + 1

    def due(self, step: int) -> bool:
        if step < self._next:
            return False
        self._take()
        signalled, slowest = self._all
        if signalled:
            return True
        gap = min(_LONGEST, (step - self._begin) // _SHARE, int(_SECONDS / slowest))
        self._ask((time.perf_counter() - self._asked) / (step - self._last))
        self._last, self._next = step, step + max(1, gap)
        return False

    def _ask(self, seconds: float) -> None:
        self._asked = time.perf_counter()
        self._own[:] = self._signals.came, max(seconds, 1e-9)
        self._request: MPI.Request | None = self._comm.Iallreduce(self._own, self._all, MPI.MAX)
        _unanswered[id(self._all)] = self._own, self._all

    def _take(self) -> None:
        if self._request is not None:
            self._request.Wait()
            self._request = None
            del _unanswered[id(self._all)]

    def free(self) -> None:
        self._take()  # all have asked the same questions
        self._comm.Free()

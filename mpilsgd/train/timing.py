"""What the time of a step goes into: by the host's clock, or where steps are queued by events in a GPU's stream."""

from __future__ import annotations

import collections
import contextlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch

from mpilsgd.comm import Topology, seconds
from mpilsgd.train import devices
from mpilsgd.train.progress import Progress


def timer_of(device: torch.device) -> HostTimer | StreamTimer:
    """The one that goes with the device of the model."""
    return StreamTimer(lambda: devices.event(timed=True)) if devices.queued(device) else HostTimer()


def level(timer: HostTimer | StreamTimer, at: Progress, topology: Topology, computes: bool) -> None:
    """Who came early has waited for the last one: training has lasted as long for all. Collective."""
    timer.read(at)
    waited = max(topology.allgather(at.wall)) - at.wall
    if computes:
        at.waited(waited)
    else:
        at.wall += waited


class HostTimer:
    """A step by the host's clock: `begin`, `loaded` (the batch), `computed` (the gradient), `fetched` (the next batch),
    `end`. What is neither data nor communication was computing.
    """

    _begun = _loaded = 0.0

    def begin(self) -> None:
        self._begun = seconds()

    def loaded(self) -> None:
        self._loaded = seconds()

    def computing(self) -> float:
        """Seconds since the batch was there, when the gradient is."""
        return seconds() - self._loaded

    def computed(self) -> None: ...

    def fetched(self) -> None: ...

    def end(self, at: Progress, comm: float, wait: float) -> None:
        """comm, wait: seconds of communication that the method measured in this step, and of waiting in them."""
        at.spent(seconds() - self._begun, self._loaded - self._begun, comm, wait)

    @contextlib.contextmanager
    def waiting(self, at: Progress) -> Iterator[None]:
        """Inside, this worker waits for others."""
        start = seconds()
        yield
        at.waited(seconds() - start)

    def read(self, at: Progress) -> None:
        """All that was measured so far is counted from here on."""


class StreamTimer:
    """As `HostTimer`, by events in the stream of a GPU, which are read when they have passed.

    The method's clock begins to count an exchange while the gradient may still be computed. What comes before the
    event behind the gradient is no communication here: of the method's seconds only those count that the stream took
    from there to the end of the step.

    make: gives an event, as `devices.event`.
    """

    def __init__(self, make: Callable[[], Any]):
        self._make = make
        self._marks: list[Any] = []  # of the step that is under way
        self._queue: collections.deque[tuple[list[Any], Callable[[list[float]], None]]] = collections.deque()

    def _mark(self) -> None:
        self._marks.append(self._make())
        self._marks[-1].record()

    def begin(self) -> None:
        self._marks = []
        self._mark()

    def loaded(self) -> None:
        self._mark()

    def computing(self) -> float:
        """As of `HostTimer`, and waits for the gradient: for ranks that are slow on purpose."""
        now = self._make()
        now.record()
        now.synchronize()
        return self._marks[-1].elapsed_time(now) / 1000

    def computed(self) -> None:
        self._mark()

    def fetched(self) -> None:
        self._mark()

    def end(self, at: Progress, comm: float, wait: float) -> None:
        self._mark()

        def count(seconds: list[float]) -> None:
            batch, _, fetch, step = seconds
            own = min(comm, step)
            at.spent(sum(seconds), batch + fetch, own, min(wait, own))

        self._queue.append((self._marks, count))
        while self._queue and self._queue[0][0][-1].query():
            self._count()

    @contextlib.contextmanager
    def waiting(self, at: Progress) -> Iterator[None]:
        """Inside, this worker waits for others: as long as the stream has nothing to do."""
        self._marks = []
        self._mark()
        yield
        self._mark()
        self._queue.append((self._marks, lambda seconds: at.waited(*seconds)))

    def read(self, at: Progress) -> None:
        """Waits for the stream."""
        if self._queue:
            self._queue[-1][0][-1].synchronize()
        while self._queue:
            self._count()

    def _count(self) -> None:
        marks, count = self._queue.popleft()
        count([a.elapsed_time(b) / 1000 for a, b in itertools.pairwise(marks)])

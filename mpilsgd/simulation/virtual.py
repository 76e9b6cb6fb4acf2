"""A baton under a virtual clock: of all that can go on, what comes first in time goes on first."""

from __future__ import annotations

import dataclasses
import heapq
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mpilsgd.comm.baton import Baton, Task
from mpilsgd.comm.mpi import here
from mpilsgd.simulation.network import Links, Network

_TICK = 1e-7  # seconds that a look at shared memory takes: loops that look must come to an end


class Died(RuntimeError):
    """A rank has died, and the job with it.

    Attributes: rank; seconds: when it died; ended: when the job did; simulated: what there was by then (`Simulated`).
    """

    simulated: Any = None

    def __init__(self, rank: int, seconds: float, ended: float):
        super().__init__(f"rank {rank} died at {seconds:g} s, and the job ended at {ended:g} s")
        self.rank, self.seconds, self.ended = rank, seconds, ended


@dataclasses.dataclass
class Spent:
    """Where a rank's seconds went."""

    compute: float = 0.0
    communication: float = 0.0
    waiting: float = 0.0


class Clock(Baton):
    """`now` is the time of all tasks. Whoever computes or moves bytes waits until that is done, so that whoever goes on
    does so in the order of time; among those who can at one time the seed chooses.

    Args:
        deaths: of ranks, and when. A dead rank stays where it is, in its turn, say, if it had one.
        notice: seconds after a death at which the job ends; it does so at once where nobody can go on.
    """

    def __init__(
        self, seed: int, network: Network, nodes: Sequence[int], deaths: Mapping[int, float], notice: float
    ):
        super().__init__(seed)
        self.links = Links(network, nodes, lambda: self.now, self._moment, lambda: self._choosing)
        self.costs = self.links
        self.spent = [Spent() for _ in nodes]
        self.dead: dict[int, float] = {}
        self._deaths = sorted((seconds, rank) for rank, seconds in deaths.items())
        self._notice = notice
        self._moments: list[float] = []
        self._looked_far: set[Task] = set()

    def _moment(self, end: float) -> float:
        """What somebody waits for may become true then, by itself."""
        if end > self.now:
            heapq.heappush(self._moments, end)
        return end

    # For the task that has it

    def wait(
        self,
        true: Callable[[], bool] | None,
        what: Callable[[], str] | None,
        alarm: float | None,
        begun: Callable[[], float] | None = None,
    ) -> None:
        start, task = self.now, here.task
        came = math.inf
        try:
            super().wait(true, what, alarm)
            came = self.now if begun is None else min(max(start, begun()), self.now)
            if task in self._looked_far:  # from another node: it learns of it a round trip later
                self._looked_far.discard(task)
                super().wait(None, None, self.now + 2 * self.links.network.latency)
        finally:
            end = self._end(task)
            self._spend("waiting", task, start, min(came, end))
            self._spend("communication", task, came, end)

    def give_way(self) -> None:
        self.reach(0.0)

    def reach(self, end: float) -> None:
        if not self._choosing:
            self._take("communication", max(end, self.now + _TICK))

    def reads(self, nbytes: int) -> None:
        if nbytes:
            self.reach(self.links.reads(here.rank.number, nbytes))  # type: ignore[attr-defined]

    def computes(self, seconds: float) -> None:
        """So long."""
        self._take("compute", self.now + seconds)

    def _take(self, name: str, end: float) -> None:
        start, task = self.now, here.task
        try:
            super().wait(None, None, end)
        finally:
            self._spend(name, task, start, self._end(task))

    def _end(self, task: Task) -> float:
        """The time, or that of its death."""
        return min(self.now, self.dead.get(task.rank.number, math.inf))  # type: ignore[attr-defined]

    def _spend(self, name: str, task: Task, start: float, end: float) -> None:
        """Counts what the first task of a rank does; its helpers work behind it."""
        spent = self.spent[task.rank.number]  # type: ignore[attr-defined]
        if end > start and not task.serves:
            setattr(spent, name, getattr(spent, name) + end - start)

    def seconds(self) -> float:
        return self.now

    def take(self, task: Task) -> None:
        super().take(task)
        task.rank.since = time.thread_time()  # type: ignore[attr-defined]

    # Who goes on

    def _choose(self, task: Task) -> Task:
        self._choosing = True
        try:
            while True:
                self.passed += 1
                self._bury()
                if self.failure is not None:
                    return task
                chosen = self._first()
                if chosen is not None:
                    return chosen
                self._move_on()
        finally:
            self._choosing = False

    def _living(self) -> list[Task]:
        return [one for one in self.tasks if one.rank.number not in self.dead]  # type: ignore[attr-defined]

    def _first(self) -> Task | None:
        """One of those who can go on now."""
        living = self._living()
        first = self.random.randrange(len(living)) if living else 0
        for one in living[first:] + living[:first]:
            self.links.looked_far = False
            if one.can_go_on(self.now):
                if self.links.looked_far:
                    self._looked_far.add(one)
                return one
        return None

    def _move_on(self) -> None:
        """To the next time at which anybody may go on."""
        while self._moments and self._moments[0] <= self.now:
            heapq.heappop(self._moments)
        coming = [one.alarm for one in self._living() if one.alarm is not None and one.alarm > self.now]
        coming += self._moments[:1]
        if coming:
            self.now = min(*coming, self._next_death())
        else:
            self.failure = self._died() if self.dead else self._deadlock()

    # The dead

    def _next_death(self) -> float:
        """When a rank dies, or a death is noticed."""
        dies = self._deaths[0][0] if self._deaths else math.inf
        return min([dies, *(seconds + self._notice for seconds in self.dead.values())])

    def _bury(self) -> None:
        while self._deaths and self._deaths[0][0] <= self.now:
            seconds, rank = self._deaths.pop(0)
            if any(one.rank.number == rank and not one.serves for one in self.tasks):  # type: ignore[attr-defined]
                self.dead[rank] = seconds  # else its program has ended before
        if self.failure is None and any(self.now >= seconds + self._notice for seconds in self.dead.values()):
            self.failure = self._died()

    def _died(self) -> Died:
        rank = min(self.dead, key=self.dead.__getitem__)
        return Died(rank, self.dead[rank], self.now)

    def fail(self, name: str, error: BaseException) -> None:
        super().fail(name, error)
        if self.dead and not isinstance(self.failure, Died) and self.failure is not None:
            cause = self.failure.__cause__
            self.failure = self._died()
            self.failure.__cause__ = cause

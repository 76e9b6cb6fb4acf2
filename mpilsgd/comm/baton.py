"""Tasks that pass one baton: exactly one runs, and a seed decides who goes on.

A task gives the baton away where it waits for others, and at some of the points where others could do something that
it would see. All that is waited for are conditions that what somebody else does makes true, so that where none is true
nobody can ever go on: a deadlock is known at once, and what each waits in.
"""

from __future__ import annotations

import math
import random
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from mpilsgd.comm.costs import Costs
from mpilsgd.comm.mpi import Rank, here
from mpilsgd.comm.randomness import Generators

_TICK = 1e-4  # seconds that the tasks' clock counts from one point to the next
_STAY = 0.5  # how often a task keeps the baton where it need not wait
_SPREAD = 1.5  # of the logarithm of the tasks' speeds
_GRACE = 10.0  # seconds that an interrupted run waits for a task that computes
_PACKAGE = str(Path(__file__).parent.parent)
_OWN = {
    str(Path(__file__).with_name(name))
    for name in ("baton.py", "inprocess.py", "tasks.py", "task_requests.py", "task_windows.py", "waiting.py")
}


class Deadlock(RuntimeError):
    """Every worker waits for another one."""


class WorkerFailed(RuntimeError):
    """What one worker raised (the cause), which ended them all."""


class Ended(BaseException):
    """Another worker has failed: no `except Exception` shall go on after it."""


class Task:
    """A thread that runs while it has the baton.

    Attributes: rank: whose; serves: it only does what the rank's other one gives it, and need not come to an end; true:
    what it waits for; alarm: the time at which that may come true by itself; what: its words.
    """

    def __init__(self, baton: Baton, rank: Rank, name: str, do: Callable[[], Any], serves: bool = False):
        self.baton, self.rank, self.name, self.serves = baton, rank, name, serves
        self.speed = math.exp(baton.random.uniform(-_SPREAD, _SPREAD))
        self.true: Callable[[], bool] | None = None
        self.alarm: float | None = None
        self.what: Callable[[], str] | None = None
        self.error: BaseException | None = None  # what `true` raised
        self.result: Any = None
        self.turn = threading.Semaphore(0)
        self._do = do
        self.thread = threading.Thread(target=self._run, name=name, daemon=True)
        baton.tasks.append(self)
        self.thread.start()

    def _run(self) -> None:
        here.rank, here.task = self.rank, self
        self.turn.acquire()
        try:
            self.baton.take(self)
            self.result = self._do()
        except BaseException as error:
            self.baton.fail(self.name, error)
        self._do = self.true = self.what = self.error = None  # type: ignore[assignment]
        self.baton.leave(self)

    def helper(self, work: Callable[[], None], name: str) -> threading.Thread:
        """A thread of the same rank."""
        return Task(self.baton, self.rank, f"{self.name} ({name})", work, serves=True).thread

    def can_go_on(self, now: float) -> bool:
        try:
            return self.true() if self.true is not None else self.alarm is None or now >= self.alarm
        except BaseException as error:
            self.error = error
            return True

    def text(self) -> str:
        """What it waits in, and where."""
        frames = _frames(self.thread)
        own = [frame for frame in frames if _is_inside(frame)]
        calls = list(dict.fromkeys(_call(frame) for frame in (own[:1] + own[-1:])))
        what = "" if self.what is None else f": {self.what()}"
        stack = "".join(traceback.StackSummary.extract(((f, f.f_lineno) for f in frames), limit=-20).format())
        return f"{self.name} waits in {' > '.join(calls) or 'its program'}{what}\n{stack}"


class Baton:
    """Of the tasks that run together. seed: of the order."""

    costs = Costs()

    def __init__(self, seed: int):
        self.random = random.Random(seed)
        self.tasks: list[Task] = []  # those that have not ended
        self.failure: BaseException | None = None
        self.now = 0.0  # seconds of the tasks' clock
        self.passed = 0  # points that were passed
        self.holder: Task | None = None
        self.over = threading.Event()
        self._choosing = False
        self._generators: dict[Rank, Generators] = {}
        self._last: Rank | None = None  # whose random numbers are in place

    # For the task that has it

    def wait(
        self,
        true: Callable[[], bool] | None,
        what: Callable[[], str] | None,
        alarm: float | None,
        begun: Callable[[], float] | None = None,
    ) -> None:
        """Returns when it is true, which it may become by itself at the alarm; None: at the alarm.

        begun: when the transfer began that is waited for.
        """
        if self._choosing:
            raise RuntimeError("a condition that is waited for must not wait itself")
        task = here.task
        task.true, task.what, task.alarm = true, what, alarm
        self._pass(task)

    def give_way(self) -> None:
        """Another task may go on here."""
        if self._choosing:  # this is a look at what somebody waits for
            return
        self._count()
        if self.failure is not None or self.random.random() >= _STAY:
            self._pass(here.task)

    def seconds(self) -> float:
        """What time is measured by."""
        return time.perf_counter()

    def reach(self, end: float) -> None:
        """Waits for the end of its own transfer, which `costs` told."""
        self.give_way()

    def reads(self, nbytes: int) -> None:
        """It reads so many bytes of others' memory."""

    def _pass(self, task: Task) -> None:
        chosen = self._choose(task)
        if chosen is not task:
            self.holder = chosen
            chosen.turn.release()
            task.turn.acquire()
        self.take(task)

    def take(self, task: Task) -> None:
        """The task goes on, with its rank's random numbers."""
        if self._last is not task.rank:
            if self._last is not None:
                self._generators[self._last].keep()
            self._generators[task.rank].put()
            self._last = task.rank
        error, task.true, task.what, task.alarm, task.error = task.error, None, None, None, None
        if self.failure is not None:
            raise Deadlock(*self.failure.args) if isinstance(self.failure, Deadlock) else Ended()
        if error is not None:
            raise error

    def leave(self, task: Task) -> None:
        """It has come to its end."""
        self.tasks.remove(task)
        if all(other.serves for other in self.tasks):
            self.failure = self.failure or Ended()
        if self.tasks:
            self.holder = self._choose(self.tasks[0])
            self.holder.turn.release()
        else:
            self.over.set()

    def fail(self, name: str, error: BaseException) -> None:
        if self.failure is None:
            self.failure = WorkerFailed(f"{name} failed: {type(error).__name__}: {error}")
            self.failure.__cause__ = error

    def _count(self) -> None:
        self.passed += 1
        self.now += _TICK

    def _choose(self, task: Task) -> Task:
        """Who goes on: the first of those who can, in an order by chance in which quick tasks come early."""
        if self.failure is not None:
            return task
        self._count()
        order = sorted(self.tasks, key=lambda t: self.random.expovariate(t.speed))
        self._choosing = True
        try:
            while True:
                for one in order:
                    if one.can_go_on(self.now):
                        return one
                alarms = [one.alarm for one in order if one.alarm is not None and one.alarm > self.now]
                if not alarms:
                    break
                self.now = min(alarms) + _TICK
        finally:
            self._choosing = False
        self.failure = self._deadlock()
        return task

    def _deadlock(self) -> BaseException:
        texts = [one.text() for one in self.tasks if one.what is not None or not one.serves]
        return Deadlock("\n".join(["no worker can go on:", *texts]))

    # For who runs them

    def run(self, ranks: Sequence[Rank], work: Callable[[], Any], patience: float) -> list[Any]:
        """What `work` gives as a task of each rank."""
        before = Generators(None)
        try:
            for number, rank in enumerate(ranks):  # the same in every order
                self._generators[rank] = Generators(number)
            tasks = [Task(self, rank, str(rank), work) for rank in ranks]
            self.holder = self._choose(tasks[0])
            self.holder.turn.release()
            self._watch(patience)
        finally:
            before.put()
        if self.failure is not None and not isinstance(self.failure, Ended):
            raise self.failure
        return [task.result for task in tasks]

    def _watch(self, patience: float) -> None:
        """Until all have ended; says it once if who has the baton does not pass it on."""
        passed, since, told = -1, time.monotonic(), False
        try:
            while not self.over.wait(min(1.0, patience / 4)):
                if self.passed != passed:
                    passed, since, told = self.passed, time.monotonic(), False
                elif not told and time.monotonic() - since > patience and len(self.tasks) > 1:
                    told = True
                    warnings.warn(self._standing(patience), RuntimeWarning, stacklevel=4)
        except BaseException:
            self.failure = self.failure or Ended()
            self.over.wait(_GRACE)
            raise

    def _standing(self, patience: float) -> str:
        holder = self.holder
        assert holder is not None
        others = ", ".join(task.name for task in self.tasks if task is not holder and not task.serves)
        stack = "".join(traceback.format_list(traceback.extract_stack(_frames(holder.thread)[-1], limit=20)))
        return (
            f"{holder.name} has gone on alone for {patience:g} s, and {others} cannot go on, as one of them runs at "
            f"a time: it blocks or computes at\n{stack}"
        )


def _frames(thread: threading.Thread) -> list[FrameType]:
    """Those of a thread, outermost first, without what makes it wait."""
    frame = sys._current_frames().get(thread.ident or 0)
    found: list[FrameType] = []
    while frame is not None:
        found.append(frame)
        frame = frame.f_back
    while found and found[0].f_code.co_filename in {*_OWN, threading.__file__}:
        found.pop(0)
    found.reverse()
    while len(found) > 1 and found[0].f_code.co_filename in {*_OWN, threading.__file__}:
        found.pop(0)
    return found


def _is_inside(frame: FrameType) -> bool:
    return frame.f_code.co_filename.startswith(_PACKAGE)


def _call(frame: FrameType) -> str:
    owner = frame.f_locals.get("self")
    return f"{type(owner).__name__}.{frame.f_code.co_name}" if owner is not None else frame.f_code.co_name

"""The course of an asynchronous run: whose turn it is, how many steps were taken, what is recorded or repeated."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

from mpilsgd import sealed
from mpilsgd.comm import Counter, Progress, Topology, progresses_alone, thread_problem
from mpilsgd.fields import choice, fields_of, path
from mpilsgd.transport import Fabric

if TYPE_CHECKING:
    from mpilsgd.exchange.method import Method

FORMAT = 3
BEYOND = "this run goes on beyond the recorded one: it has taken other steps"


class _Ordered:
    order: str = choice(
        "free",
        "round-robin",
        help="order of the workers' exchanges in an asynchronous run: free (as it comes) or round-robin (worker 0's "
        "step, then worker 1's, ...), the same every time",
    )
    record: str | None = path(help="file for the order of events of an asynchronous run, to replay it")
    replay: str | None = path(
        help="file that record wrote: the same run again, bit for bit, with the same other options"
    )


COURSE = fields_of(_Ordered)  # what every asynchronous method has


def course_problems(m: Method) -> list[str]:
    """What is wrong with the settings about order, taken together."""
    found = []
    if m.record is not None and m.replay is not None:
        found.append("record and replay exclude each other: a replayed run has its recording already")
    for name in ("record", "replay"):
        if getattr(m, name) is not None and m.order == "round-robin":
            found.append(f'{name} is for runs of order="free"; round robin is the same every time')
    if not m.asynchronous:
        given = {"order": m.order != "free", "record": m.record is not None, "replay": m.replay is not None}
        named = [name for name, there in given.items() if there]
        if named:
            found.append(f"{', '.join(named)} only with asynchronous=True")
    return found


class Course:
    """What the workers of one asynchronous method do when.

    Args:
        order: "free" (as it comes) or "round-robin" (worker 0's whole step, then worker 1's, ...).
        record: the file to which rank 0 writes the order of events of a free run, at the end.
        replay: such a file, whose run is to be repeated.
        about: what must be equal for a replay: method, settings, number of workers, model.

    Collective, as are `open` and `finish`. Raises: ValueError on every rank if the replay cannot be used.
    """

    def __init__(
        self,
        topology: Topology,
        order: str,
        record: str | os.PathLike[str] | None,
        replay: str | os.PathLike[str] | None,
        about: dict[str, Any],
    ):
        self._topology = topology
        settings = {key: value for key, value in about["settings"].items() if not key.startswith("order,")}
        self._about = json.loads(json.dumps({**about, "settings": settings}, default=str))
        self._record = record
        self.round_robin = order == "round-robin"
        self._reached: dict[str, int] = {}
        self._events: list[Any] = []
        self._script: dict[str, Any] | None = None
        if replay is not None:
            self._script = self._read(replay)
        if record is not None:
            self._check_writable(record)
        self._meetings: list[Any] = []
        self._next = self._counted = self._last_total = 0
        self.workers = topology.world.size
        self._counter: Counter | None = None
        self._progress: Progress | None = None

    def open(self, fabric: Fabric, every: int | None = None) -> None:
        """Begins to count, and to serve other nodes' one-sided operations where MPI does not by itself.

        every: a total of steps whose multiples all workers shall learn of at once.
        """
        world = fabric.world
        if not progresses_alone(world.comm, world.channel.heads_ranks):
            self._topology.agree(thread_problem())
            self._progress = Progress(world.comm)
        if not self.round_robin and not self.replays:
            self._counter = Counter(fabric.world, every)

    @property
    def replays(self) -> bool:
        return self._script is not None

    # Steps

    def count(self, t: int) -> None:
        """This worker has taken its t-th step."""
        if self._counter is not None:
            self._counter.add()
        self._counted = t

    def load(self, t: int) -> None:
        """This worker is where it was after t steps: a state was loaded. Collective."""
        if self._counter is not None:
            self._counter.shift(t - self._counted)
        self._reached, self._counted = {}, t

    def total(self, near: int | None = None) -> int:
        """The steps of all workers, as far as they are known here; known better close to `near`."""
        if self._counter is not None:
            self._last_total = self._counter.read(near)
        return self._last_total

    def reached(self, total: int, t: int) -> bool:
        """As `Method.reached`, for this worker's clock t."""
        key = str(total)
        if self._script is not None:
            last = self._script["meetings"][-1][1]
            if t > last:
                raise RuntimeError(f"{BEYOND} (which ended after {last} steps of this worker)")
            return key in self._script["reached"] and t >= self._script["reached"][key]
        if self.round_robin:
            return t * self.workers >= total
        if key in self._reached:
            return True
        if self.total(total) < total:
            return False
        self._reached[key] = t
        return True

    # Events: anything JSON can hold

    def note(self, event: Any) -> None:
        """Records what this worker has done."""
        if self._record is not None:
            self._events.append(event)

    def upcoming(self) -> Any:
        """What this worker does next in the replayed run; None where it is free, or where nothing is left."""
        events = [] if self._script is None else self._script["events"]
        return events[self._next] if self._next < len(events) else None

    def repeat(self) -> Any:
        """Takes the next event of the replayed run; None in a run that is not one."""
        if self._script is None:
            return None
        event = self.upcoming()
        if event is None:
            raise RuntimeError(BEYOND)
        self._next += 1
        return event

    def script_of(self, rank: int) -> list[Any]:
        """All events of a worker in the replayed run."""
        assert self._script is not None
        return list(self._script["all"][rank])

    def meet(self, purpose: str, t: int) -> None:
        """This worker is about to meet all others, for its centre or its end: what it would wait for in vain if a
        replay took another way than its recording.
        """
        if self._counter is not None:
            self._counter.hand_on(True)  # this worker may count no more
        now = [purpose, t, self._next if self.replays else len(self._events)]
        self._meetings.append(now)
        if self._script is not None:
            recorded = self._script["meetings"]
            k = len(self._meetings) - 1
            if k >= len(recorded) or recorded[k] != now:
                then = recorded[k] if k < len(recorded) else None
                raise RuntimeError(
                    "the replay is not the recorded run: (purpose, steps, exchanges) at its meeting "
                    f"{k} are {now} and were {then}"
                )

    # Files

    def finish(self) -> None:
        """The run is over: writes the recording."""
        if self._record is not None:
            row = {"reached": self._reached, "events": self._events, "meetings": self._meetings}
            rows = self._topology.gather(row)
            error = None
            if rows is not None:
                try:
                    temporary = f"{os.fspath(self._record)}.{os.getpid()}"
                    with open(temporary, "w") as file:
                        file.write(
                            sealed.text({"mpilsgd recording": FORMAT, "of": self._about, "ranks": rows})
                        )
                    os.replace(temporary, self._record)
                except OSError as problem:
                    error = f"the recording could not be written: {problem}"
            self._topology.agree(error)

    def free(self) -> None:
        if self._progress is not None:
            self._progress.free()
        if self._counter is not None:
            self.total()
            self._counter.free()
            self._counter = None

    def _check_writable(self, path: str | os.PathLike[str]) -> None:
        folder = os.path.dirname(os.path.abspath(path))
        fits = os.path.isdir(folder) and os.access(folder, os.W_OK)
        fits = fits and not os.path.isdir(path) and bool(os.fspath(path))
        first = self._topology.world.rank == 0  # who writes
        wrong = f"record={os.fspath(path)!r}: no file can be written there (does its folder exist?)"
        self._topology.agree(wrong if first and not fits else None)

    def _read(self, path: str | os.PathLike[str]) -> dict[str, Any]:
        error, found = None, None
        if self._topology.world.rank == 0:
            try:
                with open(path, "rb") as file:
                    found = sealed.content(file.read())
                if found["mpilsgd recording"] != FORMAT:
                    raise ValueError(f"of format {found['mpilsgd recording']}, this version reads {FORMAT}")
                if found["of"] != self._about:
                    raise ValueError(_difference(found["of"], self._about))
            except FileNotFoundError:
                error = f"replay={os.fspath(path)}: there is no such file"
            except (sealed.Foreign, KeyError):
                error = f"replay={os.fspath(path)}: it is not a recording"
            except (OSError, ValueError) as problem:
                error = f"replay={os.fspath(path)}: {problem}"
        error = self._topology.broadcast(error)
        self._topology.agree(error)
        found = self._topology.broadcast(found)
        ranks = found["ranks"]
        return {**ranks[self._topology.world.rank], "all": [row["events"] for row in ranks]}


def _difference(recorded: dict[str, Any], now: dict[str, Any]) -> str:
    """The first thing that is not the same, settings one by one."""
    for key in ("method", "workers", "settings", *sorted({*recorded, *now})):
        then, here = recorded.get(key), now.get(key)
        if isinstance(then, dict) and isinstance(here, dict):
            wrong = [
                f"{k} was {then.get(k)!r} and is {here.get(k)!r}" for k in here if then.get(k) != here[k]
            ]
            if wrong:
                return "the recording of another run: " + "; ".join(wrong)
        elif then != here:
            return f"the recording of another run: {key} was {then!r} and is {here!r}"
    return "the recording of another run"

"""What all workers do together at certain steps: evaluations and checkpoints."""

from __future__ import annotations

from typing import NamedTuple

from mpilsgd.train.config import parse_every


class Event(NamedTuple):
    """What all workers do together once they have taken `step` steps on the mean."""

    step: int
    what: str  # "evaluate" or "save", in this order at one step


def steps_of(every: float | str | None, batches: int) -> int:
    """An interval of the configuration in steps; 0 for none."""
    interval = parse_every(every)
    if interval is None:
        return 0
    number, unit = interval
    return int(number) if unit == "steps" else max(1, round(number * batches))


def events_between(start: int, end: int, evaluations: int, saves: int) -> list[Event]:
    """The evaluations and checkpoints after `start` and before `end`, by their intervals (0: none)."""
    events = [
        Event(step, what)
        for what, interval in (("evaluate", evaluations), ("save", saves))
        if interval
        for step in range(start // interval * interval + interval, end, interval)
    ]
    return sorted(events)

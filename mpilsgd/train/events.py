"""What all workers do together at certain steps: evaluations and checkpoints."""

from __future__ import annotations

import math
import re
from typing import NamedTuple


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


def parse_every(value: float | str | None) -> tuple[float, str] | None:
    """An interval: "2" or "0.5" are epochs, "200 steps" are steps."""
    if value is None:
        return None
    found = re.fullmatch(r"\s*([0-9.]+(?:e-?[0-9]+)?)\s*(epochs?|steps?)?\s*", str(value))
    try:
        number = float(found[1]) if found else 0.0
    except ValueError:
        number = 0.0
    unit = "steps" if found and (found[2] or "").startswith("step") else "epochs"
    if number <= 0 or not math.isfinite(number) or (unit == "steps" and number % 1):
        raise ValueError(f"must be a number of epochs above 0 or 'N steps', not {value!r}")
    return number, unit

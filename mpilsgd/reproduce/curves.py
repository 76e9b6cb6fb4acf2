"""What the papers state of training curves, checked on runs.

A check says what it found and whether the statement holds, or, as a text, why that cannot be judged.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from mpilsgd.reproduce.training import Found
from mpilsgd.train.judged import ERROR
from mpilsgd.train.judged import Figure as Judged

if TYPE_CHECKING:
    from mpilsgd.train.run_reader import Run

Check = Callable[[Found], tuple[str, "bool | str"]]

GUESS, LEARNS = 0.9, 0.85  # the test error of a guess among ten classes, and of who has begun to learn
TOO_FEW = "too few passes"


def lowest(run: Run, of: Judged = ERROR) -> float:
    """The least value of a curve; infinite where it has none."""
    values = run.curve("wall_s", of.key)[1]
    values = values[np.isfinite(values)]
    return float(values.min()) if values.size else np.inf


def diverged(run: Run) -> bool:
    """It ended early, without a summary."""
    return not run.summary


def seconds_to(run: Run, level: float) -> float:
    """When the test error first comes down to the level; straight lines between evaluations, and from a guess at 0."""
    seconds, errors = run.curve("wall_s", ERROR.key)
    seconds, errors = np.append(0.0, seconds), np.append(GUESS, errors)
    for k in range(1, len(errors)):
        if errors[k] <= level:
            before = max(errors[k - 1], level) if np.isfinite(errors[k - 1]) else level
            share = (before - level) / (before - errors[k]) if before > errors[k] else 0.0
            return float(seconds[k - 1] + share * (seconds[k] - seconds[k - 1]))
    return np.inf


def fastest(first: str, *others: str) -> Check:
    """It comes sooner than each of the others to the error that both reach; who does not learn comes never."""

    def check(found: Found) -> tuple[str, bool | str]:
        if lowest(found[first]) >= LEARNS:
            return _values(found, (first,)), TOO_FEW
        told, holds = [], []
        for name in others:
            both = [error for error in map(lowest, (found[first], found[name])) if error < LEARNS]
            here, there = (seconds_to(found[one], max(both)) for one in (first, name))
            told.append(f"to {100 * max(both):.1f} %: {_seconds(here)}, {name} {_seconds(there)}")
            holds.append(here < there)
        return "; ".join(told), all(holds)

    return check


def best(first: str, *others: str) -> Check:
    """It has the lowest error."""
    return _of_errors((first, *others), lambda least: all(least[0] < other for other in least[1:]))


def rising(*names: str, of: Judged = ERROR) -> Check:
    """The lowest error (or loss) grows from each to the next."""
    return _of_errors(names, lambda least: all(a < b for a, b in pairwise(least)), of)


def alike(*names: str, within: float = 0.1) -> Check:
    """Their lowest errors are within a tenth of each other. A run of fewer than three rounds says nothing."""

    def check(found: Found) -> tuple[str, bool | str]:
        few = [name for name in names if found[name].total("rounds") < 3 and found[name].world_size > 1]
        told, holds = _of_errors(names, lambda least: max(least) <= (1 + within) * min(least))(found)
        return told, f"{TOO_FEW} for {', '.join(few)}" if few else holds

    return check


def trapped(beside: str, *names: str) -> Check:
    """Each stays at 1.5 times the lowest error of another, or diverges."""

    def check(found: Found) -> tuple[str, bool | str]:
        if lowest(found[beside]) >= LEARNS:
            return _values(found, (beside, *names)), TOO_FEW
        high = 1.5 * lowest(found[beside])
        return _values(found, (beside, *names)), all(
            diverged(found[name]) or lowest(found[name]) > high for name in names
        )

    return check


def keeps_up(beside: str, *names: str) -> Check:
    """None of them does."""
    each = [trapped(beside, name) for name in names]

    def check(found: Found) -> tuple[str, bool | str]:
        told, verdicts = _values(found, (beside, *names)), [one(found)[1] for one in each]
        return told, TOO_FEW if TOO_FEW in verdicts else not any(verdicts)

    return check


def speed_up(slow: str, fast: str, low: float, high: float, goal: float | None = None) -> Check:
    """How many times as long one takes to an error: the one that both reach, if none is given."""

    def check(found: Found) -> tuple[str, bool | str]:
        at = max(lowest(found[slow]), lowest(found[fast])) if goal is None else goal
        both = seconds_to(found[slow], at), seconds_to(found[fast], at)
        if at >= LEARNS or not np.isfinite(both).all():
            return _values(found, (slow, fast)), TOO_FEW
        ratio = both[0] / both[1]
        return f"{ratio:.2f} (to {100 * at:.1f} %)", low <= ratio <= high

    return check


def error(name: str, paper: float, within: float = 0.1) -> Check:
    """The lowest error is the paper's, in percent."""
    return _of_errors((name,), lambda least: abs(100 * least[0] - paper) <= within * paper)


def diverges(name: str) -> Check:
    """Whether this one does: one of several."""

    def check(found: Found) -> tuple[str, bool | str]:
        return "it diverges" if diverged(found[name]) else "it does not", "one seed; the paper has six"

    return check


def communicates(name: str, paper: float, steps: int = 400) -> Check:
    """Seconds of communication in so many steps; within a half, or a second."""

    def check(found: Found) -> tuple[str, bool | str]:
        run = found[name]
        here = steps * float(np.mean(run.seconds()["comm"])) / max(run.last("step"), 1)
        return f"{here:.2g}", abs(here - paper) <= max(1.0, 0.5 * paper)

    return check


def all_lead(name: str, workers: int) -> Check:
    """Every worker leads at some time."""

    def check(found: Found) -> tuple[str, bool | str]:
        ranks = [rank for _, rank in found[name].elections(0)]
        times = [ranks.count(rank) for rank in range(workers)]
        return ", ".join(map(str, times)) + " times", all(times)

    return check


def both(*checks: Check) -> Check:
    """All of them hold."""

    def check(found: Found) -> tuple[str, bool | str]:
        told, verdicts = zip(*(one(found) for one in checks), strict=True)
        unknown = [verdict for verdict in verdicts if isinstance(verdict, str)]
        return "; ".join(told), unknown[0] if unknown else all(verdicts)

    return check


def _of_errors(names: Sequence[str], holds: Callable[[list[float]], bool], of: Judged = ERROR) -> Check:
    def check(found: Found) -> tuple[str, bool | str]:
        least = [lowest(found[name], of) for name in names]
        told = _values(found, names, of)
        return told, TOO_FEW if min(least) >= (LEARNS if of is ERROR else np.inf) else holds(least)

    return check


def _seconds(value: float) -> str:
    return f"{value:.3g} s" if np.isfinite(value) else "never"


def _values(found: Found, names: Sequence[str], of: Judged = ERROR) -> str:
    """The lowest value of each, and who diverged."""
    least = {name: lowest(found[name], of) for name in names}
    return ", ".join(
        f"{name} {of.text(value) if np.isfinite(value) else '-'}{', then diverges' * diverged(found[name])}"
        for name, value in least.items()
    )

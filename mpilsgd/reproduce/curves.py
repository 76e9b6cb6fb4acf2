"""What the papers state of training curves, checked on runs: each check says what it found and whether that holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from mpilsgd.reproduce.training import Found
from mpilsgd.train.judged import ERROR
from mpilsgd.train.judged import Figure as Judged

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from mpilsgd.train.run_reader import Run

Check = Callable[[Found], tuple[str, bool]]

LEARNS = 0.85  # a test error that is below this; guessing one of ten classes gives 0.9


def lowest(run: Run, of: Judged = ERROR) -> float:
    """The least value of a curve; infinite where it has none."""
    values = run.curve("wall_s", of.key)[1]
    values = values[np.isfinite(values)]
    return float(values.min()) if values.size else np.inf


def seconds_to(run: Run, level: float) -> float:
    """When the test error first comes down to the level; straight lines between evaluations."""
    seconds, errors = run.curve("wall_s", ERROR.key)
    for k, error in enumerate(errors):
        if error <= level:
            if not k or not errors[k - 1] > level:
                return float(seconds[k])
            share = (errors[k - 1] - level) / (errors[k - 1] - error)
            return float(seconds[k - 1] + share * (seconds[k] - seconds[k - 1]))
    return np.inf


def level(runs: Sequence[Run]) -> float:
    """The test error that all of them have reached which learn at all: the highest of their lowest ones."""
    return max((error for error in map(lowest, runs) if error < LEARNS), default=np.nan)


def fastest(first: str, *others: str) -> Check:
    """It comes sooner than each of the others to the error that both reach."""

    def check(found: Found) -> tuple[str, bool]:
        told, holds = [], []
        for name in others:
            goal = level([found[first], found[name]])
            here, there = (seconds_to(found[one], goal) for one in (first, name))
            told.append(f"to {100 * goal:.1f} %: {_seconds(here)}, {name} {_seconds(there)}")
            holds.append(here < there)
        return "; ".join(told), all(holds)

    return check


def best(first: str, *others: str, of: Judged = ERROR) -> Check:
    """It has the lowest error (or loss)."""

    def check(found: Found) -> tuple[str, bool]:
        least = {name: lowest(found[name], of) for name in (first, *others)}
        return _values(least, of), all(least[first] < least[name] for name in others)

    return check


def rising(*names: str, of: Judged = ERROR) -> Check:
    """The lowest error grows from each to the next."""

    def check(found: Found) -> tuple[str, bool]:
        least = {name: lowest(found[name], of) for name in names}
        return _values(least, of), all(a < b for a, b in pairwise(least.values()))

    return check


def alike(*names: str, within: float = 0.1) -> Check:
    """Their lowest errors are within a tenth of each other."""

    def check(found: Found) -> tuple[str, bool]:
        least = {name: lowest(found[name]) for name in names}
        return _values(least), max(least.values()) <= (1 + within) * min(least.values())

    return check


def trapped(beside: str, *names: str) -> Check:
    """Each stays at 1.5 times the lowest error of another, or diverges."""
    return _against(beside, names, lambda error, other: error > 1.5 * other)


def keeps_up(beside: str, *names: str) -> Check:
    """None does."""
    return _against(beside, names, lambda error, other: error <= 1.5 * other)


def _against(beside: str, names: Sequence[str], holds: Callable[[float, float], bool]) -> Check:
    def check(found: Found) -> tuple[str, bool]:
        least = {name: lowest(found[name]) for name in (beside, *names)}
        return _values(least), all(holds(least[name], least[beside]) for name in names)

    return check


def speed_up(slow: str, fast: str, paper: float, goal: float | None = None, within: float = 0.3) -> Check:
    """How many times as long one takes to an error (the one that both reach, if none is given)."""

    def check(found: Found) -> tuple[str, bool]:
        at = level([found[slow], found[fast]]) if goal is None else goal
        both = seconds_to(found[slow], at), seconds_to(found[fast], at)
        if not np.isfinite(both).all():
            return f"{100 * at:.0f} % not reached by both", False
        ratio = both[0] / both[1]
        return f"{ratio:.2f} (to {100 * at:.1f} %)", abs(ratio - paper) <= within * paper

    return check


def error(name: str, paper: float, within: float = 0.1) -> Check:
    """The lowest error is the paper's, in percent."""

    def check(found: Found) -> tuple[str, bool]:
        here = 100 * lowest(found[name])
        return f"{here:.2f}", abs(here - paper) <= within * paper

    return check


def parts(name: str, paper: tuple[float, float, float], steps: int = 400) -> Check:
    """Seconds of computing, loading and communication in so many steps; the last is within a half, or a second."""

    def check(found: Found) -> tuple[str, bool]:
        run = found[name]
        share = steps / max(run.last("step"), 1)
        here = [share * float(np.mean(seconds)) for seconds in run.seconds().values()]
        return " / ".join(f"{value:.2g}" for value in here), abs(here[2] - paper[2]) <= max(
            1.0, 0.5 * paper[2]
        )

    return check


def all_lead(name: str) -> Check:
    """Every worker leads at some time."""

    def check(found: Found) -> tuple[str, bool]:
        led = found[name].leads()[0]
        return ", ".join(f"{times}" for times in led) + " times", all(led)

    return check


def both(*checks: Check) -> Check:
    """All of them hold."""

    def check(found: Found) -> tuple[str, bool]:
        told, holds = zip(*(one(found) for one in checks), strict=True)
        return "; ".join(told), all(holds)

    return check


def _seconds(value: float) -> str:
    return f"{value:.3g} s" if np.isfinite(value) else "never"


def _values(least: Mapping[str, float], of: Judged = ERROR) -> str:
    return ", ".join(
        f"{name} {of.text(value) if np.isfinite(value) else 'diverges'}" for name, value in least.items()
    )


def draw(figure: Figure, found: Found, of: Judged) -> None:
    """The curves over seconds of the virtual clock, and over gradient evaluations."""
    from matplotlib.ticker import EngFormatter

    from mpilsgd.train.figure_style import legend_above, line_styles, scale_y

    runs = list(found.values())
    axes = figure.subplots(1, 2, sharey=True)
    columns = {"wall_s": "seconds on the cluster", "grad_evals": "gradient evaluations, all workers"}
    handles = []
    for axis, (x, label) in zip(axes, columns.items(), strict=True):
        curves = [run.curve(x, of.key) for run in runs]
        handles = [
            axis.plot(xs, of.scale * ys, **style)[0]
            for (xs, ys), style in zip(curves, line_styles(runs), strict=True)
        ]
        axis.set(xlabel=label, xlim=(0, None))
        axis.grid(linewidth=0.6)
    axes[1].xaxis.set_major_formatter(EngFormatter(sep=""))
    axes[0].set_ylabel(f"{of.label}, centre")
    scale_y(list(axes), of.scale * np.concatenate([run.curve("step", of.key)[1] for run in runs]))
    legend_above(figure, handles, list(found))

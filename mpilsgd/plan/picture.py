"""The picture of `mpilsgd plan`: seconds of a step over the number of nodes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure

from mpilsgd.colors import colors_of
from mpilsgd.plan.advice import Advice
from mpilsgd.plan.costs import Sizes
from mpilsgd.plan.forecast import forecast
from mpilsgd.plan.machine import Machine
from mpilsgd.plan.trial import Seen
from mpilsgd.train.figure_style import DASHES, MARKERS, STYLE

MOST = 65536  # ranks


def draw(found: Sequence[Advice], sizes: Sizes, machine: Machine, step_s: float, path: Path) -> Path:
    """Each method with its settings as they are, on 1 node to as many as hold 65,536 ranks."""
    counts = [1]
    while 2 * counts[-1] * machine.most <= MOST:
        counts.append(2 * counts[-1])
    with rc_context(STYLE):
        figure = Figure(figsize=(8.5, 5.0), layout="constrained")
        axis = figure.subplots()
        methods = [one.method.__name__ for one in found]
        for k, (one, color) in enumerate(zip(found, colors_of(methods), strict=True)):
            if one.seen is None:
                continue
            points = _points(one.seen, sizes, machine, step_s, counts)
            style = {"color": color, "linestyle": DASHES[methods[:k].count(methods[k]) % len(DASHES)]}
            x, y = zip(*points, strict=True)
            axis.plot(x, y, marker=MARKERS[k % len(MARKERS)], markersize=4, label=one.name, **style)
        axis.axhline(step_s, color="#888888", linewidth=1, label="no exchange")
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xlabel(f"nodes of {machine.most} rank(s)")
        axis.set_ylabel("seconds a step")
        axis.set_title("a worker's step, exchanges included, by the plan's settings")
        figure.legend(loc="outside right upper", handlelength=3.5)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)
    return path


def _points(
    seen: Seen, sizes: Sizes, machine: Machine, step_s: float, counts: Sequence[int]
) -> list[tuple[int, float]]:
    points = []
    for nodes in counts:
        larger = dataclasses.replace(machine, ranks=(machine.most,) * nodes)
        points.append((nodes, forecast(seen, sizes, larger, step_s).step_s if larger.size > 1 else step_s))
    return points

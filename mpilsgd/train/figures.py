"""The pictures of `mpilsgd report` (matplotlib without a display): curves and periods here, the others beside."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter

from mpilsgd.colors import FAINT, colors_of
from mpilsgd.train.figure_leaders import draw_leaders
from mpilsgd.train.figure_style import STYLE, legend_above, line_styles, save, scale_y, time_unit
from mpilsgd.train.figure_time import draw_asynchrony, draw_time
from mpilsgd.train.judged import LOSS, TRAIN, figure_of, more_of
from mpilsgd.train.run_reader import Run

__all__ = ["draw_asynchrony", "draw_curves", "draw_leaders", "draw_periods", "draw_time"]
_ROWS = 5  # of pictures, at most


def draw_curves(runs: Sequence[Run], path: Path) -> Path:
    """What was evaluated of the centre, and the training loss, over wall-clock time and gradient evaluations."""
    lines = [line for run in runs for line in run.metrics]
    rows = list(dict.fromkeys([figure_of(lines), LOSS, TRAIN, *more_of(lines)]))[:_ROWS]
    unit, seconds = time_unit(max(np.nanmax([*run.column("wall_s"), 0.0]) for run in runs))
    columns = [
        ("wall_s", f"training time [{unit}]", seconds),
        ("grad_evals", "gradient evaluations, all workers", 1.0),
    ]
    with rc_context(STYLE):
        figure = Figure(figsize=(10, 1 + 3 * len(rows)), layout="constrained")
        axes = figure.subplots(len(rows), 2, sharex="col", sharey="row", squeeze=False)
        handles: list[Any] = []
        for row, y in zip(axes, rows, strict=True):
            for axis, (x, _, scale) in zip(row, columns, strict=True):
                curves = [run.curve(x, y.key) for run in runs]
                drawn = [
                    axis.plot(xs / scale, ys * y.scale, markevery=max(1, len(xs) // 12), **style)[0]
                    for (xs, ys), style in zip(curves, line_styles(runs), strict=True)
                ]
                handles = handles or drawn
                axis.grid(color=FAINT, linewidth=0.6)
                axis.set_xlim(left=0)
            scale_y(row, np.concatenate([run.curve("step", y.key)[1] * y.scale for run in runs]))
            row[0].set_ylabel(
                y.label if y is TRAIN else f"{y.name} of the centre{f' [{y.unit}]' if y.unit else ''}"
            )
        for axis, (x, x_label, _) in zip(axes[-1], columns, strict=True):
            axis.set_xlabel(x_label)
            if x == "grad_evals":
                axis.xaxis.set_major_formatter(EngFormatter(sep=""))
        legend_above(figure, handles, [run.label for run in runs])
        return save(figure, path)


def draw_periods(runs: Sequence[Run], path: Path) -> Path | None:
    """Periods that were adaptive, over the steps. None if no run's was."""
    colors = dict(zip(map(id, runs), colors_of([run.method for run in runs]), strict=True))
    runs = [run for run in runs if run.periods]
    if not runs:
        return None
    with rc_context(STYLE):
        figure = Figure(figsize=(8, 4), layout="constrained")
        axis = figure.subplots()
        for run in runs:
            steps, periods = (list(of) for of in zip(*run.periods, strict=True))
            steps.append(max(int(run.last("step")), steps[-1]))
            axis.step(
                steps, [*periods, periods[-1]], where="post", color=colors[id(run)], label=run.label, lw=1.8
            )
        axis.set_yscale("log")
        for formatted in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
            formatted(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set(xlabel="step of a worker", ylabel="steps to the next round")
        axis.grid(axis="y", color=FAINT)
        handles, names = axis.get_legend_handles_labels()
        legend_above(figure, handles, names)
        return save(figure, path)

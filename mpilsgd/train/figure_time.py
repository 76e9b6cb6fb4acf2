"""The pictures of where the time went, and of asynchronous runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from mpilsgd.colors import FAINT, INK, PARTS, colors_of
from mpilsgd.train.figure_style import STYLE, figure_text, legend_above, save, time_unit
from mpilsgd.train.run_reader import Run

PART_NAMES = {
    "compute": "computing",
    "data": "loading data",
    "comm": "communicating",
    "wait": "waiting",
    "other": "other",
}
_ASYNCHRONY = ("steps of each worker", "centre updates by others between a worker's read and its write")


def draw_time(runs: Sequence[Run], path: Path) -> Path:
    """Time computing, loading, communicating, waiting (thesis Table 4.4): a bar a worker of one run, or a bar a run."""
    if len(runs) == 1:
        parts = _times(runs[0])
        count = max(map(len, parts.values()))
        labels = [f"rank {rank}" for rank in runs[0].ranks(count)]
        bars = {part: np.resize(values, count) for part, values in parts.items()}
        title = f"{runs[0].label}: time of each worker"
        wall = np.full(count, runs[0].total("wall_s"))
    else:
        labels = [run.label for run in runs]
        means = [{part: float(np.mean(values)) for part, values in _times(run).items()} for run in runs]
        bars = {part: np.array([mean[part] for mean in means]) for part in means[0]}
        title = "time of a run, mean over its workers"
        wall = np.array([run.total("wall_s") for run in runs])
    # The rest of the training time: the loop itself, metrics; left out where it is too little to see.
    rest = np.nan_to_num(wall - sum(bars.values()))
    if (rest > 0.01 * np.nan_to_num(wall)).any():
        bars["other"] = np.maximum(rest, 0.0)
    with rc_context(STYLE):
        figure = Figure(figsize=(10, 1.3 + 0.42 * len(labels)), layout="constrained")
        axis = figure.subplots()
        whole = np.sum(list(bars.values()), axis=0)
        unit, seconds = time_unit(float(np.max(whole)))
        left = np.zeros(len(labels))
        for part, values in bars.items():
            if not values.any():
                continue
            color, name = PARTS[part], PART_NAMES[part]
            axis.barh(labels, values / seconds, left=left, height=0.66, color=color, label=name)
            left = left + values / seconds
        for i, end in enumerate(left):
            comm, wait = (100 * bars[part][i] / max(whole[i], 1e-12) for part in ("comm", "wait"))
            waiting = f", waiting {wait:.2g} %" if bars["wait"].any() else ""
            axis.annotate(
                f"{figure_text(end)} {unit}:  comm. {comm:.2g} %{waiting}",
                (end, i),
                xytext=(8, 0),
                textcoords="offset points",
                va="center",
                fontsize=9,
                bbox={"color": "white", "pad": 1},
            )
        axis.invert_yaxis()
        axis.set_xlim(0, max(float(left.max()), 1e-9) * 1.5)
        axis.set_xlabel(f"training time [{unit}]")
        axis.xaxis.set_major_locator(MaxNLocator(6))
        axis.grid(axis="x", color=FAINT, linewidth=0.6)
        axis.tick_params(axis="y", length=0)
        axis.set_title(title, loc="left")
        handles, names = axis.get_legend_handles_labels()
        legend_above(figure, handles, names)
        return save(figure, path)


def draw_asynchrony(runs: Sequence[Run], path: Path) -> Path | None:
    """Who took how many steps, and how stale the centre was when a worker wrote to it, a row a run.

    None if no run was asynchronous.
    """
    colors = dict(zip(map(id, runs), colors_of([run.method for run in runs]), strict=True))
    runs = [run for run in runs if run.staleness or run.worker_steps]
    if not runs:
        return None
    with rc_context(STYLE):
        heights = [max(1.7, 0.6 + 0.3 * min(len(run.worker_steps), 16)) for run in runs]
        figure = Figure(figsize=(10, sum(heights) + 0.5), layout="constrained")
        ratios = [2, 3] if any(run.staleness for run in runs) else [1]
        axes = figure.subplots(
            len(runs), len(ratios), squeeze=False, width_ratios=ratios, height_ratios=heights
        )
        highest = max((max(run.staleness) for run in runs if run.staleness), default=0)
        most = max((max(run.worker_steps) for run in runs if run.worker_steps), default=1)
        for row, run in zip(axes, runs, strict=True):
            row[0].set_title(run.label, loc="left")
            _draw_steps(row[0], run, colors[id(run)], most)
            for axis in row[1:]:
                _draw_staleness(axis, run, colors[id(run)], highest)
        for column, text in zip(axes.T, _ASYNCHRONY, strict=False):
            for axis in [axis for axis in column if axis.axison][-1:]:
                axis.set_xlabel(text)
        return save(figure, path)


def _draw_staleness(axis: Axes, run: Run, color: str, highest: int) -> None:
    if not run.staleness:
        axis.set_axis_off()
        axis.annotate("no centre to be stale", (0, 0.5), xycoords="axes fraction", color="#666666")
        return
    keys, counts = (
        np.array(part, dtype=float) for part in (list(run.staleness), list(run.staleness.values()))
    )
    share = 100 * counts / counts.sum()
    axis.bar(keys, share, width=0.86, color=color, alpha=0.8)
    mean = float((keys * counts).sum() / counts.sum())
    axis.axvline(mean, color=INK, linewidth=1, linestyle=(0, (3, 2)))
    axis.annotate(
        f"mean {mean:.2f}, most {keys.max():.0f}",
        (0.99, 0.9),
        xycoords="axes fraction",
        ha="right",
        fontsize=9,
        bbox={"color": "white", "pad": 1},
    )
    axis.set_xlim(-0.7, highest + 0.7)
    axis.set_ylabel("exchanges [%]")
    axis.xaxis.set_major_locator(MaxNLocator(12, integer=True, min_n_ticks=1))
    axis.grid(axis="y", color=FAINT, linewidth=0.6)


def _draw_steps(axis: Axes, run: Run, color: str, most: int) -> None:
    steps = run.worker_steps
    if not steps:
        axis.set_axis_off()
        return
    axis.barh(range(len(steps)), steps, height=0.72, color=color, alpha=0.8)
    if len(steps) <= 16:
        for i, count in enumerate(steps):
            axis.annotate(f" {count}", (count, i), va="center", fontsize=9)
    axis.set_xlim(0, most * 1.2)
    axis.set_ylim(len(steps) - 0.45, -0.55)
    shown, ranks = range(0, len(steps), max(1, len(steps) // 16)), run.ranks(len(steps))
    axis.set_yticks(shown, [str(ranks[i]) for i in shown])
    axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    axis.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    axis.set_ylabel("rank")
    axis.grid(axis="x", color=FAINT, linewidth=0.6)
    axis.tick_params(axis="y", length=0)


def _times(run: Run) -> dict[str, np.ndarray]:
    """Seconds of each worker by what was done; waiting taken out of communicating."""
    parts = {part: np.array(values) for part, values in run.seconds().items()}
    waited = np.array(run.waiting())
    known = waited.shape == parts["comm"].shape
    waited = np.minimum(waited, parts["comm"]) if known else np.zeros_like(parts["comm"])
    return {**parts, "comm": parts["comm"] - waited, "wait": waited}

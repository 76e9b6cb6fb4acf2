"""The pictures of `mpilsgd report`: curves, leaders and time (matplotlib without a display)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import (
    EngFormatter,
    FixedLocator,
    FuncFormatter,
    MaxNLocator,
    NullFormatter,
    NullLocator,
)

from mpilsgd.train.run_reader import Run

# Okabe and Ito's palette, told apart under all common colour blindness; their yellow is too pale for a line.
PALETTE = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D31"]
MARKERS = "osD^vP*X"
DASHES: list[Any] = ["-", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (6, 1.5, 1.5, 1.5))]
INK, FAINT = "#222222", "#D9D9D9"
PART_COLORS = {
    "compute": "#56B4E9",
    "data": "#E69F00",
    "comm": "#B5341A",
    "wait": "#E3A293",
    "other": "#C8C8C8",
}
PART_NAMES = {
    "compute": "computing",
    "data": "loading data",
    "comm": "communicating",
    "wait": "waiting",
    "other": "other",
}
_ASYNCHRONY = ("steps of each worker", "centre updates by others between a worker's read and its write")
STYLE: dict[Any, Any] = {
    "figure.dpi": 150,
    "savefig.dpi": 150,
    "font.size": 10.5,
    "axes.titlesize": 11,
    "axes.labelsize": 10.5,
    "axes.edgecolor": "#666666",
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "xtick.color": "#444444",
    "ytick.color": "#444444",
    "text.color": INK,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
}


def draw_curves(runs: Sequence[Run], path: Path) -> Path:
    """Test error and loss of the centre over wall-clock time and gradient evaluations, all runs together."""
    with rc_context(STYLE):
        figure = Figure(figsize=(10, 7.2), layout="constrained")
        unit, seconds = _time_unit(max(np.nanmax([*run.column("wall_s"), 0.0]) for run in runs))
        columns = [
            ("wall_s", f"training time [{unit}]", seconds),
            ("grad_evals", "gradient evaluations, all workers", 1.0),
        ]
        rows = [
            ("test_error", "test error of the centre [%]", 100.0),
            ("test_loss", "test loss of the centre", 1.0),
        ]
        rows = [row for row in rows if any(len(run.curve("step", row[0])[1]) for run in runs)] or rows[1:]
        axes = figure.subplots(len(rows), 2, sharex="col", sharey="row", squeeze=False)
        handles: list[Any] = []
        for row, (y, y_label, y_scale) in zip(axes, rows, strict=True):
            for axis, (x, x_label, x_unit) in zip(row, columns, strict=True):
                curves = [run.curve(x, y) for run in runs]
                lines = [
                    axis.plot(xs / x_unit, ys * y_scale, **_line_style(i, len(xs)))[0]
                    for i, (xs, ys) in enumerate(curves)
                ]
                handles = handles or lines
                axis.grid(color=FAINT, linewidth=0.6)
                axis.set_xlim(left=0)
                if axis in axes[-1]:
                    axis.set_xlabel(x_label)
                if x == "grad_evals":
                    axis.xaxis.set_major_formatter(EngFormatter(sep=""))
            _scale_y(row, np.concatenate([run.curve("step", y)[1] * y_scale for run in runs]))
            row[0].set_ylabel(y_label)
        _legend_above(figure, handles, [run.label for run in runs])
        return _save(figure, path)


def draw_leaders(runs: Sequence[Run], path: Path) -> Path | None:
    """Who led when, and how often (LSGD Fig. 5), a row a run; None if none of the runs elected a leader.

    A bar spans the steps from an election to the next; with several groups the black bar inside leads all.
    """
    runs = [run for run in runs if run.leaders]
    if not runs:
        return None
    with rc_context(STYLE):
        heights = [0.9 + 0.34 * min(run.world_size, 16) for run in runs]
        figure = Figure(figsize=(10, sum(heights) + 0.5), layout="constrained")
        axes = figure.subplots(
            len(runs), 2, squeeze=False, sharey="row", width_ratios=[3, 1], height_ratios=heights
        )
        for (lanes, counts), run in zip(axes, runs, strict=True):
            _draw_lanes(lanes, run)
            _draw_counts(counts, run)
            lanes.set_title(run.label, loc="left")
            lanes.set_ylabel("rank of the leader")
        axes[-1, 0].set_xlabel("step")
        axes[-1, 1].set_xlabel("times it led")
        most = max(run.n_groups for run in runs)
        if most > 1:
            groups = [
                Patch(color=PALETTE[g % 6], alpha=0.75, label=f"leads group {g}") for g in range(min(most, 6))
            ]
            handles = [*groups, Patch(color=INK, label="leads all")]
            _legend_above(figure, handles, [str(handle.get_label()) for handle in handles])
        return _save(figure, path)


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
        unit, seconds = _time_unit(float(np.max(whole)))
        left = np.zeros(len(labels))
        for part, values in bars.items():
            if not values.any():
                continue
            color, name = PART_COLORS[part], PART_NAMES[part]
            axis.barh(labels, values / seconds, left=left, height=0.66, color=color, label=name)
            left = left + values / seconds
        for i, end in enumerate(left):
            comm, wait = (100 * bars[part][i] / max(whole[i], 1e-12) for part in ("comm", "wait"))
            waiting = f", waiting {wait:.2g} %" if bars["wait"].any() else ""
            axis.annotate(
                f"{_figure(end)} {unit}:  comm. {comm:.2g} %{waiting}",
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
        _legend_above(figure, handles, names)
        return _save(figure, path)


def draw_asynchrony(runs: Sequence[Run], path: Path) -> Path | None:
    """Who took how many steps, and how stale the centre was when a worker wrote to it, a row a run.

    None if no run was asynchronous.
    """
    colors = {id(run): PALETTE[i % len(PALETTE)] for i, run in enumerate(runs)}  # as in the curves
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
        return _save(figure, path)


def draw_periods(runs: Sequence[Run], path: Path) -> Path | None:
    """Periods that were adaptive, over the steps. None if no run's was."""
    colors = {id(run): PALETTE[i % len(PALETTE)] for i, run in enumerate(runs)}  # as in the curves
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
        _legend_above(figure, handles, names)
        return _save(figure, path)


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


def _draw_lanes(axis: Axes, run: Run) -> None:
    """The time line of each rank: a coloured bar while it leads its group, a black one while it leads all."""
    steps = [line["step"] for line in run.leaders]
    typical = float(np.median(np.diff(steps))) if len(steps) > 1 else 1.0
    end = max(steps[-1], last) if math.isfinite(last := run.last("step")) else steps[-1] + typical
    for group in range(run.n_groups):
        for rank, spans in _spans(run.elections(group), end).items():
            color = PALETTE[group % 6]
            axis.broken_barh(spans, (rank - 0.36, 0.72), facecolor=color, alpha=0.75, linewidth=0)
    if run.n_groups > 1:
        for rank, spans in _spans(run.elections(None), end).items():
            axis.broken_barh(spans, (rank - 0.13, 0.26), facecolor=INK, linewidth=0)
    axis.set_xlim(0, end)
    axis.set_ylim(run.world_size - 0.45, -0.55)
    ranks = range(0, run.world_size, max(1, run.world_size // 16))
    axis.yaxis.set_major_locator(FixedLocator([float(rank) for rank in ranks]))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda rank, _: f"{rank:.0f}"))
    axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    axis.grid(axis="y", color=FAINT, linewidth=0.6)
    axis.tick_params(axis="y", length=0)


def _spans(elections: Sequence[tuple[float, int]], end: float) -> dict[int, list[tuple[float, float]]]:
    """(start, length) of each unbroken lead, by rank."""
    changes = [
        (step, rank)
        for (step, rank), (_, before) in zip(elections, [(0.0, None), *elections], strict=False)
        if rank != before
    ]
    spans: dict[int, list[tuple[float, float]]] = {}
    for (start, rank), (stop, _) in zip(changes, [*changes[1:], (end, -1)], strict=True):
        spans.setdefault(rank, []).append((start, stop - start))
    return spans


def _draw_counts(axis: Axes, run: Run) -> None:
    local, overall = run.leads()
    group_of = {
        rank: group for line in run.leaders for group, rank in enumerate(line["leaders"]) if rank is not None
    }
    colors = [PALETTE[group_of.get(rank, 0) % 6] for rank in range(run.world_size)]
    axis.barh(range(run.world_size), local, height=0.72, color=colors, alpha=0.75)
    if run.n_groups > 1:
        axis.barh(range(run.world_size), overall, height=0.26, color=INK)
    if run.world_size <= 16:
        for rank, count in enumerate(local):
            text = f" {count}" + (f" ({overall[rank]})" if run.n_groups > 1 else "")
            axis.annotate(text, (max(count, overall[rank]), rank), va="center", fontsize=9)
    axis.set_xlim(0, max(1, *local, *overall) * (1.45 if run.n_groups > 1 else 1.25))
    axis.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    axis.grid(axis="x", color=FAINT, linewidth=0.6)
    axis.tick_params(axis="y", length=0)


def _line_style(index: int, points: int) -> dict[str, Any]:
    color = index % len(PALETTE)
    return {
        "color": PALETTE[color],
        "linestyle": DASHES[index // len(PALETTE) % len(DASHES)],
        "marker": MARKERS[color],
        "markersize": 5.5 if MARKERS[color] in "P*X" else 4.5,
        "markevery": max(1, points // 12),
        "markeredgecolor": "white",
        "markeredgewidth": 0.4,
    }


def _scale_y(row: Sequence[Axes], values: np.ndarray) -> None:
    """A logarithmic axis where values span a factor of ten; a run that blows up is cut off there."""
    values = values[np.isfinite(values) & (values > 0)]
    if not values.size:
        return
    low, high = float(values.min()), float(values.max())
    sensible = 8 * float(np.median(values))
    if high > 50 * max(sensible, low):
        high = sensible
    if high <= 10 * low:
        row[0].set_ylim(
            0 if low < 0.4 * high else low - 0.1 * (high - low or high), high + 0.04 * (high - low or high)
        )
        return
    for axis in row:
        axis.set_yscale("log")
        axis.set_ylim(low / 1.15, high * 1.15)
        ticks = [m * 10.0**e for e in range(-12, 13) for m in (1, 2, 5)]
        axis.yaxis.set_major_locator(FixedLocator(ticks if high < 2000 * low else ticks[::3]))
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.yaxis.set_minor_locator(NullLocator())
        axis.yaxis.set_minor_formatter(NullFormatter())


def _time_unit(seconds: float) -> tuple[str, float]:
    for unit, size in (("h", 3600.0), ("min", 60.0)):
        if seconds >= 3 * size:
            return unit, size
    return "s", 1.0


def _figure(seconds: float) -> str:
    """Three significant digits, never an exponent."""
    return f"{seconds:.{0 if seconds >= 100 else 1 if seconds >= 10 else 2}f}"


def _legend_above(figure: Figure, handles: Sequence[Any], labels: Sequence[str]) -> None:
    figure.legend(
        handles,
        labels,
        loc="outside upper center",
        ncols=max(1, min(len(labels), 110 // (8 + max(map(len, labels))))),
        handlelength=2.4,
    )


def _save(figure: Figure, path: Path) -> Path:
    figure.savefig(path)
    return path

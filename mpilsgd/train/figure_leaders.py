"""The picture of who led when, and how often."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import EngFormatter, FixedLocator, FuncFormatter, MaxNLocator

from mpilsgd.colors import FAINT, INK, PALETTE
from mpilsgd.train.figure_style import STYLE, legend_above, save
from mpilsgd.train.run_reader import Run


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
            legend_above(figure, handles, [str(handle.get_label()) for handle in handles])
        return save(figure, path)


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

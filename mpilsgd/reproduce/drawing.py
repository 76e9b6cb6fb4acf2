"""What the pictures share: maps of a value over two settings, curves of trainings, the paper's numbers in them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mpilsgd.colors import FAINT as GRID
from mpilsgd.colors import INK, PALETTE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from mpilsgd.train.judged import Figure as Judged
    from mpilsgd.train.run_reader import Run

COLORS = PALETTE
PAPER, FAINT = "#B5341A", "#C8C8C8"  # what is the paper's is drawn in this red
BOX = {"color": "white", "pad": 1, "alpha": 0.75}  # behind text on a map


def save(
    draw: Callable[[Figure], None], path: Path, title: str, shortened: str, size: tuple[float, float]
) -> Path:
    """Draws into a file, in the style of all pictures; what was shortened stands below."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    from mpilsgd.train.figure_style import STYLE

    with rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        figure.suptitle(title, fontsize=11, x=0.01, ha="left")
        draw(figure)
        if shortened:
            figure.supxlabel(f"shortened: {shortened}", fontsize=9, color=PAPER, x=0.01, ha="left")
        figure.savefig(path)
    return path


def radius_map(
    figure: Figure, axis: Axes, x: np.ndarray, y: np.ndarray, values: np.ndarray, bar: bool = True
) -> None:
    """A spectral radius, values[i, j] at (x[j], y[i]): grey where it is 1 or more, a line where it is 1."""
    from matplotlib import colormaps

    shown = np.ma.masked_greater_equal(values, 1.0)
    colors = colormaps["viridis"].with_extremes(bad="#D0D0D0")
    picture = axis.pcolormesh(x, y, shown, cmap=colors, vmin=0, vmax=1, shading="nearest", rasterized=True)
    if (values < 1).any() and (values > 1).any():
        axis.contour(x, y, values, levels=[1.0], colors=INK, linewidths=0.9)
    if bar:
        figure.colorbar(picture, ax=axis, label="spectral radius (grey: 1 or more)")


def mark(axis: Axes, x: float, y: float, text: str, **options: Any) -> None:
    """The paper's number, as a red cross with its text."""
    axis.plot([x], [y], "x", color=PAPER, markersize=9, markeredgewidth=2.2, zorder=5, clip_on=False)
    axis.annotate(
        text,
        (x, y),
        xytext=options.get("offset", (8, 6)),
        textcoords="offset points",
        color=PAPER,
        fontsize=9,
        ha=options.get("ha", "left"),
        bbox=BOX,
        zorder=6,
    )


def paper_line(axis: Axes, y: float, text: str) -> None:
    """The paper's number as a red dashed line across."""
    axis.axhline(y, color=PAPER, linewidth=1.1, linestyle=(0, (4, 3)), zorder=1)
    axis.annotate(
        text,
        (0.995, y),
        xycoords=("axes fraction", "data"),
        xytext=(0, 3),
        textcoords="offset points",
        ha="right",
        color=PAPER,
        fontsize=9,
    )


def training_curves(figure: Figure, found: Mapping[str, Run], of: Judged) -> None:
    """The curves over seconds of the virtual clock, and over gradient evaluations."""
    from matplotlib.ticker import EngFormatter

    from mpilsgd.train.figure_style import line_styles, scale_y

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
        axis.grid(color=GRID, linewidth=0.6)
    axes[1].xaxis.set_major_formatter(EngFormatter(sep=""))
    axes[0].set_ylabel(f"{of.label}, centre")
    scale_y(list(axes), of.scale * np.concatenate([run.curve("step", of.key)[1] for run in runs]))
    figure.legend(handles, list(found), loc="outside right center")

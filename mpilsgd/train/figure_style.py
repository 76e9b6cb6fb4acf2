"""What all pictures share: the style, units, legends, and the line of each run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator

from mpilsgd.colors import INK, colors_of
from mpilsgd.train.run_reader import Run

MARKERS = "osD^vP*X"
DASHES: list[Any] = ["-", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (6, 1.5, 1.5, 1.5))]
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


def line_styles(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Of each run its method's colour, a marker of its own, and dashes that tell runs of one method apart."""
    methods, seen, styles = [run.method for run in runs], Counter[str](), []
    for k, (method, color) in enumerate(zip(methods, colors_of(methods), strict=True)):
        marker = MARKERS[k % len(MARKERS)]
        styles.append(
            {
                "color": color,
                "linestyle": DASHES[seen[method] % len(DASHES)],
                "marker": marker,
                "markersize": 5.5 if marker in "P*X" else 4.5,
                "markeredgecolor": "white",
                "markeredgewidth": 0.4,
            }
        )
        seen[method] += 1
    return styles


def scale_y(row: Sequence[Axes], values: np.ndarray) -> None:
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


def time_unit(seconds: float) -> tuple[str, float]:
    for unit, size in (("h", 3600.0), ("min", 60.0)):
        if seconds >= 3 * size:
            return unit, size
    return "s", 1.0


def figure_text(seconds: float) -> str:
    """Three significant digits, never an exponent."""
    return f"{seconds:.{0 if seconds >= 100 else 1 if seconds >= 10 else 2}f}"


def legend_above(figure: Figure, handles: Sequence[Any], labels: Sequence[str]) -> None:
    columns = max(1, min(len(labels), 110 // (8 + max(map(len, labels)))))
    more = -(-len(labels) // columns) - 2  # lines, for which the figure has no room yet
    figure.set_figheight(figure.get_figheight() + 0.24 * max(more, 0))
    figure.legend(
        handles,
        labels,
        loc="outside upper center",
        ncols=columns,
        handlelength=2.4,
    )


def save(figure: Figure, path: Path) -> Path:
    figure.savefig(path)
    return path

"""A curve in characters: each holds 2 x 4 dots of Unicode's braille patterns."""

from __future__ import annotations

import numpy as np

from mpilsgd.train.table import count_text

# of the dots of a character, by row and column (Unicode, chapter 21.1)
_DOTS = np.array([[0x01, 0x08], [0x02, 0x10], [0x04, 0x20], [0x40, 0x80]])
_EMPTY = 0x2800


def curve(x: np.ndarray, y: np.ndarray, columns: int, rows: int) -> list[str]:
    """Lines of text: the curve over an axis from 0, with the ends of both axes. Points that are not finite are gaps.

    The vertical axis starts at 0, or is logarithmic where the values span more than a factor of ten.
    """
    known = np.isfinite(x) & np.isfinite(y)
    if not known.any():
        return [""] * rows
    low, high, log = _range(y[known])
    marks = [count_text(value) for value in (high, low)]
    margin = max(map(len, marks)) + 1
    wide, tall = max(columns - margin - 1, 4), max(rows - 2, 2)
    most = max(float(x[known].max()), 1.0)

    def dot(k: int) -> tuple[float, float]:
        value, ends = (np.log(y[k]), np.log([low, high])) if log else (y[k], (low, high))
        across, down = x[k] / most, (ends[1] - value) / (ends[1] - ends[0])
        return across * (2 * wide - 1), min(max(float(down), 0.0), 1.0) * (4 * tall - 1)

    dots = np.zeros((4 * tall, 2 * wide), dtype=bool)
    drawn = np.flatnonzero(known).tolist()
    for k, after in zip(drawn, [*drawn[1:], drawn[-1]], strict=True):
        (a, b), (c, d) = dot(k), dot(after if after == k + 1 else k)
        count = int(max(abs(c - a), abs(d - b))) + 1
        dots[np.linspace(b, d, count).round().astype(int), np.linspace(a, c, count).round().astype(int)] = (
            True
        )
    lines = []
    for row in range(tall):
        mark = marks[0] if row == 0 else marks[1] if row == tall - 1 else ""
        cells = dots[4 * row : 4 * row + 4].reshape(4, wide, 2).transpose(1, 0, 2)
        lines.append(f"{mark:>{margin - 1}} │" + "".join(map(_character, cells)))
    right = count_text(most)
    lines.append(" " * margin + "└" + "─" * wide)
    lines.append(" " * (margin + 1) + "0" + right.rjust(wide - 1))
    return lines


def _character(cell: np.ndarray) -> str:
    return chr(_EMPTY + int(_DOTS[cell].sum())) if cell.any() else " "


def _range(y: np.ndarray) -> tuple[float, float, bool]:
    """The ends of the vertical axis, and whether it is logarithmic."""
    low, high = float(y.min()), float(y.max())
    if low > 0 and high > 10 * low:
        return low, high, True
    if low >= 0:
        return 0.0, high or 1.0, False
    return low, high if high > low else low + 1.0, False

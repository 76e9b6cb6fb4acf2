"""Tables of plain text, and numbers as a person reads them."""

from __future__ import annotations

import math
from collections.abc import Sequence


def columns(rows: Sequence[Sequence[str]]) -> str:
    """Aligned text: the first column to the left, the others to the right; a rule below the head."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    padded = [[row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in rows]
    lines = ["  ".join(row).rstrip() for row in padded]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def count(value: float) -> str:
    return f"{value:.0f}" if math.isfinite(value) else "-"


def count_text(value: float) -> str:
    """Three significant digits, large numbers with k and M."""
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if abs(value) >= 10 * size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.4g}" if abs(value) >= 1000 else f"{value:.3g}"


def duration(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "-"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d} min" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02d} h"


def in_bytes(value: float) -> str:
    """Decimal units: 40 MB are 40e6 bytes."""
    if not math.isfinite(value):
        return "-"
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.0f} B"


def in_ms(seconds: float) -> str:
    """Milliseconds, three significant digits, never an exponent; none beyond the sixth place."""
    ms = float(f"{1e3 * seconds:.2e}")
    if not 0 < ms < math.inf:
        return "0" if ms == 0 else "-"
    return f"{ms:.{min(6, max(0, 2 - math.floor(math.log10(ms))))}f}"


def ranges(ranks: Sequence[int]) -> str:
    """0, 1, 2, 5 as "0-2, 5"."""
    parts: list[list[int]] = []
    for rank in sorted(ranks):
        if parts and parts[-1][1] == rank - 1:
            parts[-1][1] = rank
        else:
            parts.append([rank, rank])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in parts)


def forecast_text(told: dict[str, list[float]]) -> str:
    """What a run was forecast, beside what it measured."""
    ms = [
        f"{in_ms(a)} / {in_ms(b)} ms a {what}"
        for what in ("step", "round")
        for a, b in _of(told, f"{what}_s")
    ]
    read = [
        f"{in_bytes(a)} / {in_bytes(b)} {where}"
        for key, where in (("bytes_group", "in groups"), ("bytes_across", "across"))
        for a, b in _of(told, key)
        if a or b
    ]
    return ", ".join(ms + read)


def _of(told: dict[str, list[float]], key: str) -> list[list[float]]:
    return [told[key]] if key in told else []

"""The page of `mpilsgd watch`, made with rich."""

from __future__ import annotations

import json
import math
import time
from typing import Any

import numpy as np
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from mpilsgd.colors import METHODS, PARTS, colors_of
from mpilsgd.train.braille import curve
from mpilsgd.train.judged import TRAIN, Figure, figure_of, is_finite
from mpilsgd.train.run_reader import Run
from mpilsgd.train.table import duration, ranges
from mpilsgd.train.watch import ended, total_steps

_NAMES = {"compute": "computing", "data": "loading", "comm": "communicating", "wait": "waiting"}
_RANKS = 12  # that have a line of their own
_BAR = 36  # columns of a rank's time
_AROUND = 16  # lines of the page around the curves
_SIDE_BY_SIDE = 96  # columns from which on the two curves stand beside each other


def page(run: Run, width: int, height: int | None = None) -> RenderableType:
    """All that is known of a run; height: of the terminal, if the page should not be longer."""
    parts: list[RenderableType] = [_head(run)]
    if run.metrics:
        figure = figure_of(run.metrics)
        parts.append(_curves(run, [figure, TRAIN], width, height))
        parts.append(_latest(run, figure))
    else:
        parts.append(Text("no evaluation yet", style="dim"))
    ranks = _ranks_of(run)
    if ranks:
        parts.append(_times(run, ranks))
    elif run.leaders:
        parts.append(_leads(run))
    return Group(*parts)


def _head(run: Run) -> RenderableType:
    total, step = total_steps(run), run.last("step")
    step = step if math.isfinite(step) else 0.0
    config = run.config
    told = Table.grid(padding=(0, 1))
    told.add_row(Text(_title(run), style="bold"))
    task = [f"{config.get(key)}" for key in ("model", "data") if config.get(key)]
    told.add_row(Text(" on ".join(task) + f"   {run.path}", style="dim"))
    bar = Table.grid(padding=(0, 1))
    bar.add_row(
        ProgressBar(
            total=total or 1.0,
            completed=min(step, total or 1.0) if total else 0.0,
            width=40,
            complete_style="green",
            finished_style="green",
        ),
        f"step {step:g}" + (f" of {total:g}" if total else ""),
    )
    told.add_row(bar)
    told.add_row(Text(_standing(run, total, step), style="bold" if ended(run) else ""))
    return Panel(told, title="mpilsgd watch", title_align="left", border_style="dim")


def _title(run: Run) -> str:
    kind = run.config.get("asynchronous")
    waits = f" {'asynchronous' if kind is True else kind}" if kind else ""
    ranks = run.summary.get("world_size") or len(_ranks_of(run).get("steps", ())) or None
    return f"{run.name}: {run.method}{waits}" + (f" on {ranks} rank(s)" if ranks else "")


def _standing(run: Run, total: float | None, step: float) -> str:
    """Where the run is, and when it will end by the time of its steps so far."""
    if ended(run):
        return "interrupted; it can be resumed" if (run.path / "interrupted").exists() else "finished"
    wall = run.last("wall_s")
    if not step or total is None or not math.isfinite(wall):
        return "running"
    left = f"about {duration(wall / step * max(total - step, 0))} of training left"
    return f"{left}; last heard {duration(_silence(run))} ago"


def _silence(run: Run) -> float:
    """Seconds since the last line."""
    try:
        return max(0.0, time.time() - (run.path / "metrics.jsonl").stat().st_mtime)
    except OSError:
        return math.nan


def _curves(run: Run, figures: list[Figure], width: int, height: int | None) -> RenderableType:
    beside = width >= _SIDE_BY_SIDE
    room = 16 if height is None else height - _AROUND  # for the curves, one above the other or side by side
    rows = max(5, min(14, room if beside else room // 2 - 1))
    columns = (width - 3) // 2 if beside else width - 1
    (color,) = colors_of([run.method])
    drawn = [_curve(run, figure, columns, rows, color) for figure in figures]
    if not beside:
        return Group(*drawn)
    grid = Table.grid(padding=(0, 1))
    grid.add_row(*drawn)
    return grid


def _curve(run: Run, figure: Figure, columns: int, rows: int, color: str) -> Text:
    x, y = run.curve("step", figure.key)
    told = Text(figure.label + "\n", style="bold")
    # black would not be seen on a dark terminal
    style = "default" if color == METHODS["AllreduceSGD"] else color
    for line in curve(x, y * figure.scale, columns, rows):
        axis, bar, dots = line.partition("│")
        told.append(axis + bar, "dim not bold").append(dots + "\n", style + " not bold")
    told.rstrip()
    return told


def _latest(run: Run, figure: Figure) -> RenderableType:
    steps, values = run.curve("step", figure.key)
    told = f"{figure.name} {figure.text(run.last(figure.key))}"
    if np.isfinite(values).any():
        best = int(np.nanargmin(values))
        told += f", at its best {figure.text(values[best])} at step {steps[best]:g}"
    told += f"; {TRAIN.name} {TRAIN.text(run.last(TRAIN.key))}"
    if run.leaders:
        leader = next(
            (line["leader"] for line in reversed(run.leaders) if line.get("leader") is not None), None
        )
        told += "" if leader is None else f"; rank {leader} leads"
    return Text(told)


def _ranks_of(run: Run) -> dict[str, Any]:
    """ranks.json, if it is sound."""
    try:
        found = json.loads((run.path / "ranks.json").read_text())
        count = len(found["steps"])
        lists = [found[key] for key in ("leads", *(f"t_{part}" for part in _NAMES))]
        sound = all(len(of) == count and all(map(is_finite, of)) for of in [found["steps"], *lists])
        return found if sound and isinstance(found["workers"], list) else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _times(run: Run, ranks: dict[str, Any]) -> RenderableType:
    """A line a rank: its steps, how often it led, and where its time went."""
    count = len(ranks["steps"])
    waits = [ranks["t_wait"][r] / max(_seconds(ranks, r), 1e-12) for r in range(count)]
    # of many those that wait least, for whom the others wait, and those that wait most
    order = sorted(range(count), key=waits.__getitem__)
    half = _RANKS // 2
    shown = range(count) if count <= _RANKS else sorted([*order[:half], *order[-half:]])
    led = any(ranks["leads"])
    table = Table(box=None, padding=(0, 1), header_style="")
    for name in ["rank", "steps", *(["led"] if led else [])]:
        table.add_column(Text(name, "dim"), justify="right")
    table.add_column(_legend())
    table.add_column(Text("waiting", "dim"), justify="right")
    most = max(map(int, ranks["leads"]), default=0)
    for r in shown:
        times = led and ranks["leads"][r]
        cells = [Text(str(times), style="bold" if times == most else "")] if led else []
        idle = r not in ranks["workers"]
        wait = "averages only" if idle else f"{100 * waits[r]:.1f} %"
        table.add_row(str(r), str(ranks["steps"][r]), *cells, "" if idle else _bar(ranks, r), wait)
    if count <= _RANKS:
        return table
    left = ranges([r for r in range(count) if r not in shown])
    return Group(table, Text(f"those that wait least and most; not shown: ranks {left}", style="dim"))


def _seconds(ranks: dict[str, Any], r: int) -> float:
    return float(sum(ranks[f"t_{part}"][r] for part in ("compute", "data", "comm")))


def _legend() -> Text:
    told = Text()
    for part, name in _NAMES.items():
        told.append("█ ", PARTS[part]).append(name + " ", "dim")
    return told


def _bar(ranks: dict[str, Any], r: int) -> Text:
    whole = max(_seconds(ranks, r), 1e-12)
    wait = min(ranks["t_wait"][r], ranks["t_comm"][r])
    parts = {
        "compute": ranks["t_compute"][r],
        "data": ranks["t_data"][r],
        "comm": ranks["t_comm"][r] - wait,
        "wait": wait,
    }
    bar, end, filled = Text(), 0.0, 0
    for part, seconds in parts.items():
        end += seconds
        columns = round(_BAR * end / whole) - filled
        bar.append("█" * columns, PARTS[part])
        filled += columns
    return bar


def _leads(run: Run) -> RenderableType:
    local, _ = run.leads()
    return Text("led by rank  " + "  ".join(f"{rank}: {count}" for rank, count in enumerate(local) if count))

"""`mpilsgd report`: pictures and a table of one run or of several, from their run directories alone."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mpilsgd.train.run_reader import Run, RunError, read_runs
from mpilsgd.train.scored import text
from mpilsgd.train.table import columns, count, duration, in_bytes, judged_by, percent


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `mpilsgd report`."""
    parser.description = (
        "Draws PNG figures of one or more runs and prints a table of them: test error and loss over "
        "wall-clock time and over gradient evaluations (curves.png), who led when and how often "
        "(leaders.png), the time spent computing, loading, communicating and waiting (time.png), and of "
        "asynchronous runs each rank's steps and how stale the centre was (asynchrony.png)."
    )
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="run directory (what `mpilsgd train --output` wrote)"
    )
    parser.add_argument(
        "-o",
        "--output",
        metavar="DIR",
        help="folder for the figures (default: RUN/report for one run, ./report for several)",
    )


def run(args: argparse.Namespace) -> int:
    """Prints the table, draws the figures; exit status 2: a path is no run directory, no run has an evaluation, or a
    figure cannot be written.
    """
    try:
        found = read_runs(args.runs)
        for notice in (notice for one in found for notice in one.notices):
            print(f"mpilsgd report: {notice}", file=sys.stderr)
        runs = [one for one in found if one.metrics]
        if not runs:
            raise RunError("no run is left to report on")
        folder = (
            Path(args.output)
            if args.output
            else (found[0].path / "report" if len(found) == 1 else Path("report"))
        )
        folder.mkdir(parents=True, exist_ok=True)
    except RunError as error:
        print(f"mpilsgd report: {error}".replace("\n", "\nmpilsgd report: "), file=sys.stderr)
        return 2
    except OSError as error:
        print(f"mpilsgd report: the folder for the figures cannot be made: {error}", file=sys.stderr)
        return 2
    print(table(runs))
    told = [f"{one.name}: {text(pairs)}" for one in runs if (pairs := _forecast(one))]
    if told:
        print("\n".join(["", "forecast by the machine and the settings / measured:", *told]))
    for one in runs:
        if one.leaders:
            print("\n" + leads_text(one))
    try:
        from mpilsgd.train import figures
    except ImportError as error:
        print(
            f"mpilsgd report: no figures: {error}; `pip install 'mpilsgd[report]'` brings matplotlib",
            file=sys.stderr,
        )
        return 1
    print()
    try:
        for draw, name in (
            (figures.draw_curves, "curves.png"),
            (figures.draw_leaders, "leaders.png"),
            (figures.draw_time, "time.png"),
            (figures.draw_asynchrony, "asynchrony.png"),
            (figures.draw_periods, "periods.png"),
        ):
            path = draw(runs, folder / name)
            if path is not None:
                print(path)
            elif (folder / name).exists():
                (
                    folder / name
                ).unlink()  # of an earlier report in this folder: it would be taken for one of these runs
    except OSError as error:
        print(f"mpilsgd report: a figure cannot be written: {error}", file=sys.stderr)
        return 2
    return 0


def table(runs: Sequence[Run]) -> str:
    """The runs, a line each: errors of the centre, training time (without evaluation), exchange, resets."""
    head = [
        "run",
        "method",
        "workers",
        "steps",
        "error %",
        "best %",
        "at",
        "worker %",
        "time",
        "comm",
        "rounds",
    ]
    head += ["in groups", "across", "resets"]
    rows = [head] + [_row(one) for one in runs]
    if any(one.worker_steps for one in runs):  # asynchronous runs: what says something of them
        rows[0] += ["waiting", "staleness"]
        for row, one in zip(rows[1:], runs, strict=True):
            row += [_waiting(one), _staleness(one)]
    return columns(rows)


def _forecast(one: Run) -> dict[str, list[float]]:
    """By name what was forecast and what was measured."""
    found = one.summary.get("forecast")
    pairs = found.items() if isinstance(found, dict) else ()
    return {
        key: pair
        for key, pair in pairs
        if isinstance(pair, list) and len(pair) == 2 and all(map(_is_number, pair))
    }


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def leads_text(one: Run) -> str:
    """How often each rank led its group, and all groups where there is more than one."""
    local, overall = one.leads()
    rounds = max(1, sum(local))
    lines = [f"{one.name}: {len(one.leaders)} elections; led by rank"]
    rows = [["rank", "led", "%"] + (["led all"] if one.n_groups > 1 else [])]
    for rank, led in enumerate(local):
        share = f"{100 * led * one.n_groups / rounds:.0f}"
        rows.append([str(rank), str(led), share] + ([str(overall[rank])] if one.n_groups > 1 else []))
    return "\n".join([*lines, columns(rows)])


def _row(one: Run) -> list[str]:
    name = judged_by(
        {"test_error": one.total("test_error") if np.isfinite(one.total("test_error")) else None}
    )
    wall, errors = one.curve("wall_s", name)
    seen = np.isfinite(errors)
    best = int(np.nanargmin(errors)) if seen.any() else -1
    best_worker = one.summary.get("best_worker")
    seconds = {part: float(np.mean(values)) for part, values in one.seconds().items()}
    whole = sum(seconds.values())
    groups = f" ({one.n_groups} groups)" if one.n_groups > 1 else ""
    return [
        one.name,
        one.method,
        f"{_workers(one)}{groups}",
        _steps(one),
        _figure(name, one.total(name)),
        _figure(name, float(errors[best])) if best >= 0 else "-",
        duration(float(wall[best])) if best >= 0 else "-",
        _figure(name, best_worker.get(name)) if isinstance(best_worker, dict) else "-",
        duration(one.total("wall_s")),
        f"{100 * seconds['comm'] / whole:.2g} %" if whole > 0 else "-",
        count(one.total("rounds")),
        in_bytes(one.total("bytes_group")),
        in_bytes(one.total("bytes_across")),
        _resets(one),
    ]


def _figure(name: str, value: float | None) -> str:
    """An error in percent, a loss as such."""
    if name == "test_error" or value is None or not np.isfinite(value):
        return percent(value)
    return f"loss {value:.4g}"


def _workers(one: Run) -> str:
    """How many ranks compute, and of how many if some do not."""
    computing = len(one.workers)
    return f"{computing} of {one.world_size}" if computing < one.world_size else str(computing)


def _steps(one: Run) -> str:
    own = one.worker_steps
    return f"{min(own)}..{max(own)}" if own and min(own) < max(own) else count(one.last("step"))


def _waiting(one: Run) -> str:
    whole = sum(float(np.mean(values)) for values in one.seconds().values())
    waited = one.waiting()
    return f"{100 * float(np.mean(waited)) / whole:.2g} %" if waited and whole > 0 else "-"


def _staleness(one: Run) -> str:
    """Mean and maximum."""
    counts = one.staleness
    if not counts:
        return "-"
    mean = sum(key * number for key, number in counts.items()) / sum(counts.values())
    return f"{mean:.2f}, most {max(counts)}"


def _resets(one: Run) -> str:
    """How many times a worker was set back after a non-finite state, over all ranks."""
    resets = one.summary.get("resets", [])
    return str(sum(resets) if isinstance(resets, list) else resets) if "resets" in one.summary else "-"

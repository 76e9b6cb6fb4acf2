"""`mpilsgd report`: pictures and a table of one run or of several, from their run directories alone."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mpilsgd.train.judged import ERROR, TRAIN, Figure, figure_of
from mpilsgd.train.page import write_page
from mpilsgd.train.run_reader import Run, RunError, read_runs
from mpilsgd.train.table import columns, count, duration, forecast_text, in_bytes

PICTURES = {"curves": "draw_curves", "leaders": "draw_leaders", "time": "draw_time"} | {
    name: f"draw_{name}" for name in ("asynchrony", "periods")
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `mpilsgd report`."""
    parser.description = (
        "Draws PNG figures of one or more runs and prints a table of them: test error and losses over "
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
    parser.add_argument(
        "--html",
        action="store_true",
        help="also write report.html: one page for a browser, with interactive curves, what differs between the runs, "
        "and the command of each",
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
    told = [f"{one.name}: {forecast_text(pairs)}" for one in runs if (pairs := _forecast(one))]
    if told:
        print("\n".join(["", "forecast by the machine and the settings / measured:", *told]))
    for one in runs:
        if one.leaders:
            print("\n" + leads_text(one))
    print()
    try:
        drawn = _draw(runs, folder)
        if args.html:
            # the page has curves of its own
            print(
                write_page(
                    runs,
                    rows_of(runs),
                    [path for path in drawn or () if path.stem != "curves"],
                    folder / "report.html",
                )
            )
    except OSError as error:
        print(f"mpilsgd report: a figure cannot be written: {error}", file=sys.stderr)
        return 2
    return 0 if drawn is not None else 1


def _draw(runs: Sequence[Run], folder: Path) -> list[Path] | None:
    """The figures, each named when it is there; None without matplotlib."""
    try:
        from mpilsgd.train import figures
    except ImportError as error:
        print(
            f"mpilsgd report: no figures: {error}; `pip install 'mpilsgd[report]'` brings matplotlib",
            file=sys.stderr,
        )
        return None
    drawn = []
    for name, function in PICTURES.items():
        path = folder / f"{name}.png"
        if getattr(figures, function)(runs, path) is not None:
            print(path)
            drawn.append(path)
        else:  # of an earlier report in this folder: it would be taken for one of these runs
            path.unlink(missing_ok=True)
    return drawn


def table(runs: Sequence[Run]) -> str:
    """The runs, a line each: figures of the centre, training time (without evaluation), exchange, resets."""
    return columns(rows_of(runs))


def rows_of(runs: Sequence[Run]) -> list[list[str]]:
    """The table's head and lines."""
    figure = figure_of(line for one in runs for line in one.metrics)
    judged = ["error %", "best %"] if figure is ERROR else [figure.name, "best"]
    worker = "worker %" if figure is ERROR else "worker"
    head = [
        "run",
        "method",
        "workers",
        "steps",
        *judged,
        "at",
        worker,
        "train loss",
        "time",
        "comm",
        "rounds",
    ]
    head += ["in groups", "across", "resets"]
    rows = [head] + [_row(one, figure) for one in runs]
    if any(one.worker_steps for one in runs):  # asynchronous runs: what says something of them
        rows[0] += ["waiting", "staleness"]
        for row, one in zip(rows[1:], runs, strict=True):
            row += [_waiting(one), _staleness(one)]
    return rows


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


def _row(one: Run, figure: Figure) -> list[str]:
    wall, errors = one.curve("wall_s", figure.key)
    seen = np.isfinite(errors)
    best = int(np.nanargmin(errors)) if seen.any() else -1
    best_worker = one.summary.get("best_worker")
    seconds = {part: float(np.mean(values)) for part, values in one.seconds().items()}
    whole = sum(seconds.values())
    groups = f" ({one.n_groups} groups)" if one.n_groups > 1 else ""

    def told(value: object) -> str:
        return figure.text(value).removesuffix(" %")

    return [
        one.name,
        one.method,
        f"{_workers(one)}{groups}",
        _steps(one),
        told(one.total(figure.key)),
        told(float(errors[best])) if best >= 0 else "-",
        duration(float(wall[best])) if best >= 0 else "-",
        told(best_worker.get(figure.key)) if isinstance(best_worker, dict) else "-",
        TRAIN.text(one.last(TRAIN.key)),
        duration(one.total("wall_s")),
        f"{100 * seconds['comm'] / whole:.2g} %" if whole > 0 else "-",
        count(one.total("rounds")),
        in_bytes(one.total("bytes_group")),
        in_bytes(one.total("bytes_across")),
        _resets(one),
    ]


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

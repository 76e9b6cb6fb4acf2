"""`mpilsgd reproduce`: the figures and tables of the papers, ours beside theirs."""

from __future__ import annotations

import argparse
import importlib.util
import sys
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path

from mpilsgd.reproduce.judge import AGREES, NOT_RUN, Row
from mpilsgd.reproduce.registry import Failed, MissingData, Options, Reproduction, Result, entries, named
from mpilsgd.train.numbers import count, positive

_WIDTH = 40  # of a column of the table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `mpilsgd reproduce`."""
    parser.description = (
        "Reproduces figures and tables of the papers with the methods of this package, draws them with the papers' "
        "numbers marked, and says for each number whether it agrees. --list shows the names; a pattern such as "
        "'thesis-fig5*' takes several. Runs without a launcher. Needs matplotlib and scipy."
    )
    add = parser.add_argument
    add("names", nargs="*", metavar="NAME", help="what to reproduce: names, patterns, or all")
    add("--list", action="store_true", dest="listed", help="show the names and what they are")
    add("--quick", action="store_true", help="shorter runs; what is shortened is said")
    add(
        "--passes",
        type=positive,
        metavar="N",
        help="train the deep networks too, each worker for N passes over the data (without it they are only named)",
    )
    add(
        "--workers",
        type=count,
        metavar="N",
        help="of deep networks, leave out trainings of more workers; what needs them is not judged",
    )
    add(
        "--amp",
        choices=["bf16", "fp16"],
        help="of deep networks, forward pass and loss in half precision, faster where the processor has it",
    )
    add("--seed", type=int, default=0, metavar="N", help="of noise and starts (default: 0)")
    add(
        "--data_dir",
        "--data-dir",
        type=Path,
        default=Path("data"),
        metavar="DIR",
        help="folder of the data sets (default: data)",
    )
    add(
        "--output",
        type=Path,
        default=Path("reproduced"),
        metavar="DIR",
        help="folder for the pictures (default: reproduced)",
    )
    add("--markdown", type=Path, metavar="FILE", help="write all tables into this file, too")


def run(args: argparse.Namespace) -> int:
    """Prints the tables, draws the pictures. Status 1: data missing, a training failed; 2: wrong arguments."""
    if args.listed:
        known = entries()
        width = max(map(len, known))
        for one in known.values():
            print(f"{one.name:{width}}  {one.paper}: {one.title}")
        return 0
    lacking = [name for name in ("matplotlib", "scipy") if importlib.util.find_spec(name) is None]
    if lacking:
        print(
            f"mpilsgd reproduce: needs {' and '.join(lacking)}: pip install 'mpilsgd[report,theory]'",
            file=sys.stderr,
        )
        return 2
    try:
        chosen = named(args.names)
        if not chosen:
            raise ValueError("name something to reproduce, or give --list")
        if args.passes is None and (args.workers or args.amp):
            raise ValueError("--workers and --amp are for deep networks, which --passes N trains")
    except ValueError as error:
        print(f"mpilsgd reproduce: {error}", file=sys.stderr)
        return 2
    options = Options(
        args.quick, args.passes, args.seed, args.data_dir, args.output, workers=args.workers, amp=args.amp
    )
    done: list[tuple[Reproduction, Result]] = []
    failed = False
    for one in chosen:
        began = time.perf_counter()
        try:
            result = one.run(options)
        except (MissingData, Failed) as error:
            what = "data" if isinstance(error, MissingData) else "training"
            failed, result = True, Result([Row(what, "-", "-", NOT_RUN, str(error))])
        print(f"{one.name}  {one.paper}: {one.title}")
        print(table(result))
        if result.draw is not None:
            from mpilsgd.reproduce.drawing import save

            args.output.mkdir(parents=True, exist_ok=True)
            title = f"{one.paper}: {one.title}"
            path = save(result.draw, args.output / f"{one.name}.png", title, result.shortened, result.size)
            print(f"picture: {path}")
        print(f"{time.perf_counter() - began:.1f} s\n", flush=True)
        done.append((one, result))
    print(summary([row for _, result in done for row in result.rows]))
    if args.markdown:
        args.markdown.write_text(markdown(done))
    return int(failed)


def table(result: Result) -> str:
    """Quantity, paper, here, verdict; long texts in several lines."""
    rows = [["quantity", "paper", "here", "verdict"]]
    rows += [[row.quantity, row.paper, row.here, row.verdict] for row in result.rows]
    cells = [
        [textwrap.wrap(cell, _WIDTH if i != 3 else 60) or [""] for i, cell in enumerate(row)] for row in rows
    ]
    widths = [max(len(line) for row in cells for line in row[i]) for i in range(4)]
    lines = []
    for k, row in enumerate(cells):
        for i in range(max(map(len, row))):
            parts = [(cell[i] if i < len(cell) else "").ljust(w) for cell, w in zip(row, widths, strict=True)]
            lines.append("  ".join(parts).rstrip())
        if not k:
            lines.append("-" * (sum(widths) + 6))
    if result.shortened:
        lines.append(f"shortened: {result.shortened}")
    return "\n".join(lines)


def markdown(done: Sequence[tuple[Reproduction, Result]]) -> str:
    """All as one table of Markdown; a shortened one says so."""
    lines = ["| name | quantity | paper | here | verdict |", "|---|---|---|---|---|"]
    for one, result in done:
        for k, row in enumerate(result.rows):
            name = "" if k else one.name + (f" (shortened: {result.shortened})" if result.shortened else "")
            cells = [name, row.quantity, row.paper, row.here, row.verdict]
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def summary(rows: Sequence[Row]) -> str:
    """How many rows have each outcome."""
    counts: dict[str, int] = {AGREES: 0}
    for row in rows:
        counts[row.outcome] = counts.get(row.outcome, 0) + 1
    return f"{len(rows)} numbers and properties: " + ", ".join(f"{n} {what}" for what, n in counts.items())

"""`mpilsgd watch`: a run in the terminal as it goes on: curves, who leads, where the time goes, when it will end."""

from __future__ import annotations

import argparse
import contextlib
import select
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mpilsgd.train.run_reader import Run, RunError, read_runs

_FILES = ("config.yaml", "metrics.jsonl", "leaders.jsonl", "ranks.json", "summary.json", "interrupted")
_PAUSE = 1.0  # seconds between two looks at the files


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `mpilsgd watch`."""
    parser.description = (
        "Follows a run in the terminal, from its directory alone: on the same machine, over ssh, or on a file system "
        "that both see. The page changes with every evaluation. It ends with the run, or with q or Ctrl-C; the run "
        "does not notice. Needs rich: pip install 'mpilsgd[report]'."
    )
    parser.add_argument("run", metavar="RUN", help="run directory (what `mpilsgd train --output` wrote)")
    parser.add_argument("--once", action="store_true", help="print the page once, as it is now")


def run(args: argparse.Namespace) -> int:
    """Shows the page; exit status 2 with one line if there is no such run, 1 without the libraries."""
    try:
        from rich.console import Console

        from mpilsgd.train.watch_page import page
    except ImportError as error:
        print(f"mpilsgd watch: {error}: pip install 'mpilsgd[report]'", file=sys.stderr)
        return 1
    console = Console()
    try:
        found = _read(args.run)
        if args.once or not console.is_terminal:
            console.print(page(found, console.width))
            return 0
        return _follow(found, console)
    except RunError as error:
        print(f"mpilsgd watch: {error}", file=sys.stderr)
        return 2


def ended(run: Run) -> bool:
    """Whether the run has ended, by itself or by a signal. One that was resumed with more steps has not."""
    if (run.path / "interrupted").exists():
        return True
    steps, total = run.summary.get("steps"), total_steps(run)
    return isinstance(steps, int | float) and (total is None or steps >= total - 0.5)


def total_steps(run: Run) -> float | None:
    """How many steps a worker takes; None as long as that is not known."""
    steps, epochs = run.config.get("steps"), run.config.get("epochs")
    if isinstance(steps, int):
        return float(steps)
    step, epoch = run.last("step"), run.last("epoch")
    if isinstance(epochs, int | float) and epoch > 0 and step > 0:
        return float(epochs * step / epoch)
    return None


def _read(path: str | Path) -> Run:
    (found,) = read_runs([path])
    return found


def _follow(found: Run, console: Any) -> int:
    from rich.live import Live

    from mpilsgd.train.watch_page import page

    seen = _state(found.path)
    with (
        _keys() as pressed,
        Live(page(found, console.width), console=console, screen=True, auto_refresh=False) as live,
        contextlib.suppress(KeyboardInterrupt),
    ):
        while not ended(found) and not pressed(_PAUSE):
            if (now := _state(found.path)) != seen:
                found, seen = _read(found.path), now
            live.update(page(found, console.width, console.height), refresh=True)
    console.print(page(found, console.width))
    return 0


def _state(folder: Path) -> list[tuple[int, int] | None]:
    """What changes when a file is written."""
    told: list[tuple[int, int] | None] = []
    for name in _FILES:
        try:
            found = (folder / name).stat()
            told.append((found.st_mtime_ns, found.st_size))
        except OSError:
            told.append(None)
    return told


@contextlib.contextmanager
def _keys() -> Iterator[Any]:
    """Gives a function that waits some seconds for a key and says whether it was q."""
    if not sys.stdin.isatty():
        yield lambda seconds: time.sleep(seconds)
        return
    import termios
    import tty

    before = termios.tcgetattr(sys.stdin)

    def pressed(seconds: float) -> bool:
        ready, _, _ = select.select([sys.stdin], [], [], seconds)
        return bool(ready) and sys.stdin.read(1) in ("q", "Q")

    try:
        tty.setcbreak(sys.stdin)  # keys come without Enter; Ctrl-C stays a signal
        yield pressed
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)

"""What rank 0 tells while it trains, on a terminal or into a log, and the summary at the end."""

from __future__ import annotations

import os
import sys
import time
from typing import Any, TextIO

from mpilsgd.train.config import Config
from mpilsgd.train.run_directory import METRICS
from mpilsgd.train.scored import text
from mpilsgd.train.stragglers import parse_slow
from mpilsgd.train.table import judged, judged_by

_LIVE_PERIOD = 0.2  # seconds between changes of the live line


class Display:
    """One line for each evaluation; on a terminal a live line below it, too. Silent on all ranks but 0."""

    def __init__(self, rank: int, total_steps: int, batches: int, stream: TextIO | None = None):
        self.on = rank == 0
        self.stream = sys.stdout if stream is None else stream
        self.total, self.batches = total_steps, batches
        self.live = self.on and self.stream.isatty() and os.environ.get("TERM") != "dumb"
        self._drawn = 0
        self._last = 0.0
        self._start: tuple[float, int] | None = None

    def say(self, text: str) -> None:
        """A line of its own."""
        if self.on:
            self._erase()
            self.stream.write(text + "\n")
            self.stream.flush()

    def step(self, step: int, loss: float | None) -> None:
        """The live line, a few times a second; loss: None on a rank that only averages."""
        if not self.live:
            return
        now = time.monotonic()
        if self._start is None:
            self._start = (now, step)
        if now - self._last < _LIVE_PERIOD:
            return
        self._last = now
        seconds, steps = now - self._start[0], step - self._start[1]
        text = f"step {step}/{self.total}  epoch {step / self.batches:.2f}"
        text += "" if loss is None else f"  loss {loss:.4f}"
        if steps and seconds:
            left = max(self.total - step, 0)  # in an asynchronous run a fast rank goes on for the slow ones
            text += f"  {steps / seconds:.3g} steps/s  {duration(left * seconds / steps)} left"
        self._erase()
        self.stream.write(text)
        self.stream.flush()
        self._drawn = len(text)

    def evaluation(self, row: dict[str, Any]) -> None:
        """The line for a line of metrics.jsonl."""
        width = len(str(self.total))
        text = (
            f"epoch {row['epoch']:6.2f}  step {int(row['step']):{width}}  {duration(row['wall_s']):>8}  "
            f"train loss {number(row['train_loss'])}  test loss {number(row['test_loss'])}"
        )
        if row["test_error"] is not None:
            text += f"  test error {100 * row['test_error']:5.2f} %"
        more = {key: value for key, value in row.items() if key.startswith("test_") and key not in METRICS}
        text += "".join(f"  {key[5:]} {number(value).strip()}" for key, value in more.items())
        self.say(text + (f"  leader {row['leader']}" if row["leader"] is not None else ""))

    def _erase(self) -> None:
        if self._drawn:
            self.stream.write("\r" + " " * self._drawn + "\r")
            self._drawn = 0


def opening(
    config: Config,
    world_size: int,
    groups: list[list[int]],
    threads: int,
    samples: int | None,
    parameters: int,
) -> str:
    """What will be done, in two lines; a third where ranks are slowed down."""
    sizes = sorted({len(group) for group in groups})
    of = "" if len(groups) == 1 else f" in {len(groups)} groups of {' or '.join(map(str, sizes))}"
    options = "".join(f" {key}={value}" for key, value in config.set_options.items())
    size, of_data = f"({parameters} parameters)", "" if samples is None else f" ({samples} samples)"
    what = (
        f"{config.task} {size}{of_data}"
        if config.task
        else f"{config.model} {size} on {config.data}{of_data}"
    )
    slowdown = parse_slow(config.slow)
    slowed = f"\nslowed down on purpose: {slowdown.told()}" if slowdown else ""
    return (
        f"{config.method}{options}: {what}\n"
        f"{world_size} rank(s){of}, {threads} thread(s) each; {config.optimizer} lr={config.lr:g}, "
        f"batches of {config.batch_size}{f', {config.amp}' if config.amp else ''}{slowed}"
    )


def closing(summary: dict[str, Any], directory: str) -> str:
    """The summary for a reader."""
    workers = len(summary["t_wait"])
    parts = {name: sum(summary[f"t_{name}"]) / workers for name in ("compute", "data", "comm")}
    whole = max(sum(parts.values()), 1e-12)
    words = {"compute": "computing", "data": "loading data", "comm": "communicating"}
    times = ", ".join(f"{words[k]} {duration(v)} ({100 * v / whole:.1f} %)" for k, v in parts.items())
    waited = sum(summary["t_wait"]) / workers
    times += f", of which {duration(waited)} waiting for other ranks"
    best = summary["best_worker"]
    loss = f"   (loss {number(summary['test_loss'])})" if judged_by(summary) == "test_error" else ""
    lines = [
        (f"{judged_by(summary).replace('_', ' ')} of the centre", f"{judged(summary)}{loss}"),
        ("of the best worker", f"{judged(best)}   (rank {best['rank']})"),
    ]
    if any(summary["leads"]):
        lines.append(("times each rank led", "  ".join(f"{r}: {n}" for r, n in enumerate(summary["leads"]))))
    if any(summary["resets"]):
        told = "  ".join(f"{r}: {n}" for r, n in enumerate(summary["resets"]) if n)
        lines.append(("set back, not finite", told))
    if "overflows" in summary:
        told = "  ".join(f"{r}: {n}" for r, n in enumerate(summary["overflows"]) if n)
        lines.append(("steps left out", f"{told}   (worker: how many of its gradients overflowed in fp16)"))
    alone = summary["world_size"] > 1 and not summary["rounds"]
    unmet = "   (the ranks never exchanged anything: the run is shorter than a period)"
    lines += [
        (
            "training time",
            f"{duration(summary['wall_s'])}, evaluation not counted; {_steps(summary)} steps a rank",
        ),
        ("time of a rank, mean", times),
        (
            "read from other ranks",
            f"{size(summary['bytes_group'])} in groups, {size(summary['bytes_across'])} across groups",
        ),
        ("rounds", str(summary["rounds"]) + (unmet if alone else "")),
        ("peak memory", _memory(summary["peak_memory"])),
    ]
    if "periods" in summary:
        periods = [period for _, period in summary["periods"]]
        lines.append(("period", f"{periods[-1]} in the end, from {min(periods)} to {max(periods)}"))
    if "staleness" in summary:
        lines.append(("staleness", _staleness(summary["staleness"])))
    if "skipped" in summary:
        told = "  ".join(f"{r}: {n}" for r, n in enumerate(summary["skipped"]) if n)
        lines.append(
            ("messages left out", f"{told}   (rank: how many of those due; those before were not taken yet)")
        )
    if "forecast" in summary:
        lines.append(("forecast / measured", text(summary["forecast"])))
    lines.append(("run directory", directory))
    width = max(len(name) for name, _ in lines)
    return "\n" + "\n".join(f"{name:{width}}  {text}" for name, text in lines)


def _steps(summary: dict[str, Any]) -> str:
    own = summary.get("worker_steps")
    if own is None:
        return str(summary["steps"])
    return str(own[0]) if min(own) == max(own) else f"{min(own)} to {max(own)}"


def _memory(peaks: list[int]) -> str:
    return f"{size(max(peaks))} a rank at most, {size(sum(peaks))} in all (what ranks share counts for each)"


def _staleness(histogram: dict[str, int]) -> str:
    counts = {int(key): count for key, count in histogram.items()}
    mean = sum(key * count for key, count in counts.items()) / sum(counts.values())
    return (
        f"mean {mean:.2f}, at most {max(counts)} (centre updates by others between a worker's read and write)"
    )


def duration(seconds: float) -> str:
    """As 3.2 s, 4 min 05 s, 2 h 03 min."""
    if seconds < 99.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"


def size(count: float) -> str:
    """As 12.3 MB."""
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return f"{count / factor:.3g} {unit}"
    return f"{count:.0f} B"


def number(value: float | None) -> str:
    """A loss in seven columns."""
    return "   none" if value is None else f"{value:7.4f}" if abs(value) < 99 else f"{value:7.3g}"

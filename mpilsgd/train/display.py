"""What rank 0 tells while it trains, on a terminal or into a log, and the summary at the end."""

from __future__ import annotations

import shlex
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any, TextIO

from tqdm import tqdm

from mpilsgd.train.config import Config
from mpilsgd.train.judged import ERROR, LOSS, figure_of, more_of
from mpilsgd.train.stragglers import parse_slow
from mpilsgd.train.table import forecast_text
from mpilsgd.train.terminal import columns_of

_LIVE_PERIOD = 0.2  # seconds between changes of the bar
_QUIET = 60.0  # seconds after which a log is told that the run is alive
_BAR = "{percentage:3.0f} % {bar} {n_fmt}/{total_fmt}  {desc}  {rate_fmt}  {remaining} left"


class _Bar(tqdm):
    """Without the thread and the locks between processes that tqdm makes for bars in many of them."""

    monitor_interval = 0
    _lock = threading.RLock()


class Display:
    """One line for each evaluation; on a terminal a bar below it, elsewhere a line a minute. Silent on ranks but 0."""

    def __init__(self, rank: int, total_steps: int, batches: int, stream: TextIO | None = None):
        self.on = rank == 0
        self.stream = sys.stdout if stream is None else stream
        self.total, self.batches = total_steps, batches
        self.columns = columns_of(self.stream) if self.on else None
        self._bar: Any = None
        self._start: tuple[float, int] | None = None
        self._told = self._drawn = 0.0  # when there was last a line, and a change of the bar

    @property
    def live(self) -> bool:
        """Whether there is a bar."""
        return self.columns is not None

    def say(self, text: str) -> None:
        """A line of its own."""
        if not self.on:
            return
        self._told = time.monotonic()
        if self._bar is not None:
            self._bar.clear()
        self.stream.write(text + "\n")
        self.stream.flush()
        if self._bar is not None:
            self._bar.refresh()

    def step(self, step: int, loss: float | None) -> None:
        """How far it is, a few times a second on a terminal; loss: None on a rank that only averages."""
        if not self.on:
            return
        now = time.monotonic()
        if self._start is None:
            self._start = (now, step)
            self._told = max(self._told, now)
        if self.live:
            self._draw(step, now, loss)
        elif now - self._told > _QUIET and step < self.total:
            seconds, steps = now - self._start[0], max(step - self._start[1], 1)
            share = f"step {step}/{self.total} ({100 * step / self.total:.0f} %)"
            left = duration((self.total - step) * seconds / steps)
            self.say(f"{share}  {self._where(step, loss)}  {steps / seconds:.3g} steps/s  {left} left")

    def _draw(self, step: int, now: float, loss: float | None) -> None:
        if self._bar is None:
            self._bar = _Bar(
                total=self.total,
                initial=step,
                file=self.stream,
                ncols=(self.columns or 1) - 1,  # a full line would go on in the next
                desc=self._where(step, loss),
                mininterval=_LIVE_PERIOD,
                leave=False,
                unit=" steps",
                bar_format=_BAR,
            )
        elif now - self._drawn < _LIVE_PERIOD:  # reading the loss makes a GPU wait
            return
        self._drawn = now
        self._bar.set_description_str(self._where(step, loss), refresh=False)
        # in an asynchronous run a fast rank goes on for the slow ones
        self._bar.n = min(step, self.total)
        self._bar.refresh()

    def _where(self, step: int, loss: float | None) -> str:
        return f"epoch {step / self.batches:.2f}" + ("" if loss is None else f"  loss {loss:.4f}")

    def evaluation(self, row: dict[str, Any]) -> None:
        """The line for a line of metrics.jsonl."""
        width = len(str(self.total))
        told = [
            f"epoch {row['epoch']:6.2f}  step {int(row['step']):{width}}  {duration(row['wall_s']):>8}",
            f"train loss {number(row['train_loss'])}  test loss {number(row['test_loss'])}",
        ]
        if row.get(ERROR.key) is not None:
            told.append(f"test error {100 * row[ERROR.key]:5.2f} %")
        told += [f"{one.name.removeprefix('test ')} {number(row[one.key]).strip()}" for one in more_of([row])]
        if row["leader"] is not None:
            told.append(f"leader {row['leader']}")
        self.say("  ".join(told))

    def close(self) -> None:
        """Takes the bar away."""
        if self._bar is not None:
            self._bar.close()
        self._bar, self.columns = None, None

    def __enter__(self) -> Display:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


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
    options = "".join(f" {key}={value}" for key, value in config.shown_options.items())
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


def command_of(argv: Sequence[str], ranks: int) -> str:
    """The command that trains so, for a reader; the launcher's own options are not known."""
    launcher = [] if ranks == 1 else ["mpiexec", "-n", str(ranks)]
    return shlex.join([*launcher, "mpilsgd", "train", *argv])


def after_interrupt(directory: str, step: int, ranks: int) -> str:
    """What is left of a run that was interrupted."""
    return (
        f"{directory} has the checkpoint of step {step}. To go on: {command_of(['--resume', directory], ranks)}\n"
        f"To take its centre: mpilsgd export {shlex.quote(directory)} -o model.pt\n"
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
    figure, worker, best = figure_of([summary]), summary["best_worker"], summary.get("best")
    loss = "" if figure is LOSS else f"   (loss {number(summary['test_loss'])})"
    lines = [
        (f"{figure.name} of the centre", figure.text(summary[figure.key]) + loss),
        ("of the best worker", f"{figure.text(worker.get(figure.key))}   (rank {worker['rank']})"),
    ]
    if best is not None and best["step"] != summary["steps"]:
        lines.insert(1, ("at its best", f"{figure.text(best.get(figure.key))}   (step {best['step']:g})"))
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
        lines.append(("forecast / measured", forecast_text(summary["forecast"])))
    lines.append(("run directory", directory))
    lines += _usage(directory)
    width = max(len(name) for name, _ in lines)
    return "\n" + "\n".join(f"{name:{width}}  {text}" for name, text in lines)


def _usage(directory: str) -> list[tuple[str, str]]:
    """How the trained model is used."""
    center = f"{directory}/checkpoint/center.pt"
    return [
        ("load the result", f"model.load_state_dict(torch.load({center!r}))"),
        ("or as one file", f"mpilsgd export {shlex.quote(directory)} -o model.pt"),
    ]


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

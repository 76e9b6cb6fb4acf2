"""`mpilsgd bench kernels`: each fused update against the operations of torch that it stands for."""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from mpilsgd import devices, kernels
from mpilsgd.devices import on_host
from mpilsgd.train import bench_device
from mpilsgd.train.bench_updates import RATE, Contest, contests
from mpilsgd.train.table import columns, in_bytes, in_ms

ON_HOST = "triad a = b + s c"
ON_DEVICE = "copies on the device of as many bytes, read and written"


class Ruler(NamedTuple):
    """What tells how fast memory is: `call` moves so many vectors, reads and writes."""

    name: str
    call: Callable[[], object]
    vectors: int


def run(args: argparse.Namespace) -> int:
    """Measures and prints the table; exit status 2 if there is no such device, or too little memory on it."""
    place = bench_device.place(args.device)
    if place is None:
        print("mpilsgd bench: there is no CUDA device here", file=sys.stderr)
        return 2
    if args.threads:
        torch.set_num_threads(args.threads)
    dtype = getattr(torch, args.dtype)
    nbytes = args.size * dtype.itemsize
    sets = bench_device.how_many_sets(place, nbytes)
    # torch's mean of four stacks them and makes a fifth
    if not on_host(place) and (problem := devices.shortage(place, (4 * sets + 6) * nbytes)):
        print(f"mpilsgd bench: --size {args.size:,}: {problem}", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    vectors = [bench_device.vectors(place, dtype, args.size) for _ in range(sets)]
    every = _on_all(vectors)
    rulers = _triads(vectors[0]) if on_host(place) else _copies(vectors, every)
    sides = [side for contest in every for side in (contest.ours, contest.theirs)]
    gc.collect()
    grown = [_growth(side, place) for side in sides]  # also the warm-up
    for ruler in rulers:
        ruler.call()
    calls = [*sides, *(ruler.call for ruler in rulers)]
    seconds = _interleaved(calls, args.repetitions, bench_device.clock_of(place))
    measured = list(zip(rulers, seconds[len(sides) :], strict=True))
    here = f"{torch.get_num_threads()} thread(s), {kernels.instruction_set()} instructions"
    print(
        f"{args.size:,} x {args.dtype} ({in_bytes(nbytes)} a vector{f', {sets} sets of 4' if sets > 1 else ''}), "
        f"{bench_device.title(place) or here}, backend {kernels.backend(vectors[0][0])}, "
        f"medians of {args.repetitions} interleaved repetitions\n"
    )
    table = _table(every, seconds, grown, measured, nbytes, "triad" if on_host(place) else "copy")
    print(columns(table))
    print(f"\n{ON_HOST if on_host(place) else ON_DEVICE}, in the same run:")
    for ruler, taken in measured:
        rate = ruler.vectors * nbytes / taken / 1e9
        print(f"  {ruler.name}: {in_ms(taken)} ms, {ruler.vectors} vectors moved, {rate:.1f} GB/s")
    if on_host(place):
        print(
            "The faster triad counts. A store to memory that was not read before reads it first, unless it goes\n"
            "past the caches: such a triad moves 4 vectors, not 3. The updates store only where they have read."
        )
    else:
        figures = [
            f"{row[0]} {row[7]} of a copy, {row[4]} x {row[2]}" for row in table if row[5].startswith(">=")
        ]
        print(f"\nfigures: {args.size:.2g} x {args.dtype}: {'; '.join(figures)}")
    return 0


def _table(
    every: list[Contest],
    seconds: list[float],
    grown: list[float],
    measured: list[tuple[Ruler, float]],
    nbytes: int,
    ruler: str,
) -> list[list[str]]:
    """Rows: the bandwidth beside that of the copy of as many bytes, or of the fastest triad."""
    head = ["update", "ms", "against", "ms", "ratio", "target", "GB/s", f"of {ruler}", "target"]
    rows = [[*head, "memory +", "torch's +"]]
    for i, contest in enumerate(every):
        ours, theirs = seconds[2 * i : 2 * i + 2]
        rate = contest.vectors * nbytes / ours
        alike = [one for one in measured if ruler == "triad" or one[0].vectors == contest.vectors]
        best = max(one.vectors * nbytes / taken for one, taken in alike)
        row = [
            contest.name,
            in_ms(ours),
            contest.baseline,
            in_ms(theirs),
            f"{theirs / ours:.2f}",
            contest.target,
        ]
        row += [f"{rate / 1e9:.1f}", f"{rate / best:.2f}", "0.9"]
        rows.append([*row, in_bytes(grown[2 * i]), in_bytes(grown[2 * i + 1])])
    return rows


def _on_all(sets: Sequence[list[torch.Tensor]]) -> list[Contest]:
    """The contests over several sets of vectors, which they take in turns."""
    turns = bench_device.Turns(len(sets))
    return [
        same[0]._replace(
            ours=turns.of([one.ours for one in same]), theirs=turns.of([one.theirs for one in same])
        )
        for same in zip(*map(contests, sets), strict=True)
    ]


def _triads(vectors: list[torch.Tensor]) -> list[Ruler]:
    """torch's and the extension's, with and past the caches."""
    a, b, c = vectors[:3]
    triads = [Ruler("torch.add(b, c, alpha=s, out=a)", lambda: torch.add(b, c, alpha=RATE, out=a), 4)]
    if kernels.backend(a) != "reference" and a.dtype in (torch.float32, torch.float64):
        triads.append(Ruler("the extension's", lambda: kernels.triad(a, b, c, RATE, streaming=False), 4))
        triads.append(Ruler("the extension's, past the caches", lambda: kernels.triad(a, b, c, RATE), 3))
    return triads


def _copies(sets: Sequence[list[torch.Tensor]], every: list[Contest]) -> list[Ruler]:
    """For each number of vectors that a contest moves a copy that moves as many: it reads half and writes half."""
    turns, numel = bench_device.Turns(len(sets)), sets[0][0].numel()
    return [
        Ruler(f"copy_ of {n / 2:g}", turns.of(bench_device.copies(sets, n * numel // 2)), n)
        for n in sorted({contest.vectors for contest in every})
    ]


def _interleaved(
    calls: Sequence[Callable[[], object]], repetitions: int, clock: bench_device.HostClock
) -> list[float]:
    """Median seconds of each call: A B C, C B A, A B C ..., so that a slow spell of the machine meets all."""
    times: list[list[float]] = [[] for _ in calls]
    for repetition in range(repetitions):
        order = range(len(calls)) if repetition % 2 == 0 else reversed(range(len(calls)))
        marks = []
        for i in order:
            clock.ahead()
            start = clock.mark()
            calls[i]()
            marks.append((i, start, clock.mark()))
        for i, start, end in marks:
            times[i].append(clock.between(start, end))
    return [statistics.median(each) for each in times]


def _growth(call: Callable[[], object], place: torch.device) -> float:
    """Bytes by which memory peaks, during a second call, above what is held (the first sets things up)."""
    call()
    if place.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - held
    if not on_host(place):
        call()
        return float("nan")
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # the peak (VmHWM) starts anew
    except OSError:
        return float("nan")
    before = _status("VmRSS")
    call()
    return max(0.0, _status("VmHWM") - before)


def _status(key: str) -> float:
    """A size in /proc/self/status, in bytes."""
    with open("/proc/self/status") as file:
        return next(float(line.split()[1]) * 1024 for line in file if line.startswith(f"{key}:"))

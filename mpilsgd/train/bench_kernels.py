"""`mpilsgd bench kernels`: each fused update against the operations of torch that it stands for."""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch

from mpilsgd import kernels
from mpilsgd.train.table import columns, in_bytes, in_ms

RATE, OTHER_RATE = 0.1, 0.05
LR, MOMENTUM, DECAY = 1e-3, 0.9, 1e-4
OF_TRIAD = "0.9"


class Contest(NamedTuple):
    """One update, ours and torch's, on the same vectors.

    vectors: how many vectors the update must at least move (each read and each write of one counts once).
    """

    name: str
    baseline: str
    ours: Callable[[], object]
    theirs: Callable[[], object]
    vectors: int
    target: str = ""


def run(args: argparse.Namespace) -> int:
    """Measures and prints the table; exit status 2 if there is no such device."""
    if args.device == "cuda" and not torch.cuda.is_available():
        print("mpilsgd bench: there is no CUDA device here", file=sys.stderr)
        return 2
    if args.threads:
        torch.set_num_threads(args.threads)
    dtype, device = getattr(torch, args.dtype), torch.device(args.device)
    torch.manual_seed(0)
    vectors = [torch.rand(args.size, dtype=torch.float32, device=device).to(dtype) for _ in range(4)]
    contests = list(_contests(vectors))
    triads = _triads(vectors)
    nbytes = args.size * vectors[0].element_size()
    sides = [side for contest in contests for side in (contest.ours, contest.theirs)]
    gc.collect()
    grown = [_growth(side, device) for side in sides]  # also the warm-up
    seconds = _interleaved([*sides, *(triad for _, triad, _ in triads)], args.repetitions, device)
    rates = [
        moved * nbytes / taken for (_, _, moved), taken in zip(triads, seconds[len(sides) :], strict=True)
    ]
    bandwidth = max(rates)
    print(
        f"{args.size:,} x {args.dtype} ({in_bytes(nbytes)} a vector), {torch.get_num_threads()} thread(s), "
        f"{kernels.instruction_set()} instructions, backend {kernels.backend(vectors[0])}, "
        f"medians of {args.repetitions} interleaved repetitions\n"
    )
    rows = [
        [
            "update",
            "ms",
            "against",
            "ms",
            "ratio",
            "target",
            "GB/s",
            "of triad",
            "target",
            "memory +",
            "torch's +",
        ]
    ]
    for i, contest in enumerate(contests):
        ours, theirs = seconds[2 * i : 2 * i + 2]
        rate = contest.vectors * nbytes / ours
        row = [
            contest.name,
            in_ms(ours),
            contest.baseline,
            in_ms(theirs),
            f"{theirs / ours:.2f}",
            contest.target,
        ]
        row += [f"{rate / 1e9:.1f}", f"{rate / bandwidth:.2f}", OF_TRIAD]
        rows.append([*row, in_bytes(grown[2 * i]), in_bytes(grown[2 * i + 1])])
    print(columns(rows))
    print("\ntriad a = b + s c, in the same run:")
    for (name, _, moved), rate, taken in zip(triads, rates, seconds[len(sides) :], strict=True):
        print(f"  {name}: {in_ms(taken)} ms, {moved} vectors moved, {rate / 1e9:.1f} GB/s")
    print(
        "The faster triad counts. A store to memory that was not read before reads it first, unless it goes\n"
        "past the caches: such a triad moves 4 vectors, not 3. The updates store only where they have read."
    )
    return 0


def _contests(vectors: list[torch.Tensor]) -> Iterator[Contest]:
    """The updates over the same four vectors; they all draw the vectors together, so nothing overflows."""
    x, a, b, c = vectors

    def torch_elastic() -> None:
        d = x - c
        x.sub_(d, alpha=RATE)
        c.add_(d, alpha=RATE)

    def torch_moving_average() -> None:
        c.mul_(1.0 - 3 * RATE)
        for peer in (x, a, b):
            c.add_(peer, alpha=RATE)

    def torch_mean() -> None:
        mean = torch.stack(vectors).mean(0)
        for peer in vectors:
            peer.copy_(mean)

    def two_lerps() -> None:
        x.lerp_(a, RATE)
        x.lerp_(b, OTHER_RATE)

    yield Contest(
        "pull to one leader", "lerp_", lambda: kernels.pull(x, a, RATE), lambda: x.lerp_(a, RATE), 3
    )
    yield Contest(
        "pull to two leaders",
        "two lerp_",
        lambda: kernels.pull(x, a, RATE, b, OTHER_RATE),
        two_lerps,
        4,
        ">= 1.3",
    )
    yield Contest(
        "... with statistics",
        "two lerp_",
        lambda: kernels.pull(x, a, RATE, b, OTHER_RATE, stats=True),
        two_lerps,
        4,
    )
    yield Contest(
        "elastic pair",
        "3 operations",
        lambda: kernels.elastic(c, [x], RATE, RATE),
        torch_elastic,
        4,
        ">= 2.2",
    )
    yield Contest(
        "centre over 3 peers",
        "4 operations",
        lambda: kernels.elastic(c, [x, a, b], 0.0, RATE),
        torch_moving_average,
        5,
    )
    yield Contest("mean of 4 peers", "stack, mean, copy_", lambda: kernels.average(vectors), torch_mean, 8)
    yield Contest("running average", "lerp_", lambda: kernels.pull(c, x, 0.01), lambda: c.lerp_(x, 0.01), 3)
    for fused in (False, True):
        optimizer = _torch_sgd(x, a, fused)
        if optimizer is not None:
            yield Contest(
                "msgd (Nesterov)",
                "SGD fused=True" if fused else "SGD",
                lambda: kernels.msgd(x, a, b, LR, MOMENTUM, True, DECAY),
                optimizer.step,
                5,
            )
    plain = _torch_sgd(x, a, False)
    assert plain is not None
    step = plain.step

    def step_and_pull() -> None:
        step()
        x.lerp_(c, RATE)

    yield Contest(
        "msgd and pull",
        "SGD, lerp_",
        lambda: kernels.msgd(x, a, b, LR, MOMENTUM, True, DECAY, c, RATE),
        step_and_pull,
        6,
    )


def _torch_sgd(x: torch.Tensor, grad: torch.Tensor, fused: bool) -> torch.optim.SGD | None:
    """torch's SGD over a parameter that shares x's memory; None where it has no such implementation."""
    parameter = torch.nn.Parameter(x)
    parameter.grad = grad
    try:
        optimizer = torch.optim.SGD(
            [parameter], LR, momentum=MOMENTUM, nesterov=True, weight_decay=DECAY, fused=fused
        )
        optimizer.step()  # makes the velocity
    except RuntimeError:
        return None
    return optimizer


def _triads(vectors: list[torch.Tensor]) -> list[tuple[str, Callable[[], object], int]]:
    """(name, call, vectors moved) of torch's triad and the extension's, with and past the caches."""
    a, b, c = vectors[:3]
    cached = 3 if a.is_cuda else 4
    triads: list[tuple[str, Callable[[], object], int]]
    triads = [("torch.add(b, c, alpha=s, out=a)", lambda: torch.add(b, c, alpha=RATE, out=a), cached)]
    if kernels.backend(a) != "reference" and a.dtype in (torch.float32, torch.float64):
        triads.append(("the extension's", lambda: kernels.triad(a, b, c, RATE, streaming=False), cached))
        if not a.is_cuda:
            triads.append(("the extension's, past the caches", lambda: kernels.triad(a, b, c, RATE), 3))
    return triads


def _interleaved(
    calls: Sequence[Callable[[], object]], repetitions: int, device: torch.device
) -> list[float]:
    """Median seconds of each call: A B C, C B A, A B C ..., so that a slow spell of the machine meets all."""
    times: list[list[float]] = [[] for _ in calls]
    for repetition in range(repetitions):
        order = range(len(calls)) if repetition % 2 == 0 else reversed(range(len(calls)))
        for i in order:
            _wait(device)
            start = time.perf_counter()
            calls[i]()
            _wait(device)
            times[i].append(time.perf_counter() - start)
    return [statistics.median(each) for each in times]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _growth(call: Callable[[], object], device: torch.device) -> float:
    """Bytes by which memory peaks, during a second call, above what is held (the first sets things up)."""
    call()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - held
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

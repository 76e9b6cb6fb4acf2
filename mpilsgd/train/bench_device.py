"""Where a benchmark measures: the host, a GPU, or the emulated device of a build for tests; and its clocks."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from mpilsgd import devices, extension
from mpilsgd.devices import on_host

EMULATED = "emulated device: NOT A MEASUREMENT"
_L2 = 128_000_000  # bytes, where torch does not tell
_AHEAD = 200_000  # cycles, 0.1 ms


def place(name: str, rank: int = 0) -> torch.device | None:
    """For "cuda" the GPU of the node's rank `rank`, or an emulated one; None: there is none."""
    if name == "cpu":
        return extension.HOST
    if torch.cuda.is_available():
        device = torch.device("cuda", rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
        return device
    return None if extension.emulated is None else torch.device("cpu", 0)


def title(place: torch.device) -> str:
    """What it is, for the head of a table."""
    if place.type == "cuda":
        return str(torch.cuda.get_device_name(place))
    return "" if on_host(place) else EMULATED


def finish(place: torch.device) -> None:
    """Returns when the device has done all that it was given."""
    if place.type == "cuda":
        torch.cuda.synchronize(place)
    elif not on_host(place):
        devices.finish(place)


class HostClock:
    """Marks are the host's time, when the device has done what came before."""

    def __init__(self, place: torch.device):
        self._place = place

    def mark(self) -> Any:
        finish(self._place)
        return time.perf_counter()

    def between(self, start: Any, end: Any) -> float:
        """Seconds."""
        return float(end - start)

    def ahead(self) -> None:
        """Work for the device, while the host gives it more: so that it never waits for the host."""


class EventClock(HostClock):
    """Marks are events in the current stream of a GPU, and the host does not wait for them."""

    def mark(self) -> Any:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, start: Any, end: Any) -> float:
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3

    def ahead(self) -> None:
        torch.cuda._sleep(_AHEAD)


def clock_of(place: torch.device) -> HostClock:
    return EventClock(place) if place.type == "cuda" else HostClock(place)


class Turns:
    """Calls on several sets of vectors: each call, of whatever, is on the next set, so that none finds its vectors in a
    cache."""

    def __init__(self, sets: int):
        self._next = itertools.cycle(range(sets))

    def of(self, calls: Sequence[Callable[[], object]]) -> Callable[[], object]:
        """The calls on the first set, the second, ... as one."""
        return lambda: calls[next(self._next)]()


def how_many_sets(place: torch.device, nbytes: int) -> int:
    """Sets of four vectors, so that the others' are twice what the cache holds when a set comes again. One on the
    host, where the vectors are longer than its caches."""
    if on_host(place):
        return 1
    cache = (
        getattr(torch.cuda.get_device_properties(place), "L2_cache_size", _L2) if place.type == "cuda" else 0
    )
    return min(max(2, 1 + math.ceil(2 * cache / (4 * nbytes))), 64)


def vectors(place: torch.device, dtype: torch.dtype, numel: int) -> list[torch.Tensor]:
    """Four random vectors; on a device they follow each other in one memory."""
    if on_host(place):
        return [torch.rand(numel, dtype=torch.float32).to(dtype) for _ in range(4)]
    step = -(-numel * dtype.itemsize // 512) * 512 // dtype.itemsize
    memory = torch.rand(4 * step, dtype=torch.float32, device=place).to(dtype)
    return [memory[i * step : i * step + numel] for i in range(4)]


def copies(sets: Sequence[list[torch.Tensor]], numel: int) -> list[Callable[[], object]]:
    """Copies of so many elements, four vectors' at most, from the memory of each set to that of the next."""
    memories = [four[0].as_strided((numel,), (1,)) for four in sets]

    def copy(source: torch.Tensor, target: torch.Tensor) -> Callable[[], object]:
        return lambda: target.copy_(source)

    return [copy(a, b) for a, b in zip(memories, [*memories[1:], memories[0]], strict=True)]

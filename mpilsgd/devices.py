"""Memory of devices, beside torch's own: vectors that other processes can map, and events that they can wait for."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from mpilsgd.extension import core, emulated, emulated_current, stream_of


def on_host(place: torch.device) -> bool:
    return place.type == "cpu" and place.index is None


def capturing(place: torch.device) -> bool:
    """Whether the current stream's work goes into a CUDA graph, and is not done yet."""
    if place.type == "cuda":
        return torch.cuda.is_current_stream_capturing()
    return emulated is not None and not on_host(place) and bool(emulated.capturing(stream_of(place)))


def identity(place: torch.device) -> bytes:
    """Of the device, the same in all processes; empty where the extension has nothing to do with such devices."""
    known = core is not None and core.cuda and place.type in ("cpu", "cuda")
    told: bytes = core.device.identity(place.index) if known else b""
    return told


def shortage(place: torch.device, nbytes: int) -> str | None:
    """What is wrong with so many bytes more on a device."""
    if place.type == "cuda":
        torch.cuda.empty_cache()  # what torch keeps for itself is not free
    free, total = core.device.memory(place.index)
    if nbytes <= free:
        return None
    return (
        f"{nbytes / 1e9:.2f} GB are wanted on {place} by its ranks, of whose {total / 1e9:.2f} GB {free / 1e9:.2f} GB "
        "are free: a smaller model, fewer ranks a device, or more devices"
    )


class Memory:
    """Bytes of a device that other processes can map: zeros at first."""

    def __init__(self, place: torch.device, nbytes: int):
        self._place = place
        self.address: int = core.device.allocate(place.index, nbytes)
        core.device.fill(place.index, self.address, 0, nbytes, stream_of(place))

    def handle(self) -> bytes:
        handle: bytes = core.device.memory_handle(self._place.index, self.address)
        return handle

    def free(self) -> None:
        if self.address:
            core.device.release(self._place.index, self.address)
            self.address = 0


class Mapped:
    """Another process' `Memory`, here."""

    def __init__(self, place: torch.device, handle: bytes):
        self._place = place
        self.address: int = core.device.open_memory(place.index, handle)

    def free(self) -> None:
        if self.address:
            core.device.close_memory(self._place.index, self.address)
            self.address = 0


class Pinned:
    """Host memory that a device's copies read and write while the host goes on."""

    def __init__(self, place: torch.device):
        self._place, self._address = place, 0

    def pin(self, memory: Tensor) -> None:
        core.device.pin(memory.data_ptr(), memory.nbytes, self._place.index)
        self._address = memory.data_ptr()

    def free(self) -> None:
        if self._address:
            finish_all(self._place)
            core.device.unpin(self._address)
            self._address = 0


def copy(place: torch.device, to: int, source: int, nbytes: int) -> None:
    """Between addresses of the device or of pinned memory, by the current stream."""
    core.device.copy(place.index, to, source, nbytes, stream_of(place))


def vector(place: torch.device, address: int, dtype: torch.dtype, numel: int) -> Tensor:
    """The memory at an address, which must outlive it."""
    if numel == 0:
        return torch.empty(0, dtype=dtype, device=place)
    capsule = core.device.vector(place.index, address, numel * dtype.itemsize)
    bytes_there: Tensor = torch.from_dlpack(capsule)
    return bytes_there.view(dtype)


class Mark:
    """A point in what a stream does, for which streams of other processes can wait."""

    def __init__(self, place: torch.device, event: Any = None):
        self._place = place
        self._event = core.device.Event(place.index, True) if event is None else event

    @classmethod
    def of(cls, place: torch.device, handle: bytes) -> Mark:
        """Another process'."""
        return cls(place, core.device.Event.opened(place.index, handle))

    def handle(self) -> bytes:
        handle: bytes = self._event.handle()
        return handle

    def here(self) -> None:
        """It is where the current stream is now."""
        self._event.record(stream_of(self._place))

    def awaited(self) -> None:
        """What the current stream is given from now on comes after it."""
        self._event.wait(stream_of(self._place))


class Side:
    """A stream beside those that the steps are given to, for a thread's work; hosts wait for none.

    On a GPU of the lowest priority there is, torch's usual one: steps in a stream of a higher one go first. What is
    made on one stream and used on the other must not be freed before `awaited`: torch's allocator gives memory again in
    the order of the stream on which it was made.
    """

    def __init__(self, place: torch.device):
        self._place, self._stream = place, None
        if place.type == "cuda":
            self._stream = torch.cuda.Stream(place, priority=0)  # others are negative
        else:
            self.address = core.device.new_stream(place.index)
            self._given, self._done = (core.device.Event(place.index, False) for _ in range(2))

    def follows(self) -> None:
        """What it is given from now on comes after what the current stream was given."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._place))
        else:
            self._given.record(stream_of(self._place))
            self._given.wait(self.address)

    def awaited(self) -> None:
        """What the current stream is given from now on comes after what it was given."""
        if self._stream is not None:
            torch.cuda.current_stream(self._place).wait_stream(self._stream)
        else:
            self._done.record(self.address)
            self._done.wait(stream_of(self._place))

    @contextlib.contextmanager
    def current(self) -> Iterator[None]:
        """Of this thread, inside."""
        if self._stream is not None:
            with torch.cuda.stream(self._stream):
                yield
            return
        emulated_current.stream = self.address
        try:
            yield
        finally:
            emulated_current.stream = 0

    def free(self) -> None:
        """When its work is done. Torch keeps its streams."""
        if self._stream is None:
            core.device.drop_stream(self._place.index, self.address)


def side(place: torch.device) -> Side | None:
    """None where work has no streams."""
    return (
        Side(place)
        if place.type == "cuda" or (core is not None and core.cuda and not on_host(place))
        else None
    )


def finish(place: torch.device) -> None:
    """Returns when the current stream has done all that it was given."""
    if place.type == "cuda":
        torch.cuda.current_stream(place).synchronize()
    else:
        core.device.synchronize(place.index, stream_of(place))


def finish_all(place: torch.device) -> None:
    """The same for all streams of this process."""
    if place.type == "cuda":
        torch.cuda.synchronize(place)
    else:
        finish(place)

"""Vectors in device memory, of a GPU or of the emulated device, laid out as they are on the host."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Iterable

import torch

from mpilsgd import extension


def device_bytes(nbytes: int, device: int = 0) -> torch.Tensor:
    """So many bytes, at a multiple of 64; given back with the last tensor that looks at them."""
    if extension.emulated is None:
        return torch.empty(nbytes, dtype=torch.uint8, device=f"cuda:{device}")
    address = extension.core.device.allocate(device, nbytes)
    memory = (ctypes.c_ubyte * nbytes).from_address(address)
    weakref.finalize(memory, extension.core.device.release, device, address)
    return torch.frombuffer(memory, dtype=torch.uint8)


def to_device(vectors: Iterable[torch.Tensor], device: int = 0) -> list[torch.Tensor]:
    """Copies that are as far from a multiple of 64 bytes as these are."""
    vectors = list(vectors)
    places, end = [], 0
    for x in vectors:
        begin = end + (x.data_ptr() if x.numel() else 0) % 64
        places.append(begin)
        end = -(-(begin + x.numel() * x.element_size()) // 64) * 64
    memory = device_bytes(end or 64, device)
    copies = []
    for x, begin in zip(vectors, places, strict=True):
        copies.append(memory[begin : begin + x.numel() * x.element_size()].view(x.dtype))
        copies[-1].copy_(x)
    return copies


def wait() -> None:
    """For all kernels, as an operation of torch on a GPU does by itself."""
    if extension.emulated is not None:
        extension.emulated.drain()


def to_host(x: torch.Tensor) -> torch.Tensor:
    wait()
    return x.cpu().clone()

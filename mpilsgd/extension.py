"""The compiled extension: whether it is there, what it runs on, and how a vector is handed to it."""

from __future__ import annotations

import importlib
import sys
import threading
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mpilsgd.reference import Moved

core: Any = None
missing = ""
try:
    core = importlib.import_module("mpilsgd._core")
except ImportError as error:
    missing = str(error)

DTYPES: dict[torch.dtype, Any] = {
    dtype: None if core is None else getattr(core.DType, str(dtype).removeprefix("torch."))
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16)
}
HALF = (torch.bfloat16, torch.float16)
_warned: set[str] = set()
_PACKAGE = str(Path(__file__).parent)


class FallbackWarning(UserWarning):
    """The compiled kernels are missing, and slower torch operations take their place."""


# A build for tests has device memory that torch takes for the host's; else None (csrc/emulated).
emulated: Any = getattr(core, "emulated", None)


class _Current(threading.local):
    """A thread's."""

    stream = 0  # the default one


emulated_current = _Current()
HOST = torch.device("cpu")


def device_of(x: Tensor) -> int:
    """The index of the CUDA device where x lies; -1: on the host, or on another kind of device."""
    if x.is_cpu:
        return -1 if emulated is None else emulated.owner(x.data_ptr())
    return x.device.index if x.is_cuda else -1


def place_of(x: Tensor) -> torch.device:
    """Where x lies. An emulated device is a numbered "cpu"; the host's memory has no number."""
    index = device_of(x)
    if index >= 0:
        return torch.device(x.device.type, index)
    return HOST if x.is_cpu else x.device


def stream_of(place: torch.device) -> int:
    """The stream to which torch gives its work there."""
    return torch.cuda.current_stream(place).cuda_stream if place.type == "cuda" else emulated_current.stream


def backend(x: Tensor) -> str:
    """What updates a tensor like x: "cpu", "cuda" or "reference"."""
    if core is not None and x.dtype in DTYPES:
        if device_of(x) >= 0:
            return "cuda" if core.cuda else "reference"
        if x.is_cpu:
            return "cpu"
    return "reference"


def instruction_set() -> str:
    """What the CPU kernels are compiled for: "avx512", "avx2", "baseline" (none: "reference")."""
    return "reference" if core is None else core.instruction_set()


def where_to_run(x: Tensor, stats: bool, seed: int = 0) -> Any:
    """Where and how the extension shall run; None: it cannot, the reference must."""
    if core is None:
        _warn(
            f"the extension mpilsgd._core is not there ({missing})",
            "pip install . in the checkout builds it",
        )
        return None
    seed &= 0xFFFFFFFF
    if x.is_cpu and (emulated is None or device_of(x) < 0):
        return core.Where(DTYPES[x.dtype], x.numel(), -1, torch.get_num_threads(), stats, seed)
    if core.cuda and (x.is_cuda or x.is_cpu):
        return core.Where(DTYPES[x.dtype], x.numel(), device_of(x), stream_of(x.device), stats, seed)
    hint = (
        "build it with -C cmake.define.MPILSGD_CUDA=ON" if x.is_cuda else "there are kernels for cpu and cuda"
    )
    _warn(f"the extension mpilsgd._core has no kernels for {x.device.type} tensors", hint)
    return None


def _warn(problem: str, hint: str) -> None:
    """Once, at the line that called the package."""
    if problem in _warned:
        return
    _warned.add(problem)
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_PACKAGE):
        level, frame = level + 1, frame.f_back
    told = f"{problem}: slower torch operations take their place ({hint})"
    warnings.warn(told, FallbackWarning, stacklevel=level)


def moved(result: Any) -> Moved | None:
    """What a kernel found out: None, a tuple, or on a device a Pending, which is waited for."""
    if result is None:
        return None
    return Moved(*(result if type(result) is tuple else result.get()))


def pointer(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def pointers(peers: Sequence[Tensor]) -> list[int]:
    return [x.data_ptr() for x in peers]

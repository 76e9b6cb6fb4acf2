"""The compiled extension: whether it is there, what it runs on, and how a vector is handed to it."""

from __future__ import annotations

import importlib
import sys
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
INLINE_PEERS = 64  # more go through device memory (cuda.cu)
_warned: set[str] = set()
_PACKAGE = str(Path(__file__).parent)


class FallbackWarning(UserWarning):
    """The compiled kernels are missing, and slower torch operations take their place."""


def backend(x: Tensor) -> str:
    """What updates a tensor like x: "cpu", "cuda" or "reference"."""
    if core is not None and x.dtype in DTYPES and (x.is_cpu or (x.is_cuda and core.cuda)):
        return x.device.type
    return "reference"


def instruction_set() -> str:
    """What the CPU kernels are compiled for: "avx512", "avx2", "baseline" (none: "reference")."""
    return "reference" if core is None else core.instruction_set()


def where_to_run(x: Tensor, stats: bool, n_peers: int = 0, seed: int = 0) -> Any:
    """Where and how the extension shall run; None: it cannot, the reference must."""
    if core is None:
        _warn(
            f"the extension mpilsgd._core is not there ({missing})",
            "pip install . in the checkout builds it",
        )
        return None
    seed &= 0xFFFFFFFF
    if x.is_cpu:
        return core.Where(DTYPES[x.dtype], x.numel(), -1, torch.get_num_threads(), None, stats, seed)
    if x.is_cuda and core.cuda:
        stream = torch.cuda.current_stream(x.device)
        workspace = None
        if stats or n_peers > INLINE_PEERS:
            size = core.cuda_workspace_bytes(n_peers)
            workspace = torch.empty(size, dtype=torch.uint8, device=x.device)
        place = (x.device.index, stream.cuda_stream, workspace)
        return core.Where(DTYPES[x.dtype], x.numel(), *place, stats, seed)
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


def moved(result: tuple[float, bool, bool, tuple[int, ...]] | None) -> Moved | None:
    return None if result is None else Moved(*result)


def pointer(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def pointers(peers: Sequence[Tensor]) -> list[int]:
    return [x.data_ptr() for x in peers]

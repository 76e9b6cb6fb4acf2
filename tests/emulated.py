"""Tensors of an emulated device, for machines that have none: see csrc/emulated.

Their memory is that of the extension's emulation; for torch they are CPU tensors. Within `Emulation` torch treats them
as it treats a GPU's: its operations come on the thread's stream after what was given to it before, what they make of
such tensors lies on the device, too, and nothing comes to the host but by asking for it. Copies are as late as kernels;
other operations are done at once, when the stream has done all before. Memory that is given up is given again to the
same stream, without waiting for others. DEVICE stands for the emulated device in `.to(...)` and `device=...`. `waits`
counts what would keep the host waiting for a GPU.
"""

from __future__ import annotations

import collections
import ctypes
import os
from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

from mpilsgd.extension import core, emulated_current

DEVICE = torch.device("cpu", 0)
waits: collections.Counter[str] = collections.Counter()
# by the stream on which it was made, and its size
_free: dict[tuple[int, int], list[Block]] = collections.defaultdict(list)


class Block:
    """Memory of the device, kept for the next that wants as much, as torch's allocator does it."""

    def __init__(self, key: tuple[int, int]):
        self.key, nbytes = key, key[1]
        self.address: int = core.device.allocate(0, nbytes)


def _block(nbytes: int) -> tuple[Block, Any]:
    nbytes = -(-nbytes // 512) * 512
    key = emulated_current.stream, nbytes
    block = _free[key].pop() if _free[key] else Block(key)
    memory = (ctypes.c_ubyte * nbytes).from_address(block.address)
    memory._gives_back = _GivesBack(block)  # type: ignore[attr-defined]
    return block, memory


class _GivesBack:
    def __init__(self, block: Block):
        self._block, self._process = block, os.getpid()

    def __del__(self) -> None:
        if os.getpid() == self._process:
            _free[self._block.key].append(self._block)


def drain() -> None:
    """What the thread's stream was given is done."""
    core.emulated.drain(emulated_current.stream)


def there(x: Any) -> bool:
    """Whether it lies on the device."""
    if not isinstance(x, torch.Tensor) or x.layout is not torch.strided or x.device.type != "cpu":
        return False
    storage = x.untyped_storage()
    return storage.nbytes() > 0 and core.emulated.owner(storage.data_ptr()) >= 0


def placed(x: torch.Tensor, values: bool = True) -> torch.Tensor:
    """A copy on the device, laid out as x; without values, NaN."""
    return x if x.numel() == 0 or there(x) else _copy(x, values)


def _copy(x: torch.Tensor, values: bool) -> torch.Tensor:
    dense = x if x.is_contiguous() else torch.empty_like(x).copy_(x)
    span = 1 + sum((n - 1) * s for n, s in zip(dense.shape, dense.stride(), strict=True))
    _, memory = _block(span * x.element_size())
    flat = torch.frombuffer(memory, dtype=torch.uint8, count=span * x.element_size()).view(x.dtype)
    copy = flat.as_strided(dense.shape, dense.stride())
    if values:
        drain()  # what has been done to it before, by the stream
        return copy.copy_(dense)
    core.emulated.copy_later(flat.data_ptr(), 0, span * x.element_size(), emulated_current.stream)
    return copy


def _is_device(given: Any) -> bool:
    if isinstance(given, torch.Tensor):
        return there(given)
    return isinstance(given, torch.device | str) and torch.device(given) == DEVICE


class _Operations(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        every, _ = tree_flatten((args, kwargs))
        on_device = any(there(x) for x in every)
        if func is torch.ops.aten.copy_.default and _alike(*args[:2]):
            return _copy_later(*args[:2])
        plain = kwargs.get("memory_format") in (None, torch.contiguous_format, torch.preserve_format)
        if func is torch.ops.aten.clone.default and plain and _alike(args[0], args[0]) and args[0].numel():
            return _copy_later(_copy(args[0], False), args[0])
        if on_device and not func.is_view:
            drain()
            if func is torch.ops.aten._local_scalar_dense.default:
                waits["a number of a tensor"] += 1
        out = func(*args, **kwargs)
        if not on_device:
            return out
        given = {x.untyped_storage().data_ptr() for x in every if isinstance(x, torch.Tensor)}

        def place(x: torch.Tensor) -> torch.Tensor:
            return x if x.untyped_storage().data_ptr() in given else placed(x, "empty" not in func.name())

        return tree_map_only(torch.Tensor, place, out)


def _alike(to: torch.Tensor, source: torch.Tensor) -> bool:
    """Whether the one is copied into the other byte for byte, on the device."""
    same = to.dtype == source.dtype and to.shape == source.shape
    return same and there(to) and there(source) and to.is_contiguous() and source.is_contiguous()


def _copy_later(to: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    nbytes = to.numel() * to.element_size()
    if nbytes and to.data_ptr() != source.data_ptr():
        core.emulated.copy_later(to.data_ptr(), source.data_ptr(), nbytes, emulated_current.stream)
    return to


class _Calls(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if name == "__deepcopy__" and there(args[0]):
            drain()  # its bytes are read
        if args and there(args[0]) and name in ("cpu", "numpy", "tolist", "to"):
            targets = [*args[1:], kwargs.get("device"), kwargs.get("other")]
            if name == "cpu" or (name == "to" and _to_host(targets)):
                waits[f".{name}()"] += 1
                drain()
                rest = [a for a in args[1:] if not _place(a)] if name == "to" else []
                kwargs.pop("device", None), kwargs.pop("other", None)
                copy = args[0].detach().clone()  # on the device
                host = torch.empty(copy.shape, dtype=copy.dtype).copy_(copy)
                return host.to(*rest, **kwargs) if rest or kwargs else host
            if name in ("numpy", "tolist"):
                raise TypeError(f"can't convert a tensor of an emulated device to {name}: use .cpu() first")
        moves = name == "to" and args and isinstance(args[0], torch.Tensor)
        if moves and any(_is_device(t) for t in [*args[1:], kwargs.get("device"), kwargs.get("other")]):
            return _to_device(func, args, kwargs)
        if isinstance(kwargs.get("device"), torch.device | str) and torch.device(kwargs["device"]) == DEVICE:
            kwargs["device"] = "cpu"
            with torch.no_grad():
                out = func(*args, **kwargs)
            return placed(out).requires_grad_(out.requires_grad)
        return func(*args, **kwargs)


def _place(given: Any) -> bool:
    return isinstance(given, torch.device | str | torch.Tensor)


def _to_host(targets: list[Any]) -> bool:
    """Whether it goes to the host's memory: to a place that is none of the device's."""
    named = [t for t in targets if _place(t)]
    return bool(named) and not any(_is_device(t) for t in named)


def _to_device(func: Any, args: Any, kwargs: dict[str, Any]) -> torch.Tensor:
    tensor, *rest = args
    dtypes = [t.dtype for t in [*rest, kwargs.get("other")] if isinstance(t, torch.Tensor)]
    dtypes += [t for t in [*rest, kwargs.get("dtype")] if isinstance(t, torch.dtype)]
    out = tensor.to(dtypes[0]) if dtypes else tensor
    if not there(out):
        return placed(out.detach()).requires_grad_(out.requires_grad and not out.grad_fn)
    return out.clone() if kwargs.get("copy") and out is tensor else out


_pickled = torch.Tensor._reduce_ex_internal


def _pickle(x: torch.Tensor, protocol: Any) -> Any:
    if there(x):
        drain()  # as above; torch does not ask modes first
    return _pickled(x, protocol)


if getattr(core, "emulated", None) is not None:
    torch.Tensor._reduce_ex_internal = _pickle  # type: ignore[method-assign]


class Emulation:
    """Within it torch knows of the emulated device. Of one thread."""

    def __enter__(self) -> None:
        self._modes = [_Operations(), _Calls()]
        for mode in self._modes:
            mode.__enter__()

    def __exit__(self, *error: Any) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(*error)


def emulating(do: Callable[..., Any]) -> Callable[..., Any]:
    """As a thread of the package's has to be run."""

    def run(*args: Any) -> Any:
        with Emulation():
            return do(*args)

    return run

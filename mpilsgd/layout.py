"""Where a model's tensors lie in flat vectors: order, gaps and ties, checked before anything moves."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

ALIGNMENT = 64  # bytes: a cache line, and what oneDNN and the SIMD kernels like best


class Plan:
    """The layout, with every check, before anything is touched."""

    def __init__(self, source: nn.Module | Iterable[Tensor], buffers: Iterable[Tensor]) -> None:
        tensors, names, extra = _listed(source, buffers)
        self.names = {id(t): name for t, name in reversed(list(zip(tensors, names, strict=True)))}
        self.parameters = _unique(t for t in tensors if t.requires_grad)
        taken = {id(t) for t in self.parameters}
        frozen = _unique(t for t in tensors if not t.requires_grad)
        for i, buffer in enumerate(extra):
            shape = tuple(_tensor(buffer, "buffer", i).shape)
            self.names.setdefault(id(buffer), f"buffer {i} of shape {shape}")
        self.buffers = [b for b in _unique(extra) if id(b) not in taken]
        if not self.parameters:
            shapes = ", ".join(str(tuple(t.shape)) for t in tensors[:4]) or "none"
            raise ValueError(f"no parameter to train among the {len(tensors)} given (shapes: {shapes})")
        for tensor in [*self.parameters, *self.buffers]:
            self._check(tensor)
        self.places: dict[int, Place] = {}
        self.sizes: dict[torch.dtype, int] = {}
        self._first: dict[object, Tensor] = {}
        for parameter in self.parameters:
            self._lay(parameter)
        parts = dict(self.sizes)
        for buffer in self.buffers:
            self._lay(buffer)
        self.n_parameters = {dtype: parts.get(dtype, 0) for dtype in self.sizes}
        self.primaries = {id(t) for t in self._first.values()}
        self._check_overlaps()
        self.followers = [t for t in frozen if id(t) not in self.places and self._follows(t)]

    def _check(self, tensor: Tensor) -> None:
        name, first = self.names[id(tensor)], self.parameters[0]
        if is_lazy(tensor):
            raise ValueError(f"{name.split(' of shape')[0]} has no shape yet: run the model once before")
        if not tensor.is_floating_point():
            raise ValueError(f"{name} is {tensor.dtype}: only floating-point tensors will do")
        if tensor.layout != torch.strided or tensor.is_meta:
            raise ValueError(f"{name} is {tensor.layout} on {tensor.device}: only dense tensors will do")
        if not tensor.is_leaf:
            raise ValueError(f"{name} is the result of an operation, not a leaf")
        if tensor.device != first.device:
            raise ValueError(f"{name} is on {tensor.device}, but {self.names[id(first)]} on {first.device}")
        if tensor.requires_grad and _overlaps_itself(tensor):
            raise ValueError(
                f"{name} has elements on top of each other (strides {tensor.stride()}): clone it"
            )

    def _lay(self, tensor: Tensor) -> None:
        key = _memory(tensor)
        first = self._first.setdefault(key, tensor)
        end = self.sizes.get(tensor.dtype, 0)
        start = end if first is tensor else self.places[id(first)].start
        self._put(tensor, start, end if tensor.requires_grad else start)
        if first is tensor or tensor.requires_grad:
            self.sizes[tensor.dtype] = end + padded(tensor.numel(), tensor.dtype)

    def _put(self, tensor: Tensor, start: int, slot: int) -> None:
        # A tensor with gaps becomes dense with its dimensions in the same order, all others stay as they are.
        strides = torch.empty_like(tensor.detach(), device="meta").stride()
        self.places[id(tensor)] = Place(tensor.dtype, start, slot, tensor.numel(), tensor.shape, strides)

    def _follows(self, tensor: Tensor) -> bool:
        if tensor.layout != torch.strided or is_lazy(tensor):
            return False
        first = self._first.get(_memory(tensor))
        if first is None:
            return False
        self._put(tensor, self.places[id(first)].start, self.places[id(first)].slot)
        return True

    def _check_overlaps(self) -> None:
        ranges = sorted((*_extent(t), i) for i, t in enumerate(self._first.values()) if t.numel())
        tensors = list(self._first.values())
        for (_, stop, i), (start, _, j) in pairwise(ranges):
            if start < stop:
                one, two = (self.names[id(tensors[k])] for k in sorted((i, j)))
                raise ValueError(f"{two} shares a part of its memory with {one}: clone one of them")


@dataclass(frozen=True)
class Place:
    """Where one tensor lies: `start` of its values and `slot` of its gradient, in elements.

    They differ only for a second Parameter on the same memory: the values are shared, the gradients are not.
    """

    dtype: torch.dtype
    start: int
    slot: int
    numel: int
    shape: torch.Size
    strides: tuple[int, ...]


def digest(parameters: nn.Module | Iterable[Tensor], buffers: Iterable[Tensor] = ()) -> str:
    """SHA-256 of the order, shapes, dtypes, layouts and ties, as FlatParameters would lay them out.

    Equal models on two ranks give equal digests. Nothing is changed. Raises as FlatParameters does.
    """
    plan = Plan(parameters, buffers)
    rows = [(name, plan.places[id(t)]) for name in ("parameters", "buffers") for t in getattr(plan, name)]
    lines = []
    for name, p in rows:
        strides = [stride if size > 1 else 0 for size, stride in zip(p.shape, p.strides, strict=True)]
        lines.append(f"{name} {p.dtype} {tuple(p.shape)} {strides} {p.start} {p.slot}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def float_buffers(modules: Iterable[nn.Module]) -> list[Tensor]:
    """The floating-point buffers of these modules, in order, each once."""
    buffers = (b for module in modules for b in module.buffers() if b.is_floating_point())
    return list({id(b): b for b in buffers}.values())


def _listed(
    source: nn.Module | Iterable[Tensor], buffers: Iterable[Tensor]
) -> tuple[list[Tensor], list[str], list[Tensor]]:
    if isinstance(source, Tensor):
        raise TypeError("a single tensor was given; a Module or a list of parameters is needed")
    if isinstance(source, nn.Module):
        named = list(source.named_parameters())
        labels = [f"parameter {i} ({name})" for i, (name, _) in enumerate(named)]
        tensors: list[Tensor] = [p for _, p in named]
        extra = [*float_buffers([source]), *buffers]
    else:
        tensors, extra = list(source), list(buffers)
        labels = [f"parameter {i}" for i in range(len(tensors))]
    names = []
    for i, (tensor, label) in enumerate(zip(tensors, labels, strict=True)):
        shape = "?" if is_lazy(tensor) else tuple(_tensor(tensor, "parameter", i).shape)
        names.append(f"{label} of shape {shape}")
    return tensors, names, extra


def _tensor(thing: Tensor, kind: str, index: int) -> Tensor:
    if not isinstance(thing, Tensor):
        raise TypeError(f"{kind} {index} is a {type(thing).__name__}, not a tensor")
    return thing


def _unique(tensors: Iterable[Tensor]) -> list[Tensor]:
    return list({id(t): t for t in tensors}.values())


def padded(numel: int, dtype: torch.dtype) -> int:
    line = ALIGNMENT // dtype.itemsize
    return -(-numel // line) * line


def _extent(tensor: Tensor) -> tuple[int, int]:
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


def _memory(tensor: Tensor) -> object:
    """Equal for tensors that are tied: the same elements, whatever their order in dense ones."""
    if tensor.numel() == 0:
        return id(tensor)
    start, stop = _extent(tensor)
    if stop - start == tensor.numel() * tensor.element_size() and not _overlaps_itself(tensor):
        return (tensor.device, start, stop, tensor.dtype)
    return (tensor.device, start, stop, tensor.dtype, tensor.shape, tensor.stride())


def _overlaps_itself(tensor: Tensor) -> bool:
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and tensor.numel():
            if stride <= reach:
                return True
            reach += (size - 1) * stride
    return False

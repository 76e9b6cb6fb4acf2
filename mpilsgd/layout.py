"""Where a model's tensors lie in flat vectors: names, order, gaps and ties, checked before anything moves."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from mpilsgd.names import (
    Described,
    canonical,
    find_modules,
    first_difference,
    parameter_names,
    without_collector,
    without_prefix,
)

__all__ = [
    "Place",
    "Plan",
    "canonical",
    "digest",
    "find_modules",
    "first_difference",
    "float_buffers",
    "padded",
    "parameter_names",
]

ALIGNMENT = 64  # bytes: a cache line, and what oneDNN and the SIMD kernels like best


class Plan:
    """The layout, with every check, before anything is touched.

    Args:
        source: the parameters, or a Module, which stands for its parameters and float buffers.
        buffers: float tensors that lie behind the parameters.
        names: id of a tensor -> its name, for what is said of it; a Module's are known. A tensor without one
            is named by its place.
    """

    @without_collector()
    def __init__(
        self,
        source: nn.Module | Iterable[Tensor],
        buffers: Iterable[Tensor] = (),
        names: Mapping[int, str] | None = None,
    ) -> None:
        if isinstance(source, Tensor):
            raise TypeError("a single tensor was given; a Module or a list of parameters is needed")
        extra = list(buffers)
        if isinstance(source, nn.Module):
            extra = [*float_buffers([source]), *extra]
            names = {**parameter_names([source]), **(names or {})}
            source = source.parameters()
        tensors = list(source)
        self.names: Mapping[int, str] = names or {}
        self._listed = (tensors, extra)
        for kind, listed in (("parameter", tensors), ("buffer", extra)):
            for i, thing in enumerate(listed):
                if not isinstance(thing, Tensor):
                    raise TypeError(f"{kind} {i} is a {type(thing).__name__}, not a tensor")
        self.parameters = _unique(t for t in tensors if t.requires_grad)
        taken = {id(t) for t in self.parameters}
        self.buffers = [b for b in _unique(extra) if id(b) not in taken]
        if not self.parameters:
            shapes = ", ".join(str(tuple(t.shape)) for t in tensors[:4]) or "none"
            raise ValueError(f"no parameter to train among the {len(tensors)} given (shapes: {shapes})")
        for tensor in [*self.parameters, *self.buffers]:
            self._check(tensor)
        self.places: dict[int, Place] = {}
        self.sizes: dict[torch.dtype, int] = {}
        self._first: dict[object, Tensor] = {}
        self._ranges: list[tuple[int, int, Tensor]] = []
        for parameter in self.parameters:
            self._lay(parameter)
        parts = dict(self.sizes)
        for buffer in self.buffers:
            self._lay(buffer)
        self.n_parameters = {dtype: parts.get(dtype, 0) for dtype in self.sizes}
        self.primaries = {id(t) for t in self._first.values()}
        self._check_overlaps()
        frozen = _unique(t for t in tensors if not t.requires_grad)
        self.followers = [t for t in frozen if id(t) not in self.places and self._follows(t)]

    def name(self, tensor: Tensor) -> str:
        """As one speaks of it: "parameter layer1.0.weight", or by its place, "parameter 3"."""
        for kind, listed in zip(("parameter", "buffer"), self._listed, strict=True):
            for i, other in enumerate(listed):
                if other is tensor:
                    return f"{kind} {self.names.get(id(tensor), i)}"
        known = self.names.get(id(tensor))  # frozen, for one
        return f"a tensor of shape {tuple(tensor.shape)}" if known is None else f"parameter {known}"

    def _label(self, tensor: Tensor) -> str:
        return f"{self.name(tensor)} of shape {tuple(tensor.shape)}"

    def _check(self, tensor: Tensor) -> None:
        if is_lazy(tensor):
            raise ValueError(f"{self.name(tensor)} has no shape yet: run the model once before")
        if not tensor.is_floating_point():
            raise ValueError(f"{self._label(tensor)} is {tensor.dtype}: only floating-point tensors will do")
        if tensor.layout != torch.strided or tensor.is_meta:
            where = f"{tensor.layout} on {tensor.device}"
            raise ValueError(f"{self._label(tensor)} is {where}: only dense tensors will do")
        if not tensor.is_leaf:
            raise ValueError(f"{self._label(tensor)} is the result of an operation, not a leaf")
        first = self.parameters[0]
        if tensor.device != first.device:
            there = f"{self._label(first)} on {first.device}"
            raise ValueError(f"{self._label(tensor)} is on {tensor.device}, but {there}")
        if tensor.requires_grad and not tensor.is_contiguous() and _overlaps_itself(tensor):
            strides = tensor.stride()
            raise ValueError(
                f"{self._label(tensor)} has elements on top of each other (strides {strides}): clone it"
            )

    def _lay(self, tensor: Tensor) -> None:
        dtype, numel = tensor.dtype, tensor.numel()
        start, stop = _extent(tensor)
        first = self._first.setdefault(_memory(tensor, start, stop), tensor)
        end = self.sizes.get(dtype, 0)
        if first is not tensor:
            start = self.places[id(first)].start
            self._put(tensor, start, end if tensor.requires_grad else start)
        else:
            if numel:
                self._ranges.append((start, stop, tensor))
            self._put(tensor, end, end)
        if first is tensor or tensor.requires_grad:
            self.sizes[dtype] = end + padded(numel, dtype)

    def _put(self, tensor: Tensor, start: int, slot: int) -> None:
        # A tensor with gaps becomes dense with its dimensions in the same order, all others stay as they are.
        dense = tensor if tensor.is_contiguous() else torch.empty_like(tensor.detach(), device="meta")
        place = Place(tensor.dtype, start, slot, tensor.numel(), tensor.shape, dense.stride())
        self.places[id(tensor)] = place

    def _follows(self, tensor: Tensor) -> bool:
        if tensor.layout != torch.strided or is_lazy(tensor) or tensor.device != self.parameters[0].device:
            return False
        first = self._first.get(_memory(tensor, *_extent(tensor)))
        if first is None:
            return False
        self._put(tensor, self.places[id(first)].start, self.places[id(first)].slot)
        return True

    def _check_overlaps(self) -> None:
        self._ranges.sort(key=lambda item: item[:2])
        for (_, stop, one), (start, _, two) in pairwise(self._ranges):
            if start < stop:
                order = list(self.places)
                one, two = sorted((one, two), key=lambda t: order.index(id(t)))
                raise ValueError(
                    f"{self._label(two)} shares a part of its memory with {self._label(one)}: clone one of them"
                )

    @without_collector()
    def described(self) -> list[Described]:
        """What the ranks' models must have in common: each parameter and buffer, in order."""
        told = []
        for kind, tensors in (("parameter", self.parameters), ("buffer", self.buffers)):
            for t in tensors:
                place, name = self.places[id(t)], self.names.get(id(t))
                shape, strides = tuple(place.shape), place.strides
                if 1 in shape:  # along such a dimension any stride means the same
                    strides = tuple(n if size > 1 else 0 for size, n in zip(shape, strides, strict=True))
                where = (strides, place.start, place.slot)
                told.append(Described(kind, name, f"{shape} {place.dtype}", where))
        return told

    def digest(self) -> str:
        """SHA-256 of the order, names, shapes, dtypes, layouts and ties: equal for equal models on two ranks.

        A prefix that all names have does not count: `torch.compile`, for one, adds it on the rank where it is used.
        """
        lines = [str(tuple(row)) for row in without_prefix(self.described())]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()


class Place(NamedTuple):
    """Where one tensor lies: `start` of its values and `slot` of its gradient, in elements.

    They differ only for a second Parameter on the same memory: the values are shared, the gradients are not.
    """

    dtype: torch.dtype
    start: int
    slot: int
    numel: int
    shape: torch.Size
    strides: tuple[int, ...]


def digest(
    parameters: nn.Module | Iterable[Tensor],
    buffers: Iterable[Tensor] = (),
    names: Mapping[int, str] | None = None,
) -> str:
    """`Plan.digest` of these; nothing is changed. Raises as FlatParameters does."""
    return Plan(parameters, buffers, names).digest()


def float_buffers(modules: Iterable[nn.Module]) -> list[Tensor]:
    """The floating-point buffers of these modules, in order, each once."""
    buffers = (b for module in modules for b in module.buffers() if b.is_floating_point())
    return list({id(b): b for b in buffers}.values())


def _unique(tensors: Iterable[Tensor]) -> list[Tensor]:
    return list({id(t): t for t in tensors}.values())


def padded(numel: int, dtype: torch.dtype) -> int:
    line = ALIGNMENT // dtype.itemsize
    return -(-numel // line) * line


def _extent(tensor: Tensor) -> tuple[int, int]:
    """The first byte and the one behind the last."""
    start, size = tensor.data_ptr(), tensor.element_size()
    if tensor.is_contiguous():
        return start, start + tensor.numel() * size
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return start, start + (last + 1) * size


def _memory(tensor: Tensor, start: int, stop: int) -> object:
    """Equal for tensors that are tied: the same elements, whatever their order in dense ones."""
    if tensor.numel() == 0:
        return id(tensor)
    dense = stop - start == tensor.numel() * tensor.element_size()
    if dense and (tensor.is_contiguous() or not _overlaps_itself(tensor)):
        return (start, stop, tensor.dtype)
    return (start, stop, tensor.dtype, tensor.shape, tensor.stride())


def _overlaps_itself(tensor: Tensor) -> bool:
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and tensor.numel():
            if stride <= reach:
                return True
            reach += (size - 1) * stride
    return False

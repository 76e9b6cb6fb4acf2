"""Pieces of a flat vector as tensors: their storages, the gaps between them, gradients that stay in their places."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from mpilsgd.layout import Place

Vectors = dict[torch.dtype, Tensor]


def piece(vector: Tensor, place: Place, start: int) -> Tensor:
    """A tensor on vector[start : start + numel] whose storage is those bytes and no others."""
    if vector.dim() != 1 or vector.numel() < start + place.numel:
        end = start + place.numel
        raise ValueError(f"a vector of shape {tuple(vector.shape)} has no elements {start} to {end}")
    size = vector.element_size()
    begin = (vector.storage_offset() + start) * size
    storage = vector.untyped_storage()[begin : begin + place.numel * size]
    return vector.new_empty(0).set_(storage, 0, place.shape, place.strides)


def clear_gaps(vectors: Vectors, places: Iterable[Place]) -> None:
    """Zeros where no place is."""
    places = list(places)
    for dtype, vector in vectors.items():
        end, short = 0, list[int]()
        mine = sorted((p.start, p.numel) for p in places if p.dtype == dtype)
        for start, numel in [*mine, (vector.numel(), 0)]:
            if start - end < 64:
                short.extend(range(end, start))
            else:
                vector[end:start].zero_()
            end = start + numel
        vector[torch.tensor(short, dtype=torch.int64, device=vector.device)] = 0  # one call, not one a gap


def seats(tensors: list[Tensor]) -> list[tuple[int, torch.dtype, torch.Size, tuple[int, ...]]]:
    """Where and how the tensors lie in memory, quickly: every round asks."""
    return [(t.data_ptr(), t.dtype, t.shape, t.stride()) for t in tensors]


def grad_keeper(view: Tensor) -> Callable[[Tensor], None]:
    """A hook that brings a parameter's gradient to `view`; it holds the view alone: no reference cycle."""

    def keep(parameter: Tensor) -> None:
        grad = parameter.grad
        if grad is None or grad is view:
            return
        with torch.no_grad():
            if grad.layout != torch.strided:
                view.copy_(grad.to_dense())
            elif grad.data_ptr() != view.data_ptr():
                view.copy_(grad)
            else:
                return
        if not grad.requires_grad:  # a gradient with a graph (create_graph=True) must stay the one it is
            parameter.grad = view

    return keep

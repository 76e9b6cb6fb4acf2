"""Parameters and their companions (velocities, averages) as 1-D pieces, as few as memory allows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from mpilsgd.flat import FlatParameters


def companions(parameters: Iterable[Tensor]) -> list[Tensor]:
    """Zeros like each parameter; those of one FlatParameters lie as there, so that one call serves many."""
    wholes: dict[tuple[int, torch.dtype], Tensor] = {}
    out = []
    for p in parameters:
        flat = FlatParameters.of(p)
        span = flat.span(p) if flat is not None else None
        if flat is None or span is None:
            out.append(torch.zeros_like(p, memory_format=torch.preserve_format, requires_grad=False))
            continue
        key = (id(flat), p.dtype)
        if key not in wholes:
            wholes[key] = torch.zeros(flat.n_parameters[p.dtype], dtype=p.dtype, device=p.device)
        out.append(wholes[key].as_strided(p.shape, p.stride(), span.start))
    return out


Row = tuple[Tensor, "Tensor | None", "Tensor | None"]  # parameter, companion, gradient
Line = tuple[Tensor, Tensor, Any, Any]  # the first parameter; parameter, companion and gradient in 1-D


def lines(rows: list[Row], merge: bool = True) -> Iterator[Line]:
    """(first parameter, and 1-D: parameter, companion, gradient) for rows of these; neighbours come as one.

    Neighbours are parameters of one FlatParameters whose companions and gradients lie in the same order. A
    parameter with gaps in its memory comes as a dense copy, which is written back.
    """
    run: tuple[FlatParameters, Row, int, int] | None = None
    for row in rows:
        p, companion, _ = row
        if not p.numel():
            continue
        flat = FlatParameters.of(p) if merge else None
        span = _flat_span(flat, row) if flat is not None else None
        if run is not None:
            same = span is not None and flat is run[0] and p.dtype == run[1][0].dtype and span.start == run[3]
            if same and span is not None and _same_storage(companion, run[1][1]):
                run = (*run[:3], span.stop)
                continue
            yield _cut(*run)
            run = None
        if flat is not None and span is not None:
            run = (flat, row, span.start, span.stop)
        else:
            yield from _single(row)
    if run is not None:
        yield _cut(*run)


def _flat_span(flat: FlatParameters, row: Row) -> slice | None:
    p, companion, grad = row
    span, size = flat.span(p), p.element_size()
    if span is None:
        return None
    if companion is not None:
        whole = companion.untyped_storage().nbytes() == flat.n_parameters[p.dtype] * size
        if not whole or companion.storage_offset() != span.start or companion.stride() != p.stride():
            return None
    if grad is not None:
        grads = flat.grads.get(p.dtype)
        if grads is None or grad.data_ptr() != grads.data_ptr() + span.start * size:
            return None
    return span


def _cut(flat: FlatParameters, row: Row, start: int, stop: int) -> Line:
    p, companion, grad = row
    along = None if companion is None else companion.as_strided((stop - start,), (1,), start)
    grads = None if grad is None else flat.grads[p.dtype][start:stop]
    return p, flat.data[p.dtype][start:stop], along, grads


def _single(row: Row) -> Iterator[Line]:
    p, companion, grad = row
    dense = like(p, p)
    along = None if companion is None else like(companion, dense)
    slope = None if grad is None else line(like(grad, dense))
    yield p, line(dense), None if along is None else line(along), slope
    if dense is not p:
        p.copy_(dense)
    if companion is not None and along is not None and along is not companion:
        companion.copy_(along)


def _same_storage(one: Tensor | None, two: Tensor | None) -> bool:
    if one is None or two is None:
        return one is two
    return one.untyped_storage().data_ptr() == two.untyped_storage().data_ptr()


def line(dense: Tensor) -> Tensor:
    """A dense tensor's elements in 1-D, in the order of memory."""
    return dense.detach().as_strided((dense.numel(),), (1,))


def like(tensor: Tensor, model: Tensor) -> Tensor:
    """`tensor` itself if it lies in memory densely and in the order of `model`, else such a copy."""
    strides = torch.empty_like(model, device="meta").stride()
    if tensor.layout == torch.strided and tensor.stride() == strides and tensor.dtype == model.dtype:
        return tensor
    copy = torch.empty_like(model, requires_grad=False)
    return copy.copy_(tensor.to_dense() if tensor.layout != torch.strided else tensor)

"""Parameters and their companions (velocities, averages) as 1-D pieces, as few as memory allows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
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


# parameter, companions (as for every other row; one of them may be missing everywhere), gradient
Row = tuple[Tensor, "tuple[Tensor | None, ...]", "Tensor | None"]
# the first parameter; and in 1-D: parameter, companions, gradient
Line = tuple[Tensor, Tensor, "tuple[Any, ...]", Any]


def lines(rows: Iterable[Row], merge: bool = True) -> Iterator[Line]:
    """Rows in 1-D; neighbours come as one.

    Neighbours are parameters of one FlatParameters whose companions and gradients lie in the same order. A
    parameter with gaps in its memory comes as a dense copy, which is written back.
    """
    run: tuple[FlatParameters, Row, int, int] | None = None
    for row in rows:
        if not row[0].numel():
            continue
        flat = FlatParameters.of(row[0]) if merge else None
        span = _flat_span(flat, row) if flat is not None else None
        if run is not None:
            if span is not None and flat is run[0] and span.start == run[3] and _continues(run[1], row):
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


def line(dense: Tensor) -> Tensor:
    """A dense tensor's elements in 1-D, in the order of memory."""
    return dense.detach().as_strided((dense.numel(),), (1,))


def like(tensor: Tensor, model: Tensor) -> Tensor:
    """`tensor` itself if it lies in memory densely and in the order of `model`, else such a copy."""
    same = tensor.layout == torch.strided and tensor.dtype == model.dtype
    if (
        same
        and tensor.stride() == model.stride()
        and (model.is_contiguous() or model.stride() == torch.empty_like(model, device="meta").stride())
    ):
        return tensor
    copy = torch.empty_like(model, requires_grad=False)
    return copy.copy_(tensor.to_dense() if tensor.layout != torch.strided else tensor)


def pull_settings(p: Tensor, pairs: Sequence[tuple[Tensor, float]]) -> dict[str, Any]:
    """Up to two (leader, rate), leaders of p's shape, as the arguments of `kernels.msgd` on p's line."""
    if len(pairs) > 2:
        raise ValueError(f"pulls gave {len(pairs)} leaders (2 at most) for shape {tuple(p.shape)}")
    settings: dict[str, Any] = {}
    for (name, rate_name), (leader, rate) in zip(_LEADERS, pairs, strict=False):
        if leader.shape != p.shape:
            shapes = f"{tuple(leader.shape)} for a parameter of shape {tuple(p.shape)}"
            raise ValueError(f"pulls gave a leader of shape {shapes}")
        settings |= {name: line(like(leader.detach(), p)), rate_name: rate}
    return settings


_LEADERS = (("leader", "rate"), ("other", "other_rate"))


def _flat_span(flat: FlatParameters, row: Row) -> slice | None:
    p, companions, grad = row
    if grad is not None and p.dtype not in flat.grads:
        return None
    span, size = flat.span(p), p.element_size()
    if span is None:
        return None
    for along in companions:
        if along is not None:
            whole = along.untyped_storage().nbytes() == flat.n_parameters[p.dtype] * size
            if not whole or along.storage_offset() != span.start or along.stride() != p.stride():
                return None
    if grad is not None and grad.data_ptr() != flat.grads[p.dtype].data_ptr() + span.start * size:
        return None
    return span


def _continues(first: Row, row: Row) -> bool:
    pairs = zip(first[1], row[1], strict=True)
    return first[0].dtype == row[0].dtype and all(_same_storage(one, two) for one, two in pairs)


def _same_storage(one: Tensor | None, two: Tensor | None) -> bool:
    if one is None or two is None:
        return one is two
    return one.untyped_storage().data_ptr() == two.untyped_storage().data_ptr()


def _cut(flat: FlatParameters, row: Row, start: int, stop: int) -> Line:
    p, companions, grad = row
    along = tuple(None if c is None else c.as_strided((stop - start,), (1,), start) for c in companions)
    return p, flat.data[p.dtype][start:stop], along, None if grad is None else flat.grads[p.dtype][start:stop]


def _single(row: Row) -> Iterator[Line]:
    p, companions, grad = row
    dense = like(p, p)
    along = [None if c is None else like(c, dense) for c in companions]
    slope = None if grad is None else line(like(grad, dense))
    yield p, line(dense), tuple(None if c is None else line(c) for c in along), slope
    for old, new in ((p, dense), *zip(companions, along, strict=True)):
        if old is not None and new is not None and new is not old:
            old.copy_(new)

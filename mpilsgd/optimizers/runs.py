"""Parameters and their companions (velocities, averages) as 1-D pieces, as few as memory allows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from mpilsgd.extension import place_of
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
            wholes[key] = torch.zeros(flat.n_parameters[p.dtype], dtype=p.dtype, device=place_of(p))
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
    run: _Run | None = None
    for row in rows:
        p = row[0]
        if not p.numel():
            continue
        flat = FlatParameters.of(p) if merge else None
        span = flat.span(p) if flat is not None else None
        if run is not None:
            if span is not None and run.takes(flat, span, row):
                continue
            yield run.line()
        run = _Run(flat, span, row) if flat is not None and span is not None else None
        if run is None or not run.fits():
            run = None
            yield from _single(row)
    if run is not None:
        yield run.line()


class _Run:
    """Neighbours of one FlatParameters, from the first row on."""

    def __init__(self, flat: FlatParameters, span: slice, row: Row):
        self.flat, self.row, self.start, self.stop = flat, row, span.start, span.stop
        self.size = row[0].element_size()
        self.bases = [None if t is None else t.data_ptr() - span.start * self.size for t in (*row[1], row[2])]

    def fits(self) -> bool:
        """Whether the first row's companions and gradient lie as in its flat vector."""
        p, companions, grad = self.row
        for along in companions:
            if along is not None:
                whole = along.untyped_storage().nbytes() == self.flat.n_parameters[p.dtype] * self.size
                if not whole or along.storage_offset() != self.start or along.stride() != p.stride():
                    return False
        grads = self.flat.grads.get(p.dtype)
        return grad is None or (grads is not None and self.bases[-1] == grads.data_ptr())

    def takes(self, flat: FlatParameters | None, span: slice, row: Row) -> bool:
        """Whether the row lies right behind, with all it has; it belongs to the run then."""
        p, companions, grad = row
        if flat is not self.flat or span.start != self.stop or p.dtype != self.row[0].dtype:
            return False
        offset, strides = span.start * self.size, p.stride()
        for tensor, base in zip((*companions, grad), self.bases, strict=True):
            if (tensor is None) != (base is None):
                return False
            # The first companion spans the whole vector: what lies at the same distance lies in it.
            if tensor is not None and (tensor.data_ptr() - offset != base or tensor.stride() != strides):
                return False
        self.stop = span.stop
        return True

    def line(self) -> Line:
        p, companions, grad = self.row
        start, stop = self.start, self.stop
        along = tuple(None if c is None else c.as_strided((stop - start,), (1,), start) for c in companions)
        slope = None if grad is None else self.flat.grads[p.dtype][start:stop]
        return p, self.flat.data[p.dtype][start:stop], along, slope


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


def _single(row: Row) -> Iterator[Line]:
    p, companions, grad = row
    dense = like(p, p)
    along = [None if c is None else like(c, dense) for c in companions]
    slope = None if grad is None else line(like(grad, dense))
    yield p, line(dense), tuple(None if c is None else line(c) for c in along), slope
    for old, new in ((p, dense), *zip(companions, along, strict=True)):
        if old is not None and new is not None and new is not old:
            old.copy_(new)

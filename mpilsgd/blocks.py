"""Vectors in 8 or 4 bits, block by block: what the kernels write, and its specification in torch.

A block of 128 values (the last may be shorter) is a scale, in the type of the arithmetic (float32; float64 for
float64), and a whole number for each value, from -127 to 127 or from -7 to 7: the value is scale times number. The
scale is the largest magnitude by 127 or 7, so an error is at most half the scale. Of 4 bits the first half of a block
lies in the low ones of its bytes, the second in the high ones.

A block with a value that is not finite comes back as NaN, all of it, and whoever looks for such values sees it; what is
kept beside it (`residual`, `base`) stays as it was there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mpilsgd import kernel_arguments as need
from mpilsgd.extension import HALF, pointer, where_to_run
from mpilsgd.extension import core as _core

BLOCK = 128
_LEVELS = {8: 127, 4: 7}


def nbytes(numel: int, dtype: torch.dtype, bits: int) -> int:
    """Of the codes of so many values of this type."""
    scale = 8 if dtype is torch.float64 else 4
    whole, rest = divmod(numel, BLOCK)
    return whole * (scale + BLOCK * bits // 8) + (scale + -(-rest * bits // 8)) * (rest > 0)


def encode(
    codes: Tensor,
    x: Tensor,
    bits: int,
    residual: Tensor | None = None,
    base: Tensor | None = None,
    weight: float = 1.0,
) -> None:
    """v = x - weight base + residual;  codes <- v in so many bits;  residual <- v - what they say (error feedback).

    codes: bytes, `nbytes` of them. residual, base: of the type of the arithmetic; each may be missing.
    """
    _match(codes, x, bits, residual, base, weight)
    where = where_to_run(x, False)
    if where is None:
        _encode(codes, x, bits, residual, base, weight)
    else:
        _core.encode(where, x.data_ptr(), codes.data_ptr(), bits, pointer(residual), pointer(base), weight)


def decode(
    codes: Tensor,
    out: Tensor | None,
    bits: int,
    base: Tensor | None = None,
    weight: float = 1.0,
    *,
    add: bool = False,
    follow: bool = False,
) -> None:
    """v = what the codes say + weight base;  out <- v (add: out + v);  follow: base <- v / weight where v is finite.

    out: of the type that was encoded, or None, if only base is to follow.
    """
    x = base if out is None else out
    if x is None:
        raise ValueError("decode needs out or base")
    _match(codes, x, bits, None, base, weight)
    where = where_to_run(x, False)
    if where is None:
        _decode(codes, out, bits, base, weight, add, follow)
    else:
        _core.decode(where, codes.data_ptr(), pointer(out), bits, pointer(base), weight, add, follow)


def _match(
    codes: Tensor, x: Tensor, bits: int, residual: Tensor | None, base: Tensor | None, weight: float
) -> None:
    need.match(x)
    need.number(weight=weight)
    if bits not in _LEVELS:
        raise ValueError(f"bits must be 8 or 4, not {bits!r}")
    size = nbytes(x.numel(), x.dtype, bits)
    if codes.dtype is not torch.uint8 or codes.numel() != size or not codes.is_contiguous():
        raise ValueError(f"codes must be {size} contiguous bytes, got {codes.numel()} of {codes.dtype}")
    if codes.device != x.device:
        raise ValueError(f"codes are on {codes.device}, but the vector is on {x.device}")
    for other in (residual, base):
        if other is not None and other is not x:
            need.match_total(other, x, (x,))


# --- the specification ------------------------------------------------------------------------------------------------


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in HALF else x


def _runs(numel: int, dtype: torch.dtype, bits: int) -> list[tuple[int, int, int, int]]:
    """The whole blocks and the rest: first element, length of a block, first byte, bytes of a block."""
    whole, rest = numel - numel % BLOCK, numel % BLOCK
    runs = [(0, BLOCK, 0, nbytes(BLOCK, dtype, bits))] if whole else []
    end = nbytes(whole, dtype, bits)
    return runs + ([(whole, rest, end, nbytes(rest, dtype, bits))] if rest else [])


@torch.no_grad()
def _encode(
    codes: Tensor, x: Tensor, bits: int, residual: Tensor | None, base: Tensor | None, weight: float
) -> None:
    v = _wide(x) if base is None else _wide(x) - weight * base
    v = v if residual is None else v + residual
    levels, tiny = _LEVELS[bits], 2.0**-52 if v.dtype is torch.float64 else 2.0**-23
    for at, m, first, size in _runs(v.numel(), v.dtype, bits):
        stop = at + m if m < BLOCK else v.numel() - v.numel() % BLOCK
        blocks = v[at:stop].view(-1, m)
        largest = blocks.abs().amax(1, keepdim=True)
        scale = largest / levels
        scale = torch.where(torch.isfinite(scale * levels), scale, scale * (1 - tiny))
        scale = torch.where(torch.isfinite(largest), scale, torch.nan)
        q = (blocks / scale).clamp(-levels, levels)
        q = torch.where(scale > 0, q, 0.0).round()
        if residual is not None:
            sent, e = q * scale, residual[at:stop].view(-1, m)
            e.copy_(torch.where(torch.isfinite(sent), blocks - sent, e))
        whole, half = q.to(torch.int8).view(torch.uint8), (m + 1) // 2
        if bits == 4:
            high = torch.nn.functional.pad(whole[:, half:], (0, half - (m - half)))
            whole = (whole[:, :half] & 15) | (high << 4)
        packed = torch.cat([scale.contiguous().view(torch.uint8), whole], 1)
        codes[first : first + len(blocks) * size].copy_(packed.view(-1))


@torch.no_grad()
def _decode(
    codes: Tensor, out: Tensor | None, bits: int, base: Tensor | None, weight: float, add: bool, follow: bool
) -> None:
    x = base if out is None else out
    assert x is not None
    kind = _wide(x).dtype
    v = torch.empty(x.numel(), dtype=kind, device=x.device)
    for at, m, first, size in _runs(v.numel(), kind, bits):
        stop = at + m if m < BLOCK else v.numel() - v.numel() % BLOCK
        blocks = codes[first : first + (stop - at) // m * size].view(-1, size)
        scale = blocks[:, : kind.itemsize].clone().flatten().view(kind)[:, None]
        whole = blocks[:, kind.itemsize :]
        if bits == 4:
            halves = torch.cat([whole & 15, whole >> 4], 1)[:, :m]
            numbers = (halves.to(torch.int8) ^ 8) - 8
        else:
            numbers = whole.contiguous().view(torch.int8)
        v[at:stop] = (numbers.to(kind) * scale).view(-1)
    if base is not None:
        v = v + weight * base
        if follow:
            base.copy_(torch.where(torch.isfinite(v), v / weight, base))
    if out is not None:
        out.copy_(_wide(out) + v if add else v)

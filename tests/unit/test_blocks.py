"""Vectors in 8 and 4 bits: bit for bit the specification, its bound, error feedback, what is not finite, extremes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from mpilsgd import blocks, kernels

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
LENGTHS = [0, 1, 7, 127, 128, 129, 255, 1000, 4097]
by_bits = pytest.mark.parametrize("bits", [8, 4])
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture(params=kernels._core.instruction_sets())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    best = kernels.instruction_set()
    kernels._core.select_instruction_set(request.param)
    yield request.param
    kernels._core.select_instruction_set(best)


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def codes_of(x: torch.Tensor, bits: int) -> torch.Tensor:
    return torch.zeros(blocks.nbytes(x.numel(), x.dtype, bits), dtype=torch.uint8)


def through(x: torch.Tensor, bits: int) -> torch.Tensor:
    codes, out = codes_of(x, bits), torch.empty_like(x)
    kernels.encode(codes, x, bits)
    kernels.decode(codes, out, bits)
    return out


def vectors(n: int, dtype: torch.dtype, seed: int = 0) -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(seed)
    x, e, r = (torch.randn(n, generator=g, dtype=torch.float64) for _ in range(3))
    return (
        (x * 10.0 ** torch.randint(-3, 4, (n,), generator=g)).to(dtype),
        e.to(wide(dtype)),
        r.to(wide(dtype)),
    )


@by_bits
@by_dtype
def test_equals_the_specification(isa: str, dtype: torch.dtype, bits: int) -> None:
    """Codes, residual, base and result, with and without each of them; broken blocks, blocks of zeros."""
    for n in LENGTHS:
        for kept in (0, 1, 2, 3):
            x, e, r = vectors(n, dtype, n)
            if n > 300:
                x[:128], e[:128], r[:128] = 0, 0, 0
                x[200], x[n - 1] = float("nan"), float("inf")
            runs = []
            for encode, decode in ((kernels.encode, kernels.decode), (blocks._encode, blocks._decode)):
                residual, base = e.clone() if kept & 1 else None, r.clone() if kept & 2 else None
                codes, out = codes_of(x, bits), x.nan_to_num(0, 0, 0)
                encode(codes, x, bits, residual, base, 3.0)
                if decode is kernels.decode:
                    decode(codes, out, bits, base, 3.0, add=bool(kept & 1), follow=True)
                else:
                    decode(codes, out, bits, base, 3.0, bool(kept & 1), True)
                found = [codes, out, residual, base]
                runs.append([v.double().numpy() for v in found if v is not None])
            for mine, wanted in zip(*runs, strict=True):
                if n > 300 and len(mine) == len(runs[0][0]):  # a NaN has many bits
                    continue
                np.testing.assert_array_equal(mine, wanted, f"n={n} kept={kept}")


@by_bits
@by_dtype
def test_the_error_is_at_most_half_a_step(isa: str, dtype: torch.dtype, bits: int) -> None:
    levels = {8: 127, 4: 7}[bits]
    for n in LENGTHS[1:]:
        x = vectors(n, dtype, n)[0]
        error = (through(x, bits).double() - x.double()).abs()
        for at in range(0, n, blocks.BLOCK):
            part = x[at : at + blocks.BLOCK].double().abs()
            rounding = part * torch.finfo(dtype).eps  # of the result's own type
            bound = 0.5 * part.max() / levels * (1 + 1e-6) + rounding
            assert (error[at : at + blocks.BLOCK] <= bound).all()
        assert error.max() > 0 or n == 1


@by_bits
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_extremes(isa: str, dtype: torch.dtype, bits: int) -> None:
    info, levels = torch.finfo(dtype), {8: 127, 4: 7}[bits]
    for size in (info.max, info.max / 2, info.tiny, info.smallest_normal * info.eps * 1000, 1.0):
        x = torch.linspace(-1, 1, 200, dtype=dtype) * size
        y = through(x, bits)
        assert torch.isfinite(y).all()
        slack = info.smallest_normal * info.eps * levels
        assert ((y - x).abs() <= 0.51 * size / levels + slack).all(), size
    assert (through(torch.zeros(300, dtype=dtype), bits) == 0).all()
    assert (through(torch.full((300,), info.smallest_normal * info.eps, dtype=dtype), bits) >= 0).all()
    same = torch.full((300,), 0.1, dtype=dtype)
    assert torch.allclose(through(same, bits), same, rtol=1e-6)


@by_bits
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_broken_block_is_seen_and_poisons_nothing(isa: str, bits: int, bad: float) -> None:
    x, e, r = vectors(1000, torch.float32)
    x[300] = bad  # in the third block
    residual, base, out = e.clone(), r.clone(), torch.empty(1000)
    codes = codes_of(x, bits)
    kernels.encode(codes, x, bits, residual, base)
    kernels.decode(codes, out, bits, base, follow=True)
    broken = torch.zeros(1000, dtype=torch.bool)
    broken[256:384] = True
    assert torch.isnan(out[broken]).all() and torch.isfinite(out[~broken]).all()
    assert (residual[broken] == e[broken]).all() and torch.isfinite(residual).all()
    assert (base[broken] == r[broken]).all() and (base[~broken] == out[~broken]).all()


@by_bits
def test_nothing_is_lost_for_good(bits: int) -> None:
    """The sum of what came is the sum of what was sent but for what is still kept (error feedback), and a vector that
    goes by its changes comes ever closer to one that stays."""
    residual, sent, came = (
        torch.zeros(500),
        torch.zeros(500, dtype=torch.float64),
        torch.zeros(500, dtype=torch.float64),
    )
    for k in range(200):
        x, out = vectors(500, torch.float32, k)[1], torch.empty(500)
        codes = codes_of(x, bits)
        kernels.encode(codes, x, bits, residual)
        kernels.decode(codes, out, bits)
        sent += x
        came += out
    assert torch.allclose(sent, came + residual, atol=1e-3)
    assert residual.abs().max() < 0.5  # of vectors of about 4
    x, base = vectors(500, torch.float32)[1], torch.zeros(500)
    gaps = []
    for _ in range(6):
        codes = codes_of(x, bits)
        kernels.encode(codes, x, bits, None, base)
        kernels.decode(codes, None, bits, base, follow=True)
        gaps.append(float((x - base).abs().max()))
    assert all(b <= max(a / 10, 1e-6) for a, b in itertools.pairwise(gaps))


def test_bad_arguments() -> None:
    x, codes = torch.zeros(10), torch.zeros(14, dtype=torch.uint8)
    for call, told in (
        (lambda: kernels.encode(codes[:13], x, 8), "codes must be 14"),
        (lambda: kernels.encode(codes, x, 5), "bits must be 8 or 4"),
        (lambda: kernels.encode(codes, x, 8, torch.zeros(9)), "length"),
        (lambda: kernels.decode(codes, None, 8), "out or base"),
        (lambda: kernels.encode(codes, x, 8, None, x.double()), "must be torch.float32"),
        (lambda: kernels.encode(codes, x, 8, None, None, float("nan")), "weight must be a finite"),
    ):
        with pytest.raises(ValueError, match=told):
            call()


@by_bits
@by_dtype
def test_threads_and_pieces_change_nothing(dtype: torch.dtype, bits: int) -> None:
    """Cut at whole blocks, and by several threads."""
    x = vectors(700_001, dtype)[0]
    whole, before = codes_of(x, bits), torch.get_num_threads()
    kernels.encode(whole, x, bits)
    torch.set_num_threads(2)
    try:
        again = codes_of(x, bits)
        kernels.encode(again, x, bits)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(whole, again)
    parts = [x[a : a + 128 * 1000] for a in range(0, len(x), 128 * 1000)]
    pieces = []
    for part in parts:
        pieces.append(codes_of(part, bits))
        kernels.encode(pieces[-1], part, bits)
    assert torch.equal(whole, torch.cat(pieces))

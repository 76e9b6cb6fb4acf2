"""How half types are stored where rounding to nearest would lose a small pull."""

from __future__ import annotations

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF


def round_by_chance(value: Tensor, dtype: torch.dtype, seed: int) -> Tensor:
    """float32 values that a half type can hold, the given ones in the mean; those of other types as they are.

    The bits that the type lacks are the chance of rounding up; a hash of the value and of the seed decides.
    """
    dropped = {torch.bfloat16: 16, torch.float16: 13}.get(dtype)
    if dropped is None:
        return value
    bits = value.contiguous().view(torch.int32).to(torch.int64) & _WORD
    magnitude, h = bits & 0x7FFFFFFF, bits ^ _mixed(seed & _WORD)
    up = (((h ^ (h >> 16)) * 0x7FEB352D) & _WORD) >> (32 - dropped)
    rounded = (magnitude + up) >> dropped << dropped
    fits = rounded <= torch.tensor(torch.finfo(dtype).max).view(
        torch.int32
    )  # else to nearest: NaN, an overflow
    return torch.where(fits, rounded | (bits ^ magnitude), bits).to(torch.int32).view(torch.float32)


def _mixed(h: int) -> int:
    """A round's seed: neighbouring ones have nothing in common."""
    h = ((h ^ (h >> 16)) * 0x7FEB352D) & _WORD
    h = ((h ^ (h >> 15)) * 0x846CA68B) & _WORD
    return h ^ (h >> 16)

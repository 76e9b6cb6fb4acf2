"""The random generators that every process has, as tasks of one process need them once each."""

from __future__ import annotations

import ctypes
import random
from typing import Any

import numpy as np
import torch

_numpy: Any = np.random
_MT19937 = 625 * 4  # bytes: the words and the place among them


class Generators:
    """Python's, numpy's and torch's default ones, of which one task's at a time are in place.

    Args: seed: stands for what a new process takes from the system; None: as they are now.
    """

    def __init__(self, seed: int | None):
        self._cuda: torch.Tensor | None = None
        self._numpy: Any = None
        self._first: bytes | None = None
        if seed is None:
            self._bits: Any = _numpy.get_bit_generator()
            self.keep()
            return
        self._python = random.Random(seed).getstate()
        self._torch = torch.Generator().manual_seed(seed).get_state()
        self._bits = np.random.MT19937(seed)
        self._first = self._raw()

    def keep(self) -> None:
        """What is in place is theirs, and something else will be."""
        self._python, self._torch = random.getstate(), torch.get_rng_state()
        drawn = self._first is None or self._raw() != self._first
        self._numpy = np.random.get_state(legacy=False) if drawn else None  # which takes its time
        if torch.cuda.is_initialized():
            self._cuda = torch.cuda.get_rng_state()

    def put(self) -> None:
        """In place, as they were."""
        random.setstate(self._python)
        torch.set_rng_state(self._torch)
        _numpy.set_bit_generator(self._bits)
        if self._numpy is not None and self._numpy["has_gauss"]:  # half a pair, which it keeps elsewhere
            np.random.set_state(self._numpy)
        if torch.cuda.is_initialized():
            cuda = torch.Generator("cuda").get_state() if self._cuda is None else self._cuda
            torch.cuda.set_rng_state(cuda)

    def _raw(self) -> bytes:
        return ctypes.string_at(self._bits.ctypes.state_address, _MT19937)

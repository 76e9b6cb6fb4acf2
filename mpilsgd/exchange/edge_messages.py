"""What the messages along a tree's edges hold: a head, then the vectors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from mpilsgd import kernels
from mpilsgd.exchange.vectors import accumulation_dtype
from mpilsgd.transport import Wire

if TYPE_CHECKING:
    from mpilsgd.exchange.method import Method

Vectors = dict[torch.dtype, torch.Tensor]

_HEAD = 64  # bytes before the vectors: whether they are finite, and the seconds of a leaf's step


class Messages:
    """Writes and reads them. narrow: of edges between islands.

    In few bits a vector is sent as its difference from `base`, rank 0's start, which all know: the newest message
    counts, whatever became of those before it. What one does not say is added to the next one that the node sends.

    Collective.
    """

    def __init__(self, m: Method):
        self._fabric, self._n = m.fabric, m.n
        self.base: Vectors = {}
        world = m.fabric.world
        for d, window in m.x.items():
            if world.n_islands > 1 and m.fabric.wire(d).coded:
                start = world.bring(window, 0, m.scratch.get(d), exact=True)[: m.n[d]]
                self.base[d] = start.to(accumulation_dtype(d), copy=True)
                world.barrier()  # dtypes may take turns in what it landed in

    def _wires(self, narrow: bool) -> Iterator[tuple[torch.dtype, Wire]]:
        return ((d, self._fabric.wire(d) if narrow else Wire(d, d)) for d in self._n)

    def nbytes(self, narrow: bool) -> int:
        return _HEAD + sum(_padded(wire.nbytes(self._n[d])) for d, wire in self._wires(narrow))

    def open(self, memory: np.ndarray, narrow: bool) -> tuple[torch.Tensor, Vectors]:
        """The head (whether all is finite, seconds a step), and the bytes of the vectors."""
        whole, at, vectors = torch.from_numpy(memory), _HEAD, {}
        for d, wire in self._wires(narrow):
            vectors[d] = whole[at : at + wire.nbytes(self._n[d])]
            at += _padded(len(vectors[d]))
        return whole[:16].view(torch.float64), vectors

    def write(self, memory: np.ndarray, narrow: bool, x: Vectors, residual: Vectors, seconds: float) -> None:
        head, codes = self.open(memory, narrow)
        fit = []
        for d, wire in self._wires(narrow):
            kept: dict[str, Any] = {"base": self.base[d], "residual": residual[d]} if wire.coded else {}
            wire.encode(x[d], codes[d], **kept)
            fit.append(kernels.check(x[d] if wire.coded else codes[d].view(wire.travels)))
        head[0], head[1] = all(fit), seconds

    def read(self, memory: np.ndarray, narrow: bool) -> tuple[bool, Vectors]:
        """Whether a message is finite, and its vectors."""
        head, vectors = self.open(memory, narrow)
        for d, wire in self._wires(narrow):
            codes = vectors[d]
            if wire.coded:
                vectors[d] = torch.empty_like(self.base[d], dtype=d)
                wire.decode(codes, vectors[d], base=self.base[d])
            else:
                vectors[d] = codes.view(wire.travels)
        return bool(head[0]), vectors


def _padded(nbytes: int) -> int:
    """To whole cache lines."""
    return -(-nbytes // 64) * 64

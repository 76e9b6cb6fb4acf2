"""What crosses nodes in 8 or 4 bits, for the simulations, in NumPy: for float64 vectors without gaps."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from simulation import Exact, Matrix

Vector = NDArray[np.float64]
BLOCK = 128
LEVELS = {"int8": 127, "int4": 7}


def quantised(v: Vector, across: str) -> Vector:
    """Each block of values as whole multiples of its largest magnitude by the levels."""
    out, levels = v.copy(), LEVELS[across]
    for a in range(0, len(v), BLOCK):
        block = v[a : a + BLOCK]
        scale = np.abs(block).max() / levels
        out[a : a + BLOCK] = np.round(block / scale) * scale if scale > 0 else 0.0
    return out


class FewBits(Exact):
    """islands: the ranks of each. Memory is by the name of what is sent one after the other."""

    def __init__(self, across: str, islands: Sequence[Sequence[int]], start: Vector):
        self.across, self.islands, self.start = across, islands, start
        self.residual: dict[str, Matrix] = {}
        self.base: dict[str, Vector] = {}

    def total(self, rows: Matrix, name: str, about: Vector | None = None) -> Vector:
        """Each island sums a slice: its own part exactly, the others' and the sum that it sends back in few bits."""
        n, parts = rows.shape[1], len(self.islands)
        share = math.ceil(n / parts / BLOCK) * BLOCK
        known = np.zeros(n) if about is None else about
        v = np.stack([(rows[list(ranks)] - known).sum(0) for ranks in self.islands])
        e = self.residual.setdefault(name, np.zeros((parts, n)))
        result = np.zeros(n)
        for owner in range(parts):
            a, b = min(owner * share, n), min(owner * share + share, n)
            own = v[owner, a:b]
            for k in range(parts):
                if k != owner:
                    sent = quantised(v[k, a:b] + e[k, a:b], self.across)
                    e[k, a:b] += v[k, a:b] - sent
                    own = own + sent
            result[a:b] = quantised(own + e[owner, a:b], self.across)
            e[owner, a:b] += own - result[a:b]
        return result + len(rows) * known

    def mean(self, rows: Matrix) -> Vector:
        first = "mean" not in self.base
        total = rows.sum(0) if first else self.total(rows, "mean", self.base["mean"])
        self.base["mean"] = total / len(rows)
        return self.base["mean"]

    def leader(self, rows: Matrix, i: int, name: str) -> Matrix:
        if name not in self.base:
            self.base[name] = rows[i].copy()
        else:
            self.base[name] = self.base[name] + quantised(rows[i] - self.base[name], self.across)
        return self._seen(rows[i], self.base[name], i, len(rows))

    def published(self, x: Vector, i: int, workers: int) -> Matrix:
        e = self.residual.setdefault(f"published {i}", np.zeros(len(x)))
        sent = quantised(x - self.start + e, self.across)
        e += x - self.start - sent
        return self._seen(x, self.start + sent, i, workers)

    def _seen(self, x: Vector, coded: Vector, i: int, workers: int) -> Matrix:
        home = next(ranks for ranks in self.islands if i in ranks)
        return np.stack([x if k in home else coded for k in range(workers)])


class CodedCentre:
    """A centre in shards, one an island, which the workers visit: what a visit leaves of what the worker made of it."""

    def __init__(self, across: str, islands: int, workers: int, start: Vector):
        self.across, self.workers = across, workers
        step = math.ceil(len(start) / islands / 16) * 16
        cuts = range(0, islands * step, step)
        self.spans = [(min(a, len(start)), min(a + step, len(start))) for a in cuts]
        self.base, self.e = start.copy(), np.zeros((workers, len(start)))
        self.updates = [0] * islands
        self.followed = [set(range(workers)) for _ in self.spans]

    def visit(self, i: int, c: Vector) -> Vector:
        out = c.copy()
        for k, (a, b) in enumerate(self.spans):
            self.followed[k].add(i)
            codes = quantised(c[a:b] - self.base[a:b] + self.e[i, a:b], self.across)
            self.e[i, a:b] += c[a:b] - self.base[a:b] - codes
            out[a:b] = self.base[a:b] + codes
            self.updates[k] += 1
            if len(self.followed[k]) == self.workers and self.updates[k] >= 4 * self.workers:
                self.base[a:b] = out[a:b]
                self.updates[k], self.followed[k] = 0, {i}
        return out

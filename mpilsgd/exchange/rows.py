"""What a worker brings to a meeting."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

# What a worker has come for; the least number present decides what happens.
ROUND, CENTER, CLOSE = 0.0, 1.0, 2.0


class Row(NamedTuple):
    """method: the number of the method on its topology; stamp: the step of the round; fit: whether what is exchanged is
    finite; score: the rule's; behind: whether this worker followed rounds of others without a gradient of its own."""

    method: float
    purpose: float
    stamp: float
    fit: float
    score: float
    behind: float


class Rows:
    """The rows of all, in rank order; each field of a row is one array.

    came: the rows of those who came for a round; round: the step at which it is held, None if nobody came for one.
    """

    def __init__(self, table: np.ndarray):
        self.method, self.purpose, self.stamp, self.fit, self.score, self.behind = table.T
        came = self.purpose == ROUND
        self._came = None if came.all() else Rows(table[came])
        self.round = int(self.came.stamp[0]) if len(self.came.stamp) else None

    @property
    def came(self) -> Rows:
        return self if self._came is None else self._came

    def best(self) -> int | None:
        """The rank with the least score, the lowest among equals; None if no score is finite."""
        best = int(np.argmin(self.score))  # a NaN, if there is one
        if math.isfinite(self.score[best]):
            return best
        return int(np.nanargmin(self.score)) if np.isfinite(self.score).any() else None

    def broken(self) -> set[int]:
        return set() if self.fit.all() else {r for r, fit in enumerate(self.fit) if not fit}


def checked(table: np.ndarray) -> Rows:
    """A table of rows, if they belong together; a RuntimeError on every rank if they do not."""
    rows = Rows(table)
    if (rows.method != rows.method[0]).any():
        raise RuntimeError(
            "workers came to rounds of different methods: with several methods, give all workers equally many batches"
        )
    if (rows.came.stamp != rows.round).any():
        raise RuntimeError(
            f"workers came to one round at different steps {sorted(set(map(int, rows.came.stamp)))}: are their periods "
            "equal?"
        )
    return rows

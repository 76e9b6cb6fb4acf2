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

    round: the step at which a round is held, None if nobody came for one. methods, stamps: which there are, stamps of
    those who came for one. scores: as Python's numbers.
    """

    def __init__(self, table: np.ndarray):
        self._table = table
        # the numbers are few, and looked through faster as Python's
        methods, purposes, come, self._fit, self.scores, _ = zip(*table.tolist(), strict=True)
        stamps = [stamp for stamp, purpose in zip(come, purposes, strict=True) if purpose == ROUND]
        self.methods, self.stamps = set(methods), set(stamps)
        self.round = int(stamps[0]) if stamps else None
        self._all_came = len(stamps) == len(table)

    def __getattr__(self, name: str) -> np.ndarray:
        if name not in Row._fields:
            raise AttributeError(name)
        column: np.ndarray = self._table[:, Row._fields.index(name)]
        return column

    @property
    def came(self) -> Rows:
        """The rows of those who came for a round: one at least."""
        return self if self._all_came else Rows(self._table[self.purpose == ROUND])

    def best(self) -> int | None:
        """The rank with the least score, the lowest among equals; None if no score is finite."""
        finite = [score for score in self.scores if math.isfinite(score)]
        return self.scores.index(min(finite)) if finite else None

    def broken(self) -> set[int]:
        return {r for r, fit in enumerate(self._fit) if not fit}


def checked(table: np.ndarray) -> Rows:
    """A table of rows, if they belong together; a RuntimeError on every rank if they do not."""
    rows = Rows(table)
    if len(rows.methods) > 1:
        raise RuntimeError(
            "workers came to rounds of different methods: with several methods, give all workers equally many batches"
        )
    if len(rows.stamps) > 1:
        raise RuntimeError(
            f"workers came to one round at different steps {sorted(map(int, rows.stamps))}: are their periods equal?"
        )
    return rows

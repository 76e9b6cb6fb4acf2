"""What a worker brings to a meeting."""

from __future__ import annotations

import math
from collections.abc import Sequence
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
    """The rows of all, in rank order; each field of a row is a tuple: the numbers are few.

    round: the step at which a round is held, None if nobody came for one.
    """

    def __init__(self, rows: Sequence[Sequence[float]]):
        self._rows = rows
        self.method, self.purpose, self.stamp, self.fit, self.score, self.behind = zip(*rows, strict=True)
        self.stamps = [t for t, purpose in zip(self.stamp, self.purpose, strict=True) if purpose == ROUND]
        self.round = int(self.stamps[0]) if self.stamps else None

    @property
    def came(self) -> Rows:
        """The rows of those who came for a round: one at least."""
        if len(self.stamps) == len(self._rows):
            return self
        return Rows([row for row, purpose in zip(self._rows, self.purpose, strict=True) if purpose == ROUND])

    def best(self) -> int | None:
        """The rank with the least score, the lowest among equals; None if no score is finite."""
        finite = [score for score in self.score if math.isfinite(score)]
        return self.score.index(min(finite)) if finite else None

    def broken(self) -> set[int]:
        return {r for r, fit in enumerate(self.fit) if not fit}


def checked(table: np.ndarray) -> Rows:
    """A table of rows, if they belong together; a RuntimeError on every rank if they do not."""
    rows = Rows(table.tolist())
    if len(set(rows.method)) > 1:
        raise RuntimeError(
            "workers came to rounds of different methods: with several methods, give all workers equally many batches"
        )
    steps = set(rows.stamps)
    if len(steps) > 1:
        raise RuntimeError(
            f"workers came to one round at different steps {sorted(map(int, steps))}: are their periods equal?"
        )
    return rows

"""What a worker brings to a meeting."""

from __future__ import annotations

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


class Rows(NamedTuple):
    """The rows of all, in rank order; each field is one array."""

    method: np.ndarray
    purpose: np.ndarray
    stamp: np.ndarray
    fit: np.ndarray
    score: np.ndarray
    behind: np.ndarray

    @property
    def round(self) -> int | None:
        """The step at which a round is held; None if nobody came for one."""
        came = self.stamp[self.purpose == ROUND]
        return int(came[0]) if len(came) else None

    def best(self) -> int | None:
        """The rank with the least score, the lowest among equals; None if no score is finite."""
        return int(np.argmin(self.score)) if np.isfinite(self.score).any() else None

    def broken(self) -> set[int]:
        return {r for r, fit in enumerate(self.fit) if not fit}


def checked(table: np.ndarray) -> Rows:
    """A table of rows, if they belong together; a RuntimeError on every rank if they do not."""
    rows = Rows(*table.T)
    if len(set(rows.method)) > 1:
        raise RuntimeError(
            "workers came to rounds of different methods: with several methods, give all workers equally many batches"
        )
    stamps = {int(stamp) for stamp in rows.stamp[rows.purpose == ROUND]}
    if len(stamps) > 1:
        raise RuntimeError(
            f"workers came to one round at different steps {sorted(stamps)}: are their periods equal?"
        )
    return rows

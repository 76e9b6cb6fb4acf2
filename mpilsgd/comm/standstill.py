"""Where the ranks of a run stand, and which of them hold the others up."""

from __future__ import annotations

import enum
import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple


class Place(enum.IntEnum):
    """Where a rank may stand, having taken n steps; in the order of a step."""

    MEETING = 0
    BATCH = 1
    EXCHANGE = 2


_WORDS = (
    "after batch {}, in an evaluation or a checkpoint",
    "in batch {next}",
    "in the exchange after batch {next}",
)


def position(step: int, place: Place) -> int:
    """A number that grows on the way through a run."""
    return step * len(Place) + place


def position_text(number: int) -> str:
    """In words where that is."""
    step, place = divmod(number, len(Place))
    return _WORDS[place].format(step, next=step + 1)


class Sign(NamedTuple):
    """What a rank shows of itself: its position, and a pulse that grows while it runs."""

    position: int
    pulse: int


ENDED = -1  # the pulse of a rank that needs no looking after any more


class Standstill:
    """Finds ranks that stay where they are while others are further, and ranks without a pulse; each once.

    Args: ranks: those to look at; patience: seconds.
    """

    def __init__(self, ranks: Iterable[int], patience: float):
        self._ranks, self._patience = list(ranks), patience
        self._moved: dict[int, tuple[int, float]] = {}  # what was last seen, and since when
        self._lived: dict[int, tuple[int, float]] = {}

    def look(self, signs: Mapping[int, Sign], now: float) -> dict[int, str]:
        """What there is to say of which ranks. signs: of all ranks; now: seconds."""
        furthest, told = max(sign.position for sign in signs.values()), {}
        for r in self._ranks:
            where, pulse = signs[r]
            stands = self._stays(self._moved, r, where, now) and where < furthest
            lifeless = self._stays(self._lived, r, pulse, now)
            if pulse != ENDED and (stands or lifeless):
                how = "is stopped, or one of its threads lets no other run," if lifeless else "stands"
                told[r] = f"it {how} {position_text(where)}"
                self._moved[r], self._lived[r] = (where, math.inf), (pulse, math.inf)
        return told

    def _stays(self, seen: dict[int, tuple[int, float]], r: int, value: int, now: float) -> bool:
        before, since = seen.get(r, (None, now))
        if before != value:
            seen[r] = (value, now)
        return before == value and now - since > self._patience

    def forget(self) -> None:
        """Time has passed in which nobody looked."""
        self._moved, self._lived = {}, {}

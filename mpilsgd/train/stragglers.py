"""Ranks that are slowed down on purpose: `--slow 2:3` makes rank 2 three times as slow as it is."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from mpilsgd.train.sampling import generator

RULE = (
    "RANK:FACTOR or random:FACTOR, several with commas between them (2:3,random:1.5), each FACTOR at least 1"
)


@dataclass(frozen=True)
class Slowdown:
    """How much longer the gradients take than they would.

    Attributes:
        ranks: factors >= 1 of single ranks.
        every: >= 1; every step of every rank takes 1 + an exponential random number of mean every - 1 as long.
    """

    ranks: Mapping[int, float] = field(default_factory=dict)
    every: float = 1.0

    def __bool__(self) -> bool:
        return bool(self.ranks) or self.every > 1

    def __str__(self) -> str:
        parts = [f"{rank}:{factor:g}" for rank, factor in sorted(self.ranks.items())]
        return ",".join(parts + [f"random:{self.every:g}"] * (self.every > 1))

    def told(self) -> str:
        """For a reader."""
        parts = [f"rank {rank} by {factor:g}" for rank, factor in sorted(self.ranks.items())]
        return ", ".join(parts + [f"every step by a random factor of mean {self.every:g}"] * (self.every > 1))

    def factor(self, seed: int, rank: int, step: int) -> float:
        """What one step of a rank is lengthened by: a function of its arguments, each rank with numbers of its own."""
        factor = self.ranks.get(rank, 1.0)
        if self.every > 1:
            drawn = torch.empty(1, dtype=torch.float64).exponential_(
                generator=generator(seed, "slow", rank, step)
            )
            factor *= 1.0 + (self.every - 1.0) * float(drawn)
        return factor

    def sleep(self, seconds: float, seed: int, rank: int, step: int) -> None:
        """After a gradient that took so many seconds: sleeps for the rest of what it shall take."""
        if self:
            time.sleep(seconds * (self.factor(seed, rank, step) - 1.0))


def parse_slow(value: Any) -> Slowdown:
    """What the option says: a text, or a list of texts.

    Raises:
        ValueError: it cannot be understood; the text says what is right.
    """
    if value is None:
        return Slowdown()
    texts = value if isinstance(value, list) else [value]
    factors: dict[int, float] = {}  # of each rank; -1: random
    for text in texts:
        if not isinstance(text, str):
            # YAML takes 2:3 for a number in base 60
            quoted = "; in a file put it in quotes: '2:3'" if isinstance(text, int | float) else ""
            raise ValueError(f"must be {RULE}, not {text!r}{quoted}")
        for part in text.split(","):
            who, _, number = (word.strip() for word in part.partition(":"))
            factor = _number(number)
            if not (math.isfinite(factor) and factor >= 1) or not (who == "random" or who.isdecimal()):
                raise ValueError(f"must be {RULE}, not {part.strip()!r}")
            rank = -1 if who == "random" else int(who)
            if rank in factors:
                raise ValueError(f"{who} is given twice")
            factors[rank] = factor
    return Slowdown({rank: factor for rank, factor in factors.items() if rank >= 0}, factors.get(-1, 1.0))


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan

"""How long a gradient takes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from random import Random
from typing import Any

Draw = Callable[[int, int, Random], float]  # (rank, step, its random numbers) -> seconds
MEASURED = "measured"


def lognormal(mean: float, sigma: float) -> Draw:
    """Every step's seconds drawn anew: exp of a normal number of deviation sigma, with this mean.

    ValueError: a mean that is not above 0, or a sigma below 0.
    """
    if not (0 < mean < math.inf and 0 <= sigma < math.inf):
        raise ValueError(f"lognormal needs a mean above 0 and a sigma of at least 0, not {mean} and {sigma}")
    return lambda rank, step, random: random.lognormvariate(math.log(mean) - sigma * sigma / 2, sigma)


@dataclasses.dataclass(frozen=True)
class Stragglers:
    """What `stragglers` gives."""

    factors: Mapping[int, float] | Callable[[int, int], float]
    of: Any

    def factor(self, rank: int, step: int) -> float:
        return self.factors(rank, step) if callable(self.factors) else self.factors.get(rank, 1.0)


def stragglers(factors: Mapping[int, float] | Callable[[int, int], float], of: Any) -> Stragglers:
    """Ranks that take so many times as long as `of` says, which is what `compute` may be: {2: 3.0} for rank 2.

    factors: also a function (rank, step) -> factor.
    """
    return Stragglers(factors if callable(factors) else dict(factors), of)


def seconds_of(compute: Any, rank: int, step: int, random: Random, measured: float) -> float:
    """Of the gradient of a rank's step. measured: what it took here."""
    factor = 1.0
    while isinstance(compute, Stragglers):
        factor, compute = factor * compute.factor(rank, step), compute.of
    if compute == MEASURED:
        return factor * measured
    seconds = factor * float(compute(rank, step, random) if callable(compute) else compute)
    if not 0 <= seconds < math.inf:
        raise ValueError(
            f"compute gives {seconds} seconds for step {step} of rank {rank}: it must be at least 0"
        )
    return seconds


def compute_problem(compute: Any, workers: int) -> str | None:
    """What is wrong with the argument."""
    if isinstance(compute, Stragglers):
        for rank, factor in ({} if callable(compute.factors) else compute.factors).items():
            if rank not in range(workers):
                return f"stragglers: there is no rank {rank!r}; the ranks are 0 to {workers - 1}"
            if not _is_number(factor):
                return f"stragglers: the factor of rank {rank} must be a number of at least 0, not {factor!r}"
        return compute_problem(compute.of, workers)
    if compute == MEASURED or callable(compute) or _is_number(compute):
        return None
    return (
        "compute must be seconds, a function (rank, step, random) -> seconds, 'measured', or stragglers(...) of "
        f"one of them, not {compute!r}"
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf

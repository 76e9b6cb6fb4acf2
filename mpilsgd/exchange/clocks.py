"""When an exchange is due. A clock knows the steps of its own worker, or the total of all; nothing else.

Every clock has these verbs. `first` says that the exchange comes before the local step, from the values of time t, and
that t counts from 0 before the step; else it comes after the step that makes t what it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import torch


class Due(NamedTuple):
    """What an exchange holds: one within each group, one among all."""

    group: bool
    world: bool

    def __bool__(self) -> bool:
        return self.group or self.world


NOTHING, ALL = Due(False, False), Due(False, True)


class Every:
    """At the multiples of tau. Also the base of the other clocks."""

    first = False
    by_total = False
    looks = False  # whether it judges the gradient before the local step
    broken = False  # whether that gradient was not finite
    sees = False  # whether it looks at the gradient before the local step

    def __init__(self, period: int, first: bool = False):
        self.period, self.first = period, first

    def due(self, t: int) -> Due:
        """What is due at t."""
        return ALL if t % self.period == 0 else NOTHING

    def begins(self) -> None:
        """This worker comes to a meeting, its own part done."""

    def held(self, r: Any) -> None:
        """A round was held, of r's rows. Collective where the clock learns from it."""

    def gives_way(self, gradients: list[torch.Tensor]) -> bool:
        """Whether the exchange takes the place of the local step, which these gradients would make."""
        return False

    @property
    def unit(self) -> int:
        """Exchanges come at multiples of so many steps."""
        return self.period


class EverySo(Every):
    """At the steps of a set, or where a callable says so; never without either."""

    def __init__(self, steps: Collection[int] | Callable[[int], bool] | None):
        self._steps = steps

    def due(self, t: int) -> Due:
        if self._steps is None:
            return NOTHING
        return ALL if (self._steps(t) if callable(self._steps) else t in self._steps) else NOTHING


class TwoPeriods(Every):
    """Within the groups at the multiples of tau, among all at those of tau_G.

    total_of: of p workers whose steps are counted together, at the multiples of p tau and p tau_G of the sum.
    """

    def __init__(self, period: int, global_period: int, first: bool = False, total_of: int | None = None):
        self.period, self.global_period, self.first = period, global_period, first
        self.by_total, self._workers = total_of is not None, total_of or 1

    def due(self, t: int) -> Due:
        steps, odd = divmod(t, self._workers)
        group, world = steps % self.period == 0, steps % self.global_period == 0
        return NOTHING if odd or not (group or world) else Due(group, world)

    def after(self, t: int) -> int:
        """The next t at which anything is due."""
        units = (self._workers * period for period in (self.period, self.global_period))
        return min((t // unit + 1) * unit for unit in units)

    @property
    def unit(self) -> int:
        return self._workers * math.gcd(self.period, self.global_period)


class UntilGradient(Every):
    """T = infinity: a worker steps until its squared gradient norm is at most a threshold, then waits for the others.

    A gradient that is not finite has not converged: its worker meets the others as a broken one.
    """

    looks = True

    def __init__(self, threshold: float):
        self.threshold = threshold

    def due(self, t: int) -> Due:
        return NOTHING

    def gives_way(self, gradients: list[torch.Tensor]) -> bool:
        square = sum(float(n) ** 2 for n in torch._foreach_norm(gradients)) if gradients else 0.0
        self.broken = not math.isfinite(square)
        return self.broken or square <= self.threshold

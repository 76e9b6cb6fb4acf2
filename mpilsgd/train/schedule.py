"""The learning rate over the course of training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Schedule:
    """What the initial learning rate is multiplied by: f^k / (1 + gamma t)^0.5, k drops being past at step t.

    Args:
        drops: epochs at which the rate is multiplied by `factor`.
        factor: f, in (0, 1].
        gamma: decay a step (thesis 4.1: eta_t = eta / (1 + gamma t)^0.5); 0: none.
    """

    drops: Sequence[float] = field(default=())
    factor: float = 0.1
    gamma: float = 0.0

    def __call__(self, step: int, epoch: float) -> float:
        """The multiplier for the step taken at clock `step` (from 0), `epoch` passes into the training."""
        past = sum(epoch >= drop for drop in self.drops)
        return self.factor**past / (1 + self.gamma * step) ** 0.5

    def apply(self, param_groups: list[dict[str, Any]], step: int, epoch: float) -> None:
        """Sets every group's lr from its initial one, which is remembered beside it."""
        for group in param_groups:
            initial = group.setdefault("initial_lr", group["lr"])
            group["lr"] = initial * self(step, epoch)

"""The learning rate over the course of training."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from mpilsgd.train.callables import InputError, call, is_path
from mpilsgd.train.config import SHAPES, Config
from mpilsgd.train.events import steps_of

__all__ = ["SHAPES", "Schedule", "Scheduler", "scheduled"]


@dataclass(frozen=True)
class Schedule:
    """What the initial learning rate is multiplied by: w f^k s / (1 + gamma t)^0.5, k drops being past at step t.

    w: (t + 1) / warmup in the first `warmup` steps, then 1.
    s: 1 (step); (1 + cos(pi u)) / 2 (cosine); 1 - u (linear), where u is the part of the steps after the warm-up
    that is past.

    Args:
        drops: epochs at which the rate is multiplied by `factor`.
        factor: f, in (0, 1].
        gamma: decay a step (thesis 4.1: eta_t = eta / (1 + gamma t)^0.5); 0: none.
        shape: one of `SHAPES`.
        warmup: steps.
        total: steps of the whole training, at whose end cosine and linear come to 0.

    Source: torch's CosineAnnealingLR and LinearLR in closed form, so that a resumed run needs no state.
    """

    drops: Sequence[float] = field(default=())
    factor: float = 0.1
    gamma: float = 0.0
    shape: str = "step"
    warmup: int = 0
    total: int = 0

    def __call__(self, step: int, epoch: float) -> float:
        """The multiplier for the step taken at clock `step` (from 0), `epoch` passes into the training."""
        past = sum(epoch >= drop for drop in self.drops)
        found = self.factor**past / (1 + self.gamma * step) ** 0.5
        if step < self.warmup:
            return found * (step + 1) / self.warmup
        u = min(1.0, (step - self.warmup) / max(1, self.total - self.warmup))
        shapes = {"cosine": (1 + math.cos(math.pi * u)) / 2, "linear": 1 - u}
        return found * shapes.get(self.shape, 1.0)

    def apply(self, param_groups: list[dict[str, Any]], step: int, epoch: float) -> None:
        """Sets every group's lr from its initial one, which is remembered beside it."""
        for group in param_groups:
            initial = group.setdefault("initial_lr", group["lr"])
            group["lr"] = initial * self(step, epoch)

    def stepped(self, step: int) -> None: ...

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Scheduler:
    """A torch scheduler of the user's in the place of a `Schedule`.

    Args:
        path: `package.module:callable`, given the optimizer, and `total_steps` and `steps_per_epoch` if it takes them.

    Raises:
        InputError: it does not return a scheduler that goes by the steps alone.
    """

    def __init__(self, path: str, optimizer: torch.optim.Optimizer, total: int, batches: int):
        offered = {"total_steps": total, "steps_per_epoch": batches}
        self._scheduler = call(path, {"optimizer": optimizer}, offered)
        if isinstance(self._scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            raise InputError(
                f"{path}: ReduceLROnPlateau goes by a measure; a schedule here goes by the steps"
            )
        if not isinstance(self._scheduler, torch.optim.lr_scheduler.LRScheduler):
            kind = type(self._scheduler).__name__
            raise InputError(f"{path} must return a scheduler of torch.optim.lr_scheduler, not {kind}")
        self._total = total
        self._keepable(path)

    def _keepable(self, path: str) -> None:
        """What a checkpoint could not give back is found before the training."""
        file = io.BytesIO()
        try:
            torch.save(self.state_dict(), file)
            file.seek(0)
            torch.load(file, weights_only=True)
        except Exception as error:
            raise InputError(
                f"{path}: the scheduler's state_dict() cannot be kept in checkpoints, numbers and tensors can: {error}"
            ) from None

    def apply(self, param_groups: list[dict[str, Any]], step: int, epoch: float) -> None: ...

    def stepped(self, step: int) -> None:
        """So many steps are taken. Those beyond the total, in an asynchronous run, keep the last rate."""
        if step < self._total:
            self._scheduler.step()

    def state_dict(self) -> dict[str, Any]:
        return {"total": self._total, "scheduler": self._scheduler.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state and state["total"] != self._total:
            raise ValueError(
                f"a schedule of your own was made for {state['total']} steps, which its state holds: the run cannot be "
                f"resumed with {self._total}"
            )
        if state:
            self._scheduler.load_state_dict(state["scheduler"])


def scheduled(
    config: Config, optimizer: torch.optim.Optimizer, total: int, batches: int
) -> Schedule | Scheduler:
    """What the configuration asks for. total: steps of the training; batches: steps of an epoch."""
    if is_path(config.schedule):
        return Scheduler(config.schedule, optimizer, total, batches)
    drops, factor, gamma = config.lr_drops, config.lr_drop_factor, config.lr_gamma
    return Schedule(drops, factor, gamma, config.schedule, steps_of(config.warmup, batches), total)

"""A step's gradient."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mpilsgd.train.precision import Precision
from mpilsgd.train.samples import Batch
from mpilsgd.train.task import Task


class Gradient:
    """The gradient of the mean loss of a step's batches, left in the parameters.

    Args:
        clip_norm: the length that it is shortened to if it is longer; None: it is left as it is.
    """

    def __init__(
        self, task: Task, model: torch.nn.Module, precision: Precision, clip_norm: float | None = None
    ):
        self._task, self._model, self._precision, self._clip = task, model, precision, clip_norm

    def of(self, batches: Sequence[Batch]) -> torch.Tensor:
        """Adds the gradient of the mean loss, and gives that."""
        losses = []
        for batch in batches:
            with self._precision.autocast():
                loss = self._task.loss(self._model, batch)
            self._precision.backward(loss if len(batches) == 1 else loss / len(batches))
            losses.append(loss.detach())
        return losses[0] if len(losses) == 1 else torch.stack(losses).mean()

    def settle(self) -> bool:
        """Takes scale and excess length from it; whether it was finite, else there is none afterwards."""
        finite = self._precision.settle()
        if finite and self._clip is not None:
            torch.nn.utils.clip_grad_norm_(self._model.parameters(), self._clip)
        return finite

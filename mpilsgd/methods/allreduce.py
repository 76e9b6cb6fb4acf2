"""Mini-batch SGD: the mean of all workers' gradients, every step."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import numpy as np
import torch

from mpilsgd import kernels
from mpilsgd.comm import Topology
from mpilsgd.methods.base import ROUND, Diverged, Method
from mpilsgd.methods.wrapped import forget


class AllreduceSGD(Method):
    """Mini-batch SGD over p workers: every worker steps with the mean gradient.

        x_{t+1} = x_t - eta (1/p) sum_i g_t^i(x_t)

    The flat gradients lie in shared windows; each rank averages its slice of all of them in place, so a node holds no
    copy. Where a gradient value is not finite, the mean is that of the others'; a worker whose parameters are not
    (found when its gradient or the `loss` given to `step` is not) takes another's. Both count in `metrics.resets`.
    A worker that is out of data leaves the mean and follows the others' steps.

    Arguments and errors: see `Method`. On one rank it is the wrapped optimizer. Source: local SGD paper, (4) with
    I_T = [T]; float buffers are averaged with the gradients.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        topology: Topology | None = None,
        *,
        init: str = "same",
        buffers: str = "average",
        model: torch.nn.Module | None = None,
    ):
        super().__init__(
            optimizer,
            topology,
            init=init,
            buffers=buffers,
            model=model,
            problems=(),
            settings={},
            gradients=True,
        )

    def _acts_on_gradient(self) -> bool:
        return True

    def _shown(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext()  # gradients are exchanged, the parameters are equal

    def _before(self, loss: Any) -> None:
        self._missing = self.flat.fill_missing_grads()
        self._suspect = loss is not None and not math.isfinite(float(loss))
        self._exchange()

    def _score(self) -> float:
        return float(self._suspect)

    def _note(self) -> float:
        return float(len(self._missing))

    def _round(self, table: np.ndarray) -> None:
        active = [r for r in range(len(table)) if table[r, 0] == ROUND]
        spans = [(w, 0, w.mine.numel()) for w in self._g.values()]
        if self.buffers_policy == "average":
            spans += [
                (w, self.flat.n_parameters[d], w.mine.numel())
                for d, w in self._x.items()
                if w.mine.numel() > self.flat.n_parameters[d]
            ]
        bad = self._average(spans, active)
        if len(bad) == len(active):
            raise Diverged(f"every worker's gradient is non-finite at step {self.t}: the run has diverged")
        self.metrics.rounds += 1
        if bad or table[:, 2].any():
            self._check_parameters(bad)
        if table[:, 3].any() or len(active) < len(table):
            self._agree_on_missing(self.fabric.world.rank in active)

    def _check_parameters(self, bad: set[int]) -> None:
        """Workers whose parameters are not finite take those of the first whose are. Collective."""
        level = self.fabric.world
        own = all([kernels.check(w.mine[: self._n[d]]) for d, w in self._x.items()])
        broken = {r for r, row in enumerate(level.table([float(own)])) if not row[0]}
        if broken:
            self._set_back(broken)
            forget(self.optimizer)  # on every worker, so that they stay equal
            self._copy_from(min(set(range(level.size)) - broken), broken)
        elif level.rank in bad:
            self.metrics.resets += 1

    def _agree_on_missing(self, active: bool) -> None:
        """A parameter that had a gradient on any worker is stepped on all of them."""
        parameters = self.flat.parameters
        absent = {id(p) for p in self._missing} if active else {id(p) for p in parameters}
        had = self.fabric.world.combine(np.array([float(id(p) not in absent) for p in parameters]))
        for p, present in zip(parameters, had, strict=True):
            p.grad = self.flat.view(p, self.flat.grads) if present else None

    def _rest(self, purpose: float) -> None:
        self._missing, self._suspect = [], False
        super()._rest(purpose)

    def _followed(self) -> None:
        self.optimizer.step()
        self.t += 1

    def _free(self) -> None:
        self._missing = []

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
    copy. A worker whose gradient is not finite is left out of the mean; if its parameters are not finite either (looked
    at when its gradient or the `loss` given to `step` is not), it takes another's. Both count in `metrics.resets`.
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
        self._missing: list[torch.Tensor] = []
        self._suspect = self._follows = False  # a loss that is not finite; steps taken for the others' sake
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
        self.flat.reseat()
        self._missing = self.flat.fill_missing_grads()
        self._suspect = loss is not None and not math.isfinite(float(loss))
        self._exchange()

    def _score(self) -> float:
        return float(self._suspect)

    def _note(self) -> float:
        return float(len(self._missing) or self._follows)

    def _is_finite(self, purpose: float) -> bool:
        return purpose != ROUND or all([kernels.check(g.mine) for g in self._g.values()])

    def _round(self, table: np.ndarray) -> None:
        world = self.fabric.world
        active = table[:, 0] == ROUND
        fine = active & (table[:, 4] == 1.0)
        if not fine.any() and active.all():
            raise Diverged(f"every worker's gradient is non-finite at step {self.t}: the run has diverged")
        spans = [(w, 0, w.mine.numel()) for w in self._g.values()]
        if self.buffers_policy == "average":
            spans += [
                (w, self.flat.n_parameters[d], w.mine.numel())
                for d, w in self._x.items()
                if w.mine.numel() > self.flat.n_parameters[d]
            ]
        if fine.any():
            self._average(spans, fine)
        else:
            for g in self._g.values():
                g.mine.zero_()
        self.metrics.rounds += 1
        counted = bool(active[world.rank] and not fine[world.rank])
        self.metrics.resets += counted
        if table[active, 2].any() or not fine[active].all():
            self._check_parameters(counted)
        if table[active, 3].any() or not active.all():
            self._agree_on_missing(bool(active[world.rank]))

    def _check_parameters(self, counted: bool) -> None:
        """Workers whose parameters are not finite take those of the first whose are. Collective."""
        level = self.fabric.world
        own = all([kernels.check(w.mine) for w in self._x.values()])
        broken = {r for r, row in enumerate(level.table([own])) if not row[0]}
        if not broken:
            return
        self._refuse_if_all(broken)
        forget(self.optimizer)  # on every worker, so that they stay equal
        self._copy_from(min(set(range(level.size)) - broken), broken)
        self.metrics.resets += level.rank in broken and not counted

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
        self._follows = True

    def _catch_up(self, table: np.ndarray) -> None:
        super()._catch_up(table)
        followers = {r for r in range(len(table)) if table[r, 3]}
        if followers:  # their learning rates may have been other ones
            self._copy_from(min(set(range(len(table))) - followers), followers)
        self._follows = False

    def _free(self) -> None:
        self._missing = []

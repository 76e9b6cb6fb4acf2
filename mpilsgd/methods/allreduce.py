"""Mini-batch SGD: the mean of all workers' gradients, every step."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from mpilsgd import bound, kernels
from mpilsgd.exchange import ROUND, Diverged, Every, Method, forget, number
from mpilsgd.extension import DTYPES, device_of

_SUSPECT, _MISSING = 1, 2  # a loss that is not finite; parameters without a gradient


class AllreduceSGD(Method):
    """Mini-batch SGD over p workers: every worker steps with the mean gradient.

        x_{t+1} = x_t - eta (1/p) sum_i g_t^i(x_t)

    The flat gradients lie in shared windows; each rank averages its slice of all of them in place, so a node holds no
    copy. Before `step` a parameter's gradient is this worker's own: who clips it there clips each worker's;
    `max_grad_norm` clips the mean, as torch.nn.utils.clip_grad_norm_ does.

    A worker whose gradient is not finite is left out of the mean; if its parameters are not finite either (looked
    at when its gradient or the `loss` given to `step` is not), it takes another's. Both count in `metrics.resets`.
    A worker that is out of data leaves the mean and follows the others' steps. On one rank it is the wrapped optimizer.
    Float buffers are averaged with the gradients.

    Source: local SGD paper, (4) with I_T = [T].
    """

    max_grad_norm: float | None = number(
        None, 0, above=True, help="the norm to which the mean gradient is clipped (null: not at all)"
    )

    guard = "g"

    def clock_of(self) -> Every:
        return Every(1, first=True)

    def observe(self, loss: Any) -> None:
        self.flat.reseat()
        self.missing = self.flat.fill_missing_grads()
        self.fine = _finite(loss)

    def measure(self) -> float:
        missing, fine = getattr(self, "missing", None), getattr(self, "fine", _without_loss)
        return (0 if fine() else _SUSPECT) + (_MISSING if missing or self.behind else 0)

    def exchange(self, r: Any) -> None:
        active = np.array(r.rows.purpose) == ROUND
        fine = active & (np.array(r.rows.fit) == 1)
        here, flags = bool(active[r.level.rank]), np.array(r.came.score, int)
        if not fine.any() and active.all():
            raise Diverged(f"every worker's gradient is non-finite at step {self.t}: the run has diverged")
        if fine.any():
            r.mean(self.g, fine)
        else:
            for g in self.g.values():
                g.mine.zero_()
        counted = here and not fine[r.level.rank]
        self.metrics.resets += counted
        if (flags & _SUSPECT).any() or not fine[active].all():
            self._check_parameters(r, counted)
        if (flags & _MISSING).any() or not active.all():
            self._agree_on_missing(r, here)
        if self.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.flat.parameters, self.max_grad_norm)
        if not here:  # this worker follows
            self.optimizer.step()
            self.t += 1
            self.behind = True

    def _check_parameters(self, r: Any, counted: bool) -> None:
        """Workers whose parameters are not finite take those of the first whose are. Collective."""
        own = all([kernels.check(w.mine) for w in self.x.values()])
        broken = {k for k, row in enumerate(r.level.table([own])) if not row[0]}
        if not broken:
            return
        self.refuse_if_all(broken)
        forget(self.optimizer)  # on every worker, so that they stay equal
        self.copy_from(min(set(range(self.p)) - broken), broken)
        self.metrics.resets += r.level.rank in broken and not counted

    def _agree_on_missing(self, r: Any, here: bool) -> None:
        """A parameter that had a gradient on any worker is stepped on all of them."""
        absent = {id(p) for p in (self.missing if here else self.flat.parameters)}
        had = r.level.table([float(id(p) not in absent) for p in self.flat.parameters]).any(axis=0)
        for p, present in zip(self.flat.parameters, had, strict=True):
            p.grad = self.flat.view(p, self.flat.grads) if present else None


def _without_loss() -> bool:
    return True


def _finite(loss: Any) -> Callable[[], bool]:
    """Whether a loss is finite. On a device it is looked at when the stream has come there, as the gradients after it
    are, for which the host waits anyway."""
    if loss is None:
        return _without_loss
    if not torch.is_tensor(loss) or loss.numel() != 1 or loss.dtype not in DTYPES or device_of(loss) < 0:
        fine = math.isfinite(float(loss))
        return lambda: fine
    found = bound.check(loss.detach().reshape(1)).begin()

    def wait() -> bool:
        moved = found()
        return moved is not None and moved.finite

    return wait

"""Local SGD (Stich) and model averaging (Zhang & Li): local steps, then the mean of all workers."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import numpy as np
import torch

from mpilsgd.comm import Topology
from mpilsgd.methods.arguments import choice, number, whole
from mpilsgd.methods.averaging import accumulation_dtype, follow
from mpilsgd.methods.base import ROUND, Method


class LocalSGD(Method):
    """Local SGD: every worker steps alone and all take their mean after the steps in I_T.

        x^k_{t+1} = x^k_t - eta g^k(x^k_t);    if t+1 in I_T:  x^k_{t+1} <- (1/K) sum_k x^k_{t+1}

    Args:
        period: tau >= 1 (I_T = its multiples; 1 is mini-batch SGD), or a collection of step numbers t+1, or a callable
            step number -> bool, or None: one-shot averaging, only `center()` at the end takes the mean.
        until_grad_norm: a threshold on this worker's squared gradient norm, in place of `period` (T = infinity): each
            worker steps until its gradient is at or below it, then waits for the others; a worker that is below
            already takes no step. `converged` says that no worker took a step between the last two rounds.
        average: what `center()` holds: "last" (the mean of the workers) or "quadratic", the mean over workers
            and time (1/(K S_T)) sum_k sum_t w_t x^k_t with w_t = (a+t)^2 (one more vector a worker).
        a: the shift of those weights, > 0; the theory wants a >= max(16 kappa, H). Default: an integer period H.
        optimizer, topology, init, buffers, model and errors: see `Method`.

    Source: Stich, Algorithm 1 (line 8 averages x_{t+1}: see its (4)), Theorem 2.2; Zhang & Li, Algorithm 1.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        topology: Topology | None = None,
        *,
        period: int | Collection[int] | Callable[[int], bool] | None = 64,
        until_grad_norm: float | None = None,
        average: str = "last",
        a: float | None = None,
        init: str = "same",
        buffers: str = "average",
        model: torch.nn.Module | None = None,
    ):
        problems = [_period_problem(period), choice("average", average, ("last", "quadratic"))]
        if until_grad_norm is not None:
            problems.append(number("until_grad_norm", until_grad_norm, 0.0))
        if a is None and average == "quadratic" and isinstance(period, int) and period >= 1:
            a = float(period)
        if average == "quadratic" and (a is None or number("a", a, 0.0) or a == 0):
            problems.append(
                f'average="quadratic" needs a number a > 0 (at least 16 kappa and the period), not {a!r}'
            )
        self.period = (
            period if callable(period) or isinstance(period, int) or period is None else _steps(period)
        )
        self.until_grad_norm = until_grad_norm
        self.average, self.a = average, a
        self.converged = False
        self._moved = False  # a step since the last round
        self._z: dict[torch.dtype, torch.Tensor] = {}
        self._weight = 0.0
        settings = dict(period=self.period, until_grad_norm=until_grad_norm, average=average, a=a)
        super().__init__(
            optimizer, topology, init=init, buffers=buffers, model=model, problems=problems, settings=settings
        )
        if average == "quadratic":
            self._z = {d: torch.zeros_like(x, dtype=accumulation_dtype(d)) for d, x in self.flat.data.items()}

    def _acts_on_gradient(self) -> bool:
        return self.until_grad_norm is not None

    def _before(self, loss: Any) -> None:
        if self.average == "quadratic":  # z <- z + w_t / S_{t+1} (x_t - z)
            assert self.a is not None
            w = (self.a + self.t) ** 2
            self._weight += w
            with self._shown():
                for d, z in self._z.items():
                    follow(z, self.flat.data[d], w / self._weight)

    def _local_step(self, closure: Callable[[], Any] | None) -> Any:
        if self.until_grad_norm is None:
            return super()._local_step(closure)
        grads = [p.grad for p in self.flat.parameters if p.grad is not None]
        square = sum(float(n) ** 2 for n in torch._foreach_norm(grads)) if grads else 0.0
        if square > self.until_grad_norm:
            self._moved = True
            return super()._local_step(closure)
        self._exchange()
        return None

    def _after(self, loss: Any) -> None:
        if self.until_grad_norm is None and self._due(self.t):
            self._exchange()

    def _due(self, step: int) -> bool:
        if self.period is None:
            return False
        if isinstance(self.period, int):
            return step % self.period == 0
        return bool(self.period(step)) if callable(self.period) else step in self.period

    def _stamp(self) -> int:
        return self.t if self.until_grad_norm is None else self.metrics.rounds

    def _note(self) -> float:
        return float(self._moved)

    def _catch_up(self, table: np.ndarray) -> None:
        if self.until_grad_norm is None:
            super()._catch_up(table)

    def _round(self, table: np.ndarray) -> None:
        bad = {r for r, row in enumerate(table) if not row[4]}
        self._set_back(bad)
        self._average(self._spans(), table[:, 4])
        if bad and self.buffers_policy != "average":  # buffers that are not exchanged may be broken, too
            self._copy_from(min(set(range(len(table))) - bad), bad)
        self.metrics.rounds += 1
        self.converged = self.until_grad_norm is not None and not table[table[:, 0] == ROUND, 3].any()
        self._moved = False

    def _set_centre(self) -> None:
        if self._weight:
            for d, z in self._z.items():
                self.flat.data[d].copy_(z)
        super()._set_centre()

    def _extra(self) -> dict[str, Any]:
        z = {str(d): z.clone() for d, z in self._z.items()}
        return {"z": z, "weight": self._weight, "moved": self._moved, "converged": self.converged}

    def _load_extra(self, own: dict[str, Any]) -> None:
        self._weight, self._moved, self.converged = own["weight"], own["moved"], own["converged"]
        for d, z in self._z.items():
            z.copy_(own["z"][str(d)])


def _steps(period: Any) -> frozenset[int]:
    try:
        return frozenset(period)
    except TypeError:
        return frozenset()


def _period_problem(period: Any) -> str | None:
    if period is None or callable(period):
        return None
    if isinstance(period, (set, frozenset, list, tuple, range)):
        return next((p for p in (whole("a step number in period", s) for s in period) if p), None)
    if isinstance(period, int):
        return whole("period", period)
    return f"period must be a whole number of at least 1, a set of them, a callable or None, not {period!r}"

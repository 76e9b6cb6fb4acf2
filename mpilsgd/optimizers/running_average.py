"""The running average of any optimizer's iterates."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from mpilsgd import kernels
from mpilsgd.extension import HALF
from mpilsgd.optimizers.msgd import MSGD
from mpilsgd.optimizers.runs import Row, companions, lines


class RunningAverage(Optimizer):
    """Any optimizer, with the average z of its iterates over time.

        z_0 = x_0        z <- z + a (x - z)  after every step        a = 1/(t+1) after step t, or a constant

    a = 1/(t+1) (ASGD) makes z the mean of x_0 ... x_t, a constant (MVASGD) a moving average. What is held
    after step t is the thesis' z_{t+1} = (1 - a_{t+1}) z_t + a_{t+1} x_t. Of MSGD the iterate is averaged,
    not the look-ahead. z_0 is taken when the first step begins.

    Args:
        optimizer: whose parameters are averaged; step, schedulers and groups go through to it.
        rate: a in (0, 1] (else a ValueError); None (default) for 1/(t+1).

    Source: Zhang's thesis, 4 (ADOWNPOUR, MVADOWNPOUR at p = 1); Polyak and Juditsky.
    """

    def __init__(self, optimizer: Optimizer, rate: float | None = None) -> None:
        if rate is not None and not 0 < rate <= 1:
            raise ValueError(f"rate is {rate}; it must lie in (0, 1], or be None for 1/(t+1)")
        self.optimizer, self.rate, self.t = optimizer, rate, 0
        self._average: dict[Tensor, Tensor] = {}
        self._inside = False
        super().__setstate__({})  # the hooks' tables; state and groups are the wrapped optimizer's

    param_groups = property(lambda self: self.optimizer.param_groups)  # so that schedulers work around either
    state = property(lambda self: self.optimizer.state)
    defaults = property(lambda self: self.optimizer.defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        self.optimizer.add_param_group(param_group)

    def step(self, closure: Callable[[], Any] | None = None, **options: Any) -> Any:
        """The optimizer's step (which takes `options`), then the average's."""
        if self._inside:
            raise RuntimeError("step() inside center(): the parameters are the average there")
        self._start()
        loss = self.optimizer.step(closure, **options)
        self.t += 1
        self._follow(1 / (self.t + 1) if self.rate is None else self.rate)
        return loss

    @contextmanager
    def center(self) -> Iterator[None]:
        """Inside, the parameters hold the average z; afterwards what they held before, exactly.

        What is written inside does not reach z. May be nested. Takes memory for the parameters once more.
        """
        if self._inside:
            yield
            return
        self._start()
        parameters = self._parameters()
        msgd = _find_msgd(self.optimizer)
        with nullcontext() if msgd is None else msgd.hold():
            before = [p.detach().clone() for p in parameters]
            for p in parameters:
                p.detach().copy_(self._average[p])
            self._inside = True
            try:
                yield
            finally:
                self._inside = False
                for p, value in zip(parameters, before, strict=True):
                    p.detach().copy_(value)

    def iterate(self) -> AbstractContextManager[None]:
        """As MSGD's, if that is what is wrapped; else the parameters are the iterate anyway."""
        msgd = _find_msgd(self.optimizer)
        return nullcontext() if msgd is None else msgd.iterate()

    def state_dict(self) -> dict[str, Any]:
        """The wrapped optimizer's state, the average, t and the rate."""
        average = [self._average.get(p) for p in self._parameters()]
        return {"optimizer": self.optimizer.state_dict(), "average": average, "t": self.t, "rate": self.rate}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over a state_dict(); the average is copied."""
        if self._inside:
            raise RuntimeError("load_state_dict() inside center(): the parameters are the average there")
        average, parameters = state_dict["average"], self._parameters()
        if len(average) != len(parameters):
            raise ValueError(f"the saved average has {len(average)} tensors, the optimizer {len(parameters)}")
        for i, (p, z) in enumerate(zip(parameters, average, strict=True)):
            if z is not None and z.shape != p.shape:
                raise ValueError(
                    f"the saved average {i} has shape {tuple(z.shape)}, the parameter {tuple(p.shape)}"
                )
        self.optimizer.load_state_dict(state_dict["optimizer"])
        self.t, self.rate = state_dict["t"], state_dict["rate"]
        pairs = [(p, z) for p, z in zip(parameters, average, strict=True) if z is not None]
        places = _averages([p for p, _ in pairs])
        self._average = {p: place.copy_(z) for (p, z), place in zip(pairs, places, strict=True)}

    def __getstate__(self) -> dict[str, Any]:
        return {k: self.__dict__[k] for k in ("optimizer", "rate", "t", "_average", "_inside")}

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    @torch.no_grad()
    def _start(self) -> None:
        new = [p for p in self._parameters() if p not in self._average]
        if new:
            self._average.update(zip(new, _averages(new), strict=True))
            self._follow(1.0, set(new))

    @torch.no_grad()
    def _follow(self, a: float, only: set[Tensor] | None = None) -> None:
        for group in self.param_groups:
            ahead = float(group.get("lookahead", 0.0))
            rows: list[Row] = []
            for p in group["params"]:
                if only is not None and p not in only:
                    continue
                z, velocity = self._average[p], self.state[p].get("velocity") if ahead else None
                if z.dtype == p.dtype:
                    rows.append((p, (z, velocity), None))
                    continue
                x = p.detach().float()
                if velocity is not None:
                    x.sub_(velocity.float(), alpha=ahead)
                z.lerp_(torch.where(x.isfinite(), x, z), a)
            for _, x, (z, velocity), _ in lines(rows):
                # z <- z + a (y - δ v - z): the iterate is averaged without being written anywhere
                moved = kernels.pull(z, x, a, stats=velocity is not None)
                if moved is not None and not moved.source_finite:  # what the pull passed over, this must too
                    velocity = torch.where(x.isfinite(), velocity, torch.zeros_like(velocity))
                if velocity is not None:
                    kernels.iterate(z, velocity, a * abs(ahead), -int(math.copysign(1, ahead)))


def _averages(parameters: list[Tensor]) -> list[Tensor]:
    """Places for running averages, of half types in float32: a rate of 1/t is soon below their resolution."""
    same = iter(companions([p for p in parameters if p.dtype not in HALF]))
    return [torch.zeros_like(p, dtype=torch.float32) if p.dtype in HALF else next(same) for p in parameters]


def _find_msgd(optimizer: Any) -> MSGD | None:
    while optimizer is not None and not isinstance(optimizer, MSGD):
        optimizer = getattr(optimizer, "optimizer", None)
    return optimizer

"""Local optimizers: momentum SGD in the thesis' form, and the running average of any optimizer's iterates."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from mpilsgd import kernels
from mpilsgd.flat import FlatParameters
from mpilsgd.runs import Row, companions, like, line, lines

Pulls = Callable[[Tensor], "list[tuple[Tensor, float]]"]


class MSGD(Optimizer):
    """SGD with the gradient at Nesterov's look-ahead (2.5) or with heavy-ball momentum (2.6), one fused pass.

        Nesterov:    v <- δ v - η g(x + δ v)        x <- x + v
        heavy ball:  v <- δ v - η g(x)              x <- x + v

    With Nesterov the parameters hold the look-ahead y = x + δ v between steps, so that the loop's gradient is
    the one the equation asks for; inside `with optimizer.iterate():` they hold x, which is what is exchanged,
    averaged, evaluated and saved. δ = 0 is plain SGD. A scheduler may change η and δ at any time; a new δ
    counts from the next step on, whose gradient is still the one at the point where the loop took it.

    Args:
        params: tensors or parameter groups, as for every torch optimizer.
        lr: η >= 0.
        momentum: δ in (-1, 1), default 0; the best one can be negative (thesis 5.1.2).
        nesterov: the look-ahead form, default True.
        weight_decay: w >= 0, default 0: g + w x, with x where the gradient is taken.

    Raises:
        ValueError: a value out of its range.

    Source: Zhang's thesis, 2.3 and 5.1.2 (5.4).
    """

    fuses_pulls = True  # step(pulls=)
    _inside = 0  # how many iterate() or hold() are open

    def __init__(
        self,
        params: Any,
        lr: float,
        momentum: float = 0.0,
        nesterov: bool = True,
        weight_decay: float = 0.0,
    ) -> None:
        for name, value in (("lr", lr), ("weight_decay", weight_decay)):
            if not 0 <= value < math.inf:
                raise ValueError(f"{name} is {value}; it must be finite and not negative")
        if not -1 < momentum < 1:
            raise ValueError(f"momentum is {momentum}; it must lie between -1 and 1, ends excluded")
        # lookahead: the coefficient of v in what the parameters hold now, x + lookahead * v
        defaults = {"lr": lr, "momentum": momentum, "nesterov": nesterov, "weight_decay": weight_decay}
        super().__init__(params, {**defaults, "lookahead": 0.0})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, *, pulls: Pulls | None = None) -> Any:
        """One step; parameters without a gradient are left as they are.

        Args:
            closure: re-evaluates the model and returns the loss.
            pulls: parameter -> up to two (leader, rate), with leader of the parameter's shape: the same pass
                adds -rate (x - leader), with x the iterate before the step. Leaders are iterates too.
        """
        if self._inside:
            raise RuntimeError("step() inside iterate() or center(): the look-ahead is not there")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._make_velocities()
        for group in self.param_groups:
            self._look(group, _ahead(group))
            parameters = [p for p in group["params"] if p.grad is not None]
            lr, momentum, decay = float(group["lr"]), float(group["momentum"]), float(group["weight_decay"])
            rows: list[Row] = [(p, (self.state[p].get("velocity"),), _grad(p)) for p in parameters]
            for p, x, (velocity,), grad in lines(rows, merge=pulls is None):
                settings = _pull_settings(p, pulls(p)) if pulls is not None else {}
                kernels.msgd(x, grad, velocity, lr, momentum, bool(group["nesterov"]), decay, **settings)
        return loss

    @contextmanager
    def iterate(self) -> Iterator[None]:
        """Inside, the parameters hold the iterate x, not the look-ahead; may be nested."""
        if not self._inside:
            for group in self.param_groups:
                self._look(group, 0.0)
        self._inside += 1
        try:
            yield
        finally:
            self._inside -= 1
            if not self._inside:
                for group in self.param_groups:
                    self._look(group, _ahead(group))

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Inside, the parameters hold something else, which the caller takes away again: iterate() rests."""
        before = [(group, group["lookahead"]) for group in self.param_groups]
        for group, _ in before:
            group["lookahead"] = 0.0
        self._inside += 1
        try:
            yield
        finally:
            self._inside -= 1
            for group, lookahead in before:
                group["lookahead"] = lookahead

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over a state: hyper-parameters, velocities (copied), and whether x or the look-ahead is held.

        The model must be loaded as it was saved with it: both inside iterate(), or both outside.
        """
        super().load_state_dict(state_dict)
        loaded = {p: s["velocity"] for p, s in self.state.items() if "velocity" in s}
        for i, (p, velocity) in enumerate(loaded.items()):
            if velocity.shape != p.shape:
                shapes = f"{tuple(velocity.shape)}, the parameter {tuple(p.shape)}"
                raise ValueError(f"the velocity of parameter {i} has shape {shapes}")
        for p, place in zip(loaded, companions(loaded), strict=True):
            self.state[p]["velocity"] = place.copy_(loaded[p])

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault("lookahead", 0.0)

    def _make_velocities(self) -> None:
        todo, due = [], False
        for group in self.param_groups:
            if not group["momentum"]:
                continue
            for p in group["params"]:
                if "velocity" not in self.state[p]:
                    due = due or p.grad is not None
                    if p.grad is not None or FlatParameters.of(p):
                        todo.append(p)
        if due:
            for p, velocity in zip(todo, companions(todo), strict=True):
                self.state[p]["velocity"] = velocity

    @torch.no_grad()
    def _look(self, group: dict[str, Any], ahead: float) -> None:
        """Moves what the parameters hold to x + ahead * v."""
        change = ahead - group["lookahead"]
        if change:
            moving = [p for p in group["params"] if "velocity" in self.state[p]]
            for _, x, (velocity,), _ in lines((p, (self.state[p]["velocity"],), None) for p in moving):
                kernels.iterate(x, velocity, abs(change), int(math.copysign(1, change)))
        group["lookahead"] = ahead


class RunningAverage(Optimizer):
    """Any optimizer, with the average z of its iterates over time.

        z_0 = x_0        z <- z + a (x - z)  after every step        a = 1/(t+1) after step t, or a constant

    a = 1/(t+1) (ASGD) makes z the mean of x_0 ... x_t, a constant (MVASGD) a moving average. What is held
    after step t is the thesis' z_{t+1} = (1 - a_{t+1}) z_t + a_{t+1} x_t. Of MSGD the iterate is averaged,
    not the look-ahead. z_0 is taken when the first step begins.

    Args:
        optimizer: whose parameters are averaged; step, schedulers and groups go through to it.
        rate: a in (0, 1]; None (default) for 1/(t+1).

    Raises:
        ValueError: a rate out of its range.

    Source: Zhang's thesis, 4 (ADOWNPOUR, MVADOWNPOUR at p = 1); Polyak and Juditsky.
    """

    def __init__(self, optimizer: Optimizer, rate: float | None = None) -> None:
        if rate is not None and not 0 < rate <= 1:
            raise ValueError(f"rate is {rate}; it must lie in (0, 1], or be None for 1/(t+1)")
        self.optimizer, self.rate, self.t = optimizer, rate, 0
        self._average: dict[Tensor, Tensor] = {}
        self._inside = False
        super().__setstate__({})  # the hooks' tables; state and groups are the wrapped optimizer's

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        return self.optimizer.param_groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        return self.optimizer.state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        return self.optimizer.defaults

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

        What is written into them inside does not reach z. May be nested. Needs memory for the parameters once
        more while it is open.
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
        shapes = [None if z is None else tuple(z.shape) for z in average]
        if len(shapes) != len(parameters):
            raise ValueError(f"the saved average has {len(shapes)} tensors, the optimizer {len(parameters)}")
        for i, (p, shape) in enumerate(zip(parameters, shapes, strict=True)):
            if shape is not None and shape != tuple(p.shape):
                raise ValueError(f"the saved average {i} has shape {shape}, the parameter {tuple(p.shape)}")
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
            parameters = [p for p in group["params"] if only is None or p in only]
            for p in [p for p in parameters if self._average[p].dtype != p.dtype]:
                x = p.detach().float()
                if ahead and "velocity" in self.state[p]:
                    x.sub_(self.state[p]["velocity"].float(), alpha=ahead)
                z = self._average[p]
                z.lerp_(torch.where(x.isfinite(), x, z), a)
            parameters = [p for p in parameters if self._average[p].dtype == p.dtype]
            rows: list[Row] = [
                (p, (self._average[p], self.state[p].get("velocity") if ahead else None), None)
                for p in parameters
            ]
            for _, x, (z, velocity), _ in lines(rows):
                moved = kernels.pull(z, x, a, stats=velocity is not None)
                if velocity is None:
                    continue
                # z <- z + a (y - δ v - z): the iterate is averaged without being written anywhere
                if moved is not None and not moved.source_finite:  # what the pull passed over, this must too
                    velocity = torch.where(x.isfinite(), velocity, torch.zeros_like(velocity))
                kernels.iterate(z, velocity, a * abs(ahead), -int(math.copysign(1, ahead)))


def _averages(parameters: list[Tensor]) -> list[Tensor]:
    """Places for running averages, of half types in float32: a rate of 1/t is soon below their resolution."""
    same = iter(companions([p for p in parameters if p.dtype not in _HALF]))
    return [torch.zeros_like(p, dtype=torch.float32) if p.dtype in _HALF else next(same) for p in parameters]


_HALF = (torch.float16, torch.bfloat16)


def _grad(p: Tensor) -> Tensor:
    assert p.grad is not None
    return p.grad.detach()


def _pull_settings(p: Tensor, pairs: list[tuple[Tensor, float]]) -> dict[str, Any]:
    if len(pairs) > 2:
        raise ValueError(f"pulls gave {len(pairs)} leaders (2 at most) for shape {tuple(p.shape)}")
    settings: dict[str, Any] = {}
    for names, (leader, rate) in zip((("leader", "rate"), ("other", "other_rate")), pairs, strict=False):
        if leader.shape != p.shape:
            shapes = f"{tuple(leader.shape)} for a parameter of shape {tuple(p.shape)}"
            raise ValueError(f"pulls gave a leader of shape {shapes}")
        settings[names[0]], settings[names[1]] = line(like(leader.detach(), p)), rate
    return settings


def _ahead(group: dict[str, Any]) -> float:
    return float(group["momentum"]) if group["nesterov"] else 0.0


def _find_msgd(optimizer: Any) -> MSGD | None:
    while optimizer is not None and not isinstance(optimizer, MSGD):
        optimizer = getattr(optimizer, "optimizer", None)
    return optimizer

"""Momentum SGD in the thesis' form: the gradient at Nesterov's look-ahead, or heavy-ball momentum."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from mpilsgd import kernels
from mpilsgd.devices import on_host
from mpilsgd.extension import place_of
from mpilsgd.flat import FlatParameters, touched
from mpilsgd.optimizers.runs import Row, companions, lines, pull_settings

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
        lr: η >= 0; a number, or a tensor of one.
        momentum: δ in (-1, 1), default 0; the best one can be negative (thesis 5.1.2).
        nesterov: the look-ahead form, default True.
        weight_decay: w >= 0, default 0: g + w x, with x where the gradient is taken.
        capturable: default False. True: lr may be a tensor of one number on the parameters' device (float32 or
            float64). The kernel reads it there, so that a step in a CUDA graph goes by what a scheduler has written
            into it since; the host reads nothing. What is not finite there is not noticed.

    Raises:
        ValueError: a value out of its range; an lr on a device without `capturable`.

    Source: Zhang's thesis, 2.3 and 5.1.2 (5.4).
    """

    fuses_pulls = True  # step(pulls=)
    _inside = 0  # how many iterate() or hold() are open

    def __init__(
        self,
        params: Any,
        lr: float | Tensor,
        momentum: float = 0.0,
        nesterov: bool = True,
        weight_decay: float = 0.0,
        *,
        capturable: bool = False,
    ) -> None:
        given = _rate(lr, capturable)
        for name, value in (("lr", 0.0 if torch.is_tensor(given) else given), ("weight_decay", weight_decay)):
            if not 0 <= value < math.inf:
                raise ValueError(f"{name} is {value}; it must be finite and not negative")
        if not -1 < momentum < 1:
            raise ValueError(f"momentum is {momentum}; it must lie between -1 and 1, ends excluded")
        # lookahead: the coefficient of v in what the parameters hold now, x + lookahead * v
        defaults = {"lr": lr, "momentum": momentum, "nesterov": nesterov, "weight_decay": weight_decay}
        super().__init__(params, {**defaults, "capturable": capturable, "lookahead": 0.0})

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
        self._look(_ahead)
        for group in self.param_groups:
            moving = [(p, p.grad.detach()) for p in group["params"] if p.grad is not None]
            lr, momentum = _rate(group["lr"], group["capturable"]), float(group["momentum"])
            decay = float(group["weight_decay"])
            rows: list[Row] = [(p, (self.state[p].get("velocity"),), grad) for p, grad in moving]
            for p, x, (velocity,), grad in lines(rows, merge=pulls is None):
                settings = pull_settings(p, pulls(p)) if pulls is not None else {}
                kernels.msgd(x, grad, velocity, lr, momentum, bool(group["nesterov"]), decay, **settings)
            touched([p for p, _ in moving])
        return loss

    @contextmanager
    def iterate(self) -> Iterator[None]:
        """Inside, the parameters hold the iterate x, not the look-ahead; may be nested.

        They are written on the way in and out: a graph from before either does not survive it.
        """
        if not self._inside:
            self._look(lambda group: 0.0)
        self._inside += 1
        try:
            yield
        finally:
            self._inside -= 1
            if not self._inside:
                self._look(_ahead)

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
        for i, (p, v) in enumerate(loaded.items()):
            if v.shape != p.shape:
                shapes = f"{tuple(v.shape)}, the parameter {tuple(p.shape)}"
                raise ValueError(f"the velocity of parameter {i} has shape {shapes}")
        for p, place in zip(loaded, companions(loaded), strict=True):
            self.state[p]["velocity"] = place.copy_(loaded[p])

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault("lookahead", 0.0)
            group.setdefault("capturable", False)

    def _make_velocities(self) -> None:
        """With the first gradient for all of a flat vector, so that they lie in one piece as it does."""
        groups = [group for group in self.param_groups if group["momentum"]]
        new = [p for group in groups for p in group["params"] if "velocity" not in self.state[p]]
        if any(p.grad is not None for p in new):
            new = [p for p in new if p.grad is not None or FlatParameters.of(p)]
            for p, velocity in zip(new, companions(new), strict=True):
                self.state[p]["velocity"] = velocity

    @torch.no_grad()
    def _look(self, ahead: Callable[[dict[str, Any]], float]) -> None:
        """Moves what the parameters hold to x + ahead(group) v."""
        for group in self.param_groups:
            change = ahead(group) - group["lookahead"]
            if change:
                moving = [p for p in group["params"] if "velocity" in self.state[p]]
                for _, x, (velocity,), _ in lines((p, (self.state[p]["velocity"],), None) for p in moving):
                    kernels.iterate(x, velocity, abs(change), int(math.copysign(1, change)))
                touched(moving)
            group["lookahead"] = ahead(group)


def _rate(lr: Any, capturable: bool) -> float | Tensor:
    """A number, unless it lies on a device and may stay there."""
    if not torch.is_tensor(lr) or on_host(place_of(lr)):
        return float(lr)
    if not capturable:
        raise ValueError(
            f"lr is a tensor on {place_of(lr)}, where reading it would keep the host waiting in every step: give a "
            "number, or MSGD(..., capturable=True)"
        )
    if lr.dim():
        raise ValueError(
            f"lr must be a number or a tensor without dimensions, not of shape {tuple(lr.shape)}"
        )
    return lr.detach()


def _ahead(group: dict[str, Any]) -> float:
    return float(group["momentum"]) if group["nesterov"] else 0.0

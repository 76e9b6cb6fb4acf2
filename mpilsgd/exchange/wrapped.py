"""A `torch.optim.Optimizer` around another one, and what the methods do to the one inside."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from mpilsgd import kernels
from mpilsgd.exchange.base import pulls
from mpilsgd.flat import FlatParameters
from mpilsgd.optimizers.wrapped import fuses, is_foreign, points_problem, unfit_problem

if TYPE_CHECKING:
    from mpilsgd.exchange.method import Method


class Wrapper(torch.optim.Optimizer):
    """Shows the wrapped optimizer's parameter groups and state, so that schedulers work around either."""

    optimizer: torch.optim.Optimizer

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        return self.optimizer.param_groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        return self.optimizer.state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        return self.optimizer.defaults if hasattr(self, "optimizer") else {}

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As the wrapped optimizer's."""
        self.optimizer.zero_grad(set_to_none=set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused: the parameters lie in flat vectors already."""
        raise RuntimeError("give the wrapped optimizer all its parameter groups before wrapping it")

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.optimizer!r})"

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(
            f"a {type(self).__name__} belongs to its processes and cannot be pickled or copied: save its state_dict()"
        )


class Members:
    """Which parameters are exchanged: one that comes to be trained later would silently not be."""

    def __init__(self, optimizer: torch.optim.Optimizer, flat: FlatParameters):
        self._flat = flat
        everyone = [p for group in optimizer.param_groups for p in group["params"]]
        self._count = len(everyone)
        self._frozen = [p for p in everyone if not p.requires_grad]
        # whether it is known to hold no other point than x: of a foreign one its state has to be seen
        self._one_point = not is_foreign(optimizer)

    def check(self, optimizer: torch.optim.Optimizer) -> None:
        """A ValueError names a parameter that has become trainable, or was added to the optimizer."""
        if not self._one_point:
            several = points_problem(optimizer)
            if several is not None:
                raise ValueError(several)
            self._one_point = len(optimizer.state) > 0
        count = 0
        for group in optimizer.param_groups:
            count += len(group["params"])
        if count == self._count and not any([p.requires_grad for p in self._frozen]):
            return
        for group in optimizer.param_groups:
            for p in group["params"]:
                if p.requires_grad and FlatParameters.of(p) is not self._flat:
                    raise ValueError(
                        f"{self._flat.name(p)} is trained now and was not when the optimizer was wrapped, so it would "
                        "not be exchanged: close() the method and wrap the optimizer anew"
                    )


def wrap_problem(optimizer: Any, method: str, gradients: bool) -> str | None:
    """Why a method cannot wrap this optimizer; gradients: it takes the mean of them."""
    if isinstance(optimizer, Wrapper):
        return f"optimizer is a {type(optimizer).__name__} already: wrap the optimizer inside"
    return unfit_problem(optimizer, method, gradients)


def local_step(m: Method, closure: Callable[[], Any] | None) -> Any:
    """The wrapped optimizer's; with what the rule asks for in `toward`."""
    if not m.toward:
        return m.optimizer.step() if closure is None else m.optimizer.step(closure)
    toward, m.toward = m.toward, ()
    return _step_toward(m, toward, closure)


def _step_toward(m: Method, toward: Any, closure: Callable[[], Any] | None) -> Any:
    """The local step and x <- x - sum of rate (x - vector), from the same x; of MSGD in one pass."""
    inner: Any = m.optimizer
    fused = fuses(inner) and all(p.grad is not None for p in m.flat.parameters)
    with torch.no_grad(), contextlib.nullcontext() if fused else m.iterates():
        for d, window in m.x.items():
            terms = [(v[d], rate) for v, rate in toward]
            for a, b, leading in pulls(m, d, terms, m.edge[d] if fused else 0):
                kernels.pull(window.mine[a:b], *leading, seed=m.t)
    m.flat.touched()
    if fused:
        terms = [(dict(v), rate) for v, rate in toward]
        return inner.step(closure, pulls=lambda p: [(m.flat.view(p, flats), rate) for flats, rate in terms])
    return inner.step() if closure is None else inner.step(closure)

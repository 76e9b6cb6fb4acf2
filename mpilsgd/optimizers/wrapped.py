"""What has to be known of a worker's optimizer, whichever it is."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch

# Those of torch's that add weight_decay x to the gradient; of ours, those that fuse pulls into their step do, too.
_ADDS_L2 = (
    torch.optim.SGD,
    torch.optim.ASGD,
    torch.optim.Adam,
    torch.optim.Adamax,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.RMSprop,
    torch.optim.Adagrad,
    torch.optim.Adadelta,
)


def unfit_problem(optimizer: Any, method: str, gradients: bool) -> str | None:
    """Why a method cannot wrap this optimizer."""
    name = type(optimizer).__name__
    if not isinstance(optimizer, torch.optim.Optimizer):
        return f"optimizer must be a torch.optim.Optimizer, not {name}"
    several = points_problem(optimizer)
    if several is not None:
        return several
    if gradients and _needs_closure(optimizer):
        return (
            f"{name} evaluates its closure as often as it likes, and {method} takes the mean of one gradient a step: "
            "take LocalSGD, LSGD or EASGD"
        )
    return None


def points_problem(optimizer: torch.optim.Optimizer) -> str | None:
    """Why an optimizer that is not torch's or ours cannot be exchanged: it keeps more points than x."""
    if not is_foreign(optimizer):
        return None
    modes = callable(getattr(optimizer, "train", None)) and callable(getattr(optimizer, "eval", None))
    if not modes and not any("z" in kept for kept in list(optimizer.state.values())[:1]):
        return None
    return (
        f"{type(optimizer).__name__} keeps several points of parameter space ("
        + ("it has train() and eval()" if modes else 'its state has "z"')
        + "): only the one that the parameters hold would be exchanged"
    )


def is_foreign(optimizer: Any) -> bool:
    inner = getattr(optimizer, "optimizer", optimizer)  # RunningAverage's
    return type(inner).__module__.partition(".")[0] not in ("torch", "mpilsgd")


def _needs_closure(optimizer: torch.optim.Optimizer) -> bool:
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    return closure is not None and closure.default is inspect.Parameter.empty


def known(closure: Callable[[], Any], value: Any, once: bool) -> Callable[[], Any]:
    """The closure, whose first evaluation was made already: its gradient is there. once: no other may follow."""
    first = True

    def evaluate() -> Any:
        nonlocal first
        if first:
            first = False
            return value
        if once:
            raise RuntimeError(
                "the optimizer evaluates its closure a second time in a step, whose gradient would not be averaged: "
                "take LocalSGD, LSGD or EASGD"
            )
        with torch.enable_grad():
            return closure()

    return evaluate


def gradient_at_x(optimizer: torch.optim.Optimizer) -> contextlib.AbstractContextManager[None]:
    """Adds the optimizer's L2 term to the gradients now, at the present x, instead of in its step.

    x_{t+1} = x_t - eta (g(x_t) + wd x_t) - pull: when torch adds wd x, x has been pulled already.
    Decoupled weight decay (AdamW, Muon, ...) is no part of the gradient and stays in the step.
    """
    decaying = [group for group in optimizer.param_groups if group.get("weight_decay", 0.0)]
    return _decay_added(optimizer, decaying) if decaying else _nothing


_nothing = contextlib.nullcontext()


@contextlib.contextmanager
def _decay_added(optimizer: torch.optim.Optimizer, groups: list[dict[str, Any]]) -> Iterator[None]:
    kept = []
    inner = getattr(optimizer, "optimizer", optimizer)  # RunningAverage's
    adds = isinstance(inner, _ADDS_L2) or fuses(inner)
    for group in groups:
        decay = group["weight_decay"]
        if adds and not group.get("decoupled_weight_decay", False):
            sign = -1.0 if group.get("maximize") else 1.0
            for p in group["params"]:
                if p.grad is not None:
                    p.grad.add_(p.detach(), alpha=sign * decay)
            kept.append((group, decay))
            group["weight_decay"] = 0.0
    try:
        yield
    finally:
        for group, decay in kept:
            group["weight_decay"] = decay


def fuses(optimizer: Any) -> bool:
    """Whether its step takes pulls: MSGD's."""
    return getattr(optimizer, "fuses_pulls", False)


def described(optimizer: torch.optim.Optimizer) -> str:
    """Its kind and its settings, for a reader and to be compared."""
    groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    return f"{type(optimizer).__name__} {groups}"


def forget(optimizer: torch.optim.Optimizer) -> None:
    """Sets the optimizer's memory (momentum, the moments and step numbers of Adam) back to its start.

    In place where the start is known; the state of an optimizer that is not torch's or ours is dropped, so that it
    makes it anew: it may be a point of parameter space, of which 0 is no start.
    """
    inner = getattr(optimizer, "optimizer", optimizer)  # RunningAverage's
    if is_foreign(inner):
        inner.state.clear()
        return
    for group in optimizer.param_groups:
        start = {
            "mu_product": 1.0,  # NAdam
            "step_size": group.get("lr", 0.0),  # Rprop
            "sum": group.get("initial_accumulator_value", 0.0),  # Adagrad
            "eta": group.get("lr", 0.0),  # ASGD
            "mu": 1.0,
        }
        for p in group["params"]:
            for name, value in optimizer.state.get(p, {}).items():
                if torch.is_tensor(value) and value.is_floating_point():
                    value.fill_(start.get(name, 0.0))

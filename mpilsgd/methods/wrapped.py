"""What the methods do to the optimizer that they wrap."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from mpilsgd.methods.msgd import MSGD
from mpilsgd.methods.running_average import RunningAverage

# those of torch's that add weight_decay x to the gradient
_ADDS_L2 = (
    MSGD,
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


@contextlib.contextmanager
def gradient_at_x(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Adds the optimizer's L2 term to the gradients now, at the present x, instead of in its step.

    x_{t+1} = x_t - eta (g(x_t) + wd x_t) - pull: when torch adds wd x, x has been pulled already.
    Decoupled weight decay (AdamW, Muon, ...) is no part of the gradient and stays in the step.
    """
    kept = []
    inner = optimizer.optimizer if isinstance(optimizer, RunningAverage) else optimizer
    for group in optimizer.param_groups:
        decay = group.get("weight_decay", 0.0)
        if decay and isinstance(inner, _ADDS_L2) and not group.get("decoupled_weight_decay", False):
            sign = -1.0 if group.get("maximize") else 1.0
            for p in group["params"]:
                if p.grad is not None:
                    p.grad.add_(p, alpha=sign * decay)
            kept.append((group, decay))
            group["weight_decay"] = 0.0
    try:
        yield
    finally:
        for group, decay in kept:
            group["weight_decay"] = decay


def described(optimizer: torch.optim.Optimizer) -> str:
    """Its kind and its settings, for a reader and to be compared."""
    groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    return f"{type(optimizer).__name__} {groups}"


def forget(optimizer: torch.optim.Optimizer) -> None:
    """Sets the optimizer's memory (momentum, the moments and step numbers of Adam) back to its start, in place."""
    for group in optimizer.param_groups:
        start = {
            "mu_product": 1.0,  # NAdam
            "step_size": group.get("lr", 0.0),  # Rprop
            "sum": group.get("initial_accumulator_value", 0.0),  # Adagrad
        }
        for p in group["params"]:
            for name, value in optimizer.state.get(p, {}).items():
                if torch.is_tensor(value) and value.is_floating_point():
                    value.fill_(start.get(name, 0.0))

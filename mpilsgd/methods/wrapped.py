"""What the methods do to the optimizer that they wrap."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def gradient_at_x(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Adds the optimizer's L2 term to the gradients now, at the present x, instead of in its step.

    x_{t+1} = x_t - eta (g(x_t) + wd x_t) - pull: when torch adds wd x, x has been pulled already.
    Decoupled weight decay (AdamW) is no part of the gradient and stays in the step.
    """
    kept = []
    for group in optimizer.param_groups:
        decay = group.get("weight_decay", 0.0)
        decoupled = group.get("decoupled_weight_decay", isinstance(optimizer, torch.optim.AdamW))
        if decay and not decoupled:
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


def forget(optimizer: torch.optim.Optimizer) -> None:
    """Clears the optimizer's memory (momentum, and the moments and step numbers of Adam) in place."""
    for state in optimizer.state.values():
        for value in state.values():
            if torch.is_tensor(value) and value.is_floating_point():
                value.zero_()

"""Each worker's own optimizer, by its name in the configuration."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from mpilsgd.optimizers import MSGD, RunningAverage
from mpilsgd.train.callables import InputError, call, is_path
from mpilsgd.train.config import Config


def build(config: Config, parameters: Iterable[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizer `config.optimizer` over the parameters, in a `RunningAverage` if the configuration asks for one.

    The user's callable is given the parameters, and `lr`, `momentum`, `nesterov` and `weight_decay` if it takes them.

    Raises:
        InputError: the callable does not return an optimizer.
    """
    optimizer = _build(config, [p for p in parameters if p.requires_grad])
    if config.running_average is None:
        return optimizer
    return RunningAverage(
        optimizer, None if config.running_average == "running" else float(config.running_average)
    )


def _build(config: Config, parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    settings: dict[str, Any] = {
        "lr": config.lr,
        "weight_decay": config.weight_decay,
        "momentum": config.momentum,
    }
    if config.nesterov is not None:
        settings["nesterov"] = config.nesterov
    if config.optimizer in ("Adam", "AdamW"):
        adam = torch.optim.Adam if config.optimizer == "Adam" else torch.optim.AdamW
        return adam(parameters, lr=config.lr, weight_decay=config.weight_decay)
    if not is_path(config.optimizer):
        return (MSGD if config.optimizer == "MSGD" else torch.optim.SGD)(parameters, **settings)
    optimizer = call(config.optimizer, {"parameters": parameters}, settings)
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise InputError(
            f"{config.optimizer} must return a torch.optim.Optimizer, not {type(optimizer).__name__}"
        )
    return optimizer

"""The task and the data sets that a configuration names, and a whole task of the user's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mpilsgd.train import data
from mpilsgd.train.batches import ChannelsLast
from mpilsgd.train.callables import InputError, call, check_call, is_path, names_all, resolve
from mpilsgd.train.config import Config
from mpilsgd.train.given import wrapped
from mpilsgd.train.samples import Batch, Dataset, Reading, TensorSet
from mpilsgd.train.task import Classification, Regression, Task, UsersLoss, means, scalar
from mpilsgd.train.text import TextSet


def load(config: Config, rank: int = 0, size: int = 1) -> tuple[Task, Dataset, Dataset]:
    """The task, the training and the test set that a configuration names.

    Raises:
        InputError: they cannot be had, or do not fit.
    """
    reading = Reading(config.loss, config.classes, config.workers, config.batch_size, rank, size)
    own: UsersTask | None = None
    if config.task is not None:
        offered = {"data_dir": config.data_dir, "seed": config.seed, "rank": rank, "size": size}
        own = UsersTask(config.task, offered)
        reading = reading._replace(loss=config.task)
        for part, given, default in (
            ("data", config.data, Config.data),
            ("model", config.model, Config.model),
        ):
            if hasattr(own.user, part) and given != default:
                raise InputError(f"{part}: {config.task} brings its own; leave --{part} {given} away")
    if own is not None and hasattr(own.user, "data"):
        own_part = size > 1 and names_all(resolve(own.path), "rank", "size")
        train, test = wrapped(own.user.data(), own.path, reading, own_part)
    else:
        train, test = data.load(config.data, config.data_dir, config.augment, config.seed, reading)
    task = own or _supervised(config, train)
    for one in (train, test):
        one.check = task.check
    test.stays = False
    if config.channels_last:
        refuse_channels_last(config, train)
        train, test = ChannelsLast(train), ChannelsLast(test)
    return task, train, test


def _supervised(config: Config, train: Dataset) -> Task:
    loss = config.loss
    if is_path(loss):
        return UsersLoss(loss, config.metrics)
    numbers = isinstance(train, TensorSet) and train.labels.is_floating_point()
    if loss == "mse" or (loss == "auto" and numbers):
        return Regression(config.metrics)
    return Classification(train.classes, config.metrics, isinstance(train, TextSet))


def refuse_channels_last(config: Config, train: Dataset) -> None:
    """An InputError, unless the data are images."""
    if train.input_shape is None or len(train.input_shape) != 3:
        shape = " x ".join(map(str, train.input_shape or ("no tensor",)))
        raise InputError(
            f"channels_last: is for images (channels x height x width); {config.model} is given inputs of {shape} "
            f"from {config.data}"
        )


class UsersTask(Task):
    """An object of the user's with `loss`, and with `data`, `model` and `evaluate` where it wants; see docs/job.md."""

    def __init__(self, path: str, offered: dict[str, Any]):
        self.path = path
        self.user = call(path, {}, offered)
        parts = {"loss": ("model", "batch"), "evaluate": ("model", "batch"), "data": (), "model": ()}
        if not callable(getattr(self.user, "loss", None)):
            raise InputError(
                f"{path}: must give an object with loss(model, batch); {type(self.user).__name__} has none"
            )
        for name, given in parts.items():
            if hasattr(self.user, name):
                check_call(f"{path}, {name}", getattr(self.user, name), list(given))

    def model(self, config: Config, train: Dataset, first: Batch, seed: int) -> torch.nn.Module:
        if not hasattr(self.user, "model"):
            return super().model(config, train, first, seed)
        torch.manual_seed(seed)
        model = self.user.model()
        if not isinstance(model, torch.nn.Module):
            raise InputError(
                f"{self.path}: model() must return a torch.nn.Module, not {type(model).__name__}"
            )
        return model

    def loss(self, model: torch.nn.Module, batch: Batch) -> Tensor:
        return scalar(self.user.loss(model, batch), f"{self.path}: loss")

    def sums(self, model: torch.nn.Module, batch: Batch, count: int) -> dict[str, Tensor]:
        evaluate = getattr(self.user, "evaluate", None)
        found = {} if evaluate is None else means(evaluate(model, batch), f"{self.path}: evaluate", count)
        return found if "loss" in found else {"loss": self.loss(model, batch).double() * count, **found}

"""What is trained: the loss of a batch, and the numbers by which a model is judged."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from mpilsgd.train import models
from mpilsgd.train.callables import InputError, check_call, resolve
from mpilsgd.train.config import Config
from mpilsgd.train.formats import DataError
from mpilsgd.train.samples import Batch, Dataset


class Task:
    """What the loop and the evaluation know of the problem."""

    def model(self, config: Config, train: Dataset, first: Batch, seed: int) -> torch.nn.Module:
        """A new model. first: two samples of the training set; the seed fixes the initial parameters."""
        inputs = first[0] if isinstance(first, tuple | list) else None
        built_in = config.model in models.MODELS
        if built_in and isinstance(inputs, Tensor) and inputs.is_floating_point() == (config.model == "gpt"):
            raise InputError(
                f"{config.model} does not take inputs of {inputs.dtype} from {config.data}: gpt is for texts, the "
                "other models are for numbers"
            )
        return models.build(config.model, train.input_shape, _outputs(train, first), seed)

    def loss(self, model: torch.nn.Module, batch: Batch) -> Tensor:
        """What training makes small: a scalar, the mean over the samples."""
        raise NotImplementedError

    def sums(self, model: torch.nn.Module, batch: Batch, count: int) -> dict[str, Tensor]:
        """The figures of a batch of `count` samples, summed over them: "loss", and others by their names."""
        raise NotImplementedError

    def check(self, batch: Batch, numbers: Any) -> None:
        """An InputError, if a batch cannot be trained on. numbers: of its samples, where they are known."""

    def trial(self, config: Config, model: torch.nn.Module, batch: Batch) -> None:
        """An InputError, if the model, the batch and the loss do not fit."""
        with torch.enable_grad():
            loss = self.loss(model, batch)
        if not loss.requires_grad:
            raise InputError(
                f"{config.task or config.loss}: the loss has no gradient with respect to the model"
            )
        self.sums(model, batch, 1)


class Supervised(Task):
    """A batch is a pair (inputs, targets); the model is given the inputs.

    Args:
        metrics: `package.module:callable`, given outputs and targets; it returns further figures by their names, means
            over the samples of the batch.
    """

    name = "loss"

    def __init__(self, metrics: str | None = None):
        self._path = metrics
        self._metrics = None if metrics is None else _callable(metrics, "outputs", "targets")

    def criterion(self, outputs: Any, targets: Any) -> Tensor:
        raise NotImplementedError

    def loss(self, model: torch.nn.Module, batch: Batch) -> Tensor:
        inputs, targets = batch
        return self.criterion(model(inputs), targets)

    def judged(self, outputs: Any, targets: Any, count: int) -> dict[str, Tensor]:
        """The figures, summed over the samples."""
        return {"loss": self.criterion(outputs, targets).double() * count}

    def sums(self, model: torch.nn.Module, batch: Batch, count: int) -> dict[str, Tensor]:
        inputs, targets = batch
        outputs = model(inputs)
        found = self.judged(outputs, targets, count)
        if self._metrics is not None:
            found |= means(self._metrics(outputs, targets), f"{self._path}", count, taken=tuple(found))
        return found

    def check(self, batch: Batch, numbers: Any) -> None:
        if not isinstance(batch, tuple | list) or len(batch) != 2:
            kind = (
                f"{type(batch).__name__} of {len(batch)}"
                if hasattr(batch, "__len__")
                else type(batch).__name__
            )
            raise DataError(
                f"{self.name} needs samples that are pairs (input, target); a batch is a {kind}; other samples are for "
                "a --task of your own"
            )


class Classification(Supervised):
    """Cross-entropy of scores of shape (batch, classes, ...) for whole numbers of shape (batch, ...).

    The figures are "loss", and "error": the share of targets whose score is not the highest.

    Args:
        classes: how many there are; None: as many as the model gives scores.
        characters: whether they are characters: then "bits_per_character" is a figure, too.
    """

    name = "cross_entropy"

    def __init__(self, classes: int | None = None, metrics: str | None = None, characters: bool = False):
        super().__init__(metrics)
        self.classes, self.characters = classes, characters

    def criterion(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return functional.cross_entropy(outputs, targets)

    def judged(self, outputs: Tensor, targets: Tensor, count: int) -> dict[str, Tensor]:
        places = targets[0].numel()  # targets of a sample
        # argmax of a NaN row is an index all the same: what is not finite is an error
        right = (outputs.argmax(1) == targets) & outputs.isfinite().all(1)
        loss = functional.cross_entropy(outputs, targets, reduction="sum").double() / places
        found = {"loss": loss, "error": (targets.numel() - right.sum()).double() / places}
        return found | ({"bits_per_character": loss / math.log(2)} if self.characters else {})

    def check(self, batch: Batch, numbers: Any) -> None:
        super().check(batch, numbers)
        targets = batch[1]
        if not isinstance(targets, Tensor) or targets.is_floating_point() or targets.is_complex():
            found = targets.dtype if isinstance(targets, Tensor) else type(targets).__name__
            raise DataError(
                f"cross_entropy needs labels that are whole numbers, found {found}; for other targets say --loss: mse "
                "or your own"
            )
        low, high = int(targets.min()), int(targets.max())
        if low >= 0 and (self.classes is None or high < self.classes):
            return
        wrong = low if low < 0 else high
        place = (
            int((targets == wrong).flatten(1).any(1).nonzero()[0])
            if targets.dim() > 1
            else _place(targets, wrong)
        )
        sample = f" of sample {numbers[place]}" if numbers is not None else ""
        ends = "below 0" if wrong < 0 else f"not below {self.classes}, the number of classes"
        raise DataError(f"label {wrong}{sample} is {ends}")

    def trial(self, config: Config, model: torch.nn.Module, batch: Batch) -> None:
        inputs, targets = batch
        with torch.no_grad():
            scores = model(inputs)
        shape = (len(targets), self.classes, *targets.shape[1:])
        fits = isinstance(scores, Tensor) and len(scores.shape) == len(shape)
        if not fits or any(a != b for a, b in zip(scores.shape, shape, strict=True) if b is not None):
            found = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
            told = ", ".join(["classes" if n is None else str(n) for n in shape])
            more = ", ..." if len(shape) > 2 else ""
            raise InputError(
                f"{config.model}: must give scores of shape (batch, classes{more}) = ({told}), gave {found}"
            )
        self.classes = scores.shape[1]
        self.check(batch, None)
        super().trial(config, model, batch)


def _place(targets: Tensor, value: int) -> int:
    return int((targets == value).nonzero()[0])


class Regression(Supervised):
    """Mean squared error of outputs that have as many numbers as the targets."""

    name = "mse"

    def criterion(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return functional.mse_loss(outputs.reshape(targets.shape), targets.to(outputs.dtype))

    def trial(self, config: Config, model: torch.nn.Module, batch: Batch) -> None:
        inputs, targets = batch
        with torch.no_grad():
            outputs = model(inputs)
        if not all(isinstance(one, Tensor) for one in (outputs, targets)) or [
            n for n in outputs.shape if n != 1
        ] != [n for n in targets.shape if n != 1]:
            found, wanted = (
                tuple(one.shape) if isinstance(one, Tensor) else type(one).__name__
                for one in (outputs, targets)
            )
            raise InputError(
                f"mse: {config.model} gave {found} for targets of shape {wanted}: the shapes must agree, but for 1s"
            )
        super().trial(config, model, batch)


class UsersLoss(Supervised):
    """A loss of the user's, given outputs and targets: a scalar, the mean over the batch, or a value a sample."""

    def __init__(self, path: str, metrics: str | None = None):
        super().__init__(metrics)
        self.name = path
        self._loss = _callable(path, "outputs", "targets")

    def criterion(self, outputs: Any, targets: Any) -> Tensor:
        return scalar(self._loss(outputs, targets), self.name)


def _outputs(train: Dataset, first: Batch) -> int | None:
    """Numbers that a model is to give a sample: the classes, or as many as the targets have; None: not known."""
    if train.classes is not None:
        return train.classes
    targets = first[1] if isinstance(first, tuple | list) and len(first) == 2 else None
    return targets[0].numel() if isinstance(targets, Tensor) and targets.is_floating_point() else None


def _callable(path: str, *given: str) -> Callable[..., Any]:
    function = resolve(path)
    check_call(path, function, list(given))
    return function


def scalar(value: Any, name: str) -> Tensor:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        found = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise InputError(
            f"{name}: must return a tensor of floating-point numbers, a scalar or one a sample, not {found}"
        )
    return value.mean() if value.dim() else value


def means(found: Any, name: str, count: int, taken: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """A user's figures of a batch, as sums."""
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise InputError(f"{name}: must return a dict of numbers by their names, not {type(found).__name__}")
    for key, value in found.items():
        if key in taken:
            raise InputError(f"{name}: the name {key!r} is taken: test_{key} is what the loss gives")
        if not isinstance(value, int | float) and not (isinstance(value, Tensor) and value.numel() == 1):
            shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise InputError(f"{name}: {key!r} must be one number, the mean over the samples, not {shape}")
    return {key: torch.as_tensor(value).detach().double().reshape(()) * count for key, value in found.items()}

"""What the user's own code gives as training and test set, seen to be what can be trained on."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from mpilsgd.train.callables import call, names_all, resolve
from mpilsgd.train.formats import DataError
from mpilsgd.train.loading import MapSet, StreamSet
from mpilsgd.train.samples import Dataset, Reading, TensorSet


def load(path: str, data_dir: str, seed: int, reading: Reading) -> tuple[Dataset, Dataset]:
    """The sets of `package.module:callable`."""
    # by name, and not by **kwargs, which may leave them aside
    shards = names_all(resolve(path), "rank", "size")
    ranks = {"rank": reading.rank, "size": reading.size} if shards else {}
    pair = call(path, {}, {"data_dir": data_dir, "seed": seed, **ranks})
    own_part = reading.size > 1 and shards
    return wrapped(pair, path, reading, own_part)


def wrapped(pair: Any, path: str, reading: Reading, own_part: bool = False) -> tuple[Dataset, Dataset]:
    """The data sets of a pair. own_part: whether each rank was given its own part."""
    if not isinstance(pair, tuple | list) or len(pair) != 2:
        raise DataError(f"{path} must return (training set, test set), not {type(pair).__name__}")
    wheres = f"{path}: training set", f"{path}: test set"
    loss = "mse" if reading.loss == "auto" and any(map(_have_a_fraction, pair)) else reading.loss
    labels = [_labels(dataset, where, loss) for dataset, where in zip(pair, wheres, strict=True)]
    classes = _classes(pair[0], labels[0], reading.classes)
    for found, where in zip(labels, wheres, strict=True):
        most = int(found.max()) if found is not None and not found.is_floating_point() else -1
        if classes is not None and most >= classes:
            training = "does not occur in training" if reading.classes is None else "is not below --classes"
            raise DataError(f"{where}: label {most} {training} (0..{classes - 1})")
    train, test = (
        _wrap(dataset, known, classes, reading, own_part, where)
        for dataset, known, where in zip(pair, labels, wheres, strict=True)
    )
    in_memory = isinstance(train, TensorSet) and isinstance(test, TensorSet)
    if in_memory and train.input_shape != test.input_shape:
        raise DataError(
            f"{path}: training inputs have the shape {train.input_shape}, test inputs {test.input_shape}"
        )
    return train, test


def _classes(train: Any, labels: torch.Tensor | None, told: int | None) -> int | None:
    """--classes, else the data set's `classes`, else what the labels in memory say; None: not known."""
    if told is not None or (labels is not None and labels.is_floating_point()):
        return told
    most = 0 if labels is None else int(labels.max()) + 1
    named = getattr(train, "classes", ())
    return max(most, named if isinstance(named, int) else len(named)) or None


def _wrap(
    dataset: Any, labels: Any, classes: int | None, reading: Reading, own_part: bool, where: str
) -> Dataset:
    pair = _tensors(dataset)
    if pair is not None or not _is_iterable(dataset):
        if own_part:
            raise DataError(
                f"{where}: its callable takes rank and size, which is for iterable data sets: one with __getitem__ is "
                "divided among the ranks here"
            )
        if pair is not None:
            return TensorSet(torch.as_tensor(pair[0]), labels, classes)
        return MapSet(dataset, classes, reading)
    return StreamSet(dataset, classes, reading, not own_part)


def _is_iterable(dataset: Any) -> bool:
    """Whether it can only be gone through. torch gives every Dataset of its own a __getitem__."""
    if isinstance(dataset, torch.utils.data.IterableDataset):
        return True
    return hasattr(dataset, "__iter__") and not hasattr(dataset, "__getitem__")


def _tensors(dataset: Any) -> Any:
    """(inputs, targets) of a data set that is a pair of tensors or arrays or a TensorDataset, else None."""
    pair = dataset.tensors if isinstance(dataset, torch.utils.data.TensorDataset) else dataset
    is_pair = isinstance(pair, tuple | list) and len(pair) == 2
    return pair if is_pair and all(isinstance(t, torch.Tensor | np.ndarray) for t in pair) else None


def _have_a_fraction(dataset: Any) -> bool:
    """Whether targets in memory are not all whole numbers: then they are no classes."""
    pair = _tensors(dataset)
    targets = torch.as_tensor(pair[1] if pair is not None else 0)
    return targets.is_floating_point() and bool((targets != targets.round()).any())


def _labels(dataset: Any, where: str, loss: str) -> torch.Tensor | None:
    """All targets of a pair in memory, seen to fit the loss; None where they are read as they are needed."""
    pair = _tensors(dataset)
    if pair is None:
        readable = not _is_iterable(dataset) and hasattr(dataset, "__len__")
        if not readable and not _is_iterable(dataset):
            raise DataError(
                f"{where}: must be a torch Dataset with __getitem__ and __len__ or with __iter__, or a pair of "
                f"tensors; it is {dataset!r}"
            )
        if readable and len(dataset) == 0:
            raise DataError(f"{where}: holds no samples")
        return None
    found = torch.as_tensor(pair[1])
    if len(found) == 0:
        raise DataError(f"{where}: holds no samples")
    if len(pair[0]) != len(found):
        raise DataError(f"{where}: {len(pair[0])} inputs, but {len(found)} labels")
    if loss == "mse":
        return found.float() if not found.is_floating_point() else found
    if loss not in ("auto", "cross_entropy"):
        return found
    if found.is_floating_point() or (loss == "auto" and found.dim() != 1):
        raise DataError(
            f"{where}: labels must be whole numbers, one a sample; found {found.dtype} {tuple(found.shape)}; for other "
            "targets say --loss: cross_entropy, mse or your own"
        )
    if int(found.min()) < 0:
        raise DataError(f"{where}: label {int(found.min())} of sample {int(found.argmin())} is below 0")
    return found.to(torch.int64)

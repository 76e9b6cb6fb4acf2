"""Training and test sets in memory, and the batches that are cut from them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch.nn import functional
from torch.utils.data import default_collate

from mpilsgd.train.callables import accepted, is_path, resolve
from mpilsgd.train.devices import onto
from mpilsgd.train.formats import CLASSES, DataError, Split, read_cifar10, read_digits, read_mnist

DATASETS = ("digits", "mnist", "fashion-mnist", "cifar10")
AUGMENTATIONS = ("auto", "none", "crop", "pad")

# Where the files are looked for, below --data_dir; the last ones are where other tools and Debian put them.
_FOLDERS = {
    "mnist": ("", "mnist", "MNIST/raw"),
    "fashion-mnist": ("", "fashion-mnist", "FashionMNIST/raw", "/usr/share/datasets/fashion-mnist"),
    "cifar10": ("", "cifar-10-batches-bin", "cifar-10-batches-py", "cifar10", "cifar10/cifar-10-batches-py"),
}
# Mean and standard deviation of the training pixels, as the pixels stand in the file (CIFAR-10: LSGD 9.1).
_STATISTICS = {
    "digits": ([4.89], [6.02]),
    "mnist": ([255 * 0.1307], [255 * 0.3081]),
    "fashion-mnist": ([255 * 0.2860], [255 * 0.3530]),
    "cifar10": ([255 * m for m in (0.4914, 0.4822, 0.4465)], [255 * s for s in (0.2023, 0.1994, 0.2010)]),
}


class Dataset(Protocol):
    """What the training loop needs of a training or test set.

    on_host: whether a batch is put together in the host's memory, whatever the device.
    """

    on_host: bool

    @property
    def input_shape(self) -> tuple[int, ...]: ...

    @property
    def classes(self) -> int: ...

    def __len__(self) -> int: ...

    def batch(
        self, indices: torch.Tensor, generator: torch.Generator | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and targets of the samples; a generator asks for random augmentation (training)."""
        ...

    def to(self, device: torch.device) -> None:
        """Batches are wanted on this device from now on."""
        ...


@dataclass(frozen=True)
class Augmentation:
    """Random views of training images: pad with black, cut out a random square, mirror half of them.

    Test images are seen through the centre square, without padding or mirroring.

    Args:
        pad: black pixels added on each side of a training image.
        crop: edge of the square that is cut out (0: the whole image).
        flip: mirror a training image left to right with probability 1/2.

    Source: LSGD 9.1: `crop` 28 for CNN7 and ResNet20, `pad` 4 and `crop` 32 for VGG16, both with `flip`.
    """

    pad: int = 0
    crop: int = 0
    flip: bool = False


class ImageSet:
    """Images kept as bytes; a batch is cropped, mirrored and normalised, (x - mean) / std, when it is asked for.

    Args:
        images: uint8 (N, C, H, W).
        labels: whole numbers from 0 to `classes` - 1, (N).
        mean, std: a value a channel, in the images' units.
    """

    def __init__(
        self, split: Split, classes: int, mean: list[float], std: list[float], augmentation: Augmentation
    ):
        images, labels = split
        self.on_host = False
        self.images = torch.from_numpy(np.array(images))  # a copy: files may be mapped read-only
        self.labels = torch.from_numpy(labels.astype(np.int64))
        self.classes = classes
        self.augmentation = augmentation
        self.scale = 1 / torch.tensor(std).view(-1, 1, 1)
        self.shift = -torch.tensor(mean).view(-1, 1, 1) * self.scale
        edge = augmentation.crop
        channels, height, width = self.images.shape[1:]
        self.input_shape = (channels, edge or height, edge or width)

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device) -> None:
        self.images, self.labels = self.images.to(device), self.labels.to(device)
        self.scale, self.shift = self.scale.to(device), self.shift.to(device)

    def batch(
        self, indices: torch.Tensor, generator: torch.Generator | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        indices = onto(indices, self.images.device)
        images = self.images[indices]
        images = self._center(images) if generator is None else self._augment(images, generator)
        return images.to(self.scale.dtype).mul_(self.scale).add_(self.shift), self.labels[indices]

    def _center(self, images: torch.Tensor) -> torch.Tensor:
        edge = self.augmentation.crop
        top, left = ((size - edge) // 2 if edge else 0 for size in images.shape[2:])
        return images[:, :, top : top + edge, left : left + edge] if edge else images

    def _augment(self, images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        count, edge, pad = len(images), self.augmentation.crop, self.augmentation.pad
        if pad:
            images = functional.pad(images, (pad, pad, pad, pad))
        if edge:
            squares = images.unfold(2, edge, 1).unfold(3, edge, 1)  # a view: (N, C, top, left, edge, edge)
            top, left = (torch.randint(squares.shape[d], (count,), generator=generator) for d in (2, 3))
            rows = torch.arange(count, device=images.device)
            images = squares[rows, :, onto(top, images.device), onto(left, images.device)]
        if self.augmentation.flip:
            mirrored = torch.rand(count, 1, 1, 1, generator=generator) < 0.5
            images = torch.where(onto(mirrored, images.device), images.flip(-1), images)
        return images


class TensorSet:
    """Inputs and labels of the user's that lie in memory; uint8 inputs are brought to [0, 1]."""

    def __init__(self, inputs: torch.Tensor, labels: torch.Tensor, classes: int):
        self.inputs, self.labels, self.classes = inputs, labels, classes
        self.on_host = False
        self.input_shape = tuple(inputs.shape[1:])

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device) -> None:
        self.inputs, self.labels = self.inputs.to(device), self.labels.to(device)

    def batch(
        self, indices: torch.Tensor, generator: torch.Generator | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        indices = onto(indices, self.labels.device)
        inputs = self.inputs[indices]
        return (inputs / 255 if inputs.dtype == torch.uint8 else inputs), self.labels[indices]


class MapSet:
    """A torch Dataset of the user's with `__getitem__` and `__len__`; it does its own augmentation."""

    def __init__(self, dataset: Any, classes: int):
        self.dataset, self.classes = dataset, classes
        self.on_host = True
        self.input_shape = tuple(torch.as_tensor(dataset[0][0]).shape)
        self.device = torch.device("cpu")

    def __len__(self) -> int:
        return len(self.dataset)

    def to(self, device: torch.device) -> None:
        self.device = device

    def batch(
        self, indices: torch.Tensor, generator: torch.Generator | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        inputs, labels = default_collate([self.dataset[i] for i in indices.tolist()])
        return onto(inputs, self.device), onto(labels, self.device)


def load(name: str, data_dir: str = "data", augment: str = "auto", seed: int = 0) -> tuple[Dataset, Dataset]:
    """The training and the test set.

    Args:
        name: one of `DATASETS`, or `package.module:callable`, which returns (training set, test set): torch
            Datasets of (input, label) pairs, or (inputs, labels) pairs of tensors. It is given `data_dir` and
            `seed` if it takes them.
        data_dir: the folder of the files (or a folder that contains it).
        augment: "crop" (random 28 x 28 squares, mirrored), "pad" (4 black pixels around, random squares of the
            original size, mirrored), "none", or "auto": "crop" for cifar10, "none" for the others.
        seed: offered to the user's callable.

    Raises:
        DataError: missing, truncated or wrong files, unfit labels or shapes.
    """
    if is_path(name):
        return _load_users(name, data_dir, augment, seed)
    if name == "digits":
        splits = read_digits()
    else:
        folders = [Path(data_dir) / folder for folder in _FOLDERS[name]]
        splits = read_cifar10(folders) if name == "cifar10" else read_mnist(folders)
    height = splits[0][0].shape[2]
    choice = ("crop" if name == "cifar10" else "none") if augment == "auto" else augment
    if choice == "crop" and height < 28:
        raise DataError(
            f"augment=crop cuts out 28 x 28 pixels; the images of {name} have {height} x {height}"
        )
    augmentation = {
        "none": Augmentation(),
        "crop": Augmentation(crop=28, flip=True),
        "pad": Augmentation(pad=4, crop=height, flip=True),
    }[choice]
    train, test = (ImageSet(split, CLASSES, *_STATISTICS[name], augmentation) for split in splits)
    return train, test


def _load_users(path: str, data_dir: str, augment: str, seed: int) -> tuple[Dataset, Dataset]:
    if augment not in ("auto", "none"):
        raise DataError(
            f"augment={augment} is for the built-in image sets; let {path} augment its training set itself"
        )
    function = resolve(path)
    pair = function(**accepted(function, {"data_dir": data_dir, "seed": seed}))
    if not isinstance(pair, tuple | list) or len(pair) != 2:
        raise DataError(f"{path} must return (training set, test set), not {type(pair).__name__}")
    labels = [
        _labels(dataset, f"{path}: {part} set")
        for dataset, part in zip(pair, ("training", "test"), strict=True)
    ]
    classes = max(int(labels[0].max()) + 1, len(getattr(pair[0], "classes", ())))
    train, test = (_wrap(dataset, known, classes) for dataset, known in zip(pair, labels, strict=True))
    if int(labels[1].max()) >= classes:
        raise DataError(
            f"{path}: test set: label {int(labels[1].max())} does not occur in training (0..{classes - 1})"
        )
    if train.input_shape != test.input_shape:
        raise DataError(
            f"{path}: training inputs have the shape {train.input_shape}, test inputs {test.input_shape}"
        )
    return train, test


def _wrap(dataset: Any, labels: torch.Tensor, classes: int) -> Dataset:
    pair = _tensors(dataset)
    return MapSet(dataset, classes) if pair is None else TensorSet(torch.as_tensor(pair[0]), labels, classes)


def _tensors(dataset: Any) -> Any:
    """(inputs, labels) of a data set that is a pair of tensors or arrays or a TensorDataset, else None."""
    pair = dataset.tensors if isinstance(dataset, torch.utils.data.TensorDataset) else dataset
    is_pair = isinstance(pair, tuple | list) and len(pair) == 2
    return pair if is_pair and all(isinstance(t, torch.Tensor | np.ndarray) for t in pair) else None


def _labels(dataset: Any, where: str) -> torch.Tensor:
    """All labels, checked; a data set that does not hold them as a list is read through once."""
    pair = _tensors(dataset)
    if pair is None and not (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")):
        raise DataError(
            f"{where}: must be a torch Dataset with __getitem__ and __len__, or a pair of tensors; it is {dataset!r}"
        )
    if len(dataset if pair is None else pair[1]) == 0:
        raise DataError(f"{where}: holds no samples")
    if pair is not None:
        found = torch.as_tensor(pair[1])
        if len(pair[0]) != len(found):
            raise DataError(f"{where}: {len(pair[0])} inputs, but {len(found)} labels")
    else:
        found = torch.stack([torch.as_tensor(dataset[i][1]) for i in range(len(dataset))])
    if found.dtype.is_floating_point or found.dim() != 1:
        raise DataError(
            f"{where}: labels must be whole numbers, one a sample; found {found.dtype} {tuple(found.shape)}"
        )
    if int(found.min()) < 0:
        raise DataError(f"{where}: label {int(found.min())} of sample {int(found.argmin())} is below 0")
    return found.to(torch.int64)

"""The data sets that a configuration can name: the known images, files and folders, and the user's code."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional

from mpilsgd.train import given, image_folder, tables, text
from mpilsgd.train.callables import is_path
from mpilsgd.train.devices import onto
from mpilsgd.train.formats import CLASSES, DataError, Split, read_cifar10, read_digits, read_mnist
from mpilsgd.train.loading import MapSet
from mpilsgd.train.samples import Dataset, Reading, TensorSet

__all__ = [
    "DATASETS",
    "Augmentation",
    "Dataset",
    "ImageSet",
    "MapSet",
    "Reading",
    "TensorSet",
    "is_file",
    "load",
]

DATASETS = ("digits", "mnist", "fashion-mnist", "cifar10", "charlm")
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


class ImageSet(Dataset):
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


def is_file(name: str) -> bool:
    """Whether the name is of a file or a folder: a table, arrays, a text or images."""
    return name.endswith((".csv", ".npz", ".txt")) or os.path.isdir(name)


def load(
    name: str,
    data_dir: str = "data",
    augment: str = "auto",
    seed: int = 0,
    reading: Reading | None = None,
) -> tuple[Dataset, Dataset]:
    """The training and the test set.

    Args:
        name: one of `DATASETS`; a .csv (or two with a comma between them), .npz or .txt file or a folder of images;
            or `package.module:callable`, which returns (training set, test set): torch Datasets, map-style or
            iterable, or (inputs, targets) pairs of tensors. It is given `data_dir`, `seed`, `rank` and `size` if it
            takes them.
        data_dir: the folder of the files (or a folder that contains it).
        augment: "crop" (random 28 x 28 squares, mirrored), "pad" (4 black pixels around, random squares of the
            original size, mirrored), "none", or "auto": "crop" for cifar10, random crops of a folder's images, "none"
            for the others.
        seed: offered to the user's callable; it splits a table.
        reading: what else there is to know of the user's data.

    Raises:
        DataError: missing, truncated or wrong files, unfit labels or shapes.
    """
    reading = reading or Reading()
    known = name in DATASETS
    if augment not in ("auto", "none") and (not known or name == "charlm"):
        raise DataError(
            f"augment={augment} is for the built-in image sets; {name} is augmented by its own code"
        )
    if name == "charlm":
        return text.library()
    if not known and name.endswith(".txt"):
        return text.from_file(Path(name))
    if not known and name.endswith((".csv", ".npz")):
        read = tables.read_csv if name.endswith(".csv") else tables.read_npz
        pair = read(name, reading.loss, seed)
        return given.wrapped(pair, name, reading._replace(loss=tables.loss_of(pair, reading.loss)))
    if not known and os.path.isdir(name):
        return given.wrapped(image_folder.read(Path(name), augment == "auto"), name, reading)
    if is_path(name):
        return given.load(name, data_dir, seed, reading)
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

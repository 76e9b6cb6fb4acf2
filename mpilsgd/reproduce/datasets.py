"""The data sets of the reproductions; one that is missing is named with where it is published and its checksum."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mpilsgd.reproduce.registry import MissingData

_CANCER = (
    "colon-cancer, 62 x 2000, from https://www.csie.ntu.edu.tw/~cjlin/libsvmtools/datasets/binary.html "
    "(colon-cancer.bz2, unpacked; sha256 647eb57da9d5df273c8728a19033d80cf09bca70f4d35d1a2de5a281036bf35b)"
)
_MNIST = (
    "train-images-idx3-ubyte.gz and the other three files of MNIST, from http://yann.lecun.com/exdb/mnist/ or "
    "https://ossci-datasets.s3.amazonaws.com/mnist/ (md5 f68b3c2dcbeaaa9fbdd348bbdeb94873)"
)
_CIFAR10 = (
    "CIFAR-10, from https://www.cs.toronto.edu/~kriz/cifar.html (cifar-10-binary.tar.gz, unpacked; md5 "
    "c32a1d4ab5d03f1284b67883e8d87530)"
)


def present(name: str, folder: Path) -> None:
    """A MissingData where a training would not find cifar10 or mnist in the folder."""
    from mpilsgd.train import data

    try:
        data.load(name, str(folder), "none")
    except data.DataError as error:
        named = {"cifar10": _CIFAR10, "mnist": _MNIST}[name]
        raise MissingData(f"{named}: {error}; give --data_dir") from None


def colon_cancer(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Rows with a column of ones behind (the others are centred, the labels are not), and labels -1 and 1."""
    places = [folder / "colon-cancer", folder / "libsvm" / "colon-cancer"]
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        raise MissingData(f"{_CANCER}: not in {folder}; give --data_dir")
    lines = [line.split() for line in path.read_text().splitlines() if line.strip()]
    rows, labels = np.ones((len(lines), 2001)), np.array([float(line[0]) for line in lines])
    for row, line in zip(rows, lines, strict=True):
        for item in line[1:]:
            column, _, value = item.partition(":")
            row[int(column) - 1] = float(value)
    if rows.shape[0] != 62:
        raise MissingData(f"{path}: {len(rows)} rows in place of 62; it should be {_CANCER}")
    return rows, labels


def mnist(folder: Path, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The first images (count, 28, 28), from 0 to 1, and their labels."""
    from mpilsgd.train.formats import DataError, read_mnist

    try:
        (images, labels), _ = read_mnist([folder, folder / "mnist", folder / "MNIST" / "raw"])
    except DataError as error:
        raise MissingData(f"{_MNIST}: {error}; give --data_dir") from None
    return images[:count, 0] / 255.0, labels[:count].astype(np.int64)

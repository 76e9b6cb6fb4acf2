"""A folder of images, for which no code is needed: train/CLASS/*.jpg and test/CLASS/*.jpg (or val/)."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from mpilsgd.train.formats import DataError

EDGE = 224
_SHORT = 256  # the short side that a test image is brought to before its centre is cut out
_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
_MEAN, _STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])  # ImageNet's


def read(folder: Path, augment: bool) -> tuple[ImageFolder, ImageFolder]:
    """The training and the test set below a folder.

    Raises:
        DataError: folders are missing or empty, or their classes differ.
    """
    parts = [
        folder / "train",
        next((folder / n for n in ("test", "val") if (folder / n).is_dir()), folder / "test"),
    ]
    for part in parts:
        if not part.is_dir():
            raise DataError(
                f"{part}: no such folder; a folder of images holds train/CLASS/ and test/CLASS/ (or val/)"
            )
    train, test = ImageFolder(parts[0], augment), ImageFolder(parts[1], False)
    if train.classes != test.classes:
        differ = sorted(set(train.classes) ^ set(test.classes))
        raise DataError(
            f"{folder}: the class {differ[0]} is not in both {parts[0].name}/ and {parts[1].name}/"
        )
    return train, test


class ImageFolder(Dataset):
    """Images of one folder a class, 3 x 224 x 224, less ImageNet's mean and over its standard deviation.

    Args:
        augment: a part of the image, 8 to 100 % of its area and 3/4 to 4/3 as wide as high, mirrored with probability
            1/2; else the centre of the image whose short side is brought to 256.

    Raises:
        DataError: there is no image in one of the folders, or Pillow is missing.

    Source: the usual training on ImageNet (Szegedy et al., Going deeper with convolutions, 2014).
    """

    def __init__(self, folder: Path, augment: bool):
        try:
            import PIL.Image  # noqa: F401
        except ImportError:
            raise DataError(f"{folder}: images need Pillow: pip install 'mpilsgd[images]'") from None
        self.augment = augment
        self.classes = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
        self.samples: list[tuple[str, int]] = []
        for label, name in enumerate(self.classes):
            found = sorted(p for p in (folder / name).rglob("*") if p.suffix.lower() in _SUFFIXES)
            if not found:
                raise DataError(f"{folder / name}: holds no images ({', '.join(_SUFFIXES)})")
            self.samples += [(str(path), label) for path in found]
        if not self.classes:
            raise DataError(f"{folder}: holds no folders of images, one a class")

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        import PIL.Image

        path, label = self.samples[index]
        try:
            with PIL.Image.open(path) as opened:
                image = opened.convert("RGB")
        except (OSError, ValueError, SyntaxError, PIL.Image.DecompressionBombError) as error:
            raise DataError(f"{path}: is no image that can be read: {error}") from None
        image = _random_part(image) if self.augment else _centre(image)
        pixels = torch.from_numpy(np.array(image)).float().div_(255)
        return ((pixels - _MEAN) / _STD).permute(2, 0, 1).contiguous(), label


def _centre(image: Any) -> Any:
    width, height = image.size
    scale = _SHORT / min(width, height)
    width, height = max(EDGE, round(width * scale)), max(EDGE, round(height * scale))
    left, top = (width - EDGE) // 2, (height - EDGE) // 2
    return image.resize((width, height), 2).crop((left, top, left + EDGE, top + EDGE))  # 2: bilinear


def _random_part(image: Any) -> Any:
    width, height = image.size
    box = (0, 0, width, height)
    for _ in range(10):
        area = width * height * _between(0.08, 1.0)
        ratio = math.exp(_between(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(torch.randint(width - w + 1, ())), int(torch.randint(height - h + 1, ()))
            box = (left, top, left + w, top + h)
            break
    image = image.resize((EDGE, EDGE), 2, box=box)
    return image.transpose(0) if torch.rand(()) < 0.5 else image  # 0: left to right


def _between(low: float, high: float) -> float:
    return low + (high - low) * float(torch.rand(()))

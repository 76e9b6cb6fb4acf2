"""Texts, character by character: what a language model learns to continue."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import torch

from mpilsgd.train.devices import onto
from mpilsgd.train.formats import DataError
from mpilsgd.train.samples import Dataset

CONTEXT = 128  # characters that a sample holds
TEST_PART, TEST_MOST = 0.1, 1 << 16  # the end of the text, in characters


class TextSet(Dataset):
    """Pieces of a text as (characters, the characters that follow each): two (N, 128) tensors of whole numbers.

    Training shifts every piece by a random number of characters, so that no two epochs cut alike.

    Args:
        codes: the text as numbers below `classes`.
    """

    chunk = 64

    def __init__(self, codes: torch.Tensor, classes: int):
        self.codes, self.classes = codes, classes
        self.input_shape = (CONTEXT,)
        self._span = torch.arange(CONTEXT + 1)

    def __len__(self) -> int:
        return (len(self.codes) - 1) // CONTEXT

    def to(self, device: torch.device) -> None:
        self.codes, self._span = self.codes.to(device), self._span.to(device)

    def batch(
        self, indices: torch.Tensor, generator: torch.Generator | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        starts = indices * CONTEXT
        if generator is not None:
            starts = starts + torch.randint(CONTEXT, starts.shape, generator=generator)
            starts = starts.clamp(max=len(self.codes) - CONTEXT - 1)
        pieces = self.codes[onto(starts, self.codes.device)[:, None] + self._span].long()
        return pieces[:, :-1], pieces[:, 1:]


def library() -> tuple[TextSet, TextSet]:
    """The sources of Python's own library, by the modules' names: about 4 MB.

    Every Python version has another text: figures compare within one.
    """
    folder = Path(os.__file__).parent
    files = [folder / f"{name}.py" for name in sorted(sys.stdlib_module_names) if name[0] != "_"]
    text = "".join(file.read_text("utf-8") for file in files if file.is_file())
    return _split("".join(c for c in text if c.isascii()), f"{folder}: the library's sources")


def from_file(path: Path) -> tuple[TextSet, TextSet]:
    """A file in UTF-8; its end is the test set: a tenth, 65,536 characters at most.

    Raises:
        DataError: it cannot be read, or is too short.
    """
    try:
        text = path.read_text("utf-8")
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: is no text in UTF-8: byte {error.start} is {error.object[error.start]:#04x}"
        ) from None
    return _split(text, str(path))


def _split(text: str, where: str) -> tuple[TextSet, TextSet]:
    cut = len(text) - min(int(TEST_PART * len(text)), TEST_MOST)
    if min(cut, len(text) - cut) <= CONTEXT:
        least = int((CONTEXT + 1) / TEST_PART)
        raise DataError(f"{where}: has {len(text)} characters; a language model needs {least} at least")
    points = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    known, codes = np.unique(points, return_inverse=True)
    numbers = torch.from_numpy(codes.astype(np.int32))
    return TextSet(numbers[:cut], len(known)), TextSet(numbers[cut:], len(known))

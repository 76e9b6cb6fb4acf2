"""Tables of numbers, for which no code is needed: .csv and .npz files."""

from __future__ import annotations

import csv
import math
import zipfile
from pathlib import Path

import numpy as np
import torch

from mpilsgd.train.formats import DataError
from mpilsgd.train.sampling import generator

Pair = tuple[np.ndarray, np.ndarray]  # inputs and targets
TEST_PART = 0.2  # of a table in one file
_NAMES = ("x_train", "y_train", "x_test", "y_test")


def read_csv(names: str, loss: str, seed: int) -> tuple[Pair, Pair]:
    """The rows of a table: the last column is the target, the others are inputs.

    Targets that are whole numbers are classes, unless the loss is mse. Every input column is brought to mean 0 and
    standard deviation 1 by the training rows.

    Args:
        names: a file, of whose rows a fifth, drawn by the seed, is the test set; or two, `train.csv,test.csv`. A first
            line that holds a text is a header.

    Raises:
        DataError: with the file and the line.
    """
    files = [Path(name.strip()) for name in names.split(",")]
    if len(files) > 2:
        raise DataError(f"{names}: give one file, or two as train.csv,test.csv")
    parts = [_rows(file) for file in files]
    if len(parts) == 1:
        (rows,) = parts
        order = torch.randperm(len(rows), generator=generator(seed, "split")).numpy()
        cut = len(rows) - round(TEST_PART * len(rows))
        parts = [rows[np.sort(order[:cut])], rows[np.sort(order[cut:])]]
    if len(parts[0]) == 0 or len(parts[1]) == 0:
        raise DataError(f"{names}: too few rows for a training and a test set")
    if parts[0].shape[1] != parts[1].shape[1]:
        widths = " and ".join(str(part.shape[1]) for part in parts)
        raise DataError(f"{names}: the two files have {widths} columns")
    targets = [part[:, -1] for part in parts]
    whole = all((target == np.round(target)).all() for target in targets) and loss != "mse"
    most = max(int(target.max()) for target in targets) if whole else 0
    if whole and loss in ("auto", "cross_entropy") and most >= len(parts[0]):
        raise DataError(
            f"{names}: the last column has whole numbers up to {most}, which would be {most + 1} classes of "
            f"{len(parts[0])} training rows; for a regression say --loss mse"
        )
    mean, deviation = parts[0][:, :-1].mean(0), parts[0][:, :-1].std(0)
    deviation[deviation == 0] = 1
    kind = np.int64 if whole else np.float32
    train, test = (
        (((part[:, :-1] - mean) / deviation).astype(np.float32), target.astype(kind))
        for part, target in zip(parts, targets, strict=True)
    )
    return train, test


def _rows(file: Path) -> np.ndarray:
    rows: list[list[float]] = []
    try:
        with open(file, newline="", encoding="utf-8-sig") as opened:
            reader = csv.reader(opened)
            for row in reader:
                if not any(field.strip() for field in row):
                    continue
                where = f"{file}, line {reader.line_num}"
                try:
                    numbers = [float(field) for field in row]
                except ValueError:
                    if not rows and reader.line_num == 1 and not any(map(_is_number, row)):
                        continue  # a header
                    raise DataError(f"{where}: {_no_number(row)}") from None
                if not all(map(math.isfinite, numbers)):
                    raise DataError(f"{where}: holds a value that is not finite")
                if rows and len(numbers) != len(rows[0]):
                    raise DataError(f"{where}: {len(numbers)} values; the rows before have {len(rows[0])}")
                rows.append(numbers)
    except FileNotFoundError:
        raise DataError(f"{file}: no such file") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{file}: is no table of text: {error}") from None
    if not rows:
        raise DataError(f"{file}: holds no rows of numbers")
    if len(rows[0]) < 2:
        raise DataError(f"{file}: needs two columns at least: inputs, and the target as the last")
    return np.array(rows)


def _is_number(field: str) -> bool:
    try:
        float(field)
    except ValueError:
        return False
    return True


def _no_number(row: list[str]) -> str:
    for column, field in enumerate(row, 1):
        try:
            float(field)
        except ValueError:
            return f"column {column} holds {field!r}, which is no number"
    return "holds what is no number"


def read_npz(name: str, loss: str, seed: int) -> tuple[Pair, Pair]:
    """The arrays x_train, y_train, x_test and y_test; targets that are no whole numbers are for a regression."""
    try:
        with open(name, "rb") as opened, np.load(opened, allow_pickle=False) as file:
            missing = [key for key in _NAMES if key not in file]
            if missing:
                raise DataError(
                    f"{name}: lacks {', '.join(missing)}; it holds {', '.join(file.files) or 'nothing'}"
                )
            arrays = [np.asarray(file[key]) for key in _NAMES]
    except FileNotFoundError:
        raise DataError(f"{name}: no such file") from None
    except (zipfile.BadZipFile, EOFError, ValueError, KeyError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{name}: is no .npz file of plain arrays: {error}") from None
    for key, array in zip(_NAMES, arrays, strict=True):
        if array.dtype.kind not in "iufb" or array.ndim == 0:
            raise DataError(f"{name}: {key} must be an array of numbers, not of {array.dtype} {array.shape}")
    x, y, xt, yt = arrays
    return (_inputs(x), _targets(y)), (_inputs(xt), _targets(yt))


def loss_of(pair: tuple[Pair, Pair], loss: str) -> str:
    """What "auto" means for a table."""
    return "mse" if loss == "auto" and pair[0][1].dtype.kind == "f" else loss


def _inputs(array: np.ndarray) -> np.ndarray:
    return array if array.dtype == np.uint8 else array.astype(np.float32)


def _targets(array: np.ndarray) -> np.ndarray:
    return array.astype(np.float32 if array.dtype.kind == "f" else np.int64)

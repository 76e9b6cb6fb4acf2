"""The files of the known data sets, read and checked: idx (MNIST), CIFAR-10's binary and Python batches, digits."""

from __future__ import annotations

import gzip
import io
import math
import pickle
import pickletools
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mpilsgd.train.callables import InputError

CLASSES = 10  # of every data set here
CIFAR_SHAPE = (3, 32, 32)
CIFAR_RECORDS = 10_000  # in each of its six files
CIFAR_RECORD_BYTES = 1 + math.prod(CIFAR_SHAPE)
LARGEST = 1 << 28  # bytes of an idx file, unpacked: more than in any data set of ten classes in this format
_PIECE = 1 << 20

Split = tuple[np.ndarray, np.ndarray]  # images, uint8 (N, C, H, W), and labels, uint8 (N)


class DataError(InputError):
    """Data that cannot be trained on; the text names the file, what was expected and what was found."""


def read_digits() -> tuple[Split, Split]:
    """The embedded data set: 1437 + 360 handwritten digits of 8 x 8 pixels from 0 to 16.

    Source: Alpaydin and Kaynak, Optical Recognition of Handwritten Digits, 1998, the UCI repository's test part
    (CC BY 4.0, doi 10.24432/C50P49), split once into stratified training and test sets.
    """
    with np.load(Path(__file__).parent / "digits.npz", allow_pickle=False) as file:
        train, test = (
            (file[f"{part}_images"][:, None], file[f"{part}_labels"]) for part in ("train", "test")
        )
    return train, test


def read_mnist(folders: Sequence[Path]) -> tuple[Split, Split]:
    """MNIST or Fashion-MNIST: the four idx files, packed (.gz) or not, in the first of the folders that has them."""
    splits = []
    for part in ("train", "t10k"):
        images_path = _find([f"{part}-images-idx3-ubyte", f"{part}-images.idx3-ubyte"], folders)
        labels_path = _find([f"{part}-labels-idx1-ubyte", f"{part}-labels.idx1-ubyte"], folders)
        images, labels = read_idx(images_path, 3), read_idx(labels_path, 1)
        if len(images) != len(labels):
            raise DataError(
                f"{labels_path}: {len(labels)} labels, but {images_path.name} has {len(images)} images"
            )
        _check_labels(labels, labels_path)
        splits.append((images[:, None], labels))
    if splits[0][0].shape[1:] != splits[1][0].shape[1:]:
        raise DataError(
            f"{images_path}: test images are {images.shape[1:]}, training images {splits[0][0].shape[2:]}"
        )
    return splits[0], splits[1]


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """The uint8 array of an idx file: magic 00 00 08 d, then d big-endian sizes, then the bytes."""
    content, damage = _content(path)
    header = 4 * (1 + dimensions)
    magic = bytes([0, 0, 8, dimensions])
    if content[:4] != magic[: len(content)] or not content:
        found = content[:4].hex(" ") or "nothing"
        raise DataError(
            f"{path}: not an idx file of {dimensions} dimension(s): expected magic {magic.hex(' ')}, found {found}"
        )
    sizes = [int.from_bytes(content[i : i + 4], "big") for i in range(4, header, 4)]
    expected = header + math.prod(sizes) if len(content) >= header else header
    if damage or len(content) != expected:
        shape = " x ".join(map(str, sizes))
        raise DataError(
            f"{path}: {damage or ('truncated' if len(content) < expected else 'too long')}: "
            f"expected {expected} bytes for {shape} values, found {len(content)}"
        )
    if not sizes[0] or expected == header:
        raise DataError(f"{path}: holds no samples (sizes {sizes})")
    return np.frombuffer(content, np.uint8, offset=header).reshape(sizes)


def read_cifar10(folders: Sequence[Path]) -> tuple[Split, Split]:
    """CIFAR-10 in its binary version or its Python version, from the first folder that has either."""
    batches = [f"data_batch_{i}" for i in range(1, 6)]
    for folder in folders:
        for suffix, reader in ((".bin", read_cifar_binary), ("", read_cifar_python)):
            if not any((folder / f"{name}{suffix}").is_file() for name in [*batches, "test_batch"]):
                continue
            paths = [folder / f"{name}{suffix}" for name in [*batches, "test_batch"]]
            missing = [path.name for path in paths if not path.is_file()]
            if missing:
                raise DataError(f"{folder}: incomplete CIFAR-10: {', '.join(missing)} missing")
            parts = [reader(path) for path in paths]
            images, labels = (np.concatenate(arrays) for arrays in zip(*parts[:5], strict=True))
            return (images, labels), parts[5]
    raise DataError(_not_found("data_batch_1.bin (binary version) or data_batch_1 (Python version)", folders))


def read_cifar_binary(path: Path) -> Split:
    """One batch of the binary version: 10000 records of a label byte and 3 x 32 x 32 bytes."""
    expected = CIFAR_RECORDS * CIFAR_RECORD_BYTES
    content, _ = _content(path, 2 * expected)
    if len(content) != expected:
        what = "truncated" if len(content) < expected else "too long"
        raise DataError(
            f"{path}: {what}: expected {expected} bytes for {CIFAR_RECORDS} images, found {len(content)}"
        )
    records = np.frombuffer(content, np.uint8).reshape(CIFAR_RECORDS, CIFAR_RECORD_BYTES)
    labels = records[:, 0].copy()
    _check_labels(labels, path)
    return records[:, 1:].reshape(-1, *CIFAR_SHAPE).copy(), labels


def read_cifar_python(path: Path) -> Split:
    """One batch of the Python version: a pickled dict with b"data" and b"labels", read without running its code."""
    content = bytes(_content(path, 2 * CIFAR_RECORDS * CIFAR_RECORD_BYTES)[0])
    try:
        found = _unpickled(content)
        batch = found if isinstance(found, dict) else {}
        batch = {k.decode() if isinstance(k, bytes) else k: v for k, v in batch.items()}
        images, labels = (_values(batch.get(key)) for key in ("data", "labels"))
    except Exception as error:  # a damaged pickle can raise nearly anything
        told = repr(str(error)[:200])[1:-1]  # in one line
        raise DataError(
            f"{path}: not a CIFAR-10 batch, or truncated ({len(content)} bytes): {told}"
        ) from error
    shape = (CIFAR_RECORDS, math.prod(CIFAR_SHAPE))
    if not isinstance(images, np.ndarray) or images.dtype != np.uint8 or images.shape != shape:
        raise DataError(f"{path}: expected data of uint8 {shape}, found {_described(images)}")
    if not isinstance(labels, np.ndarray) or labels.dtype == object or labels.shape != shape[:1]:
        raise DataError(
            f"{path}: expected {CIFAR_RECORDS} whole numbers as labels, found {_described(labels)}"
        )
    _check_labels(labels, path)
    return images.reshape(-1, *CIFAR_SHAPE).copy(), labels.astype(np.uint8)


def _values(told: Any) -> Any:
    """An array, also for a list of whole numbers; anything else as it is."""
    if isinstance(told, _Array):
        return told.values()
    whole = isinstance(told, list) and all(type(value) is int for value in told)
    return np.array(told) if whole else told


def _described(found: Any) -> str:
    return f"{found.dtype} {found.shape}" if isinstance(found, np.ndarray) else type(found).__name__


def _unpickled(content: bytes) -> Any:
    """What the pickle holds. It is from the network: it must neither run code nor make gigabytes out of little."""
    others, references = 0, 0
    for operations, (opcode, argument, _) in enumerate(pickletools.genops(content)):
        if opcode.name.endswith("GET"):
            references += 1
        elif not opcode.name.endswith(_PLAIN):
            others += 1
            if opcode.name == "DUP":  # with it, little makes much
                raise pickle.UnpicklingError("it does more than a CIFAR-10 batch needs")
        # a place in an array that grows to hold it
        memo = int(argument or 0) if opcode.name.endswith("PUT") else 0
        if max(operations, memo) > 20 * CIFAR_RECORDS + 1000 or others > 1000 or references > 20:
            raise pickle.UnpicklingError("it does more than a CIFAR-10 batch needs")
    return _Unpickler(io.BytesIO(content), encoding="bytes").load()


# Operations for a text, a number, or the remembering of one, and for a list's next item.
_PLAIN = ("INT", "INT1", "INT2", "LONG", "LONG1", "STRING", "UNICODE", "BYTES", "PUT", "MEMOIZE", "APPEND")


class _Unpickler(pickle.Unpickler):
    """Builds plain containers, and stand-ins for arrays: nothing of NumPy's is called."""

    def find_class(self, module: str, name: str) -> Any:
        found = _STAND_INS.get((module.replace("numpy._core", "numpy.core"), name))
        if found is None:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no CIFAR-10 batch needs")
        return found


class _Array:
    """What a pickle tells of an array."""

    def __init__(self, *_: Any):
        self.state: Any = ()

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def values(self) -> np.ndarray:
        _, shape, kind, in_columns, content = self.state
        return np.frombuffer(content, kind.dtype()).reshape(shape, order="F" if in_columns else "C")


class _Kind:
    """What a pickle tells of a dtype."""

    def __init__(self, name: Any = "", *_: Any):
        self.name = name.decode() if isinstance(name, bytes) else name
        self.order = "<"

    def __setstate__(self, state: Any) -> None:
        self.order = ">" if state[1] in (">", b">") else "<"

    def dtype(self) -> np.dtype:
        if self.name not in ("u1", "i1", "i2", "i4", "i8"):
            raise ValueError(f"it holds an array of {self.name!r}")
        return np.dtype(self.order + self.name)


class _Encoded(bytes):
    """Bytes, as protocols before 3 write them."""

    def __new__(cls, text: str, encoding: str) -> Any:
        return text.encode("latin1")

    def __setstate__(self, state: Any) -> None: ...


def _from_buffer(content: Any, kind: Any, shape: Any, order: str) -> _Array:
    """An array, as protocol 5 writes it."""
    array = _Array()
    array.state = (1, shape, kind, order == "F", content)
    return array


_STAND_INS = {
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy.core.numeric", "_frombuffer"): _from_buffer,
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Kind,
    ("_codecs", "encode"): _Encoded,
}


def _check_labels(labels: np.ndarray, path: Path) -> None:
    wrong = np.flatnonzero((labels < 0) | (labels >= CLASSES))
    if wrong.size:
        raise DataError(
            f"{path}: label {labels[wrong[0]]} of sample {wrong[0]} is outside 0..{CLASSES - 1} "
            f"({wrong.size} such label(s))"
        )


def _find(names: Sequence[str], folders: Sequence[Path]) -> Path:
    for folder in folders:
        for name in names:
            for path in (folder / name, folder / f"{name}.gz"):
                if path.is_file():
                    return path
    raise DataError(_not_found(f"{names[0]}[.gz]", folders))


def _not_found(what: str, folders: Sequence[Path]) -> str:
    return f"{what} not found; looked in {', '.join(map(str, folders))} (choose the folder with --data_dir)"


def _content(path: Path, most: int = LARGEST) -> tuple[bytearray, str]:
    """The file's bytes, unpacked as far as that goes, and what is wrong with the packing.

    Raises:
        DataError: they cannot be read, or are more than `most`.
    """
    content, damage = bytearray(), ""
    open_it: Any = gzip.open if path.suffix == ".gz" else open
    try:
        size = path.stat().st_size
        with open_it(path, "rb") as file:
            while len(content) <= most and size <= most and (piece := file.read1(_PIECE)):
                content += piece
    except EOFError:
        damage = "truncated gzip file"
    except (gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path}: not a gzip file, or damaged ({size} bytes): {error}") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
    if max(size, len(content)) > most:
        raise DataError(f"{path}: holds more than {most} bytes, which no file of this data set does")
    return content, damage

"""Files that are either there as a whole or not at all, and what lies in them."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

_PIECE = 1 << 20


class Written(NamedTuple):
    """What lies in a file: its size and its digest."""

    bytes: int
    sha256: str


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def written(file: BinaryIO) -> Written:
    """Reads a file to its end."""
    sink = _Hashing()
    while piece := file.read(_PIECE):
        sink.write(piece)
    return sink.written()


class _Hashing:
    """Hashes what goes through it into a file, if there is one."""

    def __init__(self, file: BinaryIO | None = None):
        self._file, self._digest, self._bytes = file, hashlib.sha256(), 0

    def write(self, data: Any) -> int:
        self._digest.update(data)
        self._bytes += len(data)
        return len(data) if self._file is None else self._file.write(data)

    def flush(self) -> None:  # torch.save asks for it
        if self._file is not None:
            self._file.flush()

    def written(self) -> Written:
        return Written(self._bytes, self._digest.hexdigest())


def replace(path: Path, write: Callable[[Any], Any]) -> Written:
    """Writes a file beside `path` and renames it into place when it is safely on the disk."""
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        with named(path), open(temporary, "wb") as file:
            hashing = _Hashing(file)
            write(hashing)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return hashing.written()


@contextlib.contextmanager
def named(path: Path) -> Iterator[None]:
    """A full disk is reported without the file's name, and by torch as a RuntimeError."""
    try:
        yield
    except OSError as error:
        error.filename = str(path)
        raise
    except RuntimeError as error:
        raise OSError(errno.EIO, f"cannot be written: {str(error).splitlines()[0]}", str(path)) from error

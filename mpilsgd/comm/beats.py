"""The sending of signs of life, from code that needs no interpreter where the extension is there."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import threading
import time
import warnings
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from mpilsgd.comm.mpi import MPI

_core: Any = None
with contextlib.suppress(ImportError):
    _core = importlib.import_module("mpilsgd._core")


class Beats(Protocol):
    """Sends a word of 0 and `words` to every peer, again and again."""

    def stop(self, seconds: float) -> bool:
        """Sends no more, and waits so long at most for what is under way; whether all of it has left."""


def beats(comm: MPI.Comm, peers: Sequence[int], words: np.ndarray, every: float) -> Beats:
    """Begins to send. comm: nobody else's; words: int64, read each time; every: seconds."""
    functions = _addresses("MPI_Isend", "MPI_Test")
    if _core is None or functions is None:
        warnings.warn(
            "signs of life come from a Python thread, as mpilsgd's extension is not there: a rank that holds the "
            "interpreter's lock for long counts as gone",
            RuntimeWarning,
            stacklevel=3,
        )
        return _PythonBeats(comm, peers, words, every)
    handles = MPI._handleof(comm), MPI._handleof(MPI.BYTE)
    int_handles = MPI._sizeof(MPI.Comm) == ctypes.sizeof(ctypes.c_int)
    return _core.Beats(*functions, int_handles, *handles, list(peers), words.ctypes.data, words.size, every)


def _addresses(*names: str) -> list[int] | None:
    """Where functions of the MPI lie that mpi4py has loaded."""
    try:
        library = ctypes.CDLL(MPI.__file__)
        return [ctypes.cast(getattr(library, name), ctypes.c_void_p).value or 0 for name in names]
    except (OSError, AttributeError):
        return None


class _PythonBeats:
    def __init__(self, comm: MPI.Comm, peers: Sequence[int], words: np.ndarray, every: float):
        self._comm, self._words, self._every = comm, words, every
        self._going = dict.fromkeys(peers, MPI.REQUEST_NULL)
        self._messages = {k: np.zeros(1 + words.size, np.int64) for k in peers}
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="mpilsgd beats", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._end.wait(self._every):
            for k, message in self._messages.items():
                with contextlib.suppress(MPI.Exception):  # a connection was lost: the peer will say so
                    if self._going[k].Test():
                        message[1:] = self._words
                        self._going[k] = self._comm.Isend([message.view(np.uint8), MPI.BYTE], k)

    def stop(self, seconds: float) -> bool:
        self._end.set()
        self._thread.join()
        deadline = time.monotonic() + seconds
        while not (left := MPI.Request.Testall(list(self._going.values()))) and time.monotonic() < deadline:
            time.sleep(0.001)
        return bool(left)

"""Which MPI a rank talks to: mpi4py's where every rank is a process, that of `tasks` where it is a task of one.

Everything else asks this `MPI` for its names, so nothing above knows of the difference. mpi4py.MPI, whose import starts
MPI, is imported when a process first asks for one of them.
"""

from __future__ import annotations

import atexit
import os
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

_T = TypeVar("_T")


class NoMPI(ImportError):
    """No MPI library can be loaded."""


class Rank:
    """What there is once a rank.

    Attributes: mpi: the names of its MPI; is_process: whether it is a process of its own.
    """

    mpi: Any
    is_process = True

    def __init__(self) -> None:
        self._kept: dict[Any, Any] = {}

    def once(self, make: Callable[[], _T]) -> _T:
        """What `make` gave when this rank first asked for it."""
        if make not in self._kept:
            self._kept[make] = make()
        return self._kept[make]

    def at_end(self, do: Callable[[], None]) -> None:
        """Does it when the rank's program has come to its end."""
        raise NotImplementedError

    def computed(self) -> None:
        """A gradient has been computed: where time is simulated it has taken some."""


class _Process(Rank):
    def __getattr__(self, name: str) -> Any:
        if name != "mpi":
            raise AttributeError(name)
        try:
            from mpi4py import MPI
        except (ImportError, RuntimeError) as error:
            named = os.environ.get("MPI4PY_LIBMPI")
            raise NoMPI(
                f"no MPI library can be loaded{f' (MPI4PY_LIBMPI={named})' if named else ''}: "
                'pip install "mpilsgd[mpi]" brings one, or let MPI4PY_LIBMPI name the libmpi.so of yours'
            ) from error
        self.mpi = MPI
        return MPI

    def at_end(self, do: Callable[[], None]) -> None:
        atexit.register(do)


class _Here(threading.local):
    """Of the running thread: its rank, and its task if that is one."""

    rank: Rank = _Process()
    task: Any = None


here = _Here()


class _MPI:
    def __getattr__(self, name: str) -> Any:
        return getattr(here.rank.mpi, name)


if TYPE_CHECKING:
    from mpi4py import MPI as MPI
else:
    MPI = _MPI()

"""Whether what a rank writes comes out on a terminal, and how wide that is."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TextIO

_RANK_VARIABLES = ("PMI_RANK", "PMIX_RANK", "OMPI_COMM_WORLD_RANK")  # by which a launcher is known
_LAUNCHERS = ("mpiexec", "mpirun", "orterun", "prterun")
_PROC = Path("/proc")


def columns_of(stream: TextIO, environment: Mapping[str, str] = os.environ) -> int | None:
    """The width of the terminal that shows the stream; None if none does, or one that cannot go back in a line.

    A rank's own standard output tells nothing: MPICH's mpiexec gives it a pipe and passes on what comes, Open MPI's a
    terminal of its own. So it is the launcher's output that counts, where it runs on the same machine. Where that
    cannot be known (ranks started from another machine, no /proc) a launched rank writes as into a file.
    """
    if environment.get("TERM", "dumb") == "dumb":
        return None
    if not any(name in environment for name in _RANK_VARIABLES):
        return _columns(stream) if stream.isatty() else None
    if not stream.isatty() and not _is_pipe(stream):
        return None
    return next(map(_columns_of_process, _launchers(os.getppid())), None)


def _is_pipe(stream: TextIO) -> bool:
    try:
        mode = os.fstat(stream.fileno()).st_mode
    except (OSError, ValueError):  # no file of the system's
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)


def _launchers(pid: int) -> Iterator[int]:
    """The launchers among the ancestors of a process, the nearest first."""
    try:
        while pid > 1:
            # PID (NAME) STATE PARENT ..., where the name may hold anything
            head, _, tail = (_PROC / str(pid) / "stat").read_text().rpartition(")")
            if head.partition("(")[2].startswith(_LAUNCHERS):
                yield pid
            pid = int(tail.split()[1])
    except (OSError, ValueError, IndexError):
        return


def _columns_of_process(pid: int) -> int | None:
    try:
        descriptor = os.open(_PROC / str(pid) / "fd" / "1", os.O_WRONLY | os.O_NOCTTY | os.O_NONBLOCK)
    except OSError:
        return None
    with open(descriptor, "w") as shown:
        return _columns(shown) if shown.isatty() else None


def _columns(terminal: TextIO) -> int:
    try:
        columns = os.get_terminal_size(terminal.fileno()).columns
    except (OSError, ValueError):
        columns = 0
    return columns or shutil.get_terminal_size().columns

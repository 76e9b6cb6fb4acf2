"""How a job ends in an error: what is wrong is said, and no rank goes on alone."""

from __future__ import annotations

import contextlib
import sys
import time
import traceback
from typing import Any

from mpilsgd.comm.mpi import MPI, here


class Refused(ValueError):
    """What is wrong on any rank, raised on every one. quiet: another rank says the same, and ends the job."""

    def __init__(self, text: str, quiet: bool = False):
        super().__init__(text)
        self.quiet = quiet


# seconds: a launcher that is told to abort does not always pass on what it was given just before
_FORWARD = 0.2
_TOLD = 1.0  # seconds in which another rank says what all were refused for
_hooked = False
_status = 0


def exit_status() -> int:
    """Not 0 once this program is known to end in an error."""
    return _status


def abort_on_exception() -> None:
    """An exception on one rank ends the whole job at once, as under `python -m mpi4py`.

    Also remembers a failing exit status, so that no exit handler waits for ranks that are being aborted.
    """
    global _hooked
    if _hooked:
        return
    _hooked = True

    sys.excepthook = end_job
    set_status = getattr(MPI, "_set_abort_status", None)  # what `python -m mpi4py` tells of sys.exit(n)

    def remember(status: Any) -> None:
        global _status
        _status = status if isinstance(status, int) else int(status is not None)
        if set_status is not None:
            set_status(status)

    if set_status is not None:
        MPI._set_abort_status = remember


def _script(trace: Any) -> Any:
    """Without the frames of `python -m mpi4py`, which start the script."""
    inner = trace
    while inner is not None:
        names = inner.tb_frame.f_globals
        if names.get("__name__") != "runpy" and names.get("__package__") != "mpi4py":
            return inner
        inner = inner.tb_next
    return trace


def end_job(kind: type[BaseException], value: BaseException, trace: Any) -> None:
    """Prints the exception with this rank's number and ends all ranks."""
    global _status
    if not here.rank.is_process:
        raise value  # from the task
    _status = 1
    if getattr(value, "quiet", False):
        time.sleep(_TOLD)
    if issubclass(kind, KeyboardInterrupt):
        told = f"rank {MPI.COMM_WORLD.rank}: interrupted, the job ends\n"
    else:
        text = "".join(traceback.format_exception(kind, value, _script(trace)))
        told = f"rank {MPI.COMM_WORLD.rank} failed, the job ends:\n{text}"
    with contextlib.suppress(Exception):
        sys.stdout.flush()
        sys.stderr.write(told)
        sys.stderr.flush()
        time.sleep(_FORWARD)
    MPI.COMM_WORLD.Abort(130 if issubclass(kind, KeyboardInterrupt) else 1)

"""Standard output that a run outlives: closed, or with nobody to read it, or on a full disk."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, TextIO


@contextlib.contextmanager
def lasting_output() -> Iterator[None]:
    """Inside, and as a decorator: what cannot be written to standard output is lost, and the program goes on."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    while nowhere <= 2:  # one of the three is closed: no other file may take its place
        nowhere = os.open(os.devnull, os.O_WRONLY)
    before = sys.stdout, sys.stderr
    with os.fdopen(nowhere, "w") as lost:
        sys.stdout = _Outlet(sys.stdout or lost, nowhere)
        sys.stderr = sys.stderr or lost
        try:
            yield
        finally:
            sys.stdout.flush()
            sys.stdout, sys.stderr = before


class _Outlet:
    """A stream; at its first error it is told so, and what is written later goes to `nowhere`."""

    def __init__(self, stream: TextIO, nowhere: int):
        self._stream, self._nowhere = stream, nowhere

    def write(self, text: str) -> int:
        self._try(self._stream.write, text)
        return len(text)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _try(self, do: Callable[..., Any], *arguments: Any) -> None:
        try:
            do(*arguments)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.dup2(self._nowhere, self._stream.fileno())
                sys.stderr.write(f"mpilsgd: the run goes on without its output: {error.strerror}\n")

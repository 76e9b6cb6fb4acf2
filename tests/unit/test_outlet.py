"""Standard output that is closed, that nobody reads, or whose disk is full."""

from __future__ import annotations

import os
import sys
from typing import Any

import pytest

from mpilsgd.train.outlet import lasting_output


@pytest.mark.parametrize("how", ["full", "unread"])
def test_a_run_goes_on_without_its_output(
    how: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is told once, and no complaint is left for the end of the program."""
    if how == "full":
        stream: Any = os.fdopen(os.open("/dev/full", os.O_WRONLY), "w")
    else:
        gone, pipe = os.pipe()
        os.close(gone)
        stream = os.fdopen(pipe, "w")
    with stream:
        monkeypatch.setattr(sys, "stdout", stream)
        with lasting_output():
            for line in range(3):
                print(line)
                sys.stdout.flush()
            assert not sys.stdout.isatty()
        assert sys.stdout is stream
        monkeypatch.undo()
    assert capsys.readouterr().err.count("goes on without its output") == 1


def test_a_program_that_was_started_without_any_output(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    with lasting_output():
        print("unheard", flush=True)
        print("unheard", file=sys.stderr, flush=True)
    assert (sys.stdout, sys.stderr) == (None, None)

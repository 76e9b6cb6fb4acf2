"""The asynchronous methods when something is broken or wrong."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import asynchronous_simulation as turns
import numpy as np
import pytest
import torch
from harness import (
    WORLD,
    Layout,
    Run,
    check_together,
    running,
)
from method_cases import by_transport, close, in_turns, refused, several
from problems import Quadratic
from simulation import Local

from mpilsgd import EASGD, Downpour, Topology
from mpilsgd.comm import MPI
from mpilsgd.methods import Diverged

pytestmark = pytest.mark.mpi

# Faults


def break_down(run: Run, element: bool) -> None:
    (parameter,) = run.model.parameters()
    parameter.data.fill_(1e30 if element else math.nan)
    if element:
        parameter.data[0] = math.inf


@several
@by_transport
@pytest.mark.parametrize(("element", "bad"), [(False, 1), (True, 0)], ids=["NaN", "one infinite"])
def test_a_broken_worker_starts_anew_from_the_centre(element: bool, bad: int, layout: Layout) -> None:
    """In turns, by the papers' equations: it leaves the centre alone, takes it over, and its momentum is cleared."""
    errors: list[str] = []
    local = Local("momentum", lr=0.1, momentum=0.5)
    for case in (
        in_turns(EASGD, "", period=1, center_rate=0.6),
        in_turns(EASGD, "gauss-seidel", period=1, center_rate=0.6, form="gauss-seidel"),
        in_turns(Downpour, ""),
        in_turns(Downpour, "momentum", momentum=0.5),
    ):
        with running(case, Quadratic(0.0), local, layout, same=False) as run:
            simulated = case.simulate(Quadratic(0.0), local, layout, same=False)
            run.still()
            simulated.step()
            x, c = run.x(), run.center()
            if run.rank == bad:
                break_down(run, element)
            run.still()
            # The oracle of the others: one with the bad worker at the centre when its turn comes.
            again = case.simulate(Quadratic(0.0), local, layout, same=False)
            again.__dict__.update(simulated.__dict__)
            assert isinstance(again, turns.RoundRobin)
            again.before_step, again.after_step = absent(again, bad)  # type: ignore[method-assign]
            again.step()
            errors += close(run.x(), again.x[run.rank], f"{case} x, was {x}")
            errors += close(run.center(), again.center(), f"{case} centre, was {c}")
            resets = run.opt.metrics.resets
            errors += [] if resets == (run.rank == bad) else [f"{case}: {resets} resets"]
            for _ in range(3):
                run.still()
            finite = np.isfinite(run.held()).all() and np.isfinite(run.center()).all()
            errors += [] if finite and run.opt.metrics.resets == resets else [f"{case}: broken later"]
    check_together(errors)


def test_a_look_ahead_that_overflows_ends_the_run() -> None:
    """DOWNPOUR with momentum goes on from c + momentum u, which may be infinite where c is not."""
    topology = Topology(MPI.COMM_SELF)
    parameter = torch.nn.Parameter(torch.full((3,), -20000.0, dtype=torch.float16))
    opt = Downpour(torch.optim.SGD([parameter], lr=0.0), topology, momentum=0.9)
    for push in (30000.0, 28000.0):
        assert torch.isfinite(parameter).all()
        with torch.no_grad():
            parameter.add_(push)
        opt.step(loss=1.0)
    assert torch.isinf(parameter).all()
    with pytest.raises(Diverged, match="non-finite"):
        opt.step(loss=1.0)
    opt.close()
    topology.free()


def absent(method: Any, bad: int) -> tuple[Callable[[int, int], None], Callable[[int, int], None]]:
    """The exchanges of an oracle whose worker `bad` takes the centre over instead."""
    before, after, due = method.before_step, method.after_step, isinstance(method, turns.EASGD)
    early = due and method.form == "jacobi"

    def instead(i: int, exchange: Callable[[int, int], None], t: int, here: bool) -> None:
        if i != bad:
            exchange(i, t)
        elif here:
            method.x[bad] = method.c
            if isinstance(method, turns.Downpour):
                method.x[bad] = method.received[bad] = method.c + method.momentum * method.velocity

    return (lambda i, t: instead(i, before, t, early)), (lambda i, t: instead(i, after, t, not early))


def test_a_replay_of_what_is_no_recording(folder: Path) -> None:
    file = folder / "mine.py"
    for content in (b"import torch\n", b"\x89PNG", b"", b"3", b"[]", b'{"step": 3}'):
        if WORLD.rank == 0:
            file.write_bytes(content)
        WORLD.Barrier()
        refused(EASGD, r"mine.py: it is not a recording$", asynchronous=True, replay=file)

"""The asynchronous methods when something is broken or wrong."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import asynchronous_simulation as turns
import numpy as np
import pytest
import torch
from asynchronous_cases import MSGD, by_free, by_transport, close, in_turns, refused, refuses, several
from harness import (
    FEW,
    WORLD,
    Case,
    Layout,
    Run,
    check_together,
    running,
)
from mpi4py import MPI
from problems import Quadratic, TanhNet
from simulation import Local

from mpilsgd import ADMM, EASGD, LSGD, Downpour, Topology
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


@several
@pytest.mark.parametrize("order", ["free", "round-robin"])
@by_free
def test_training_goes_on_after_a_nan(case: Case, order: str) -> None:
    """Parameters, momentum and gradient of one worker break; the centre and the others never do."""
    errors: list[str] = []
    layout = FEW[0] if order == "free" else FEW[-1]
    with running(case, TanhNet(), MSGD, layout, order=order) as run:
        run.run(6)
        for round_ in range(2):
            if run.rank == 1:
                for parameter in run.model.parameters():
                    parameter.data.fill_(math.nan if round_ else math.inf)
            for _ in range(8):
                run.step()
                if run.rank != 1 and not np.isfinite(run.held()).all():
                    errors.append("NaN came over")
            center = run.center()
            if not (np.isfinite(center).all() and np.isfinite(run.held()).all()):
                errors.append(f"x is {run.held()}, the centre {center}")
            resets = (run.rank == 1) * (round_ + 1)
            if run.opt.metrics.resets != resets:
                errors.append(f"{run.opt.metrics.resets} resets, not {resets}")
    check_together(errors)


SCRIPT = """
import sys, torch, mpilsgd
from mpilsgd import kernels
name, order = sys.argv[1:]
model = torch.nn.Linear(3, 2)
topo = mpilsgd.Topology(shared=name != "messages")
sgd = torch.optim.SGD(model.parameters(), lr=0.1)
if name == "wait-free":
    opt = mpilsgd.LSGD(sgd, topo, asynchronous=name, order=order, period=1, global_period=1)
elif name == "Downpour":
    opt = mpilsgd.Downpour(sgd, topo, order=order)
else:
    opt = mpilsgd.EASGD(sgd, topo, asynchronous=True, order=order, period=1)

def fail(*args, **options):
    raise KeyError("in the middle of an exchange")

for t in range(2000):
    if t == 20 and topo.world.rank == topo.world.size - 1:
        for function in FUNCTIONS:
            setattr(kernels, function, fail)
    opt.zero_grad()
    loss = model(torch.ones(4, 3)).square().mean()
    loss.backward()
    opt.step(loss=loss)
with opt.center():
    print("came to its end")
opt.close()
"""
PER_RANK = ("PMI", "HYD", "OMPI_COMM", "OMPI_UNIVERSE", "OMPI_APP", "OMPI_FIRST", "OMPI_FILE", "PRTE_L")


@pytest.mark.parametrize(
    ("name", "order"), [("EASGD", "free"), ("messages", "round-robin"), ("wait-free", "free")]
)
def test_a_rank_that_raises_in_an_exchange_ends_the_job(name: str, order: str, folder: Path) -> None:
    """Promptly: no other rank waits for a turn that is never passed on."""
    if WORLD.size != 2:
        pytest.skip("needs exactly 2 ranks")
    error = None
    if WORLD.rank == 0:
        mpiexec = os.environ.get("MPILSGD_MPIEXEC") or shutil.which(
            "mpiexec", path=Path(sys.executable).parent
        )
        functions = "('pull', 'elastic', 'elastic_sum', 'elastic_apply', 'average', 'assign', 'total')"
        script = folder / "script.py"
        script.write_text(SCRIPT.replace("FUNCTIONS", functions))
        own = {k: v for k, v in os.environ.items() if not k.startswith(PER_RANK)}
        command = [mpiexec or "mpiexec", "-n", "2", sys.executable, "-m", "mpi4py", script, name, order]
        started = time.monotonic()
        done = subprocess.run(
            command, env=own | {"MPIEXEC_TIMEOUT": "60"}, capture_output=True, text=True, timeout=90
        )
        seconds = time.monotonic() - started
        if done.returncode == 0 or "in the middle of an exchange" not in done.stderr or seconds > 45:
            error = f"status {done.returncode} after {seconds:.0f} s: {done.stdout}{done.stderr}"
    told = WORLD.Ibarrier()
    while not told.Test():  # without a busy core
        time.sleep(0.05)
    check_together([error] if error else [])


ASYNCHRONOUS: dict[str, Any] = {"asynchronous": True}
WRONG: list[tuple[Any, str, dict[str, Any]]] = [
    *((method, "order", {**ASYNCHRONOUS, "order": "random"}) for method in (EASGD, Downpour, LSGD)),
    (ADMM, "order", {**ASYNCHRONOUS, "order": "random", "rho": 1.0}),
    *((method, "order", {"order": "round-robin"}) for method in (EASGD, LSGD)),
    (Downpour, "order", {"asynchronous": False, "order": "round-robin"}),
    *((method, "record", {"record": "file"}) for method in (EASGD, LSGD)),
    *((method, "replay", {"replay": "file"}) for method in (EASGD, LSGD)),
    *((method, "record", {**ASYNCHRONOUS, "record": 3}) for method in (EASGD, Downpour, LSGD)),
    (EASGD, "record|replay", {**ASYNCHRONOUS, "record": "file", "replay": "file"}),
    (EASGD, "replay", {**ASYNCHRONOUS, "order": "round-robin", "replay": "file"}),
    (EASGD, "overlap", {"overlap": True, "form": "gauss-seidel"}),
    (EASGD, "overlap", {**ASYNCHRONOUS, "overlap": True, "form": "gauss-seidel"}),
    *((EASGD, "asynchronous", {"asynchronous": value}) for value in ("wait-free", None, 2)),
    *((LSGD, "asynchronous", {"asynchronous": value}) for value in ("sometimes", None, 2)),
    *((LSGD, "when", {"asynchronous": "wait-free", "when": when}) for when in ("with_step", "every_step")),
    (Downpour, "period", {"momentum": 0.5, "period": 2}),
    *((Downpour, "momentum", {"momentum": value}) for value in (-0.1, 1.5, math.nan, "much")),
    *((Downpour, "average", {"average": value}) for value in ("mean", 0, -0.1, 1.5, math.nan, True)),
    *((Downpour, "period", {"period": value}) for value in (0, 1.5)),
    *((ADMM, "rho", {"rho": value}) for value in (0, -1.0, math.inf, math.nan, "1")),
    *((method, "init", {"init": "random"}) for method in (Downpour,)),
]


@pytest.mark.parametrize(("method", "word", "options"), WRONG, ids=lambda v: getattr(v, "__name__", str(v)))
def test_wrong_arguments_are_refused(method: Any, word: str, options: dict[str, Any]) -> None:
    """On every rank, also where only one of them is wrong; the message names the argument."""
    topo = Topology()
    fine = {"rho": 1.0} if method is ADMM else {}
    for own in (options, options if WORLD.rank == WORLD.size - 1 else fine):
        refuses(topo, method, word, Quadratic(), own)
    topo.free()


@several
def test_settings_that_differ_are_refused() -> None:
    mine = WORLD.rank == 0
    refused(EASGD, "differ", asynchronous=mine)
    refused(EASGD, "differ", asynchronous=True, order="free" if mine else "round-robin")
    refused(EASGD, "differ", asynchronous=True, overlap=mine)
    refused(EASGD, "differ", asynchronous=True, record="file" if mine else None)
    refused(LSGD, "differ", asynchronous="wait-free" if mine else True)
    refused(Downpour, "differ", momentum=0.5 * mine)
    refused(Downpour, "differ", average="running" if mine else None)
    refused(ADMM, "differ", rho=1.0 + mine)


def test_a_replay_of_what_is_no_recording(folder: Path) -> None:
    file = folder / "mine.py"
    for content in (b"import torch\n", b"\x89PNG", b"", b"3", b"[]", b'{"step": 3}'):
        if WORLD.rank == 0:
            file.write_bytes(content)
        WORLD.Barrier()
        refused(EASGD, r"mine.py: it is not a recording$", asynchronous=True, replay=file)


def test_admm_has_one_rate() -> None:
    """η stands in the centre's pull, for all parameters alike."""
    topo = Topology()
    model = torch.nn.Linear(3, 2)
    sgd = torch.optim.SGD([{"params": [model.weight], "lr": 0.1}, {"params": [model.bias]}], lr=0.2)
    with pytest.raises(ValueError, match=r"lr|learning rate"):
        ADMM(sgd, topo, rho=1.0)
    topo.free()

"""Where ranks meet: in shared memory and by MPI alike, in two threads at once, and what becomes of those who wait."""

from __future__ import annotations

import random
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from harness import check_together
from launcher import job, mpiexec
from mpi4py import MPI

from mpilsgd import Topology
from mpilsgd.comm import meeting, thread_problem
from mpilsgd.transport import Fabric, Level

pytestmark = pytest.mark.mpi
CPU = torch.device("cpu")


def _rounds(level: Level, stored: torch.Tensor, seed: int, rounds: int = 60) -> list[str]:
    """What went wrong in many meetings. stored: a place of every rank of the island for what is to be seen by all."""
    chance, errors = random.Random(seed + level.rank), []
    seats = [level.seats[r] for r in level.local_ranks]
    for k in range(rounds):
        if chance.random() < 0.1:
            time.sleep(chance.random() * 3e-3)
        count = (1, 6, 32, 100)[k % 4]  # the last in several pieces
        table = level.table([level.rank + k / 8] * count)
        if table.tolist() != [[r + k / 8] * count for r in range(level.size)]:
            errors.append(f"round {k}: {table}")
        stored[level.seats[level.rank]] = k
        level.fence()
        if any(stored[seat] != k for seat in seats):
            errors.append(f"round {k}: {stored} after the fence")
        level.barrier()
    return errors


@pytest.mark.parametrize("way", ["as it is", "by MPI", "no windows"])
@pytest.mark.parametrize("group_size", [None, 1])
def test_all_meet(way: str, group_size: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if way == "by MPI":  # as without the extension
        monkeypatch.setattr(meeting, "_core", None)
    topology = Topology(group_size=group_size, shared=way != "no windows")
    fabric = Fabric(topology, 1 << 16, CPU)
    errors = []
    for level in (fabric.world, fabric.group):
        through_mpi = level.channel.meeting.through_mpi
        if way == "by MPI" and not through_mpi:
            errors.append("it does not go by MPI")
        if way == "as it is" and sys.platform.startswith("linux") and through_mpi and topology.node.size > 1:
            errors.append("it goes by MPI")
        stored = fabric.place.common(level.channel, torch.int64, topology.world.size)
        errors += _rounds(level, stored.views[0], 7)
        del stored
    fabric.free()
    topology.free()
    check_together(errors)


@pytest.mark.skipif(thread_problem() is not None, reason=str(thread_problem()))
def test_two_threads_meet_apart() -> None:
    topology = Topology()
    fabrics = [Fabric(topology, 1 << 16, CPU, own=own) for own in (False, True)]
    places = [f.place.common(f.world.channel, torch.int64, topology.world.size).views[0] for f in fabrics]
    fabrics[1].world.patient = True
    errors: list[str] = []

    def meet(k: int) -> None:
        errors.extend(_rounds(fabrics[k].world, places[k], k))

    behind = threading.Thread(target=meet, args=(1,))
    behind.start()
    meet(0)
    behind.join()
    places.clear()
    for fabric in fabrics:
        fabric.free()
    topology.free()
    check_together(errors)


in_mpich = pytest.mark.skipif(
    MPI.get_vendor()[0] != "MPICH",
    reason="needs MPICH, whose launcher starts more ranks than cores from within a rank",
)


@in_mpich
@pytest.mark.ranks(2)
def test_a_traceback_begins_in_the_script(tmp_path: Path) -> None:
    """Not in what starts it."""
    ended = job(tmp_path, "import mpilsgd\nmpilsgd.Topology()\nraise ValueError('is wrong')\n")
    assert "ValueError: is wrong" in ended.err and "script.py" in ended.err, str(ended)
    assert "runpy" not in ended.err and "mpi4py" not in ended.err, str(ended)


@in_mpich
@pytest.mark.ranks(2)
def test_what_is_wrong_everywhere_is_told_once(tmp_path: Path) -> None:
    """And what is wrong on some rank is told with its number, also once."""
    wrong = "LSGD(torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.1), topo, period=period)"
    for period, told in (("0", "at least 1, not 0"), ("topo.world.rank", "rank 0: period")):
        lines = (
            "import torch",
            "from mpilsgd import LSGD, Topology",
            "topo = Topology()",
            f"period = {period}",
            wrong,
        )
        ended = job(tmp_path, "\n".join(lines))
        assert ended.err.count(told) == ended.err.count("Traceback") == 1, str(ended)


LOST = """
import os, signal, sys, time
import torch, mpilsgd
from mpi4py import MPI
topology = mpilsgd.Topology()
opt = mpilsgd.{method}(torch.optim.SGD([torch.nn.Parameter(torch.zeros(5))], lr=0.1), topology, period=1{more})
for t in range(20):
    if t == 9 and topology.world.rank == 1:
        time.sleep(1)
        os.kill(os.getpid(), signal.SIGKILL)
    opt.step(loss=0.5)
print("went on", flush=True)
"""


@in_mpich
@pytest.mark.ranks(2)
@pytest.mark.parametrize(
    "method, more",
    [
        ("EASGD", ""),
        pytest.param("LSGD", "", marks=pytest.mark.brief()),
        pytest.param("EASGD", ', asynchronous=True, order="round-robin"', marks=pytest.mark.brief()),
    ],
)
def test_those_who_wait_for_a_killed_rank_end(tmp_path: Path, method: str, more: str) -> None:
    def sees_no_end(ranks: int, seconds: float) -> list[str]:
        """The launcher would kill the others, perhaps before they can say anything: a shell outlives each rank."""
        command = mpiexec(ranks, seconds)
        python = command.index(sys.executable)
        return [*command[:python], "sh", "-c", '"$0" "$@"; exec sleep 200', *command[python:]]

    script = LOST.format(method=method, more=more)
    ended = job(tmp_path, script, launcher=sees_no_end, ranks=3, seconds=120)
    assert ended is not None
    assert "rank 1 is gone, and others wait for it" in ended.err and "went on" not in ended.out, str(ended)
    assert ended.seconds < 100, str(ended)

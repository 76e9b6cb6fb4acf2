"""Whole jobs, started as a user starts them: ranks that die, data loaders with processes, other launchers."""

from __future__ import annotations

from pathlib import Path

import pytest
from launcher import job, torchrun

pytestmark = [pytest.mark.mpi, pytest.mark.ranks(2)]

TRAIN = """
import os, signal, sys, time, torch, mpilsgd
from mpilsgd import *

way, *more = sys.argv[1:]
topo = Topology(shared="messages" not in more)
last = topo.world.rank == topo.world.size - 1
torch.manual_seed(0)
model = torch.nn.Linear(3, 2)
sgd = torch.optim.SGD(model.parameters(), lr=0.01)
opt = eval(way)

def step():
    opt.zero_grad()
    loss = model(torch.ones(4, 3)).square().mean()
    loss.backward()
    opt.step(loss=loss)

"""
KILLED = """
for t in range(10**9):
    if t == 20 and last:
        print("killed at", time.time(), flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    if t % 5 == 0 and "center" in more:
        with opt.center():
            pass
    step()
"""


@pytest.mark.parametrize(
    ("way", "more"),
    [
        ("LSGD(sgd, topo, period=2)", ["messages"]),
        ("EASGD(sgd, topo, period=3, overlap=True)", ["center"]),
        ("EASGD(sgd, topo, period=1, asynchronous=True)", []),
        ("EASGDTree(sgd, topo, degree=2, period=1, inner='hosted')", []),
    ],
    ids=["rounds", "behind", "turns", "tree"],
)
def test_a_rank_that_is_killed_takes_the_job_with_it(way: str, more: list[str], folder: Path) -> None:
    """SIGKILL, which no program can answer: the others wait for it, or never would; a status that is not 0."""
    ended = job(folder, TRAIN + KILLED, way, *more)
    assert "killed at " in ended.out, ended
    died = float(ended.out.split("killed at ")[1].split()[0])
    assert ended.status not in (0, 124), ended
    assert ended.at - died < 20, f"{ended.at - died:.0f} s after it was killed: {ended}"


RAISES = """
from mpilsgd import bound, kernels

def fail(*args, **options):
    raise KeyError("in the middle of an exchange")

for t in range(2000):
    if t == 20 and last:
        for function in [name for name in vars(kernels) if callable(getattr(kernels, name)) and name[0] != "_"]:
            setattr(kernels, function, fail)
        bound.Bound.__call__ = fail
    step()
with opt.center():
    print("came to its end")
opt.close()
"""


@pytest.mark.parametrize(
    ("way", "more"),
    [
        ("EASGD(sgd, topo, period=1, asynchronous=True)", []),
        ("EASGD(sgd, topo, period=1, asynchronous=True, order='round-robin')", ["messages"]),
        ("LSGD(sgd, topo, period=1, global_period=1, asynchronous='wait-free')", []),
    ],
    ids=["turns", "round-robin by messages", "wait-free"],
)
def test_a_rank_that_raises_in_an_exchange_ends_the_job(way: str, more: list[str], folder: Path) -> None:
    """Promptly: no other rank waits for a turn that is never passed on."""
    ended = job(folder, TRAIN + RAISES, way, *more)
    assert ended.status not in (0, 124) and "in the middle of an exchange" in ended.err, ended
    assert ended.seconds < 45, ended


WITH = """
with opt:
    for t in range(10**9):
        if t == 20 and last:
            raise KeyError("on one rank")
        step()
"""


def test_a_rank_that_raises_inside_with_ends_the_job(folder: Path) -> None:
    """It does not close the method, for which it would wait until the others have trained to their end."""
    ended = job(folder, TRAIN + WITH, "LSGD(sgd, topo, period=2)")
    assert ended.status not in (0, 124) and "KeyError: 'on one rank'" in ended.err, ended
    assert ended.seconds < 45, ended


LOADERS = """
import sys, torch, mpilsgd
from torch.utils.data import DataLoader, Dataset

class Numbers(Dataset):
    def __len__(self):
        return 32

    def __getitem__(self, i):
        return torch.full((4,), float(i)), torch.tensor([float(i % 2)])

def main():
    topo = mpilsgd.Topology()
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 1)
    opt = mpilsgd.LSGD(torch.optim.SGD(model.parameters(), lr=1e-4), topo, period=2)
    seen = 0
    for how in sys.argv[1:]:
        loader = DataLoader(Numbers(), batch_size=4, num_workers=1, multiprocessing_context=how)
        for inputs, targets in loader:
            opt.zero_grad()
            loss = torch.nn.functional.mse_loss(model(inputs), targets)
            loss.backward()
            opt.step(loss=loss)
            seen += 1
    with opt.center():
        print(f"rank {topo.world.rank} of {topo.world.size}: {seen} batches, {opt.metrics.rounds} rounds", flush=True)

if __name__ == "__main__":
    main()
"""


def test_data_loaders_that_start_processes(folder: Path) -> None:
    """They import the script, and mpilsgd with it: none of them is a rank."""
    ended = job(folder, LOADERS, "spawn", "forkserver", seconds=120)
    assert ended.status == 0, ended
    for rank in range(2):
        assert f"rank {rank} of 2: 16 batches, 8 rounds" in ended.out, ended


ALONE = TRAIN + "step()\nprint('rank', topo.world.rank, 'of', topo.world.size, flush=True)\n"


def test_torchrun_starts_no_ranks_and_is_told_so(folder: Path) -> None:
    """As every other PyTorch script is started: two worlds of one, each of which says what is wrong."""
    ended = job(folder, ALONE, "LSGD(sgd, topo, period=2)", launcher=torchrun, seconds=120)
    assert ended.out.count("rank 0 of 1") == 2, ended
    assert ended.err.count("RuntimeWarning") == 2 and "torchrun" in ended.err, ended

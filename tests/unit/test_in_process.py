"""Workers as tasks of one process: their order, their ends, and what every order keeps.

That the methods do there what they do under MPI is shown by the tests of several ranks, which run in process, too.
"""

from __future__ import annotations

import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mpilsgd import ADMM, EASGD, LSGD, DiLoCo, Downpour, EASGDTree, Topology, in_process
from mpilsgd.comm import Deadlock, WorkerFailed

# The first imports torch._dynamo: before conftest.py freezes what imports left.
torch.optim.SGD([torch.zeros(1)], lr=0.1)
EXAMPLES = Path(__file__).parents[2] / "examples"
Vector = np.ndarray
P, RATE = 3, 0.125
MOST = {"center_rate": 0.25 * P, "moving_rate": 0.25}  # beta = p alpha
PULLS = {"pull": 0.3, "global_pull": 0.2, "period": 2, "global_period": 4}


class Worker:
    """A vector of a few values that is stepped by gradients given to it."""

    def __init__(self, method: Any, options: dict[str, Any], start: Vector, init: str = "different"):
        self.topology = Topology()
        self.world = self.topology.world
        self.parameter = torch.nn.Parameter(torch.tensor(start))
        model = torch.nn.ParameterList([self.parameter])  # else it is looked for among all objects
        optimizer = torch.optim.SGD([self.parameter], lr=RATE)
        self.opt = method(optimizer, self.topology, model=model, init=init, **options)

    def step(self, gradient: Vector, loss: float = 1.0) -> None:
        self.parameter.grad = torch.tensor(gradient)
        self.opt.step(loss=loss)

    def x(self) -> Vector:
        return self.parameter.detach().numpy().copy()

    def center(self) -> Vector:
        with self.opt.center():
            return self.x()

    def sum(self, value: Any) -> Any:
        return sum(self.world.allgather(value))


def starts(seed: int) -> Vector:
    return np.random.default_rng(seed).integers(-64, 65, size=(P, 5)) / 64.0


def conserves(options: dict[str, Any], seed: int) -> float:
    """Z: sum x + c, less what the workers' own steps add. An exchange behind the steps moves x at the next one."""
    w = Worker(EASGD, {**options, **MOST}, starts(seed)[here_rank()])
    before, own = w.sum(w.x()) + w.center(), np.zeros(5)
    for t in range(4 + w.world.rank):
        own -= RATE * (gradient := np.sin(w.x() + t))
        w.step(gradient)
    center = w.center()
    moves = w.opt.state_dict()["mpilsgd"]["exchange"].get("moved") or {}
    x = w.x() + sum(move.numpy()[:5] for move in moves.values())
    return float(abs(w.sum(x) + center - before - w.sum(own)).max())


def loses_nothing(options: dict[str, Any], seed: int) -> float:
    """Z: c + sum (x - a) = c_0 - eta sum g, a what each received last."""
    w = Worker(Downpour, options, starts(seed)[here_rank()])
    start, received, own = w.center(), w.x(), np.zeros(5)
    for t in range(5 + w.world.rank):
        own -= RATE * (gradient := np.sin(w.x() + t))
        w.step(gradient)
        if (t + 1) % options["period"] == 0:
            received = w.x()
    kept = w.sum(w.x() - received)
    return float(abs(w.center() + kept - start - w.sum(own)).max())


def keeps_its_centre(options: dict[str, Any], seed: int) -> float:
    """Z (3.54): c is the mean of x - dual, each worker's dual following from its own x alone."""
    w, r = Worker(ADMM, options, starts(seed)[here_rank()]), RATE * options["rho"]
    dual = np.zeros(5)
    for t in range(4 + w.world.rank):
        x, gradient = w.x(), np.sin(w.x() + t)
        w.step(gradient)
        dual = ((w.x() * (1 + r) - (x - RATE * gradient)) / r + dual - x) / 2
    mean = w.sum(w.x() - dual) / P
    return float(abs(w.center() - mean).max())


def stays_in_the_hull(method: Any, options: dict[str, Any], seed: int) -> float:
    """Averages only: nobody leaves the box that the starts span. And a consensus stays one."""
    w = Worker(method, options, starts(seed)[here_rank()])
    every = np.stack(w.world.allgather(w.x()))
    total = 6 * len(w.opt.workers)
    while not w.opt.reached(total):
        w.step(np.zeros(5), loss=float(w.world.rank))
    center = w.center()  # now they may talk
    taken = w.sum(w.opt.t * w.opt.computes)
    assert total <= taken < total + 2 * P, f"{taken} steps for a total of {total}"
    out = [max(0.0, (every.min(0) - x).max(), (x - every.max(0)).max()) for x in (w.x(), center)]
    w.opt.close()
    same = Worker(method, options, starts(seed)[0])
    for _ in range(6):
        same.step(np.zeros(5))
    out += [abs(x - starts(seed)[0]).max() for x in (same.x(), same.center())]
    return float(max(out))


def stays_equal(options: dict[str, Any], seed: int) -> float:
    """Of equal workers at zero gradient; and the centre of all is one."""
    same = Worker(DiLoCo, options, starts(seed)[0])
    for _ in range(4 + same.world.rank):
        same.step(np.zeros(5))
    out = [abs(x - starts(seed)[0]).max() for x in (same.x(), same.center())]
    for t in range(4 + same.world.rank):
        same.step(np.sin(same.x() + t))
    center = same.center()
    return float(max(*out, *(abs(center - other).max() for other in same.world.allgather(center))))


def here_rank() -> int:
    return Topology().world.rank


TURNS = {"asynchronous": True, "period": 2}
KEPT: dict[str, Callable[[int], float]] = {
    "EASGD": lambda seed: conserves(TURNS, seed),
    "EASGD-overlap": lambda seed: conserves({**TURNS, "overlap": True}, seed),
    "EASGD-gauss-seidel": lambda seed: stays_in_the_hull(EASGD, {**TURNS, "form": "gauss-seidel"}, seed),
    "Downpour": lambda seed: loses_nothing(TURNS, seed),
    "ADMM": lambda seed: keeps_its_centre({"asynchronous": True, "rho": 2.0}, seed),
    "LSGD": lambda seed: stays_in_the_hull(LSGD, {**PULLS, "asynchronous": True}, seed),
    "LSGD-wait-free": lambda seed: stays_in_the_hull(LSGD, {**PULLS, "asynchronous": "wait-free"}, seed),
    "DiLoCo": lambda seed: stays_equal(TURNS, seed),
    "EASGDTree": lambda seed: stays_in_the_hull(
        EASGDTree, {"degree": 2, "period": 1, "upper_period": 2}, seed
    ),
}
by_method = pytest.mark.parametrize("name", KEPT)


def in_many_orders(name: str, seeds: range) -> None:
    """On one node and on two."""
    for seed in seeds:
        gaps = in_process(lambda seed=seed: KEPT[name](seed), P, seed=seed, nodes=1 + seed % 2)
        assert max(gaps) < 1e-12, f"seed {seed}: {gaps}"


@by_method
def test_what_every_order_keeps(name: str) -> None:
    in_many_orders(name, range(20))


@pytest.mark.slow
@by_method
def test_what_a_thousand_orders_keep(name: str) -> None:
    in_many_orders(name, range(1000))


@by_method
def test_the_seed_decides_the_order(name: str) -> None:
    """Of the same seed to the bit, and other seeds give other orders."""

    def trace(seed: int, told: list[Any]) -> list[Any]:
        def worker() -> None:
            method = {"EASGD": EASGD, "Downpour": Downpour, "ADMM": ADMM, "LSGD": LSGD, "DiLoCo": DiLoCo}
            cls: Any = method.get(name.split("-")[0], EASGDTree)
            options = {"rho": 2.0} if cls is ADMM else PULLS if cls is LSGD else {"period": 2}
            if cls is not EASGDTree:
                options = {**options, "asynchronous": "wait-free" if "wait" in name else True}
            w = Worker(cls, options, starts(0)[here_rank()])
            while not w.opt.reached(15):
                w.step(np.sin(w.x()))
                told.append((w.world.rank, w.x().tobytes()))
            w.opt.close()

        in_process(worker, P, seed=seed)
        return told

    runs = [trace(seed, []) for seed in (0, 0, 1, 2, 3)]
    assert runs[0] == runs[1]
    assert any(run != runs[0] for run in runs[2:])


def test_the_example_gives_what_mpiexec_gives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the bit; and nothing of MPI is loaded for it."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # torch adds up otherwise with more
    script = (
        "import sys, torch; sys.path.insert(0, sys.argv[1]); import in_process, mpilsgd\n"
        "models = mpilsgd.in_process(in_process.worker, workers=4, seed=int(sys.argv[3]))\n"
        "assert 'mpi4py.MPI' not in sys.modules\n"
        "for k, model in enumerate(models): torch.save(model.state_dict(), f'{sys.argv[2]}/{k}')\n"
    )
    for seed in (0, 1):
        folder = tmp_path / str(seed)
        folder.mkdir()
        subprocess.run([sys.executable, "-c", script, EXAMPLES, folder, str(seed)], check=True, timeout=120)
    (tmp_path / "mpi").mkdir()
    ranks = (
        "import sys, torch; sys.path.insert(0, sys.argv[1]); import in_process; from mpi4py import MPI\n"
        "model = in_process.worker()\n"
        "torch.save(model.state_dict(), f'{sys.argv[2]}/{MPI.COMM_WORLD.rank}')\n"
    )
    from launcher import mpiexec

    file = tmp_path / "ranks.py"
    file.write_text(ranks)
    subprocess.run([*mpiexec(4, 120), file, EXAMPLES, tmp_path / "mpi"], check=True, timeout=120)
    for k in range(4):
        one, *others = (torch.load(tmp_path / part / str(k)) for part in ("mpi", "0", "1"))
        assert one and all(torch.equal(v, other[name]) for other in others for name, v in one.items())


def test_a_deadlock_says_who_waits_for_what() -> None:
    def worker() -> None:
        w = Worker(LSGD, {"period": 1}, np.zeros(2))
        if w.world.rank == 1:
            w.world.Barrier()
        w.step(np.zeros(2))

    started = time.monotonic()
    with pytest.raises(Deadlock) as error:
        in_process(worker, 2)
    text = str(error.value)
    assert (
        "rank 0 waits in LSGD.step" in text
        and "Allgather, to which rank(s) 1 of [0, 1] have not come" in text
    )
    assert (
        "rank 1 waits in" in text and "Barrier, to which rank(s) 0 of" in text and "w.world.Barrier()" in text
    )
    assert time.monotonic() - started < 10


def test_other_collective_calls_are_told_apart() -> None:
    def worker() -> None:
        world = Topology().world
        world.Barrier() if world.rank else world.bcast(1)

    with pytest.raises(WorkerFailed, match=r"comes to (Barrier|bcast) and rank \d to (Barrier|bcast)"):
        in_process(worker, 2)


def test_a_worker_that_fails_ends_all() -> None:
    ended = []

    def worker() -> None:
        w = Worker(EASGD, {"period": 1}, np.zeros(2))
        try:
            for t in range(10**6):
                if (t, w.world.rank) == (3, 2):
                    raise KeyError("here")
                w.step(np.zeros(2))
        finally:
            ended.append(w.world.rank)

    with pytest.raises(WorkerFailed, match="rank 2 failed: KeyError: 'here'") as error:
        in_process(worker, P)
    assert isinstance(error.value.__cause__, KeyError) and sorted(ended) == [0, 1, 2]
    assert not [t for t in threading.enumerate() if t.name.startswith("rank ")]


def test_a_worker_that_blocks_is_told() -> None:
    def worker() -> None:
        w = Worker(EASGD, {"period": 1}, np.zeros(2))
        if w.world.rank == 1:
            time.sleep(1.0)
        w.step(np.zeros(2))

    with pytest.warns(RuntimeWarning, match=r"rank 1 has gone on alone for 0\.2 s(.|\n)*time\.sleep\(1\.0\)"):
        in_process(worker, 2, patience=0.2)


def test_a_model_of_all_workers_is_refused() -> None:
    parameter = torch.nn.Parameter(torch.zeros(3))

    def worker() -> None:
        LSGD(torch.optim.SGD([parameter], lr=0.1), Topology())

    with pytest.raises(WorkerFailed, match="the workers share parameters: make the model inside"):
        in_process(worker, 2)


def test_each_has_its_random_numbers() -> None:
    """Also half a pair of numpy's normal ones; what is outside stays as it was."""

    def worker() -> list[float]:
        world = Topology().world
        for module in (random, np.random, torch):
            getattr(module, "manual_seed" if module is torch else "seed")(world.rank)
        drawn = []
        for _ in range(5):
            drawn += [random.random(), np.random.randn(), float(torch.rand(()))]
            world.Barrier()
        return drawn

    def alone(rank: int) -> list[float]:
        own = random.Random(rank), np.random.RandomState(rank), torch.Generator().manual_seed(rank)
        return [
            v
            for _ in range(5)
            for v in (own[0].random(), own[1].randn(), float(torch.rand((), generator=own[2])))
        ]

    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    assert in_process(worker, P) == [alone(rank) for rank in range(P)]
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == states


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"workers": 0}, "workers must be a whole number of at least 1, not 0"),
        ({"workers": 2, "nodes": 3}, "nodes must be a whole number from 1 to the number of workers"),
        ({"seed": -1}, "seed must be"),
        ({"patience": 0}, "patience must be"),
        ({"worker": 3}, "worker must be a function"),
    ],
)
def test_bad_arguments_are_refused(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        in_process(**{"worker": lambda: None, **options})


def test_ranks_of_mpiexec_and_workers_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(WorkerFailed, match="a worker of another in_process"):
        in_process(lambda: in_process(lambda: None, 2), 2)
    monkeypatch.setenv("PMI_SIZE", "4")
    with pytest.raises(RuntimeError, match="one of 4 ranks already: start it without mpiexec"):
        in_process(lambda: None, 2)


def test_a_topology_belongs_to_its_worker() -> None:
    outside = in_process(Topology, 1)[0]
    with pytest.raises(RuntimeError, match="make the Topology in the worker"):
        in_process(lambda: LSGD(torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.1), outside), 1)


def test_nodes_and_groups() -> None:
    def worker() -> tuple[Any, ...]:
        topology = Topology(group_size=2)
        return topology.nodes, topology.groups, topology.group.rank

    nodes, groups, _ = in_process(worker, 5, nodes=2)[0]
    assert (nodes, groups) == ([[0, 1, 2], [3, 4]], [[0, 1], [2], [3, 4]])

"""`mpilsgd.simulate`: workers as tasks of one process, under a virtual clock."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from random import Random
from typing import Any, Generic, TypeVar

from mpilsgd.comm import here, tasks
from mpilsgd.comm.inprocess import TaskRank, node_of, problem_of, refuse
from mpilsgd.simulation.compute import compute_problem, seconds_of
from mpilsgd.simulation.network import Network
from mpilsgd.simulation.virtual import Clock, Died, Spent

_T = TypeVar("_T")


@dataclasses.dataclass
class Simulated(Generic[_T]):
    """What a simulation gives. Lists are in the order of the ranks; seconds are those of the virtual clock.

    Attributes:
        results: what each worker returned, None of one that has not.
        seconds: when it did (or where its clock stood in the end): compute + communication + waiting.
        compute: in gradients; communication: while its bytes moved (of what goes on behind its steps, only the
            wait for it, as waiting); waiting: for others.
        sent, received: bytes over the link of each node.
    """

    results: list[_T | None]
    seconds: list[float]
    compute: list[float]
    communication: list[float]
    waiting: list[float]
    sent: list[int]
    received: list[int]

    def __str__(self) -> str:
        rows = zip(self.seconds, self.compute, self.communication, self.waiting, strict=True)
        lines = [f"{'rank':>4} {'seconds':>11} {'compute':>11} {'comm':>11} {'waiting':>11}"]
        lines += [f"{r:>4} " + " ".join(f"{v:>11.6g}" for v in row) for r, row in enumerate(rows)]
        return "\n".join(lines)


def simulate(
    worker: Callable[[], _T],
    workers: int = 4,
    *,
    seed: int = 0,
    nodes: int = 1,
    compute: Any = 0.01,
    network: Network | None = None,
    deaths: Mapping[int, float] | None = None,
    notice: float = 1.0,
    patience: float = 30.0,
) -> Simulated[_T]:
    """Runs workers as `in_process` does, under a clock that shows what the time would be on a cluster.

    All that they compute is real, and so are methods, parameters and errors. Only time is not: a `step()` takes the
    seconds that `compute` says, what is exchanged takes what `network` says, and everything else takes none. Of two
    workers the one that is earlier on this clock goes on first, so that asynchronous methods see the order that a
    cluster would give. The same arguments give the same run.

    Args:
        worker: called once for each, without arguments: the program of one worker. `mpilsgd.simulation.clock()` tells
            the time in it.
        workers: how many.
        seed: of the order of what comes at the same time, and of what `compute` draws.
        nodes: they lie on so many nodes, in consecutive blocks.
        compute: seconds of a gradient and the worker's own step: a number, a function (rank, step, random) of the rank,
            its step from 0 on and a `random.Random` of this rank; or "measured", the processor time that the worker
            took here since it last went on. See `lognormal` and `stragglers`.
        network: what communication costs; by default `Network()`.
        deaths: {rank: seconds}: it ends then, like a process that is killed.
        notice: seconds after a death at which the job ends, with all ranks.
        patience: as of `in_process`.

    Raises:
        Died: a rank has died; what there was by then is its `simulated`.
        WorkerFailed, Deadlock: as `in_process`.
    """
    net, ends = network or Network(), dict(deaths or {})
    refuse(
        problem_of(worker, workers, seed, nodes, patience)
        or compute_problem(compute, workers)
        or (net.problem() if isinstance(net, Network) else f"network must be a Network, not {net!r}")
        or _problem(ends, notice, workers),
        "simulate",
    )
    place = node_of(workers, nodes)
    clock, world = Clock(seed, net, place, ends, notice), tasks.Members(range(workers))
    ranks = [SimulatedRank(clock, world, r, place[r], compute, seed) for r in range(workers)]

    def work() -> None:
        rank: Any = here.rank
        rank.result = worker()
        rank.finished = clock.now, dataclasses.replace(clock.spent[rank.number])
        rank.end()

    try:
        clock.run(ranks, work, patience)
    except Died as died:
        died.simulated = _simulated(clock, ranks)
        raise
    return _simulated(clock, ranks)


def _simulated(clock: Clock, ranks: list[SimulatedRank]) -> Simulated[Any]:
    ends = [
        rank.finished or (clock.dead.get(rank.number, clock.now), clock.spent[rank.number]) for rank in ranks
    ]
    spent = [of for _, of in ends]
    return Simulated(
        [rank.result for rank in ranks],
        [seconds for seconds, _ in ends],
        [of.compute for of in spent],
        [of.communication for of in spent],
        [of.waiting for of in spent],
        list(clock.links.sent),
        list(clock.links.received),
    )


def _problem(deaths: dict[Any, Any], notice: Any, workers: int) -> str | None:
    def seconds(value: Any) -> bool:
        return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf

    for rank, when in deaths.items():
        if rank not in range(workers):
            return f"deaths: there is no rank {rank!r}; the ranks are 0 to {workers - 1}"
        if not seconds(when):
            return f"deaths: rank {rank} must die at a number of seconds of at least 0, not {when!r}"
    return None if seconds(notice) else f"notice must be a number of seconds of at least 0, not {notice!r}"


class SimulatedRank(TaskRank):
    """A rank whose gradients take the time that `compute` says.

    Attributes: result, finished: what its worker returned, when, and what it had spent by then; since: the processor
    time at which it last went on.
    """

    result: Any = None
    finished: tuple[float, Spent] | None = None
    since = 0.0

    def __init__(self, clock: Clock, world: tasks.Members, rank: int, node: int, compute: Any, seed: int):
        super().__init__(clock, world, rank, node)
        self._clock, self._compute, self._step = clock, compute, 0
        self._random = Random(f"{seed} {rank}")  # its own: the same in every order

    def computed(self) -> None:
        measured = time.thread_time() - self.since
        self._clock.computes(seconds_of(self._compute, self.number, self._step, self._random, measured))
        self._step += 1

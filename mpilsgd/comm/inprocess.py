"""Workers as tasks of one process, without MPI: for notebooks, tests and simulation."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any, TypeVar

from mpilsgd.comm import task_requests, task_windows, tasks
from mpilsgd.comm.baton import Baton
from mpilsgd.comm.inquiry import launched_processes
from mpilsgd.comm.mpi import Rank, here

_T = TypeVar("_T")


def in_process(
    worker: Callable[[], _T], workers: int = 4, *, seed: int = 0, nodes: int = 1, patience: float = 30.0
) -> list[_T]:
    """Runs workers as tasks of this process, without MPI, and gives what each returns, in the order of the ranks.

    Inside, `Topology()` is that of these workers, and all is as it would be under mpiexec: each has its rank, its
    model, random generators of its own (Python's, numpy's and torch's default ones), and ends like a program of its
    own. One of them runs at a time. Which goes on where one waits for others, or has taken a step of an asynchronous
    method, the seed decides: the same seed gives the same run, another one another order.

    Args:
        worker: called once for each, without arguments.
        workers: how many.
        seed: of the order alone. The generators of worker r begin with seed r, in every order.
        nodes: they lie on so many nodes, in consecutive blocks: between nodes vectors travel as messages.
        patience: seconds after which it is told that a worker blocks or computes while the others wait for it.

    Raises:
        WorkerFailed: what a worker raised is its cause, and it ends the others.
        Deadlock: every worker waits for another; it says what each waits in.
        RuntimeError: where mpiexec started this program as one of several ranks.
    """
    refuse(problem_of(worker, workers, seed, nodes, patience), "in_process")
    return run_tasks(worker, workers, seed, nodes, patience)


def run_tasks(worker: Callable[[], _T], workers: int, seed: int, nodes: int, patience: float) -> list[_T]:
    """The same within a program that is a rank, beside what that does: nothing of MPI is touched."""
    baton, world = Baton(seed), tasks.Members(range(workers))
    ranks = [TaskRank(baton, world, r, node) for r, node in enumerate(node_of(workers, nodes))]

    def work() -> _T:
        result = worker()
        rank: Any = here.rank
        rank.end()
        return result

    return baton.run(ranks, work, patience)


def node_of(workers: int, nodes: int) -> list[int]:
    """Of each rank: consecutive blocks."""
    return [r * nodes // workers for r in range(workers)]


def refuse(problem: str | None, name: str) -> None:
    """Raises what is wrong with the arguments of the function of this name, or with where it is called."""
    if problem is not None:
        raise ValueError(problem)
    launched = _ranks_of_program()
    if launched > 1 or here.task is not None:
        who = "a worker of another in_process()" if here.task is not None else f"one of {launched} ranks"
        raise RuntimeError(
            f"{name}() makes the workers itself, and this program is {who} already: start it without mpiexec, or "
            "call the worker function itself, once on every rank"
        )


def problem_of(worker: Any, workers: Any, seed: Any, nodes: Any, patience: Any) -> str | None:
    """What is wrong with these arguments."""

    def whole(number: Any, low: int) -> bool:
        return isinstance(number, int) and not isinstance(number, bool) and number >= low

    if not callable(worker):
        return f"worker must be a function without arguments, not {worker!r}"
    if not whole(workers, 1):
        return f"workers must be a whole number of at least 1, not {workers!r}"
    if not whole(nodes, 1) or nodes > workers:
        return f"nodes must be a whole number from 1 to the number of workers ({workers}), not {nodes!r}"
    if not whole(seed, 0):
        return f"seed must be a whole number of at least 0, not {seed!r}"
    if isinstance(patience, bool) or not isinstance(patience, int | float) or not patience > 0:
        return f"patience must be a number of seconds greater than 0, not {patience!r}"
    return None


def _ranks_of_program() -> int:
    """As far as that is known without starting MPI."""
    started: Any = sys.modules.get("mpi4py.MPI")
    seen = started.COMM_WORLD.size if started and started.Is_initialized() else 1
    return max(seen, launched_processes(os.environ) or 1)


class TaskRank(Rank):
    """A rank whose MPI is that of `tasks`."""

    is_process = False

    def __init__(self, baton: Baton, world: tasks.Members, rank: int, node: int):
        super().__init__()
        self.baton, self.number, self.node = baton, rank, node
        self._ends: list[Callable[[], None]] = []
        self.mpi = TaskMPI(tasks.Comm(world, rank), tasks.Comm(tasks.Members([rank]), 0))

    def __str__(self) -> str:
        return f"rank {self.number}"

    def at_end(self, do: Callable[[], None]) -> None:
        self._ends.append(do)

    def end(self) -> None:
        while self._ends:
            self._ends.pop()()


class TaskMPI:
    """What a task finds under the name MPI. COMM_WORLD, COMM_SELF: its own."""

    Comm = Intracomm = tasks.Comm
    Request, Status = task_requests.Request, task_requests.Status
    Win, Info = task_windows.Win, task_windows.Info
    SUM, MAX, LOR, LAND, REPLACE, NO_OP = (
        staticmethod(getattr(task_windows, name))
        for name in ("SUM", "MAX", "LOR", "LAND", "REPLACE", "NO_OP")
    )
    COMM_NULL = BOTTOM = None
    UNDEFINED, ANY_SOURCE, ANY_TAG = tasks.UNDEFINED, task_requests.ANY_SOURCE, task_requests.ANY_TAG
    BYTE, TAG_UB, COMM_TYPE_SHARED, MODE_NOCHECK, THREAD_MULTIPLE = "bytes", 0, 1, 0, 3
    WIN_UNIFIED = Win.model
    Exception = RuntimeError

    def __init__(self, world: tasks.Comm, alone: tasks.Comm):
        self.COMM_WORLD, self.COMM_SELF = world, alone

    @staticmethod
    def Is_initialized() -> bool:
        return True

    @staticmethod
    def Query_thread() -> int:
        return TaskMPI.THREAD_MULTIPLE

    @staticmethod
    def Get_library_version() -> str:
        return "tasks of one process"

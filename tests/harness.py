"""A method of mpilsgd and its simulation, set up alike on every rank; imported by the tests that run under MPI."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import asynchronous_simulation
import emulated
import numpy as np
import simulation
import torch
from numpy.typing import NDArray
from problems import Problem, flatten, state_of
from simulation import Local, Simulation

import mpilsgd
from mpilsgd.comm import MPI, WorkerFailed, here

torch.optim.SGD(
    [torch.zeros(1)]
)  # the first imports torch._dynamo: before conftest.py freezes what imports left

# Ranks are so many tasks of one process ("4"), on so many nodes ("4x2").
TASKS = os.environ.get("MPILSGD_TEST_TASKS", "")
CORE = os.environ.get("MPILSGD_TEST_CORE", "")  # an extension with an emulated device


class Outside:
    """The world as its first rank sees it, outside of a test, where tasks are none."""

    rank, size = 0, int(TASKS.split("x")[0] or 1)
    nodes = int(TASKS.split("x")[1]) if "x" in TASKS else 1

    def bcast(self, item: Any) -> Any:
        return item

    def Barrier(self) -> None: ...


class World:
    """That of the task that asks."""

    def __getattr__(self, name: str) -> Any:
        return getattr(Outside() if here.task is None else MPI.COMM_WORLD, name)


WORLD: Any = World() if TASKS else MPI.COMM_WORLD


def on_every_rank(do: Callable[[], Any], seed: int = 0) -> Any:
    """What it gives, on rank 0; where ranks are tasks this makes them."""
    if not TASKS:
        return do()
    try:
        return mpilsgd.in_process(do, Outside.size, nodes=Outside.nodes, seed=seed)[0]
    except WorkerFailed as failure:
        raise failure.__cause__ or failure from None


def place(device: str) -> torch.device:
    """The device that a test means, or the emulated one."""
    if device == "cuda" and CORE:
        return emulated.DEVICE
    return torch.device(device)


TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 4e-2, torch.float16: 5e-3}


@dataclass(frozen=True)
class Layout:
    """How the workers are grouped, by shared windows or messages; groups: what that has to come to."""

    group_size: int | None
    shared: bool
    groups: tuple[tuple[int, ...], ...]

    def __str__(self) -> str:
        sizes = [len(group) for group in self.groups]
        shape = f"{len(sizes)}x{sizes[0]}" if len(set(sizes)) == 1 else "+".join(map(str, sizes))
        return f"{shape}-{'windows' if self.shared else 'messages'}"


def layouts(comm: Any = WORLD) -> list[Layout]:
    """Every way to group the ranks of `comm`, whatever the nodes they came up on; the first: a group a node."""
    node = comm.Split_type(MPI.COMM_TYPE_SHARED, key=comm.rank)
    lowest = comm.allgather(node.bcast(comm.rank))
    node.Free()
    nodes = [[rank for rank in range(comm.size) if lowest[rank] == first] for first in sorted(set(lowest))]
    found: dict[tuple[tuple[int, ...], ...], int | None] = {}
    for size in (None, *range(1, min(map(len, nodes)) + 1)):
        groups = []
        for ranks in nodes:
            step = size or len(ranks)
            groups += [tuple(ranks[i : i + step]) for i in range(0, len(ranks), step)]
        found.setdefault(tuple(groups), size)
    return [Layout(size, shared, groups) for groups, size in found.items() for shared in (True, False)]


LAYOUTS = on_every_rank(layouts)


def chosen() -> list[Layout]:
    """Fewer, where there are many: 3x1 and 2+1 of three ranks, 1x4 and 2x2 of four, as far as the nodes have them."""
    leave_out = {3: ("1x3",), 4: ("4x1", "3+1")}.get(WORLD.size, ())
    return [layout for layout in LAYOUTS if str(layout)[:3] not in leave_out] or LAYOUTS


MOST = chosen()
MESSAGES = next(layout for layout in LAYOUTS if not layout.shared)
FEW = LAYOUTS[:1] + [
    layout for layout in MOST[-2:] if layout != LAYOUTS[0]
]  # a group a node, and one with smaller groups both ways


@dataclass(frozen=True)
class Case:
    """A method with its arguments; asynchronous ones in turns (round-robin) have an oracle, too."""

    method: type[mpilsgd.AllreduceSGD] | Any
    options: dict[str, Any] = field(default_factory=dict)
    name: str = ""

    def __str__(self) -> str:
        return f"{self.method.__name__}{'-' + self.name if self.name else ''}"

    @property
    def asynchronous(self) -> Any:
        return self.options.get("asynchronous", self.method is mpilsgd.Downpour)

    def simulate(self, problem: Problem, local: Local, layout: Layout, **options: Any) -> Simulation:
        name, source = self.method.__name__, simulation
        own = {k: v for k, v in self.options.items() if k not in ("order", "asynchronous")}
        if self.method is mpilsgd.LSGD:
            own["groups"] = layout.groups
            if self.asynchronous == "wait-free":
                name, source = "WaitFreeLSGD", asynchronous_simulation
        elif self.method in (mpilsgd.Downpour, mpilsgd.ADMM) or self.asynchronous:
            source = asynchronous_simulation
            if self.method is mpilsgd.Downpour:
                own["asynchronous"] = self.asynchronous
        else:  # what changes how it is done, or only what the centre is
            own = {k: v for k, v in own.items() if k != "average" and (k, v) != ("overlap", True)}
        workers = sum(len(group) for group in layout.groups)
        made: Simulation = getattr(source, name)(problem, workers, local, **own, **options)
        return made


def optimizer(local: Local, parameters: Any) -> torch.optim.Optimizer:
    """The optimizer of a `Local`, at its rate for t = 0."""
    rate = local.rate(0)
    if local.kind == "msgd":
        return mpilsgd.MSGD(parameters, rate, local.momentum, local.nesterov, local.weight_decay)
    return torch.optim.SGD(
        parameters, lr=rate, momentum=local.momentum, nesterov=local.nesterov, weight_decay=local.weight_decay
    )


def topology(layout: Layout, comm: Any) -> tuple[mpilsgd.Topology, bool]:
    """Made once a layout and kept, as it takes as long as a short run; and whether it is the caller's to free."""
    kept, key = here.rank.once(topologies), (layout.group_size, layout.shared, comm == WORLD)
    if key not in kept or comm not in (WORLD, MPI.COMM_SELF):
        given = None if comm is WORLD else comm
        made = mpilsgd.Topology(given, group_size=layout.group_size, shared=layout.shared)
        if comm not in (WORLD, MPI.COMM_SELF):
            return made, True
        kept[key] = made
    return kept[key], False


def topologies() -> dict[tuple[int | None, bool, bool], mpilsgd.Topology]:
    return {}


class Run:
    """This rank's worker: its model, its optimizer, its method."""

    def __init__(
        self,
        case: Case,
        problem: Problem,
        local: Local,
        layout: Layout,
        *,
        same: bool = True,
        dtype: torch.dtype = torch.float64,
        device: str = "cpu",
        losses: Callable[[int, int], float] | None = None,
        comm: Any = WORLD,
        topo: mpilsgd.Topology | None = None,
        **options: Any,
    ):
        self.topo, self.owned = (topo, False) if topo else topology(layout, comm)
        self.rank, self.size = self.topo.world.rank, self.topo.world.size
        self.problem, self.losses, self.t = problem, losses, 0
        # Every rank starts elsewhere; init="same" has to bring them to rank 0's start.
        self.model = problem.build(dtype, problem.start(self.rank)).to(place(device))
        self.inner = optimizer(local, self.model.parameters())
        self.opt: Any = case.method(
            self.inner, self.topo, **{**case.options, **options}, init="same" if same else "different"
        )

    def step(self) -> None:
        self.opt.zero_grad()
        loss = self.problem.loss(self.model, self.rank, self.t)
        loss.backward()
        self.opt.step(loss=loss if self.losses is None else self.losses(self.rank, self.t))
        self.t += 1

    def still(self, loss: float = 1.0) -> None:
        """A step with a gradient of zero, whatever the parameters are."""
        for parameter in self.model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        self.opt.step(loss=loss)
        self.t += 1

    def run(self, steps: int) -> Run:
        for _ in range(steps):
            self.step()
        return self

    def held(self) -> NDArray[np.float64]:
        """What the model holds: parameters, then float buffers."""
        return flatten(state_of(self.model))

    def x(self) -> NDArray[np.float64]:
        """The iterate."""
        with self.inner.iterate() if isinstance(self.inner, mpilsgd.MSGD) else contextlib.nullcontext():
            return self.held()

    def center(self, **options: Any) -> NDArray[np.float64]:
        with self.opt.center(**options):
            return self.held()

    def close(self) -> None:
        self.opt.close()
        if self.owned:
            self.topo.free()


@contextlib.contextmanager
def running(*args: Any, **options: Any) -> Iterator[Run]:
    """A `Run` that is closed at the end (which is collective, so not after an exception of one rank)."""
    run = Run(*args, **options)
    yield run
    run.close()


def distance(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """‖a − b‖/‖b‖; infinite where a value is not finite."""
    gap = float(np.linalg.norm(a - b)) / max(float(np.linalg.norm(b)), 1e-30)
    return gap if np.isfinite(gap) else np.inf


def check_together(errors: list[str]) -> None:
    """Fails on every rank if any rank has an error, so that none goes on alone."""
    found = [f"rank {rank}: {error}" for rank, own in enumerate(WORLD.allgather(errors)) for error in own[:3]]
    assert not found, "\n".join(found)


def compare(run: Run, other: Simulation, steps: int, tolerance: float, label: str = "") -> list[str]:
    """Runs both; the steps (t, after it) at which this rank's iterate or the centre is not the simulation's."""
    errors = []
    for t in range(1, steps + 1):
        run.step()
        other.step()
        gap = distance(run.x(), other.x[run.rank])
        if gap > tolerance:
            errors.append(f"{label} t={t}: x differs by {gap:.1e}")
        if steps > 1 and t in (steps // 2, steps):
            gap = distance(run.center(), other.center())
            if gap > tolerance:
                errors.append(f"{label} t={t}: centre differs by {gap:.1e}")
    return errors

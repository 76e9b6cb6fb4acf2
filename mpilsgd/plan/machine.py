"""What nodes and their network do in a second: given, or measured."""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Sequence

import torch

from mpilsgd import kernels
from mpilsgd.comm import MPI, Topology, progresses_alone
from mpilsgd.comm.channel import memory_of

_POLL = 2.5e-4  # seconds on the mean until a thread that polls every 0.5 ms looks
_LARGEST = 1 << 26  # bytes of a vector that is tried
_FIRST = 1 << 16  # numbers of the first message around the ring


@dataclasses.dataclass(frozen=True)
class Machine:
    """Ranks on nodes, and a network between the nodes.

    Attributes:
        ranks: how many each node has.
        bandwidth: bytes a second that a node's link carries, each way.
        latency: seconds that a small message takes from one node to another.
        memory: bytes a second that the ranks of a node read and write together.
        meeting: seconds of a meeting of the ranks of one node.
        one_sided: seconds of a small one-sided operation on another node (None: two latencies).

    Raises:
        ValueError: a number out of its range.
    """

    ranks: tuple[int, ...]
    bandwidth: float = 1.25e9
    latency: float = 3e-5
    memory: float = 1e10
    meeting: float = 1e-5
    one_sided: float | None = None

    def __post_init__(self) -> None:
        if not self.ranks or min(self.ranks) < 1:
            raise ValueError(f"ranks must be at least 1 on each node, not {self.ranks}")
        for name, least in (("bandwidth", 0), ("memory", 0), ("latency", -1), ("meeting", -1)):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > least and value >= 0):
                raise ValueError(f"{name} must be a finite number above 0, not {value!r}")

    @classmethod
    def of(cls, ranks: int, nodes: int, **given: float) -> Machine:
        """So many ranks on so many nodes, as evenly as can be."""
        if not 1 <= nodes <= ranks:
            raise ValueError(f"nodes must be from 1 to the number of ranks ({ranks}), not {nodes}")
        cut = [k * ranks // nodes for k in range(nodes + 1)]
        return cls(tuple(b - a for a, b in itertools.pairwise(cut)), **given)

    @property
    def size(self) -> int:
        """All ranks."""
        return sum(self.ranks)

    @property
    def nodes(self) -> int:
        return len(self.ranks)

    @property
    def most(self) -> int:
        """Ranks of the fullest node."""
        return max(self.ranks)

    @property
    def rounds(self) -> int:
        """Messages one after the other until every node knows of all."""
        return math.ceil(math.log2(self.nodes))

    def operation(self) -> float:
        """Seconds of a one-sided operation on another node."""
        return 2 * self.latency if self.one_sided is None else self.one_sided


@torch.no_grad()
def measure(topology: Topology, nbytes: float, seconds: float = 10.0) -> Machine:
    """The machine as these ranks find it, tried with vectors of so many bytes. Collective; takes about `seconds`.

    Memory: all ranks of a node pull a vector of their own at once. Network: the first ranks of the nodes send around a
    ring; on a slow network a part of the vector. Meetings: those that methods hold.
    """
    part = seconds / 4
    world, group = topology.channels(topology.islands(topology.shared))
    numel = max(int(min(nbytes, _LARGEST)) // 4, 16)
    x, leader = torch.zeros(numel), torch.ones(numel)

    def pull() -> None:
        kernels.pull(x, leader, 0.5)

    each = 3 * 4 * numel / _timed(topology, pull, part)
    memory = min(topology.allgather(topology.node.allreduce(each, MPI.SUM)))
    row = [0.0] * 8
    together = _timed(topology, lambda: world.meeting.table(row, False), part / 2, at_once=10)
    meeting = _timed(topology, lambda: group.meeting.table(row, False), part / 2, at_once=10)
    ranks = tuple(map(len, topology.nodes)) if topology.shared else (1,) * topology.world.size
    if world.n_islands == 1:
        return Machine(ranks, memory=memory, meeting=meeting)
    latency = max(together - meeting, 1e-7) / math.ceil(math.log2(world.n_islands))
    sent, received = torch.zeros(numel), torch.zeros(numel)

    def around() -> None:
        if world.is_head:
            heads, n = world.heads, world.n_islands
            coming = heads.Irecv(memory_of(received[:length], False), (heads.rank - 1) % n)
            going = heads.Isend(memory_of(sent[:length], False), (heads.rank + 1) % n)
            MPI.Request.Waitall([coming, going])

    length = min(_FIRST, numel)
    taken = _timed(topology, around, 0.0)
    while length < numel and taken < part / 32:  # on a slow network the whole may take minutes
        length = min(4 * length, numel)
        taken = _timed(topology, around, 0.0)
    taken = _timed(topology, around, part)
    bandwidth = 4 * length / max(taken - latency, 1e-9)
    one_sided = 2 * latency + (0.0 if progresses_alone(world.comm, world.heads_ranks) else _POLL)
    return Machine(ranks, bandwidth, latency, memory, meeting, one_sided)


def _timed(topology: Topology, do: Callable[[], object], seconds: float, at_once: int = 1) -> float:
    """Seconds that one takes, the median over about so many seconds, of the slowest rank. Collective."""
    do()  # what is made on first use
    taken: list[float] = []
    begin, more = time.perf_counter(), True
    while more:
        topology.barrier()
        start = time.perf_counter()
        for _ in range(at_once):
            do()
        taken.append((time.perf_counter() - start) / at_once)
        enough = len(taken) >= 3 and time.perf_counter() - begin > seconds
        more = not topology.broadcast(enough)
    return max(topology.allgather(_median(taken)))


def _median(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 2]

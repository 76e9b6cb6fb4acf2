"""What communication costs: nodes that are joined by a network, and ranks that share a node.

Every node has one link with two directions. A message takes the way out of its node and the way into the other at the
same time, the first at which both are free; so the ranks of a node share its link. Switches between the nodes are never
busy. In a node, ranks read each other's memory.
"""

from __future__ import annotations

import bisect
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

from mpilsgd.comm.costs import Costs

_PACKET = 4096  # bytes: as little as that slips in between the packets of others
TO_ALL = {"allgather", "Allgather", "Iallgather", "gather"}
FROM_ONE = {"bcast", "Bcast"}
SUMS = {"allreduce"}


@dataclasses.dataclass(frozen=True)
class Network:
    """The cluster.

    Attributes:
        bandwidth: bytes a second of a node's link, each way. 1.25e9: 10 Gbit/s.
        latency: seconds from one node to another.
        memory: bytes a second at which a rank reads what lies on its node.
        local_latency: seconds from one rank to another of its node.
        shared_memory: whether the ranks of a node share that rate (as processors do) or have it each (as GPUs).
    """

    bandwidth: float = 1.25e9
    latency: float = 2e-5
    memory: float = 1e10
    local_latency: float = 1e-6
    shared_memory: bool = False

    def problem(self) -> str | None:
        """What is wrong with these numbers."""
        for name in ("bandwidth", "memory"):
            if not getattr(self, name) > 0:
                return f"{name} must be greater than 0 bytes a second, not {getattr(self, name)!r}"
        for name in ("latency", "local_latency"):
            if not 0 <= getattr(self, name) < math.inf:
                return f"{name} must be at least 0 seconds, not {getattr(self, name)!r}"
        return None


class Way:
    """One direction of a link: the times at which it is busy, in order."""

    def __init__(self) -> None:
        self.busy: list[tuple[float, float]] = []

    def forget(self, before: float) -> None:
        self.busy = [span for span in self.busy if span[1] > before]

    def free(self, start: float, length: float) -> float:
        """From when on, at `start` or later, it is free for so long."""
        for begin, end in self.busy:
            if start + length <= begin:
                break
            start = max(start, end)
        return start


def taken(ways: Sequence[Way], now: float, start: float, length: float) -> float:
    """Takes the first time, from `start` on, at which all ways are free for so long; when that ends."""
    for way in ways:
        way.forget(now)
    while (later := max(way.free(start, length) for way in ways)) > start:
        start = later
    for way in ways:
        bisect.insort(way.busy, (start, start + length))
    return start + length


class Links(Costs):
    """The links of a network at work.

    Args: nodes: of every rank; now: the time; moment: notes a time at which something is complete; looking: whether
    this is but a look at what somebody waits for.

    Attributes: sent, received: bytes over each node's link.
    """

    def __init__(
        self,
        network: Network,
        nodes: Sequence[int],
        now: Callable[[], float],
        moment: Callable[[float], float],
        looking: Callable[[], bool],
    ):
        self.network, self._nodes = network, list(nodes)
        self._now, self._moment, self._looking = now, moment, looking
        n = max(nodes) + 1
        self.sent, self.received = [0] * n, [0] * n
        self._out, self._in = ([Way() for _ in range(n)] for _ in range(2))
        self._memory = [0.0] * n  # when it is free
        self.looked_far = False

    def message(self, source: int, dest: int, nbytes: int) -> tuple[float, float]:
        """It begins when the way out of its node and the way into the other are both free, and keeps both for bytes /
        bandwidth; a latency later it has come. On a node: bytes / memory, and the local latency.

        A synchronous send is announced by a message of no bytes, and its own begins when it is taken.
        """
        left, came = self._send(self._now(), self._nodes[source], self._nodes[dest], nbytes)
        return self._moment(left), self._moment(came)

    def _send(self, start: float, a: int, b: int, nbytes: int) -> tuple[float, float]:
        if a == b:
            end = self._read(start, a, nbytes)
            return end, end + self.network.local_latency
        self.sent[a] += nbytes
        self.received[b] += nbytes
        if nbytes <= _PACKET:
            end = start + nbytes / self.network.bandwidth
        else:
            end = taken([self._out[a], self._in[b]], self._now(), start, nbytes / self.network.bandwidth)
        return end, end + self.network.latency

    def _read(self, start: float, node: int, nbytes: float) -> float:
        if not (self.network.shared_memory and nbytes > _PACKET):
            return start + nbytes / self.network.memory
        self._memory[node] = max(start, self._memory[node]) + nbytes / self.network.memory
        return self._memory[node]

    def reads(self, rank: int, nbytes: int) -> float:
        """When a rank has read so many bytes on its node."""
        return self._moment(self._read(self._now(), self._nodes[rank], nbytes))

    def access(self, rank: int, target: int, there: int, back: int) -> float:
        """A message to the other node, then one back: its memory is reached without its processors (RDMA).

        Where a rank looks at a word there again and again, this moves nothing; it goes on a round trip after the word
        has changed.
        """
        a, b = self._nodes[rank], self._nodes[target]
        if self._looking():
            self.looked_far |= a != b
            return self._now()
        _, came = self._send(self._now(), a, b, there)
        return self._moment(self._send(came, b, a, back)[1])

    def collective(self, name: str, ranks: Sequence[int], sizes: Mapping[int, int]) -> float:
        """From the last one's coming: a latency for each doubling of the nodes, and of the ranks of a node (twice for
        sums); and the bytes over the links, all at the same time: to all, every node takes what is not its own
        (a ring); from one, every other node takes it once (a chain of pieces); sums, 2 (n-1)/n of it (reduce-scatter
        and allgather).
        """
        net, own, ranks_of = self.network, dict[int, int](), dict[int, int]()
        for r in ranks:
            k = self._nodes[r]
            own[k] = own.get(k, 0) + sizes.get(r, 0)
            ranks_of[k] = ranks_of.get(k, 0) + 1
        most, times = max(ranks_of.values()), 2 if name in SUMS else 1
        out, into = moved(name, own, max(sizes.values()))
        start = self._now() + times * _doublings(most) * net.local_latency
        if most > 1 and name in TO_ALL | FROM_ONE | SUMS:
            start += sum(sizes.values()) / net.memory
        if len(own) == 1:
            return self._moment(start)
        longest = max(*out.values(), *into.values())
        end = start + longest / net.bandwidth
        for k in own:
            self.sent[k] += out[k]
            self.received[k] += into[k]
        if longest > _PACKET:
            ways = [way[k] for way in (self._out, self._in) for k in own]
            end = taken(ways, self._now(), start, longest / net.bandwidth)
        return self._moment(end + times * _doublings(len(own)) * net.latency)


def moved(name: str, own: Mapping[int, int], most: int) -> tuple[dict[int, int], dict[int, int]]:
    """The bytes that go out of each node and into it in a collective operation.

    own: what the ranks of each node bring; most: what one rank brings at most.
    """
    n, total = len(own), sum(own.values())
    if name in TO_ALL:
        both = {k: total - size for k, size in own.items()}
        return both, both
    if name in SUMS:
        both = dict.fromkeys(own, 2 * (n - 1) * most // n)
        return both, both
    if name in FROM_ONE:
        home = max(own, key=own.__getitem__)
        chain = [home, *(k for k in own if k != home)]
        return {k: most * (k != chain[-1]) for k in own}, {k: most * (k != home) for k in own}
    return dict.fromkeys(own, 0), dict.fromkeys(own, 0)


def _doublings(n: int) -> int:
    return (n - 1).bit_length()

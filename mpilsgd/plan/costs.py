"""Bytes and seconds of one exchange, by what its verbs do on a machine.

Let S be the bytes of what is exchanged, W those of a sum (float32 for half types), S', W' as they travel between
nodes, l the ranks of a node, n the nodes, B a link's bandwidth, L its latency. Between nodes

    a sum goes as slices, each summed by one node:     2 (n-1)/n W' in and out of every node
    a leader goes along a chain of the nodes:          S' in and out of every node, S'/B + (n-2) piece/B + (n-1) L
    a turn fetches all shards and puts them back:      (n-1)/n S' in, and as much out, for every rank that takes one

and within a node vectors are read and written in memory, so many times as the verbs say.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Mapping

import torch

from mpilsgd.comm.channel import chunk_bytes, piece_bytes
from mpilsgd.comm.coded import _VISITS
from mpilsgd.comm.topology import ACROSS
from mpilsgd.exchange.vectors import accumulation_dtype
from mpilsgd.plan.machine import Machine
from mpilsgd.plan.trial import Event, Kept, Seen, Verb
from mpilsgd.transport.wire import wire_of
from mpilsgd.tree import Tree, lay_tree

_WORDS = 5  # one-sided operations of a turn at a shard beside its vectors: ticket, look, tick, pass on, wake
_LAID = 512  # ranks of the largest tree that is laid out


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of a model: values by type, those of float buffers among them; across: as `Topology`'s across_dtype."""

    values: Mapping[torch.dtype, int]
    across: torch.dtype | str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "across", None if self.across is None else ACROSS[self.across])

    def stored(self) -> float:
        return sum(n * d.itemsize for d, n in self.values.items())

    def wide(self) -> float:
        return sum(n * accumulation_dtype(d).itemsize for d, n in self.values.items())

    def sent(self) -> float:
        """Bytes of the vector between nodes."""
        return sum(wire_of(d, self.across).nbytes(n) for d, n in self.values.items())

    def summed(self) -> float:
        """Of a sum of vectors between nodes."""
        return sum(wire_of(accumulation_dtype(d), self.across).nbytes(n) for d, n in self.values.items())

    def of(self, kept: Kept) -> tuple[float, float]:
        """Bytes of a named vector, as it is kept, and as it travels."""
        return (self.wide(), self.summed()) if kept.wide else (self.stored(), self.sent())


@dataclasses.dataclass(frozen=True)
class Cost:
    """Of one kind of exchange.

    every: a worker's steps between two. seconds: that it takes where nobody is late. group, across: bytes that all
    ranks together read from others or receive, of their own node and of others. link: bytes through the busiest node's
    link, each way. busy: seconds that it keeps what only one can use at a time (a shard, a link), of all workers' ones.
    """

    every: float
    seconds: float
    group: float
    across: float
    link: float
    busy: float = 0.0


def costs(seen: Seen, sizes: Sizes, machine: Machine) -> list[Cost]:
    """What a method's exchanges cost on a machine, a kind each."""
    if seen.kind == "edges":
        return [_edges(seen, sizes, machine)]
    make = {"together": _together, "turns": _turn, "published": _published}[seen.kind]
    return [make(seen, event, sizes, machine) for event in seen.events]


# Rounds of all


def _together(seen: Seen, event: Event, sizes: Sizes, machine: Machine) -> Cost:
    several = machine.nodes > 1
    memory = group = across = link = wire = 0.0
    for verb in event.verbs:
        passes, sums, near, far = _verb(verb, sizes, machine.most, several)
        memory += passes * event.part
        inside = (sum(machine.ranks) - machine.nodes) * sizes.stored() * event.part
        if sums and several:
            volume = 2 * (machine.nodes - 1) / machine.nodes * sums * event.part
            link += volume
            across += volume * machine.nodes
            nbytes = math.ceil(sums * event.part)
            parts = math.ceil(nbytes / chunk_bytes(nbytes, machine.nodes))
            wire += volume / machine.bandwidth + 2 * parts * machine.latency
        group += inside * (bool(sums) or near)
        if far and several:
            sent = sizes.sent()
            link += sent
            across += (machine.nodes - 1) * sent
            # the others of the leader's node read it where it lies
            group += inside / machine.nodes
            wire += _chain(sent, machine)
        elif far and (verb.name == "keep" or not near):  # a pull takes one leader of both once
            group += inside
    meetings = max(seen.meetings, 1.0)
    seconds = memory / machine.memory + wire + meetings * (machine.meeting + machine.rounds * machine.latency)
    return Cost(event.every, seconds, group, across, link)


def _verb(verb: Verb, sizes: Sizes, ranks: int, several: bool) -> tuple[float, float, bool, bool]:
    """Bytes that go through a node's memory, bytes of sums between nodes, whether leaders of group and world go."""
    s, w = sizes.stored(), sizes.wide()
    if verb.name == "mean":
        return 2 * ranks * s + (2 * w if several else 0), sizes.summed(), False, False
    if verb.name == "elastic":
        return (2 * ranks + 2) * s + (2 * w if several else 0), sizes.summed(), False, False
    if verb.name == "push":
        more = 2 * s if verb.momentum else 0
        return (ranks + 3) * s + 2 * w + ranks * 4 * s + more, sizes.summed(), False, False
    if verb.name in ("pull", "keep"):
        leaders = verb.near + (verb.far and several)
        return (2 * ranks - 1 + leaders + (verb.far and several)) * s, 0.0, verb.near, verb.far
    if verb.name == "copy":
        return 2 * ranks * s, 0.0, False, False
    if verb.name in ("each", "follow"):
        return (verb.vectors + 1) * w, 0.0, False, False
    return 0.0, 0.0, False, False


def _chain(nbytes: float, machine: Machine) -> float:
    steps = machine.nodes - 1
    delay = min(piece_bytes(int(nbytes), machine.nodes), nbytes) / machine.bandwidth
    return nbytes / machine.bandwidth + (steps - 1) * delay + steps * machine.latency


# One worker at a time


def _turn(seen: Seen, event: Event, sizes: Sizes, machine: Machine) -> Cost:
    n = machine.nodes
    shards = [sizes.of(kept) for kept in seen.kept if kept.shard]
    private = sum(sizes.of(kept)[0] for kept in seen.kept if not kept.shard)
    memory = 2 * (sizes.stored() + private + sum(stored for stored, _ in shards))
    seconds = memory / (machine.memory / machine.most)
    fetched = sum(sent for _, sent in shards) * (n - 1) / n
    if isinstance(sizes.across, str):
        # codes that have become the base are fetched once more, by all but who made them so and who comes next
        fetched *= 1 + max(machine.size - 2, 0) / (_VISITS * machine.size)
    operations = (n - 1) * (_WORDS + 2 * len(shards))
    wire = 2 * fetched / machine.bandwidth + operations * machine.operation()
    # in a period a link carries its own ranks' turns at the others, and the others' at its shard
    link = 2 * fetched * machine.most
    # one works at a shard at a time, and a link has one direction for its own puts and for what others fetch
    shard = (seconds + wire) / n * machine.size
    busy = max(shard, link / machine.bandwidth)
    own = sizes.stored() / n * machine.size
    return Cost(event.every, seconds + wire, own, fetched * machine.size, link, busy)


# Nobody waits


def _published(seen: Seen, event: Event, sizes: Sizes, machine: Machine) -> Cost:
    s, sent, n = sizes.stored(), sizes.sent(), machine.nodes
    near, far = (any(getattr(verb, of) for verb in event.verbs) for of in ("near", "far"))
    copies = near + (far and n > 1) or 1
    memory = (2 + 5 * copies) * s
    others = machine.size - machine.nodes  # of each group all but its leader
    group = others * s * (near or (far and n == 1))
    # who leads all is copied by those of other nodes over its link, and once more by its own group
    away = machine.size * (n - 1) / n * far
    group += others / n * s * far * (n > 1)
    across, link = away * sent, away * sent
    wire = far * (n - 1) / n * (sent / machine.bandwidth + 8 * machine.operation()) * (n > 1)
    seconds = memory / (machine.memory / machine.most) + wire
    return Cost(event.every, seconds, group, across, link, link / machine.bandwidth)


# A tree


def _edges(seen: Seen, sizes: Sizes, machine: Machine) -> Cost:
    """A step of the tree, all messages that go through in it on the mean."""
    assert seen.tree is not None
    machine, times = _smaller(machine)
    tree = _tree(machine.ranks, seen.tree["degree"], seen.tree["inner"])
    home = [k for k, ranks in enumerate(machine.ranks) for _ in range(ranks)]
    group = across = 0.0
    link = [0.0] * machine.nodes
    passes = [0.0] * len(tree.parent)
    for child, parent in enumerate(tree.parent):
        if parent < 0:
            continue
        up, down = seen.tree["periods"].of(tree.is_leaf(child))
        ends = home[tree.host[child]], home[tree.host[parent]]
        rate = 1 / up + 1 / down
        for node in (child, parent):
            passes[node] += 5 * rate  # written as a message; read, and pulled to
        if tree.host[child] == tree.host[parent]:
            continue
        if ends[0] == ends[1]:
            group += rate * sizes.stored()
        else:
            across += rate * sizes.sent()
            for k in ends:
                link[k] += rate / 2 * sizes.sent()
    leaf = max((p for i, p in enumerate(passes) if tree.is_leaf(i)), default=0.0)
    hosted = _hosted(tree, passes) if seen.tree["inner"] == "hosted" else 0.0
    seconds = (leaf + hosted) * sizes.stored() / (machine.memory / machine.most)
    return Cost(1.0, seconds, times * group, times * across, max(link), max(link) / machine.bandwidth)


def _smaller(machine: Machine) -> tuple[Machine, float]:
    """So few ranks that a tree is laid quickly, and how many times as many there are: no edge knows how many."""
    ranks: list[int] = []
    total = 0
    for count in machine.ranks:
        if total + count > _LAID and ranks:
            break
        ranks.append(min(count, _LAID))
        total += ranks[-1]
    return dataclasses.replace(machine, ranks=tuple(ranks)), machine.size / total


@functools.cache
def _tree(ranks: tuple[int, ...], degree: int, inner: str) -> Tree:
    ends = list(itertools.accumulate(ranks))
    return lay_tree([list(range(b - m, b)) for b, m in zip(ends, ranks, strict=True)], degree, inner)


def workers(seen: Seen, machine: Machine) -> int:
    """How many ranks take gradients."""
    if seen.tree is None or seen.tree["inner"] == "hosted":
        return machine.size
    machine, times = _smaller(machine)
    tree = _tree(machine.ranks, seen.tree["degree"], seen.tree["inner"])
    return round(times * sum(tree.is_leaf(i) for i in range(machine.size)))


def _hosted(tree: Tree, passes: list[float]) -> float:
    """Of the rank that hosts most, for the inner nodes on it."""
    of: dict[int, float] = {}
    for i, host in enumerate(tree.host):
        if not tree.is_leaf(i):
            of[host] = of.get(host, 0.0) + passes[i]
    return max(of.values(), default=0.0)

"""Leader SGD without waiting: workers publish snapshots, and are pulled to the leader's last one."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch

from mpilsgd import kernels
from mpilsgd.comm import Fabric, Snapshots, Topology, Turns, Window, wait_until
from mpilsgd.methods.course import Course
from mpilsgd.methods.metrics import Metrics

Vectors = dict[torch.dtype, torch.Tensor]

NOBODY = -1, 0  # a leader's rank and version
_TRIES = 3


class WaitFree:
    """The exchange of `LSGD(asynchronous="wait-free")`.

    A worker publishes its score and parameters, reads everybody's scores, copies the last snapshot of who is best and
    is pulled to it. Nobody waits, except by order: in round robin for its turn, in a replay for the version that it
    read in the recorded run.
    """

    def __init__(
        self,
        topology: Topology,
        fabric: Fabric,
        course: Course,
        x: dict[torch.dtype, Window],
        n: dict[torch.dtype, int],
        two: bool,
    ):
        self._topology, self._fabric, self._course, self._x, self._n = topology, fabric, course, x, n
        self._snapshots = Snapshots(fabric, n)
        self._turns = Turns(fabric.world, [0]) if course.round_robin else None
        self._near: Vectors = {d: torch.empty_like(w.mine[: n[d]]) for d, w in x.items()}
        self._far: Vectors = {d: torch.empty_like(v) for d, v in self._near.items()} if two else self._near
        # of a replay: who read each version of this worker's, and in which of its exchanges
        self._readers: dict[int, list[tuple[int, int]]] = defaultdict(list)
        if course.replays:
            for rank in range(topology.world.size):
                for index, event in enumerate(course.script_of(rank)):
                    for k in (0, 1):  # two copies an exchange
                        leader, version = event[2 * k : 2 * k + 2]
                        if leader == fabric.world.rank and rank != leader:
                            self._readers[version].append((rank, 2 * index + k))
        own = {d: w.mine[: n[d]] for d, w in x.items()}
        self._snapshots.publish(own, math.inf, lambda _: True)  # nobody's leader, but there to fall back on
        fabric.world.barrier()

    def exchange(self, score: float, fit: bool, rates: tuple[float, float], metrics: Metrics) -> None:
        """Publishes (if fit) and pulls. rates: of the pulls to the group's and the global leader; 0: not due.

        An unfit worker takes over the best snapshot instead.
        """
        start = time.perf_counter()
        ticket = None
        if self._turns is not None:
            ticket, waited = self._turns.take(0, None, True)
            metrics.t_wait += waited
        try:
            self._exchange(score, fit, rates, metrics)
        finally:
            if self._turns is not None and ticket is not None:
                self._turns.pass_on(0, ticket, True)
        metrics.rounds += 1
        metrics.t_comm += time.perf_counter() - start
        metrics.bytes_group, metrics.bytes_across = self._fabric.traffic.group, self._fabric.traffic.across

    def _exchange(self, score: float, fit: bool, rates: tuple[float, float], metrics: Metrics) -> None:
        world, groups = self._fabric.world, self._topology.groups
        me, mine = world.rank, groups[self._topology.group_index]
        if fit:
            vectors = {d: w.mine[: self._n[d]] for d, w in self._x.items()}
            self._snapshots.publish(vectors, score, self._may_overwrite)
        script = self._course.repeat()
        known = [-1, 0, -1, 0] if script is None else script
        near = self._best(mine, known[:2], self._near) if rates[0] or not fit else NOBODY
        self._snapshots.finish()
        far, far_vectors = NOBODY, self._far
        if rates[1] and self._topology.n_groups == 1 and rates[0]:
            far, far_vectors = near, self._near  # one and the same
        elif rates[1] or (not fit and near == NOBODY):
            far = self._best(range(world.size), known[2:], self._far)
        self._snapshots.finish()
        self._course.note([*near, *far])
        self._note_leaders(near[0], far[0], metrics)
        if not fit:
            self._start_anew(near[0], far[0])
            return
        terms = []
        for leader, vectors, rate in ((near[0], self._near, rates[0]), (far[0], far_vectors, rates[1])):
            if leader >= 0 and leader != me and rate:
                terms.append((vectors, rate))
        square = 0.0
        for d, w in self._x.items() if terms else ():
            pulls = [(vectors[d], rate) for vectors, rate in terms]
            (first, r), (second, s) = pulls[0], pulls[1] if len(pulls) > 1 else (None, 0.0)
            moved = kernels.pull(w.mine[: self._n[d]], first, r, second, s, stats=True)
            square += 0.0 if moved is None else moved.squared_distance
        if terms:
            metrics.distance = math.sqrt(square) / sum(rate for _, rate in terms)

    def _best(self, ranks: Iterable[int], known: list[int], into: Vectors) -> tuple[int, int]:
        """The rank with the least score among the published ones and its version, whose copy is `into` then."""
        me, snapshots = self._fabric.world.rank, self._snapshots
        if self._course.replays:
            leader, version = known
            if leader >= 0 and leader != me:
                wait_until(lambda: snapshots.newest(leader)[0] >= version)
                snapshots.copy(leader, version, into)
                self._count(leader)
            return leader, version
        for _ in range(_TRIES):
            found = [(score, r, v) for r in ranks for v, score in [snapshots.newest(r)] if v]
            found = [row for row in found if math.isfinite(row[0])]
            if not found:
                return NOBODY
            _, best, newest = min(found)
            if best == me:
                return best, newest
            self._count(best)
            if snapshots.copy(best, newest, into):
                return best, newest
        return NOBODY  # it publishes faster than it can be read

    def _may_overwrite(self, version: int) -> bool:
        """In a replay: whether all have read the version who did so in the recorded run."""
        return all(self._snapshots.done(rank) > index for rank, index in self._readers[version])

    def _start_anew(self, near: int, far: int) -> None:
        """From the leader's snapshot, or where there is none from this worker's own last one."""
        me = self._fabric.world.rank
        leader, vectors = (near, self._near) if near >= 0 else (far, self._far)
        if leader in (-1, me):
            self._snapshots.copy(me, self._snapshots.newest(me)[0], vectors)
        for d, w in self._x.items():
            w.mine[: self._n[d]].copy_(vectors[d])

    def _note_leaders(self, near: int, far: int, metrics: Metrics) -> None:
        me, j = self._fabric.world.rank, self._topology.group_index
        if near >= 0:
            metrics.leaders[j] = near
        if far >= 0:
            metrics.leader = far
            metrics.leaders[next(k for k, ranks in enumerate(self._topology.groups) if far in ranks)] = far
        elif self._topology.n_groups == 1 and near >= 0:
            metrics.leader = near
        metrics.leads += me == (near if near >= 0 else far)

    def _count(self, leader: int) -> None:
        far = leader not in self._fabric.world.local_ranks
        sizes = ((v.numel(), self._fabric.wire(d) if far else d) for d, v in self._near.items())
        nbytes = sum(n * dtype.itemsize for n, dtype in sizes)
        if leader in self._topology.groups[self._topology.group_index]:
            self._fabric.traffic.group += nbytes
        else:
            self._fabric.traffic.across += nbytes

    def state(self) -> Any:
        last = self._snapshots.last()
        return None if last is None else {"score": last[0], "x": {str(d): v for d, v in last[1].items()}}

    def load(self, state: Any) -> None:
        """Collective."""
        self._fabric.world.barrier()
        vectors = {} if state is None else {d: state["x"][str(d)] for d in self._x}
        self._snapshots.restart(None if state is None else (state["score"], vectors))
        self._fabric.world.barrier()

    def rest(self) -> None:
        if self._turns is not None:
            self._turns.rest()

    def wake(self) -> None:
        if self._turns is not None:
            self._turns.wake(True)
            self._fabric.world.barrier()

    def free(self) -> None:
        self._snapshots.free()
        if self._turns is not None:
            self._turns.free()
        self._x, self._near, self._far = {}, {}, {}

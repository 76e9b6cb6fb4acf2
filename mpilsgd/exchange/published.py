"""The exchange in which nobody waits: workers publish snapshots, and are pulled to the leader's last one."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch

from mpilsgd import kernels
from mpilsgd.comm import Snapshots, Turns, reads, seconds, wait_until
from mpilsgd.exchange.base import Exchange, pulls
from mpilsgd.exchange.clocks import Due
from mpilsgd.exchange.vectors import Vector, load, save

if TYPE_CHECKING:
    from mpilsgd.exchange.method import Method

Vectors = dict[torch.dtype, torch.Tensor]

NOBODY = -1, 0  # a leader's rank and version
_TRIES = 3


class Published(Exchange):
    """A worker publishes its score and parameters, reads everybody's scores, copies the last snapshot of who is best
    and is pulled to it. Nobody waits, except by order: in round robin for its turn, in a replay for the version that it
    read in the recorded run.
    """

    verbs = frozenset({"pull"})
    always_ordered = True

    def __init__(self, method: Method):
        super().__init__(method)
        self._snapshots: Snapshots | None = None
        self._turns: Turns | None = None
        # of a replay: who read each version of this worker's, and in which of its exchanges
        self._readers: dict[int, list[tuple[int, int]]] = defaultdict(list)

    def sizes(self, nbytes: int, wide: int) -> int:
        return 2 * nbytes

    hosted = sizes

    def allocate(self, vectors: list[Vector]) -> None:
        super().allocate(vectors)
        m = self.m
        self._snapshots = Snapshots(m.fabric, m.n)
        self._turns = Turns(m.fabric.world, [0]) if m.course.round_robin else None
        self._near: Vectors = {d: torch.empty_like(w.mine[: m.n[d]]) for d, w in m.x.items()}
        self._far = (
            self._near
            if getattr(m, "global_pull", None) == 0
            else {d: torch.empty_like(v) for d, v in self._near.items()}
        )

    def open(self) -> None:
        m = self.m
        assert self._snapshots is not None
        if m.course.replays:
            for rank in range(m.p):
                for index, event in enumerate(m.course.script_of(rank)):
                    for k in (0, 1):  # two copies an exchange
                        leader, version = event[2 * k : 2 * k + 2]
                        if leader == m.fabric.world.rank and rank != leader:
                            self._readers[version].append((rank, 2 * index + k))
        world = m.fabric.world
        for d, base in self._snapshots.bases.items():
            base.copy_(world.bring(m.x[d], 0, m.scratch.get(d), exact=True)[: m.n[d]])
            world.barrier()  # dtypes may take turns in what it landed in
        with m.iterates():  # nobody's leader, but there to fall back on
            self._snapshots.publish(self._own(), math.inf, lambda _: True)
        m.fabric.world.barrier()

    def _own(self) -> Vectors:
        return {d: w.mine[: self.m.n[d]] for d, w in self.m.x.items()}

    def run(self) -> None:
        m, metrics = self.m, self.m.metrics
        start, ticket = seconds(), None
        with m.iterates():
            self.fit, self.score = m.is_finite(), m.measure()
            if not self.fit:
                m.begin_anew()
            if self._turns is not None:
                ticket, waited = self._turns.take(0, None, True)
                metrics.t_wait += waited
            try:
                m.exchange(self)
            finally:
                if self._turns is not None and ticket is not None:
                    self._turns.pass_on(0, ticket, True)
        metrics.rounds += 1
        metrics.t_comm += seconds() - start
        m.count_traffic()

    def pull(self, rate: float, global_rate: float, sequential: bool = False) -> None:
        """x <- x - rate (x - leader of the group) - global_rate (x - leader of all), each where it is due.

        An unfit worker takes over the best snapshot instead.
        """
        m, due = self.m, self.m.clock.due(self.m.t)
        rate, global_rate = rate * due.group, global_rate * due.world
        if sequential:
            rate *= 1.0 - global_rate
        near, far = self._leaders(Due(bool(rate), bool(global_rate)))
        told = [None if leader < 0 else leader for leader, _ in (near, far)]
        m.note_leaders(told[0], told[1], None)
        if not self.fit:
            self._start_anew(near[0], far[0])
            return
        far_vectors = self._near if far == near else self._far
        candidates = ((near[0], self._near, rate), (far[0], far_vectors, global_rate))
        terms = [(v, r) for leader, v, r in candidates if leader >= 0 and leader != m.fabric.world.rank and r]
        square = 0.0
        for d, w in m.x.items() if terms else ():
            for a, b, leading in pulls(m, d, [(v[d], r) for v, r in terms]):
                moved = kernels.pull(w.mine[a:b], *leading, stats=True, seed=m.t)
                square += 0.0 if moved is None else moved.squared_distance
        if terms:
            m.metrics.distance = math.sqrt(square) / sum(r for _, r in terms)

    def _leaders(self, due: Due) -> tuple[tuple[int, int], tuple[int, int]]:
        """Publishes (if fit); the leaders of the group and of all, whose snapshots are copied."""
        m, snapshots = self.m, self._snapshots
        assert snapshots is not None
        if self.fit:
            snapshots.publish(self._own(), self.score, self._may_overwrite)
        script = m.course.repeat()
        known = [-1, 0, -1, 0] if script is None else script
        mates = m.topology.groups[m.topology.group_index]
        near = self._best(mates, known[:2], self._near) if due.group or not self.fit else NOBODY
        snapshots.finish()
        far = NOBODY
        if due.world and due.group and m.topology.n_groups == 1:
            far = near  # one and the same
        elif due.world or (not self.fit and near == NOBODY):
            far = self._best(range(m.p), known[2:], self._far)
        snapshots.finish()
        m.course.note([*near, *far])
        return near, far

    def _best(self, ranks: Iterable[int], known: list[int], into: Vectors) -> tuple[int, int]:
        """The rank with the least score among the published ones and its version, whose copy is `into` then."""
        me, snapshots = self.m.fabric.world.rank, self._snapshots
        assert snapshots is not None
        if self.m.course.replays:
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
        assert self._snapshots is not None
        done = self._snapshots.done
        return all(done(rank) > index for rank, index in self._readers[version])

    def _start_anew(self, near: int, far: int) -> None:
        """From the leader's snapshot, or where there is none from this worker's own last one."""
        me, snapshots = self.m.fabric.world.rank, self._snapshots
        leader, vectors = (near, self._near) if near >= 0 else (far, self._far)
        if leader in (-1, me):
            assert snapshots is not None
            snapshots.copy(me, snapshots.newest(me)[0], vectors)
        for d, x in self._own().items():
            x.copy_(vectors[d])

    def _count(self, leader: int) -> None:
        fabric, topology = self.m.fabric, self.m.topology
        far = leader not in fabric.world.local_ranks
        sizes = {d: v.numel() for d, v in self._near.items()}
        nbytes = sum(fabric.wire(d).nbytes(n) if far else n * d.itemsize for d, n in sizes.items())
        if not far:
            reads(nbytes)
        if leader in topology.groups[topology.group_index]:
            fabric.traffic.group += nbytes
        else:
            fabric.traffic.across += nbytes

    # The life of the exchange

    def stepped(self) -> None:
        self.m.course.count(self.m.t)
        super().stepped()

    def rests(self) -> None:
        if self._turns is not None:
            self._turns.rest()

    def wakes(self) -> None:
        if self._turns is not None:
            self._turns.wake(True)
            self.m.fabric.world.barrier()

    def state(self) -> dict[str, Any]:
        assert self._snapshots is not None
        last, kept = self._snapshots.last(), (self._snapshots.bases, self._snapshots.residuals)
        told = None if last is None else {"score": last[0], "x": save(last[1]), "narrow": save(last[2])}
        return {"snapshot": told, "kept": [save(of) for of in kept]}

    def misfit(self, state: dict[str, Any]) -> str | None:
        assert self._snapshots is not None
        snapshot = state["snapshot"] or {"narrow": {}}
        last = self._snapshots.last()
        here = {} if last is None else {str(d): v.numel() for d, v in last[2].items()}
        saved = {name: v.numel() for name, v in snapshot["narrow"].items()}
        return (
            None
            if here == saved
            else "the state is of another across_dtype, or of ranks laid otherwise on nodes"
        )

    def load(self, state: dict[str, Any]) -> None:
        assert self._snapshots is not None
        for kept, saved in zip(
            (self._snapshots.bases, self._snapshots.residuals), state["kept"], strict=True
        ):
            load(kept, saved)
        snapshot = state["snapshot"]
        if snapshot is None:
            self._snapshots.restart(None)
            return
        own, narrow = (
            {d: of[str(d)] for d in self._near if str(d) in of} for of in (snapshot["x"], snapshot["narrow"])
        )
        self._snapshots.restart((snapshot["score"], own, narrow))

    def free(self) -> None:
        for part in (self._snapshots, self._turns):
            if part is not None:
                part.free()
        self._snapshots = self._turns = None
        self._near, self._far = {}, {}

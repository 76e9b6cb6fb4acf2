"""Rounds in which workers are pulled toward the best of them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import partial
from typing import Any

import numpy as np
import torch

from mpilsgd import bound, kernels
from mpilsgd.exchange.base import pulls
from mpilsgd.exchange.rows import Rows
from mpilsgd.exchange.vectors import Vector
from mpilsgd.exchange.verbs import Verbs
from mpilsgd.transport import Level, exhaust


class Leaders(Verbs):
    """The verbs of `Together` that elect leaders, and go toward them."""

    rows: Rows | None
    level: Level
    joined: int
    _mates: Rows | None
    _everyone: Rows | None

    def pull(self, rate: float, global_rate: float, sequential: bool = False) -> None:
        """x_i <- x_i - rate (x_i - leader of the group) - global_rate (x_i - leader of all), each where it is due.

        A leader is the worker with the least score. A worker that is not finite takes the place of the best.
        """
        m, (near, far) = self.m, self.leaders()
        if sequential and near is not None and far is not None:
            rate *= 1.0 - global_rate
        found = [0.0] * (self.level.size + 2)
        due = ((m.fabric.group, near, rate), (m.fabric.world, far, global_rate))
        terms = [(level, leader, r) for level, leader, r in due if leader is not None and r]
        if len(terms) == 2 and m.topology.n_groups == 1:  # one leader of both: it comes once
            terms = [(*terms[1][:2], rate + global_rate)]
        self._pull(terms, found)
        *bad, square, share = np.add.reduce(self.level.table(found)).tolist()
        moved = sum(r for *_, r in terms)
        if share and moved:
            m.metrics.distance = math.sqrt(square / share) / moved
        self.repair({r for r, flag in enumerate(bad) if flag})

    def leaders(self) -> tuple[int | None, int | None]:
        """The ranks, in the group and in the world, of those who lead; None where nobody does, or none is due."""
        m = self.m
        near = None if self._mates is None else self._mates.best()
        group = m.fabric.group.world_ranks
        far = None if self._everyone is None else self._everyone.best()
        m.note_leaders(
            None if near is None else group[near],
            far,
            None if self._everyone is None else self._everyone.score,
        )
        return near, far

    def _pull(self, terms: list[tuple[Level, int, float]], found: list[float]) -> None:
        """Pulls the workers of this island's part of the group, each rank its slice of all their vectors.

        So a leader is read from memory once for all of them, and nobody idles. A local leader that moves to the
        global one does so last, piece by piece behind the others.
        """
        m, group = self.m, self.m.fabric.group
        those = tuple((level is group, leader, rate) for level, leader, rate in terms)
        leaders, movers = self.once(("movers", those), partial(self._movers, terms))
        for d, window in m.x.items():
            pulled: list[tuple[torch.Tensor, float]] = []
            parts: Iterable[tuple[int, int]] = ()
            for level, leader, rate in terms:
                exhaust(parts)
                vector, parts = level.coming(window, leader, self._landing(level, d), name=f"leader {d}")
                pulled.append((vector, rate))
            if not movers or not terms:
                exhaust(parts)
                found[self.level.rank] += not kernels.check(window.mine[: m.n[d]])
                continue
            for start, stop in parts:  # while the next one comes
                key = "pull", d, start, stop, those
                for pull in self.once(key, partial(self._bind, d, movers, pulled, start, stop)):
                    moved = pull(stats=True, seed=self.joined)
                    assert moved is not None
                    bad = {group.world_ranks[movers[i]] for i in moved.bad_peers}
                    if len(leaders) == 1 and not moved.source_finite:  # one of two is seen where it moves
                        bad |= leaders
                    for world_rank in bad:
                        found[self.level.world_ranks.index(world_rank)] += 1
                    found[-2] += moved.squared_distance
        found[-1] = len(movers) / len(group.local_ranks)

    def _movers(self, terms: list[tuple[Level, int, float]]) -> tuple[set[int], list[int]]:
        """The leaders' ranks in the world, and in the group those of the workers here that go to them."""
        group = self.m.fabric.group
        leaders = {level.world_ranks[leader] for level, leader, _ in terms}
        # an only leader stays; one of two moves to the other, behind its followers
        movers = [r for r in group.local_ranks if {group.world_ranks[r]} != leaders]
        return leaders, sorted(movers, key=lambda r: group.world_ranks[r] in leaders)

    def _bind(
        self,
        d: torch.dtype,
        movers: list[int],
        pulled: list[tuple[torch.Tensor, float]],
        start: int,
        stop: int,
    ) -> list[bound.Bound]:
        m, group = self.m, self.m.fabric.group
        peers = [m.x[d].views[group.seats[k]] for k in movers]
        return [
            bound.pull([x[a:b] for x in peers], *leading)
            for a, b, leading in pulls(m, d, pulled, start, stop, group.share)
        ]

    def _landing(self, level: Level, d: torch.dtype) -> Any:
        return self.m.landing[d] if level is self.m.fabric.group else self.m.scratch.get(d)

    def keep(self, near: Vector, far: Vector) -> list[bool]:
        """near, far <- the leaders' parameters as they are now, each where it is due; whether they are there."""
        m, kept = self.m, []
        for vector, level, leader in zip(
            (near, far), (m.fabric.group, m.fabric.world), self.leaders(), strict=True
        ):
            kept.append(leader is not None)
            for d, x in m.x.items() if leader is not None else ():
                landing = m.windows[vector.name][d]
                level.bring(x, leader, landing, name=f"leader {d}")
                if level.rank == leader:
                    landing.views[0].copy_(x.mine)
            if leader is not None:
                level.table([0.0])
        fit = self.level.table([m.is_finite()])[:, 0]
        self.repair({r for r, f in enumerate(fit) if not f})
        return kept

    def repair(self, bad: set[int]) -> None:
        """Non-finite workers take the place of the best finite one. Collective over the level."""
        m, level = self.m, self.level
        if not bad:
            return
        if len(bad) == level.size:
            if level is m.fabric.world or m.topology.n_groups == 1:
                m.refuse_if_all(set(range(m.fabric.world.size)))
            return  # a whole group: the next global round sets it back
        assert self.rows is not None
        score = self.rows.score
        source = min((r for r in range(level.size) if r not in bad), key=lambda r: (score[r], r))
        if level.rank in bad:
            m.begin_anew()
        for d, window in m.x.items():
            vector = level.bring(window, source, self._landing(level, d))
            if level.rank in bad:
                window.mine.copy_(vector)
        level.table([0.0])

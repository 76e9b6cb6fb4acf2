"""Rounds behind the steps that a worker takes some steps later."""

from __future__ import annotations

from typing import Any

import torch

from mpilsgd.exchange.behind import BehindAll
from mpilsgd.exchange.rows import Rows
from mpilsgd.exchange.vectors import Vector


class BehindSteps(BehindAll):
    """The rule's whole round is held of the copies of x_t; x takes what it copies `overlap` steps later."""

    verbs = frozenset({"mean", "each", "copy", "only"})
    needs = frozenset({"copy"})
    _began: int | None = None  # the step of the round that x has not taken yet
    _keep = 0.0

    def _begin(self) -> bool:
        self._began, fit = self.m.t, self.m.is_fit()
        self.copy_x()  # nobody waits for that
        return fit

    def _round(self, rows: Rows) -> None:
        self._part = 0, 1
        self.m.exchange(self)
        self.updates += 1

    def mean(
        self, vectors: Any = None, counted: Any = None, keep: bool = False, about: Vector | None = None
    ) -> None:
        """The mean of the copies. x is kept, as it is."""
        super().mean(vectors, counted, about=about)

    def copy(self, c: Vector, keep: float = 0.0) -> None:
        """x_i <- keep x_i + (1 - keep) c, `overlap` steps later."""
        self.c, self._keep = c, keep
        for d, copy in self.x.items() if self.level.local_ranks[0] == self.level.rank else ():
            start, stop = self.part(d)[1]
            c[d][start:stop].copy_(copy.mine[start:stop])
        self.fence()

    def _mix(self, windows: dict[torch.dtype, Any]) -> None:
        for d, window in windows.items():
            (a, b), (edge, n) = self.part(d)
            x, c = window.mine[a:b], self.c[d][a:b]
            x.copy_(torch.lerp(c, x.to(c.dtype), self._keep) if self._keep else c)
            window.mine[edge:n].copy_(self.c[d][edge:n])

    def land(self) -> None:
        if self._began is not None:
            self.settle()
            self._mix(self.m.x)
            self._began = None
            self.m.flat.touched()

    def _lands_at(self, t: int) -> bool:
        return self._began is not None and t >= self._began + self.m.overlap

    def comes(self) -> bool:
        return self._lands_at(self.m.t + 1) or super().comes()

    def _take_centre(self) -> None:
        self._began = None
        super()._take_centre()

    def stepped(self) -> None:
        if self._lands_at(self.m.t):
            with torch.no_grad(), self.m.iterates():
                self.land()
        super().stepped()

    def meet(self, purpose: float) -> Rows | None:
        """A worker that rests takes part in a round as the others do, who have landed before it, and lands at once."""
        m = self.m
        fit = m.is_fit()
        self.copy_x()
        if self._began is not None:
            self._mix(self.x)
        rows = self._gate(m.fabric.world, m.row(purpose, self.stamp(), fit))
        if rows.round is None:
            return rows
        self.land()
        self._enter(rows)
        self._began = m.t
        self._round(rows)
        if fit:
            self.land()
        else:
            self._take_centre()
        m.metrics.rounds += 1
        return None

    def state(self) -> dict[str, Any]:
        began = self._began
        under_way = None if began is None else (began, self.c.name, self._keep, self._part)
        return {**super().state(), "under_way": under_way}

    def misfit(self, state: dict[str, Any]) -> str | None:
        return super().misfit(state) if "under_way" in state else "the state is of another version of mpilsgd"

    def load(self, state: dict[str, Any]) -> None:
        super().load(state)
        self._began = None
        if state["under_way"] is not None:
            self._began, name, self._keep, self._part = state["under_way"]
            self.c = self.m.vectors[name]

"""The part of a method that its exchange works with."""

from __future__ import annotations

import contextlib
from collections import deque
from typing import TYPE_CHECKING, Any

from mpilsgd import kernels
from mpilsgd.exchange.base import average
from mpilsgd.exchange.rows import ROUND, Row
from mpilsgd.exchange.vectors import Span, Vector
from mpilsgd.exchange.wrapped import Wrapper
from mpilsgd.optimizers.wrapped import forget


class Diverged(RuntimeError):
    """Every worker's state is non-finite; raised on every rank."""


class Worker(Wrapper):
    """A worker's vectors and what is done to them, for the exchanges; see `setup` for how its attributes come to be.

    x, g: windows of parameters and gradients, by dtype; n: how much of x is exchanged; edge: how much of it are
    parameters; fresh: the rest as it was at the start. scratch, landing: one vector an island, for what arrives.
    """

    replaced = ""  # by a method that wraps the same parameters: told where it is used all the same
    left: int | None = None  # this worker's step, if it has waited in center() for the others' end

    if TYPE_CHECKING:
        # what `setup` makes, and a rule's values
        def __getattr__(self, name: str) -> Any: ...
        def __setattr__(self, name: str, value: Any) -> None: ...

    def vector(self, name: str, per: str = "worker", start: Any = 0, wide: bool = False) -> Vector:
        """A vector as long as x that this method keeps; see `Vector`."""
        self.vectors[name] = Vector(name, per, start, wide)
        return self.vectors[name]

    def window(self, name: str, length: int) -> None:
        """The last so many numbers, as an attribute; a worker that starts anew forgets them."""
        self.value(name, deque(maxlen=length))

    def iterates(self) -> contextlib.AbstractContextManager[None]:
        """The parameters hold x, which is what is exchanged: between steps MSGD's hold the look-ahead."""
        self.flat.reseat()  # RNN.flatten_parameters, for one, moves parameters
        iterate = None if self.guard == "g" else getattr(self.optimizer, "iterate", None)
        return _nothing if iterate is None else iterate()

    def row(self, purpose: float, stamp: float, fit: bool | None = None) -> Row:
        fit = self.is_fit(purpose) if fit is None else fit
        return Row(self.number, purpose, stamp, fit, self.measure(), self.behind)

    def is_fit(self, purpose: float = ROUND) -> bool:
        """Whether what this worker brings to an exchange is finite: one pass over it, before anyone reads it."""
        if self.guard == "g":
            return purpose != ROUND or all([kernels.check(g.mine) for g in self.g.values()])
        return not self.guard or (self.is_finite() and not self.clock.broken)

    def is_finite(self) -> bool:
        return all([check(stats=True).finite for check in self._checks])

    def refuse_if_closed(self) -> None:
        if not self._open:
            raise RuntimeError(f"this {type(self).__name__} is closed{self.replaced}")

    def refuse_if_all(self, bad: set[int]) -> None:
        if bad.issuperset(self.workers):
            raise Diverged(
                f"every worker's parameters are non-finite at step {self.t}: the run has diverged; "
                "a smaller learning rate may help"
            )

    def set_back(self, bad: set[int]) -> None:
        """Ends the job if all are bad; this worker, if it is, starts anew."""
        self.refuse_if_all(bad)
        if self.topology.world.rank in bad:
            self.begin_anew()

    def begin_anew(self) -> None:
        """Counts it, and clears the optimizer's memory, the gradient and what else was taken at broken parameters."""
        self.metrics.resets += 1
        forget(self.optimizer)
        for p in self.flat.parameters:
            if p.grad is not None:
                p.grad.zero_()
        for d, tail in self.fresh.items():
            self.x[d].mine[self.n[d] :].copy_(tail)
        for name in self.values:
            if isinstance(getattr(self, name), deque):
                getattr(self, name).clear()

    def mean_over(self, spans: list[Span], counted: set[int]) -> None:
        """The mean over the world ranks that count, to all. Collective, after a barrier."""
        average(self, spans, counted)  # type: ignore[arg-type]

    def copy_from(self, source: int, takers: set[int] | None = None, rest: bool = False) -> None:
        """The takers (default: all) get the vectors of world rank `source`, to the bit. Collective.

        rest: only what lies behind the part that is exchanged.
        """
        level = self.fabric.world
        level.table([0.0])
        for dtype, window in self.x.items():
            vector = level.bring(window, source, self.scratch.get(dtype), exact=True)[: window.mine.numel()]
            if level.rank != source and (takers is None or level.rank in takers):
                start = self.n[dtype] if rest else 0
                window.mine[start:].copy_(vector[start:])
        level.table([0.0])

    def keep_x(self) -> None:
        """`before` is what is exchanged of x as it is now, until the step ends."""
        with self.iterates():
            self.before = {d: w.mine[: self.n[d]].clone() for d, w in self.x.items()}

    def note_leaders(self, near: int | None, far: int | None, scores: Any) -> None:
        """Who leads the group, and all: ranks in the world. scores: of all, if this worker knows them."""
        m, groups, me = self.metrics, self.topology.groups, self.topology.world.rank
        group = self.topology.group_index
        m.leaders = m.leaders or [-1] * len(groups)
        if near is not None:
            m.leaders[group] = near
        if far is not None:
            m.leader = far
            m.leaders[next(j for j, ranks in enumerate(groups) if far in ranks)] = far
            for j, ranks in enumerate(groups) if scores is not None else ():
                m.leaders[j] = min(ranks, key=scores.__getitem__)  # the first of equals
        elif near is not None and len(groups) == 1:
            m.leader = near
        m.leads += me == (near if near is not None else far)

    def count_traffic(self) -> None:
        traffic = self.fabric.traffic
        self.metrics.bytes_group, self.metrics.bytes_across = traffic.group, traffic.across


_nothing = contextlib.nullcontext()

"""What all exchanges share."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from mpilsgd import bound, kernels
from mpilsgd.comm import seconds
from mpilsgd.exchange.rows import Rows, checked
from mpilsgd.exchange.vectors import NOTHING, Span, Vector, accumulation_dtype, allot
from mpilsgd.extension import place_of
from mpilsgd.transport import Level, Stream

if TYPE_CHECKING:
    from mpilsgd.exchange.method import Method

T = TypeVar("T")
_MANY = 1000


class Exchange:
    """With whom a worker exchanges, and who waits. A rule's `exchange(r)` is given one of these and uses its verbs.

    This base meets all workers, as every method does for its centre and its end.
    """

    verbs: frozenset[str] = frozenset()  # what a rule's `exchange(r)` may ask of it
    needs: frozenset[str] = frozenset()  # and must
    updates = 0  # of the centre so far
    waited = 0.0  # seconds for others, since this was set back
    private = False  # whether the levels need communicators of their own
    always_ordered = False  # whether workers take turns also in the method's synchronous form

    def __init__(self, method: Method):
        self.m = method
        self.made: dict[Hashable, Any] = {}

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """What `make` gives, made once for each key: views of vectors, which stay where they are, and bound kernels."""
        if key not in self.made:
            if len(self.made) >= _MANY:  # rates that change with every round
                self.made.clear()
            self.made[key] = make()
        return self.made[key]

    # What an exchange may do otherwise

    def sizes(self, nbytes: int, wide: int) -> int:
        """Shared bytes that this rank asks for beyond x and the vectors; of a vector, and of one of wide types."""
        return 0

    def hosted(self, nbytes: int, wide: int) -> float:
        """Those shared bytes, of all, that lie in the host's memory wherever the workers compute."""
        return 0.0

    def allocate(self, vectors: list[Vector]) -> None:
        """Gives the named vectors their memory. Collective."""
        m = self.m
        self.x: dict[torch.dtype, Any] = m.x  # what is exchanged
        for v in vectors:
            allot(m, v)

    def open(self) -> None:
        """All start from here. Collective."""

    def fill(self, vector: Vector) -> None:
        """A vector takes what x is. Between barriers; all of the island hold the same x, unless it is the worker's."""
        level = self.m.fabric.group if vector.per == "group" else self.m.fabric.world
        if vector.per == "worker" or level.local_ranks[0] == level.rank:
            for d, v in vector.items():
                v.copy_(self.m.x[d].mine[: self.m.n[d]])

    def take(self, c: Vector, rate: float = 1.0) -> None:
        """x <- x - rate (x - c), outside of exchanges. Collective."""
        for d, v in self.whole(c):
            x = self.m.x[d].mine[: self.m.n[d]]
            if rate == 1:
                x.copy_(v)
            else:
                kernels.pull(x, v.to(place_of(x), x.dtype), rate)
        self.m.fabric.world.barrier()

    def is_due(self) -> bool:
        """Whether this worker's clock asks for an exchange now."""
        return bool(self.m.clock.due(self.m.t))

    def comes(self) -> bool:
        """Whether the coming step brings an exchange, or may bring one."""
        clock = self.m.clock
        return clock.looks or clock.by_total or bool(clock.due(self.m.t + (not clock.first)))

    def run(self) -> None:
        """The exchange that is due."""

    def stepped(self) -> None:
        """After a step; the exchange that is due then."""
        if not self.m.clock.first and self.is_due():
            without_grad(self.run)

    def exchange(self, purpose: float) -> Rows | None:
        """Meets the others for a round, or for the centre or the end: then the rows, unless a round was held."""
        m, start, self.waited = self.m, seconds(), 0.0
        with m.iterates():
            rows = self.meet(purpose)
        m.metrics.t_comm += seconds() - start
        m.metrics.t_wait += self.waited
        m.count_traffic()
        return rows

    def meet(self, purpose: float) -> Rows | None:
        start = seconds()
        table = self.m.fabric.world.table(self.m.row(purpose, self.stamp()))
        self.waited += seconds() - start
        return checked(table)

    def stamp(self) -> int:
        return self.m.t

    def idle(self) -> None:
        """A step of a rank that computes nothing."""

    def rests(self) -> None:
        """This worker takes no part until all have met, but in the others' rounds."""

    def wakes(self) -> None:
        """All have met. Collective."""

    def catch_up(self, rows: Rows) -> None:
        """All rest."""

    def settle(self) -> None:
        """Waits for this worker's own exchange, if one is under way."""

    def land(self) -> None:
        """The end: x takes what it would have taken later."""

    def whole(self, vector: Vector) -> Iterator[tuple[torch.dtype, torch.Tensor]]:
        """All of a vector per="all", readable here. Collective."""
        yield from vector.items()

    def put(self, vector: Vector | None) -> None:
        """The centre comes into every worker's parameters: a vector, or the mean of the workers. Collective."""
        m = self.m
        if vector is not None and vector.per == "all":
            square = 0.0
            for d, c in self.whole(vector):
                x = m.x[d].mine[: m.n[d]]
                square += float(torch.dist(x, c.to(place_of(x), x.dtype))) ** 2
                x.copy_(c)
            m.metrics.distance = square**0.5
            return
        for d, v in vector.items() if vector is not None else ():
            m.x[d].mine[: m.n[d]].copy_(v)
        running = getattr(m.optimizer, "center", None)  # RunningAverage: the mean of the workers' averages
        with running() if running else contextlib.nullcontext():
            fit = m.fabric.world.table([m.is_finite()])[:, 0]
            m.refuse_if_all({r for r, f in enumerate(fit) if not f})
            spans = [Span(w, 0, m.n[d]) for d, w in m.x.items()]
            m.mean_over(spans, {r for r, f in enumerate(fit) if f})
            means = {d: w.mine.clone() for d, w in m.x.items()} if running else {}
        for d, mean in means.items():
            m.x[d].mine.copy_(mean)

    def kept(self, vector: Vector | None) -> dict[str, Any]:
        """Where a saved state holds what `put` shows, for those who read it without workers (`train.saved`)."""
        return {
            "per": "worker" if vector is None else vector.per,
            "vector": None if vector is None else vector.name,
        }

    def state(self) -> dict[str, Any]:
        return {"updates": self.updates}

    def misfit(self, state: dict[str, Any]) -> str | None:
        """Why a saved state cannot be taken up here."""
        return None

    def load(self, state: dict[str, Any]) -> None:
        """Collective."""
        self.updates = state["updates"]

    def free(self) -> None:
        """Before the windows go."""


def convex(m: Method, d: torch.dtype, alpha: float, rate: float) -> Iterator[tuple[int, int, float, float]]:
    """Spans of what is exchanged, with the rates of worker and centre: for float buffers no others than convex ones."""
    edge, n = m.edge[d], m.n[d]
    safe = min(max(alpha, 0.0), 1.0), min(max(rate, 0.0), 1.0 / m.p)
    if safe == (alpha, rate):
        edge = n
    for start, stop, rates in ((0, edge, (alpha, rate)), (edge, n, safe)):
        if start < stop:
            yield start, stop, *rates


def pulls(
    m: Method,
    d: torch.dtype,
    terms: Sequence[tuple[torch.Tensor, float]],
    start: int = 0,
    stop: int | None = None,
    share: Callable[[int, int], tuple[int, int]] = lambda a, b: (a, b),
) -> Iterator[tuple[int, int, tuple[Any, ...]]]:
    """Spans, and what `kernels.pull` takes there of one or two (vector, rate): buffers are pulled by convex rates.

    share: the part of a span that this rank works on.
    """
    n, most = m.n[d], max(1.0, sum(r for _, r in terms))
    stop, cut = n if stop is None else min(stop, n), n if most == 1 else min(m.edge[d], n)
    one, rate = terms[0]
    other, second = terms[1] if len(terms) == 2 else (None, 0.0)
    for low, high, scale in ((start, min(stop, cut), 1.0), (max(start, cut), stop, most)):
        if low < high:
            a, b = share(low, high)
            yield a, b, (one[a:b], rate / scale, None if other is None else other[a:b], second / scale)


def follow(z: torch.Tensor, x: torch.Tensor, rate: float) -> None:
    """z <- z + rate (x - z), z of x's accumulation type: small rates would be lost in a half type."""
    if z.dtype == x.dtype:
        kernels.pull(z, x, rate)
    else:
        z.lerp_(x.to(z.dtype), rate)


def outer_step(c: torch.Tensor, u: torch.Tensor, mean: torch.Tensor, lr: float, momentum: float) -> None:
    """g = c - mean;  u <- momentum u + g;  c <- c - lr (g + momentum u), c and u of x's type or a wider one."""
    kernels.outer(c, u, mean.to(c.dtype), lr, momentum)


def average(m: Method, spans: list[Span], counted: set[int]) -> None:
    """Replaces every worker's window[start:stop] by the mean over the counted workers (at least one).

    In few bits only a span with a name travels.
    Each rank handles its slice of every window on its island; across islands the sums meet in `scratch`.
    Collective, after a barrier; on return all windows hold the mean.
    """
    level = m.fabric.world
    if level.n_islands > 1:
        _average_across(level, m.scratch, spans, counted)
    else:
        key = "average", tuple(span[:3] for span in spans), frozenset(counted)
        for mean, first, others, nbytes in m.r.once(key, lambda: _means(level, spans, counted)):
            level.count_local(nbytes)
            mean()
            for x in others:
                x.copy_(first)
    level.barrier()


def _means(level: Level, spans: list[Span], counted: set[int]) -> list[tuple[Any, ...]]:
    """For this rank's slice of each span: the mean of those that count, their first, the others, and its bytes."""
    means = []
    for window, start, stop, *_ in spans:
        a, b = level.share(start, stop)
        every = {r: window.views[level.seats[r]][a:b] for r in level.local_ranks}
        peers = [view for r, view in every.items() if r in counted]
        others = [every[r] for r in every.keys() - counted]
        means.append((bound.average(peers), peers[0], others, (b - a) * peers[0].element_size()))
    return means


def _average_across(
    level: Level, scratch: dict[torch.dtype, Any], spans: list[Span], counted: set[int]
) -> None:
    # dtypes of one accumulation type take turns in its scratch
    for window, start, stop, name, about in spans:
        a, b = level.share(start, stop)
        every = {r: window.views[level.seats[r]][a:b] for r in level.local_ranks}
        peers = [view for r, view in every.items() if r in counted]
        level.count_local((b - a) * window.mine.element_size())
        sums = scratch[accumulation_dtype(window.mine.dtype)].views[0]
        if peers:
            kernels.total(sums[a:b], peers)
        else:
            sums[a:b].zero_()
        weight, count = (float(len(peers)), float(len(counted))) if about is not NOTHING else (0.0, 0.0)
        known = about[start:stop] if isinstance(about, torch.Tensor) else None
        stream = Stream(f"mean of {name}", weight, count, known) if name else None
        for part in level.allreduce(sums, start, stop, stream):
            a, b = level.share(*part)
            views = [window.views[level.seats[r]][a:b] for r in level.local_ranks]
            kernels.assign(views, sums[a:b], 1.0 / len(counted))
        level.fence()


def without_grad(do: Callable[..., T], *given: Any) -> T:
    """What torch.no_grad() is for, of which an object costs more than most of what is done here."""
    before = torch.is_grad_enabled()
    torch._C._set_grad_enabled(False)
    try:
        return do(*given)
    finally:
        torch._C._set_grad_enabled(before)

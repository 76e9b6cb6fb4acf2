"""What a method asks for in its exchanges, seen in a small run of the method itself."""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from mpilsgd.comm import Topology
from mpilsgd.comm.inprocess import run_tasks
from mpilsgd.exchange import Edges, InTurn, Method, Published
from mpilsgd.exchange.behind import Behind
from mpilsgd.exchange.clocks import EverySo, TwoPeriods, UntilGradient

_LONGEST = 2000  # steps
_WORKERS = 2  # on each of the nodes


@dataclasses.dataclass(frozen=True)
class Verb:
    """One that a rule used. near, far: of a pull, whether it went to the leader of the group, and of all."""

    name: str
    vectors: int = 1  # that it goes by
    near: bool = False
    far: bool = False
    momentum: bool = False


@dataclasses.dataclass(frozen=True)
class Event:
    """A kind of exchange. every: a worker's steps from one to the next, on the mean; part: of the vector that goes."""

    verbs: tuple[Verb, ...]
    every: float
    part: float = 1.0


@dataclasses.dataclass(frozen=True)
class Kept:
    """A named vector. shard: whether it lies in parts, one a node, that take their turns."""

    per: str
    wide: bool
    shard: bool


@dataclasses.dataclass(frozen=True)
class Seen:
    """Of a method with its settings.

    Attributes:
        kind: "together", "turns", "published" or "edges": the exchange.
        events: what it does, and how often; kept: the vectors that it keeps beside x.
        meetings: of all ranks, in one exchange on the mean.
        behind: steps that an exchange may take before a worker waits for it.
        copies: vectors more a worker that the exchange itself keeps.
        gradients: whether they, too, lie where others can read them.
        averaged: whether float buffers are exchanged.
        tree: for `lay_tree`, of kind "edges".
    """

    name: str
    kind: str
    events: tuple[Event, ...]
    kept: tuple[Kept, ...]
    meetings: float = 0.0
    behind: float = 0.0
    copies: float = 0.0
    gradients: bool = False
    averaged: bool = True
    tree: dict[str, Any] | None = None


def look(method: type[Method], settings: Mapping[str, Any] | None = None, nodes: int = 2) -> Seen:
    """Runs a method on a few tasks of this process, on one node or two, and notes its exchanges.

    A ValueError says what is wrong with the settings, or that they do not tell when exchanges come.
    """
    given = {key: value for key, value in (settings or {}).items() if key not in ("record", "replay")}
    workers = _WORKERS * nodes + (method.__name__ == "EASGDTree")
    seen = run_tasks(functools.partial(_worker, method, given), workers, 0, nodes, 60.0)
    return next(one for one in seen if one is not None)


def _worker(method: type[Method], given: dict[str, Any]) -> Seen | None:
    torch.set_num_threads(1)
    topology = Topology()
    numel = max(8, int(given.get("fragments") or 1))
    weight = torch.nn.Parameter(torch.zeros(numel))
    opt = method(torch.optim.SGD([weight], lr=0.0), topology, **given)
    horizon = _horizon(opt)
    log = _Log(opt)
    for _ in range(horizon):
        if opt.computes:
            weight.grad = torch.zeros(numel)
        opt.step(loss=float(topology.world.rank))
    opt.settle()
    if topology.world.rank:
        return None
    return _seen(opt, log, horizon)


def _horizon(opt: Any) -> int:
    """Steps after which the exchanges have come as often as they do on the mean."""
    clock = opt.clock
    if getattr(opt, "periods", None) is not None:  # of a tree
        given = [*opt.periods.of(True), *opt.periods.of(False)]
    elif isinstance(clock, TwoPeriods):
        given = [clock.period, clock.global_period]
    elif isinstance(clock, UntilGradient):
        raise ValueError("until_grad_norm tells nothing of how often exchanges come: give a period")
    elif isinstance(clock, EverySo):
        steps = opt.period
        given = [max(steps, default=1) if isinstance(steps, frozenset) else _LONGEST]
    else:
        given = [clock.period, getattr(opt, "period", 1)]
    return min(math.lcm(*given), _LONGEST)


class _Log:
    """Takes the place of a method's exchange function and verbs, and counts."""

    def __init__(self, opt: Method):
        self.rounds: collections.Counter[tuple[Verb, ...]] = collections.Counter()
        self.meetings = 0
        self._now: list[Verb] | None = None
        rule, r = opt.exchange, opt.r

        def exchange(given: Any) -> None:
            outer, self._now = self._now, []
            try:
                rule(given)
            finally:
                if outer is None:
                    self.rounds[tuple(self._now)] += 1
                    self._now = None
                else:  # a part of one that goes on behind
                    self._now = outer

        opt.exchange = exchange  # type: ignore[assignment,method-assign]
        for name in type(r).verbs:
            setattr(r, name, self._noted(name, getattr(r, name), r))
        level = opt.fabric.world
        for name in ("table", "barrier"):
            setattr(level, name, self._counted(getattr(level, name)))

    def _counted(self, do: Callable[..., Any]) -> Callable[..., Any]:
        def count(*args: Any, **more: Any) -> Any:
            self.meetings += 1
            return do(*args, **more)

        return count

    def _noted(self, name: str, do: Callable[..., Any], r: Any) -> Callable[..., Any]:
        def note(*args: Any, **more: Any) -> Any:
            verb = Verb(name, len(args))
            if name == "pull" and len(args) >= 2 and isinstance(args[0], float | int):
                due = getattr(r, "due", None) or r.m.clock.due(r.m.t)
                verb = Verb(name, 1, bool(due.group and args[0]), bool(due.world and args[1]))
            elif name == "keep":
                verb = Verb(name, 1, bool(r.due.group), bool(r.due.world))
            elif name == "push":
                verb = Verb(name, 1, momentum=len(args) > 2 and args[2] is not None)
            if self._now is not None:
                self._now.append(verb)
            else:  # the half of a round that is held behind
                self.rounds[(verb,)] += 1
            return do(*args, **more)

        return note


def _seen(opt: Any, log: _Log, horizon: int) -> Seen:
    r, kinds = opt.r, {Published: "published", Edges: "edges", InTurn: "turns"}
    kind = next((name for cls, name in kinds.items() if isinstance(r, cls)), "together")
    shards = kind == "turns"
    visits = r._shards.count if shards else 1  # one exchange is a visit to every shard
    rounds = {verbs: n / visits for verbs, n in log.rounds.items() if verbs}
    total = sum(rounds.values())
    part = 1 / (getattr(opt, "fragments", 1) or 1)
    events = tuple(Event(verbs, horizon / n, part) for verbs, n in rounds.items())
    kept = tuple(Kept(v.per, v.wide, shards and v.per == "all") for v in opt.vectors.values())
    overlap = getattr(opt, "overlap", 0)
    behind = opt.period if overlap is True else overlap
    copies = 2.0 * (kind == "published") + isinstance(r, Behind) * (2.0 if shards else 1.0)
    if kind == "published":
        copies += 1.0 if getattr(opt, "global_pull", None) == 0 else 2.0
    tree = None
    if kind == "edges":
        tree = {"degree": opt.degree, "inner": opt.inner, "periods": opt.periods}
    return Seen(
        type(opt).__name__,
        kind,
        events,
        kept,
        log.meetings / max(total, 1),
        float(behind),
        copies,
        opt.guard == "g",
        opt.buffers == "average",
        tree,
    )

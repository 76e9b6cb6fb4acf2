"""What a method asks for in its exchanges, seen in a small run of the method itself."""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from mpilsgd.comm import Topology, WorkerFailed
from mpilsgd.comm.inprocess import run_tasks
from mpilsgd.exchange import Edges, InTurn, Method, Published, Together, TwoPeriods
from mpilsgd.exchange.behind import Behind
from mpilsgd.exchange.clocks import ALL, Due, EverySo, UntilGradient

_LONGEST = 2000  # steps that a callable period is asked for
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
        behind: steps that an exchange may take before a worker waits for it; stretches: whether that is the period.
        copies: vectors more a worker that the exchange itself keeps.
        tree: for `lay_tree`, of kind "edges".
    """

    name: str
    kind: str
    events: tuple[Event, ...]
    kept: tuple[Kept, ...]
    meetings: float = 0.0
    behind: float = 0.0
    stretches: bool = False
    copies: float = 0.0
    tree: dict[str, Any] | None = None


_known: dict[Any, Seen] = {}


def look(method: type[Method], settings: Mapping[str, Any] | None = None, nodes: int = 2) -> Seen:
    """Runs a method on a few tasks of this process, on one node or two, and notes its exchanges.

    Its periods are short there; how often each kind of exchange comes follows from those that were given. A group is a
    node. A ValueError says what is wrong with the settings, or that they do not tell when exchanges come.
    """
    given = {key: value for key, value in (settings or {}).items() if key not in ("record", "replay")}
    key = method, nodes, repr(sorted(given.items()))
    plain = not any(map(callable, given.values()))
    if plain and key in _known:
        return _known[key]
    workers = _WORKERS * nodes + (method.__name__ == "EASGDTree")
    try:
        seen = run_tasks(functools.partial(_worker, method, given), workers, 0, nodes, 60.0)
    except WorkerFailed as failed:
        if isinstance(failed.__cause__, ValueError):
            raise failed.__cause__ from None
        raise
    found = next(one for one in seen if one is not None)
    if plain:
        _known[key] = found
    return found


def _worker(method: type[Method], given: dict[str, Any]) -> Seen | None:
    topology = Topology()
    numel = max(8, int(given.get("fragments") or 1))
    weight = torch.nn.Parameter(torch.zeros(numel))
    model = torch.nn.ParameterList([weight])

    def made(settings: dict[str, Any]) -> Method:
        return method(torch.optim.SGD([weight], lr=0.0), topology, model=model, **settings)

    real = made(given)  # refuses what is wrong
    often, short = _often(real), _short(real)
    real.close()
    opt = made({**given, **short})
    log = _Log(opt)
    if not isinstance(opt.r, Edges):
        for _ in range(_steps(opt)):
            if opt.computes:
                weight.grad = torch.zeros(numel)
            opt.step(loss=float(topology.world.rank))
        opt.settle()
    return None if topology.world.rank else _seen(real, opt, log, often)


def _steps(opt: Any) -> int:
    """In which every kind of exchange comes."""
    clock = opt.clock
    if isinstance(clock, TwoPeriods):
        return math.lcm(clock.period, clock.global_period)
    return 2 * clock.period if not isinstance(clock, EverySo) else 0


def _often(opt: Any) -> dict[Due, float]:
    """How many exchanges there are a step, by what is due in them."""
    clock = opt.clock
    if getattr(opt, "period", None) == "adaptive":
        raise ValueError("an adaptive period is set as the run goes: give one to plan with")
    if isinstance(clock, TwoPeriods):
        near, far = clock.period, clock.global_period
        both = 1 / math.lcm(near, far)
        return {Due(True, False): 1 / near - both, Due(False, True): 1 / far - both, Due(True, True): both}
    if isinstance(clock, UntilGradient):
        raise ValueError("until_grad_norm tells nothing of how often exchanges come: give a period")
    if not isinstance(clock, EverySo):
        return {ALL: 1 / clock.period}
    steps = opt.period
    if steps is None:
        return {ALL: 0.0}
    last = max(steps, default=1) if isinstance(steps, frozenset) else _LONGEST
    found = sum(bool(clock.due(t)) for t in range(1, last + 1))
    if not found:
        raise ValueError(f"period names none of the steps from 1 to {last}, so that nothing can be planned")
    return {ALL: found / last}


def _short(opt: Any) -> dict[str, Any]:
    """Settings with which exchanges of all kinds come soon."""
    if isinstance(opt.clock, TwoPeriods):
        near, far = opt.clock.period, opt.clock.global_period
        shape = (
            (1, 1) if near == far else (1, 2) if far % near == 0 else (2, 1) if near % far == 0 else (2, 3)
        )
        short: dict[str, Any] = dict(zip(("period", "global_period"), shape, strict=True))
        if opt.clock.by_total:  # the same rounds, at each worker's own steps
            short |= {"asynchronous": False, "order": "free"}
        return short
    if isinstance(opt.r, Edges) or "period" not in opt.fields:
        return {}
    overlap = getattr(opt, "overlap", 0)
    parts = getattr(opt, "fragments", 1)
    return {"period": parts * (1 if overlap is True else overlap + 1)}


class _Log:
    """Takes the place of a method's exchange function and verbs, and counts."""

    def __init__(self, opt: Method):
        self.rounds: dict[Due, collections.Counter[tuple[Verb, ...]]] = {}
        self.meetings = 0
        self._now: list[Verb] | None = None
        rule, r = opt.exchange, opt.r

        def exchange(given: Any) -> None:
            outer, self._now = self._now, []
            try:
                rule(given)
            finally:
                if outer is None and self._now:
                    self._count(r, self._now)
                self._now = outer

        opt.exchange = exchange  # type: ignore[assignment,method-assign]
        for name in type(r).verbs:
            setattr(r, name, self._noted(name, getattr(r, name), r))
        level = opt.fabric.world
        for name in ("table", "barrier"):
            setattr(level, name, self._counted(getattr(level, name)))

    def _count(self, r: Any, verbs: list[Verb]) -> None:
        due = ALL
        if isinstance(r.m.clock, TwoPeriods):
            due = r.due if isinstance(r, Together) else r.m.clock.due(r.m.t)
        self.rounds.setdefault(due, collections.Counter())[tuple(verbs)] += 1

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
                self._count(r, [verb])
            return do(*args, **more)

        return note


def _seen(real: Any, opt: Any, log: _Log, often: dict[Due, float]) -> Seen:
    r, kinds = opt.r, {Published: "published", Edges: "edges", InTurn: "turns"}
    kind = next((name for cls, name in kinds.items() if isinstance(r, cls)), "together")
    part = 1 / getattr(opt, "fragments", 1)
    events = []
    for due, rounds in log.rounds.items():
        for verbs, n in rounds.items():
            rate = often.get(due, 0.0) * n / sum(rounds.values())
            events += [Event(verbs, 1 / rate, part)] if rate else []
    if not events and kind != "edges" and any(often.values()):
        raise ValueError(
            f"{type(opt).__name__} held no exchange in {_steps(opt)} steps, so that nothing can be planned"
        )
    visits = r._shards.count if kind == "turns" else 1  # one exchange is a visit to every shard
    total = sum(sum(rounds.values()) for rounds in log.rounds.values()) / visits
    kept = tuple(Kept(v.per, v.wide, kind == "turns" and v.per == "all") for v in opt.vectors.values())
    overlap = getattr(opt, "overlap", 0)
    copies = 2.0 * (kind == "published") + isinstance(r, Behind) * (2.0 if kind == "turns" else 1.0)
    if kind == "published":
        copies += 1.0 if getattr(opt, "global_pull", None) == 0 else 2.0
    return Seen(
        type(opt).__name__,
        kind,
        tuple(events),
        kept,
        log.meetings / max(total, 1),
        float(real.period if overlap is True else overlap),
        overlap is True,
        copies,
        {
            "degree": opt.degree,
            "inner": opt.inner,
            "periods": opt.periods,
            "waits": opt.order == "lock-step",
        }
        if kind == "edges"
        else None,
    )

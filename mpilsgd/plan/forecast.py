"""From the costs of exchanges to seconds a step, the period to take, and memory."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

from mpilsgd.plan.costs import Cost, Sizes, costs, workers
from mpilsgd.plan.machine import Machine
from mpilsgd.plan.trial import Seen

_BUSY = 0.9  # of the time: what is so busy holds the workers up


@dataclasses.dataclass(frozen=True)
class Forecast:
    """Of a method on a machine.

    Attributes:
        step_s: seconds of a worker's step, exchanges included, on the mean.
        comm_s: of these, in exchanges.
        round_s: seconds of one exchange, where it is due, of the longest kind; waiting for a turn is not in it.
        mean_round_s: the same of all kinds, by how often they come; NaN where there are none.
        group, across: bytes that all ranks together read from others or receive in a step, of their own node and of
            other nodes.
        link: bytes a step through the busiest node's link, each way.
        memory: bytes a rank holds beyond model, gradients and optimizer.
        workers: ranks that take gradients.
        limit: what holds the workers up: "" (nothing but themselves), "turns" or "link".
    """

    step_s: float
    comm_s: float
    round_s: float
    mean_round_s: float
    group: float
    across: float
    link: float
    memory: float
    workers: int
    limit: str = ""

    @property
    def share(self) -> float:
        """Of the time that exchanges take."""
        return self.comm_s / self.step_s if self.step_s else 0.0


def forecast(seen: Seen, sizes: Sizes, machine: Machine, step_s: float) -> Forecast:
    """What a step costs.

    Args:
        seen: `look` at the method with its settings.
        sizes: of what is exchanged; machine: where; step_s: seconds of a worker's gradient and own update, at least 0.
    """
    if not (math.isfinite(step_s) and step_s >= 0):
        raise ValueError(f"step_s must be a finite number of seconds, at least 0, not {step_s!r}")
    each = costs(seen, sizes, machine)
    waits = sum(_waited(cost, seen, step_s, machine.size) / cost.every for cost in each)
    alone = step_s + waits
    # what all workers' exchanges together keep busy cannot take longer than the steps between them
    most = sum(cost.busy / cost.every for cost in each)
    # ... but a tree's messages wait for nobody: those for which a link has no room are left out
    left = 1.0
    if seen.tree is not None and not seen.tree["waits"] and most > alone:
        left, most = alone / most, alone
    step = max(alone, most)
    limit = "" if most <= _BUSY * alone else "turns" if seen.kind == "turns" else "link"
    taken = _taken(each, step - alone if seen.kind == "published" else 0.0)
    often = sum(1 / cost.every for cost in each)
    return Forecast(
        step,
        step - step_s,
        max(taken, default=0.0),
        sum(s / cost.every for s, cost in zip(taken, each, strict=True)) / often if often else math.nan,
        sum(cost.group / cost.every for cost in each),
        left * sum(cost.across / cost.every for cost in each),
        left * sum(cost.link / cost.every for cost in each),
        _memory(seen, sizes, machine),
        workers(seen, machine),
        limit,
    )


def _taken(each: list[Cost], held: float) -> list[float]:
    """Seconds of one exchange of each kind; held: those of a step for which readers hold each other up on a link."""
    often = sum(1 / cost.every for cost in each if cost.busy)
    return [cost.seconds + (held / often if held and cost.busy else 0.0) for cost in each]


def _waited(cost: Cost, seen: Seen, step_s: float, size: int) -> float:
    if seen.kind == "turns" and not seen.behind:
        return in_turns(cost.seconds, cost.busy / size, cost.every * step_s, size)
    return max(0.0, cost.seconds - seen.behind * step_s)


def in_turns(alone: float, held: float, between: float, workers: int) -> float:
    """Seconds R of an exchange for which workers take turns at shards, waiting for turns included.

    alone: S, its seconds where nobody else is; held: D, those for which it keeps the busiest shard; between: Z, the
    seconds of a worker between two. A worker that comes to a shard finds there, on the mean, (p-1)/p of the queue that
    p workers make, R/(Z + R) of a worker each: R = S + D (p-1) R/(Z + R).
    Source: Schweitzer's approximation of mean value analysis, for closed queueing networks.
    """
    b = alone + held * (workers - 1) - between
    return (b + math.sqrt(b * b + 4 * alone * between)) / 2


def _memory(seen: Seen, sizes: Sizes, machine: Machine) -> float:
    """The parameters themselves lie in the window, not beside it."""
    per = {"worker": 1.0, "group": 1 / machine.most, "all": 1 / machine.most}
    total = seen.copies * sizes.stored()
    for kept in seen.kept:
        stored, _ = sizes.of(kept)
        total += stored / machine.size if kept.shard else stored * per[kept.per]
    if machine.nodes > 1 and seen.kind != "turns":
        extra = sizes.wide() if sizes.wide() > sizes.stored() else 0.0
        total += (sizes.stored() + extra) / machine.most
    return total


def longer(seen: Seen, factor: float) -> Seen:
    """The same with all periods so many times as long."""
    events = tuple(dataclasses.replace(event, every=event.every * factor) for event in seen.events)
    tree = seen.tree
    if tree is not None:
        stretched = {
            name: None if value is None else max(1, round(value * factor))
            for name, value in dataclasses.asdict(tree["periods"]).items()
            if name != "scheme"
        }
        tree = {**tree, "periods": dataclasses.replace(tree["periods"], **stretched)}
    behind = seen.behind * factor if seen.stretches else seen.behind
    return dataclasses.replace(seen, events=events, tree=tree, behind=behind)


def least_factor(seen: Seen, sizes: Sizes, machine: Machine, step_s: float, share: float) -> int | None:
    """The least whole number by which to multiply all periods so that exchanges take at most this share of the time.

    share: above 0 and below 1. None: there is none up to a million.
    """
    if not 0 < share < 1:
        raise ValueError(f"share must lie between 0 and 1, ends excluded, not {share!r}")

    def fits(factor: int) -> bool:
        found = forecast(longer(seen, factor), sizes, machine, step_s)
        return found.share <= share and not (seen.tree and found.limit)  # nor shall messages be left out

    return least(fits)


def least(fits: Callable[[int], bool], most: int = 1 << 20) -> int | None:
    """The least whole number from 1 on that fits, where all larger ones do, too; None if there is none up to `most`."""
    high = 1
    while not fits(high):
        high *= 2
        if high > most:
            return None
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high

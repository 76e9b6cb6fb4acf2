"""EASGD Tree: elastic averaging over a tree of workers, in which nobody ever waits."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from mpilsgd.comm import tag_problem
from mpilsgd.exchange import Edges, Every, Method, choice, number, whole
from mpilsgd.tree import Periods, lay_tree, tree_problem


class EASGDTree(Method):
    """Elastic averaging SGD on a d-ary tree (Algorithm 6); with `MSGD` as the leaves' optimizer, with momentum.

    Each tree node i, with its own clock t:

        every tau_up of its steps it sends x^i to its parent, every tau_down to its children; nobody waits for that;
        x^i <- x^i + alpha (x^k - x^i) with each x^k that has come, the parent's first, then the children's in order;
        a leaf: x^i <- x^i - eta g^i(x^i); an inner node lets as much time pass.

    The gradient is taken at x^i as it is after what has come. So a leaf does the sending and taking of a step at the
    end of the one before. Of the messages that have come on an edge since its last step a node takes the newest. At
    most one is under way: where the last one has still not come, the next is left out (`metrics.skipped`), and after
    three of them the sender sends half as often, until messages get through again.

    `tree` says where the nodes are; `tree.parent` lists every rank's parent, -1 at the root. `workers` are the ranks
    that are leaves; `computes`: whether this one is. The centre is the root. The run ends by `reached(n)`: n steps of
    all leaves together. What is not finite is marked so in a message and not taken; a node that is not takes over the
    next one. `center()` raises `Diverged` where no leaf is finite, or was before it was set back at its last step.
    Memory: two messages for each edge that comes in, and those under way. In lock-step a message sent in tick s is
    taken in tick s + 1.

    Source: thesis 6.1, Algorithm 6.
    """

    degree: int = whole(16, 2, help="children of a tree node, at most")
    moving_rate: float | None = number(
        None,
        0,
        1,
        help="alpha: rate at which a node moves to its neighbours (null: 0.9 / (1 + the most children of a node))",
    )
    scheme: str = choice(
        "multi-scale",
        "up-down",
        help="multi-scale: leaves and their parents talk every period steps, inner nodes every upper_period; up-down: "
        "to the parent every up_period, to the children every down_period",
    )
    period: int | None = whole(
        None, help="multi-scale: steps between messages of leaves and their parents (null: 10)"
    )
    upper_period: int | None = whole(
        None, help="multi-scale: steps between messages of inner nodes (null: 100)"
    )
    up_period: int | None = whole(None, help="up-down: steps between messages to the parent (null: 8)")
    down_period: int | None = whole(
        None, help="up-down: steps between messages to the children, at least up_period (null: 80)"
    )
    inner: str = choice(
        "ranks",
        "hosted",
        help="inner nodes of the tree: ranks (have ranks of their own, which compute nothing) or hosted (by leaves)",
    )
    order: str = choice(
        "free",
        "lock-step",
        help="free (as it comes) or lock-step (in one tick each node makes one pass): the same every time",
    )
    # inner nodes have no statistics of their own to keep
    buffers: str = choice("average", "recalibrate", help=Method.fields["buffers"].help)

    asynchronous = True
    exchanges = {True: Edges}  # noqa: RUF012

    def declare(self) -> Iterable[str | None]:
        problem = tree_problem(self.p, self.degree)
        self.periods = Periods(self.scheme, self.period, self.upper_period, self.up_period, self.down_period)
        yield problem
        yield self.periods.problem()
        if problem is None:
            self.tree = lay_tree(self.topology.nodes, self.degree, self.inner)
            yield tag_problem(self.topology.world, 2 * len(self.tree.parent))
            if self.moving_rate is None:
                self.moving_rate = 0.9 / (1 + max(map(len, self.tree.children)))

    def clock_of(self) -> Every:
        return Every(1)

    def exchange(self, r: Any) -> None:
        r.send()
        for message in r.arrivals():
            r.pull(message, self.moving_rate)

"""Where the nodes of an EASGD tree live: the d-ary tree of thesis 6.1, laid over the ranks from the bottom up.

Nothing here talks or computes: a layout is a plain table, the same on every rank, that can be printed for ranks which
do not exist.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import TypeVar

INNER = ("ranks", "hosted")
SCHEMES = ("multi-scale", "up-down")
_PERIODS = {
    "multi-scale": {"period": 10, "upper_period": 100},
    "up-down": {"up_period": 8, "down_period": 80},
}
Item = TypeVar("Item")


@dataclasses.dataclass(frozen=True)
class Tree:
    """Tree nodes 0, 1, ...; of p ranks, the first p are the ranks themselves.

    Attributes:
        parent: of every tree node its parent, -1 at the root.
        children: ... its children, in order; none at a leaf.
        host: ... the rank it lives on: its own for the first p, a leaf's for the others (inner="hosted").
    """

    parent: list[int]
    children: list[list[int]]
    host: list[int]

    @property
    def root(self) -> int:
        return self.parent.index(-1)

    @property
    def levels(self) -> int:
        return 1 + max(map(self.depth, range(len(self.parent))))

    def is_leaf(self, i: int) -> bool:
        return not self.children[i]

    def depth(self, i: int) -> int:
        """Edges up to the root."""
        return 0 if self.parent[i] < 0 else 1 + self.depth(self.parent[i])

    def below(self, i: int) -> list[int]:
        """The leaves under a tree node; a leaf itself."""
        return [leaf for c in self.children[i] for leaf in self.below(c)] or [i]


@dataclasses.dataclass(frozen=True)
class Periods:
    """Steps between two messages on an edge (thesis, 6.1.1).

    scheme "multi-scale": `period` (10) above a leaf, `upper_period` (100) above an inner node, both ways. "up-down":
    `up_period` (8) to the parent, `down_period` (80) to the child. None: these defaults; those of the other scheme stay
    None.
    """

    scheme: str = "multi-scale"
    period: int | None = None
    upper_period: int | None = None
    up_period: int | None = None
    down_period: int | None = None

    def problem(self) -> str | None:
        """What is wrong with them."""
        found = []
        for scheme, defaults in _PERIODS.items():
            for name in defaults:
                value = getattr(self, name)
                if value is not None and scheme != self.scheme:
                    own = " and ".join(_PERIODS[self.scheme])
                    found.append(f'{name} is of scheme="{scheme}", not of "{self.scheme}", which has {own}')
                if value is not None and value < 1:
                    found.append(f"{name} must be a whole number of at least 1, not {value!r}")
        up, down = self._value("up_period", "up-down"), self._value("down_period", "up-down")
        if up > down:
            found.append(
                f"up_period={up} is larger than down_period={down}: messages go up at least as often as down"
            )
        return "; ".join(found) or None

    def of(self, leaf: bool) -> tuple[int, int]:
        """Up and down on the edge above a leaf, or above an inner node."""
        lower, upper = (self._value(name, self.scheme) for name in _PERIODS[self.scheme])
        if self.scheme == "up-down":
            return lower, upper
        return (lower, lower) if leaf else (upper, upper)

    def _value(self, name: str, scheme: str) -> int:
        given = getattr(self, name)
        return _PERIODS[scheme][name] if given is None else given


def tree_problem(ranks: int, degree: int) -> str | None:
    """Why there is no such tree."""
    if degree < 2:
        return f"degree must be at least 2, not {degree}: below that a tree does not branch"
    if ranks < 2:
        return f"a tree has at least two levels, parents and leaves, which do not fit on {ranks} rank"
    return None


def lay_tree(nodes: Sequence[Sequence[int]], degree: int, inner: str = "ranks") -> Tree:
    """The tree over the ranks 0 ... p-1, p >= 2, which lie on nodes (the ranks of each).

    In each node, parents over at most `degree` leaves of that node; above them, level by level, inner nodes that hold
    all together. inner="ranks": an inner node takes a rank of its own, the upper ones where that costs no leaf, else
    where most ranks are. "hosted": all ranks are leaves, and inner nodes live on them, on different ones.

    A rank alone on its node is a leaf of an upper node.
    """
    hosted = inner == "hosted"
    p = sum(map(len, nodes))
    node_of = {rank: k for k, ranks in enumerate(nodes) for rank in ranks}
    parent, children, host = [-1] * p, [[] for _ in range(p)], list(range(p))  # type: ignore[var-annotated]
    left = [list(ranks) for ranks in nodes]
    upper: list[int] = []

    def groups() -> list[list[int]]:
        """In each node, parents (the first of each group, if they take ranks) and their leaves."""
        found = []
        for ranks in left:
            alone = len(ranks) % (degree + 1)
            if (
                not upper or len(nodes) > 1 or alone > 2
            ):  # on a single node, 1 or 2 may hang on an upper inner node
                alone = 0
            stay = len(ranks) - alone
            found += cut(ranks[:stay], -(-stay // (degree + (not hosted))))
            found += [[rank] for rank in ranks[stay:]]
        return found

    while not hosted and _uppers([len(group) > 1 for group in groups()], degree) > len(upper):
        spare = [len(ranks) > 1 and len(ranks) % (degree + 1) == 1 for ranks in left]
        k = max(range(len(left)), key=lambda k: (spare[k], len(left[k]), -k))
        upper.append(left[k].pop(0))
    upper.sort()

    def adopt(i: int, below: list[int]) -> int:
        children[i] += below
        for child in below:
            parent[child] = i
        return i

    def inner_over(below: list[int]) -> int:
        if not hosted:
            homes = {node_of[i] for i in below}
            near = [k for k, rank in enumerate(upper) if node_of[rank] in homes]
            return adopt(upper.pop(near[-1] if near else -1), below)
        under, stack = [], list(below)
        while stack:
            i = stack.pop()
            stack += children[i]
            under += [] if children[i] else [i]
        home = min(under, key=lambda rank: (host.count(rank), rank))
        parent.append(-1)
        children.append([])
        host.append(home)
        return adopt(len(parent) - 1, below)

    tops = []
    for first, *rest in groups():
        if hosted and rest:
            tops.append(inner_over([first, *rest]))
        else:
            tops.append(adopt(first, rest))
    while len(tops) > 1 or not children[tops[0]]:
        chunks = cut(tops, -(-len(tops) // degree))
        tops = [c[0] if len(c) == 1 < len(tops) else inner_over(c) for c in chunks]
    while upper:  # taken in vain
        rank = upper.pop()
        near = sorted(
            (i for i, below in enumerate(children) if below),
            key=lambda i: (node_of[i] != node_of[rank], len(children[i]) >= degree, len(children[i]), i),
        )
        full = near[0]
        if len(children[full]) >= degree:  # makes room
            half = degree // 2
            adopt(rank, children[full][-half:])
            del children[full][-half:]
        adopt(full, [rank])
    for i in range(p):  # over a single leaf, where another of its node has room for both: it is a leaf, too
        above = parent[i]
        if hosted or len(children[i]) != 1 or children[children[i][0]] or above < 0:
            continue
        room = {
            k: degree - 2 + (k == above) - len(below) for k, below in enumerate(children) if below and k != i
        }
        near = [k for k, free in room.items() if free >= 0 and node_of[k] == node_of[i]]
        if near and (above in near or len(children[above]) > 2):
            children[above].remove(i)
            adopt(above if above in near else near[0], [i, children[i].pop()])
    return Tree(parent, [sorted(below) for below in children], host)


def _uppers(inner: list[bool], degree: int) -> int:
    """How many inner nodes hold these together; of each, whether it is one itself."""
    found = 0
    while len(inner) > 1 or not inner[0]:
        chunks = cut(inner, -(-len(inner) // degree))
        found += sum(len(c) > 1 or len(inner) == 1 for c in chunks)
        inner = [c[0] if len(c) == 1 < len(inner) else True for c in chunks]
    return found


def cut(items: list[Item], parts: int) -> list[list[Item]]:
    """Consecutive parts, about equal, the larger ones first."""
    if not parts:
        return []
    size, larger = divmod(len(items), parts)
    stops = [k * size + min(k, larger) for k in range(parts + 1)]
    return [items[a:b] for a, b in itertools.pairwise(stops)]

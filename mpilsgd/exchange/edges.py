"""The exchange along the edges of a tree: messages to parent and children, for which nobody waits."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch

from mpilsgd import kernels
from mpilsgd.comm import Edge, Inbox, Links, clock, pause, wait_until
from mpilsgd.exchange.base import Exchange
from mpilsgd.exchange.edge_messages import Messages
from mpilsgd.exchange.rows import CENTER
from mpilsgd.exchange.vectors import Span, Vector, load, save
from mpilsgd.extension import place_of

if TYPE_CHECKING:
    from mpilsgd.exchange.method import Method

Vectors = dict[torch.dtype, torch.Tensor]

_PAUSE = 5e-4  # seconds between two looks of an inner rank
_UNKNOWN = 0.05  # seconds of a pass as long as no leaf has told of its step
_MEMORY = 0.9  # of the mean of a step's seconds
_PAUSED = 4.0  # times its seconds a step counts at most
_PATIENCE = 10.0  # seconds that lock-step waits for a rank which has ended its steps
_SLOWEST = 1e6  # bytes a second: what takes longer is not under way


@dataclasses.dataclass
class _Node:
    """A tree node: its number, its x, its edges (the parent's first) and its clock."""

    index: int
    x: Vectors
    edges: list[Edge]
    residual: Vectors  # what its messages in few bits have not said yet
    t: int = 0


class Edges(Exchange):
    """The rule's `exchange(r)` is one pass of a node: `send`, then `pull` for each of `arrivals`.

    Its rule says what the tree is: `tree`, `periods`, `order` ("free" or "lock-step").
    """

    verbs = frozenset({"send", "arrivals", "pull"})
    always_ordered = private = True

    def __init__(self, method: Method):
        super().__init__(method)
        m: Any = method
        self.tree, self.periods, self.lock_step = m.tree, m.periods, m.order == "lock-step"
        m.workers = [rank for rank in m.workers if self.tree.is_leaf(rank)]
        self._seconds = _UNKNOWN  # of a leaf's step
        self._last_step: float | None = None
        self._revived = -1  # the step at which a message last found this leaf broken
        self._links: Links | None = None
        self._own: list[_Node] = []

    def open(self) -> None:
        m, tree = self.m, self.tree
        # lock-step: a leaf's next message may come before its last one is taken
        self._links = Links(m.fabric.world, newest=not self.lock_step, tags=2 * len(tree.parent))
        self._messages = Messages(m)
        self._own = [self._node(i) for i, host in enumerate(tree.host) if host == m.topology.world.rank]
        with m.iterates():
            if m.init == "different":
                self._start_at_mean()
            if m.computes:
                self._pass(self._own[0])
        self._links.deliver()  # a state saved now holds what was sent

    # The tree nodes of this rank and their edges

    def _node(self, i: int) -> _Node:
        tree, m = self.tree, self.m
        exchanged = {d: w.mine[: m.n[d]] for d, w in m.x.items()}
        x = exchanged if i == m.topology.world.rank else {d: v.clone() for d, v in exchanged.items()}
        edges = [] if i == tree.root else [self._edge(i, tree.parent[i], up=True)]
        edges += [self._edge(child, child, up=False) for child in tree.children[i]]
        coded = self._messages.base if any(edge.narrow for edge in edges) else {}
        return _Node(i, x, edges, {d: torch.zeros_like(v) for d, v in coded.items()})

    def _edge(self, child: int, other: int, up: bool) -> Edge:
        """The edge above `child`, seen from its lower end (up) or its upper end, to the tree node `other`."""
        assert self._links is not None
        every, tags = self.periods.of(self.tree.is_leaf(child)), (2 * child, 2 * child + 1)
        ours, theirs = (0, 1) if up else (1, 0)
        peer = self.tree.host[other]
        narrow = peer not in self.m.fabric.world.local_ranks
        out = self._links.out(peer, tags[ours])
        into = self._links.into(peer, tags[theirs], self._messages.nbytes(narrow))
        return Edge(out, into, up, peer, narrow, every[ours], every[theirs])

    def _start_at_mean(self) -> None:
        """Inner nodes start at the leaves' mean."""
        m = self.m
        own = {d: w.mine.clone() for d, w in m.x.items()}
        m.fabric.world.table([0.0])
        m.mean_over([Span(w, 0, m.n[d]) for d, w in m.x.items()], set(m.workers))
        for node in self._own[m.computes :]:
            for d, x in node.x.items():
                x.copy_(m.x[d].mine[: m.n[d]])
        for d, x in own.items() if m.computes else ():
            m.x[d].mine.copy_(x)

    # A pass, and its verbs

    def _pass(self, node: _Node, sends: bool = True) -> None:
        self.node, self._sends = node, sends
        self.m.exchange(self)

    def send(self) -> None:
        """x to parent and children, where it is due."""
        if not self._sends:  # between the passes of a rank that only averages
            return
        node, m, links = self.node, self.m, self._links
        assert links is not None
        due = [e for e in node.edges if node.t % e.send_every == 0]
        for edge in due if self.lock_step else ():
            self._wait(edge.out.ready, edge)
        free = [e for e in due if node.t % (e.send_every * e.stride) == 0 and e.gets_through()]
        m.metrics.skipped += len(due) - len(free)
        for narrow in {edge.narrow for edge in free}:
            memory = links.fresh(self._messages.nbytes(narrow))
            self._messages.write(memory, narrow, node.x, node.residual, self._seconds)
            for edge in free:
                if edge.narrow is narrow:
                    edge.out.send(memory)

    def arrivals(self) -> Iterator[tuple[bool, Vectors]]:
        """What has come, the parent's first: whether it is finite, and the vectors."""
        m = self.m
        for edge in self.node.edges:
            if not self._came(self.node, edge):
                continue
            message = edge.into.message()
            head, codes = self._messages.open(message, edge.narrow)
            yield self._messages.read(message, edge.narrow)
            if not (edge.above or m.computes):
                self._seconds = float(head[1])
            m.metrics.rounds += 1
            if isinstance(edge.into, Inbox):
                nbytes = sum(map(len, codes.values()))
                near = edge.rank in m.topology.groups[m.topology.group_index]
                m.fabric.traffic.group += nbytes * near
                m.fabric.traffic.across += nbytes * (not near)
                m.count_traffic()
            edge.into.release()

    def _came(self, node: _Node, edge: Edge) -> bool:
        if not self.lock_step:
            return edge.into.has()
        if node.t == 0 or (node.t - 1) % edge.take_every:
            return False
        self._wait(edge.into.has, edge)
        return True

    def pull(self, message: tuple[bool, Vectors], rate: float) -> None:
        """x <- x + rate (message - x); a node that is not finite takes over the message."""
        fit, vectors = message
        if not fit:
            return
        x = self.node.x
        if all([kernels.check(v) for v in x.values()]):
            for d, v in x.items():
                kernels.pull(v, vectors[d].to(place_of(v), v.dtype), rate, seed=self.node.t)
            return
        if self.tree.is_leaf(self.node.index):
            self._revived = self.m.t
            self.m.begin_anew()
        load(x, {str(d): v for d, v in vectors.items()})

    def _wait(self, true: Callable[[], bool], edge: Edge) -> None:
        """Lock-step: until the other end has come as far."""
        end = clock() + _PATIENCE + self._messages.nbytes(edge.narrow) / _SLOWEST

        def come() -> bool:
            assert self._links is not None
            if true():
                return True
            if clock() > end and self._links.rests(edge.rank):
                raise RuntimeError(
                    f"rank {edge.rank} has ended its steps, and this one needs it for its step {self.m.t}: "
                    'order="lock-step" is for equally many steps on every rank'
                )
            return False

        self.m.metrics.t_wait += wait_until(come, end)

    # The life of a step

    def idle(self) -> None:
        """A step of a rank that only averages: one pass, and what comes while a leaf's step would last."""
        start, (node,) = clock(), self._own
        self._pass(node)
        while not self.lock_step and (rest := start + self._seconds - clock()) > 0:
            pause(min(_PAUSE, rest))
            self._pass(node, sends=False)
        node.t += 1

    def comes(self) -> bool:
        """With every step, by what has come on the edges."""
        return True

    @torch.no_grad()
    def stepped(self) -> None:
        now, m = clock(), self.m
        if self._last_step is not None:
            taken, known = now - self._last_step, self._seconds
            mean = _MEMORY * known + (1 - _MEMORY) * min(taken, _PAUSED * known)  # a pause is no step
            self._seconds = taken if known == _UNKNOWN else mean
        self._last_step = now
        leaf, *hosted = self._own
        for node in hosted:
            self._pass(node)
            node.t += 1
        leaf.t = m.t
        if self.lock_step or any(e.into.has() or leaf.t % e.send_every == 0 for e in leaf.edges):
            with m.iterates():
                self._pass(leaf)
        m.metrics.t_comm += clock() - now
        m.course.count(m.t)

    # All meet

    def rests(self) -> None:
        self._last_step = None
        if self.lock_step and self._links is not None:
            self._links.rest()

    def wakes(self) -> None:
        assert self._links is not None
        self._links.deliver()

    def put(self, vector: Vector | None) -> None:
        m, tree = self.m, self.tree
        fit = m.fabric.world.table([m.is_fit(CENTER) and self._revived != m.t])[:, 0]
        m.refuse_if_all({leaf for leaf in m.workers if not fit[leaf]})
        square, home = 0.0, tree.host[tree.root]
        own = {d: w.mine[: m.n[d]].clone() for d, w in m.x.items()}
        if m.topology.world.rank == home:
            root = next(node for node in self._own if node.index == tree.root)
            for d, x in root.x.items():
                m.x[d].mine[: m.n[d]].copy_(x)
        m.copy_from(home)
        for d, x in own.items():
            square += float(torch.dist(x, m.x[d].mine[: m.n[d]])) ** 2
        m.metrics.distance = square**0.5

    def kept(self, vector: Vector | None) -> dict[str, Any]:
        own = [node.index for node in self._own]
        return {"per": "root", "node": own.index(self.tree.root) if self.tree.root in own else None}

    def state(self) -> dict[str, Any]:
        nodes = []
        for node in self._own:
            lying = [[torch.from_numpy(memory.copy()) for memory in edge.into.lying()] for edge in node.edges]
            inner = node.index >= self.m.p
            nodes.append((node.t, save(node.x) if inner else {}, lying, save(node.residual)))
        return {
            "nodes": nodes,
            "seconds": self._seconds,
            "layout": self._layout(),
            "base": save(self._messages.base),
        }

    def _layout(self) -> list[Any]:
        """What a state is bound to."""
        sizes = [self._messages.nbytes(edge.narrow) for node in self._own for edge in node.edges]
        return [self.tree.parent, self.tree.host, sizes]

    def misfit(self, state: dict[str, Any]) -> str | None:
        if state.get("layout") == self._layout():
            return None
        return "the state is of another tree: another degree, inner, across_dtype, or ranks laid otherwise on nodes"

    def load(self, state: dict[str, Any]) -> None:
        self.wakes()
        self._seconds, self._revived = state["seconds"], -1
        load(self._messages.base, state["base"])
        for node, (t, x, lying, residual) in zip(self._own, state["nodes"], strict=True):
            node.t = t
            load(node.residual, residual)
            if x:
                load(node.x, x)
            for edge, messages in zip(node.edges, lying, strict=True):
                edge.into.put([memory.numpy() for memory in messages])

    def free(self) -> None:
        self._own = []
        if self._links is not None:
            self._links.free()

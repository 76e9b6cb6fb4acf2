"""EASGD Tree: elastic averaging over a tree of workers, in which nobody ever waits."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from mpilsgd import kernels
from mpilsgd.comm import Inbox, Links, Outbox, Slot, Topology, tag_problem, wait_until
from mpilsgd.methods.arguments import choice, number, whole
from mpilsgd.methods.base import CENTER, Method
from mpilsgd.methods.course import course_settings
from mpilsgd.tree import INNER, SCHEMES, Periods, lay_tree, tree_problem

Vectors = dict[torch.dtype, torch.Tensor]

_HEAD = 64  # bytes before the vectors of a message: whether they are finite, and the seconds of a leaf's step
_PAUSE = 5e-4  # seconds between two looks of an inner rank
_UNKNOWN = 0.05  # seconds of a pass as long as no leaf has told of its step
_MEMORY = 0.9  # of the mean of a step's seconds
_PAUSED = 4.0  # times its seconds a step counts at most
_PATIENCE = 10.0  # seconds that lock-step waits for a rank which has ended its steps
_SLOWEST = 1e6  # bytes a second: what takes longer is not under way
_LONGEST = 64  # a sender whose messages are not taken waits so many periods at most
_MISSES = 3  # times in a row that the last message was not taken, before it sends half as often


@dataclasses.dataclass
class _Edge:
    """An edge as one of its ends sees it.

    above: whether the other end is the parent; rank: where it is; narrow: whether messages are rounded; send_every,
    take_every: steps between the messages of this end and of the other; stride: of its own, every how many-th is sent.
    """

    out: Outbox | Slot
    into: Inbox | Slot
    above: bool
    rank: int
    narrow: bool  # messages travel in the topology's across_dtype
    send_every: int
    take_every: int
    stride: int = 1
    misses: int = 0  # in a row

    def gets_through(self) -> bool:
        """Whether a message that is due can be sent. Where several cannot, the next ones will be further apart."""
        if self.out.ready():
            self.stride, self.misses = max(1, self.stride // 2), 0
            return True
        self.misses += 1
        if self.misses % _MISSES == 0:
            self.stride = min(2 * self.stride, _LONGEST)
        return False


@dataclasses.dataclass
class _Node:
    """A tree node: its number, its x, its edges (the parent's first) and its clock."""

    index: int
    x: Vectors
    edges: list[_Edge]
    t: int = 0


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

    Args:
        degree: d >= 2: at most so many children.
        moving_rate: alpha in [0, 1]; default 0.9/(d+1), with d the most children that a node has.
        scheme: "multi-scale": between leaves and their parents both ways every `period` (10) steps, above every
            `upper_period` (100). "up-down": to the parent every `up_period` (8), to the children every `down_period`
            (80), which is no smaller.
        inner: "ranks": inner nodes take ranks of their own, on which `computes` is False; the loop skips the gradient
            there, and `step()` passes messages on for as long as a leaf's step takes. "hosted": inner nodes live on
            leaf ranks, which all compute.
        order: "free", or "lock-step": in one tick each node makes one pass; a message sent in tick s is taken in tick
            s + 1. The same result every time.
        optimizer, topology, init, buffers, model and errors: see `Method`.

    Attributes:
        tree: where the nodes are; `tree.parent` lists every rank's parent, -1 at the root.
        workers: the ranks that are leaves; computes: whether this one is.

    The centre is the root. The run ends by `reached(n)`: n steps of all leaves together. What is not finite is marked
    so in a message and not taken; a node that is not takes over the next one. `center()` raises `Diverged` where no
    leaf is finite, or was before it was set back at its last step. Memory: two messages for each edge that comes in,
    and those under way.

    Source: thesis 6.1, Algorithm 6.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        topology: Topology | None = None,
        *,
        degree: int = 16,
        moving_rate: float | None = None,
        scheme: str = "multi-scale",
        period: int | None = None,
        upper_period: int | None = None,
        up_period: int | None = None,
        down_period: int | None = None,
        inner: str = "ranks",
        order: str = "free",
        init: str = "same",
        buffers: str = "average",
        model: torch.nn.Module | None = None,
    ):
        topology, made = (Topology(), True) if topology is None else (topology, False)
        problems = [whole("degree", degree), choice("scheme", scheme, SCHEMES)]
        if problems[0] is None:
            problems.append(tree_problem(topology.world.size, degree))
        problems.append(choice("inner", inner, INNER))
        tree = None if any(problems) else lay_tree(topology.nodes, degree, inner)
        if tree is not None:
            problems.append(tag_problem(topology.world, 2 * len(tree.parent)))
        if moving_rate is not None:
            problems.append(number("moving_rate", moving_rate, 0.0, 1.0))
        elif tree is not None:
            moving_rate = 0.9 / (1 + max(map(len, tree.children)))
        periods = dict(period=period, upper_period=upper_period, up_period=up_period, down_period=down_period)
        problems += [whole(name, value) for name, value in periods.items() if value is not None]
        if not any(problems):
            problems.append(Periods(scheme, **periods).problem())
        problems.append(choice("order", order, ("free", "lock-step")))
        if buffers == "keep":
            problems.append(
                'buffers="keep": inner nodes have no statistics of their own; take average or recalibrate'
            )
        self.moving_rate = 0.0 if moving_rate is None else moving_rate  # refused below
        self.order, self.asynchronous = order, True
        self.periods = Periods(scheme, **periods)
        super().__init__(
            optimizer,
            topology,
            init=init,
            buffers=buffers,
            model=model,
            problems=problems,
            settings=dict(
                degree=degree,
                moving_rate=moving_rate,
                scheme=scheme,
                **periods,
                inner=inner,
                **course_settings(order, None, None),
            ),
            vectors=0.0,
            course=("free" if order == "free" else "round-robin", None, None),
        )
        self._owns_topology = made
        assert tree is not None
        self.tree = tree
        self.workers = [rank for rank in self.workers if self.tree.is_leaf(rank)]
        self._seconds = _UNKNOWN  # of a leaf's step
        self._last_step: float | None = None
        self._revived = -1  # the step at which a message last found this leaf broken
        # lock-step: a leaf's next message may come before its last one is taken
        self._links = Links(self.fabric.world, newest=order == "free", tags=2 * len(self.tree.parent))
        self._own = [self._node(i) for i, host in enumerate(self.tree.host) if host == topology.world.rank]
        assert self._course is not None
        self._course.open(self.fabric)
        # BatchNorm statistics that are not exchanged, for a leaf that starts anew
        self._fresh = {d: w.mine[self._n[d] :].clone() for d, w in self._x.items()}
        with torch.no_grad(), self._iterates():
            self._start(init)
            if self.computes:
                self._pass(self._own[0])
        self._links.deliver()  # a state saved now holds what was sent
        self.fabric.traffic.group = self.fabric.traffic.across = 0

    # The tree nodes of this rank and their edges

    def _node(self, i: int) -> _Node:
        tree, rank = self.tree, self.topology.world.rank
        exchanged = {d: w.mine[: self._n[d]] for d, w in self._x.items()}
        x = exchanged if i == rank else {d: v.clone() for d, v in exchanged.items()}
        edges = [] if i == tree.root else [self._edge(i, tree.parent[i], up=True)]
        return _Node(i, x, edges + [self._edge(child, child, up=False) for child in tree.children[i]])

    def _edge(self, child: int, other: int, up: bool) -> _Edge:
        """The edge above `child`, seen from its lower end (up) or its upper end, to the tree node `other`."""
        every = self.periods.of(self.tree.is_leaf(child))
        tags = 2 * child, 2 * child + 1
        ours, theirs = (0, 1) if up else (1, 0)
        peer, links = self.tree.host[other], self._links
        narrow = peer not in self.fabric.world.local_ranks
        out, into = links.out(peer, tags[ours]), links.into(peer, tags[theirs], self._message_bytes(narrow))
        return _Edge(out, into, up, peer, narrow, every[ours], every[theirs])

    def _start(self, init: str) -> None:
        """Inner nodes start where all are, or at the leaves' mean."""
        if init == "same":
            return
        own = {d: w.mine.clone() for d, w in self._x.items()}
        self.fabric.world.table([0.0])
        self._average(
            self._spans(), np.array([self.tree.is_leaf(r) for r in range(self.topology.world.size)])
        )
        for node in self._own[self.computes :]:
            for d, x in node.x.items():
                x.copy_(self._x[d].mine[: self._n[d]])
        if self.computes:
            for d, x in own.items():
                self._x[d].mine.copy_(x)

    # Messages: a head, then the vectors

    def _types(self, narrow: bool) -> Iterator[tuple[torch.dtype, torch.dtype]]:
        """The vectors' types, and those in a message."""
        return ((d, self.fabric.wire(d) if narrow else d) for d in self._x)

    def _message_bytes(self, narrow: bool) -> int:
        return _HEAD + sum(_room(self._n[d] * wire.itemsize) for d, wire in self._types(narrow))

    def _open_message(self, memory: np.ndarray, narrow: bool) -> tuple[torch.Tensor, Vectors]:
        """A message's head (whether it is finite, seconds a step) and vectors."""
        whole, at, vectors = torch.from_numpy(memory), _HEAD, {}
        for d, wire in self._types(narrow):
            nbytes = self._n[d] * wire.itemsize
            vectors[d] = whole[at : at + nbytes].view(wire)
            at += _room(nbytes)
        return whole[:16].view(torch.float64), vectors

    # A pass

    def _pass(self, node: _Node) -> None:
        """Sends what is due, takes what has come; what is held is x."""
        self._send(node, [e for e in node.edges if node.t % e.send_every == 0])
        for edge in node.edges:
            if self._came(node, edge):
                self._take(node, edge)

    def _send(self, node: _Node, due: list[_Edge]) -> None:
        if self.order == "lock-step":
            for edge in due:
                self._wait(edge.out.ready, edge)
        free = [e for e in due if node.t % (e.send_every * e.stride) == 0 and e.gets_through()]
        self.metrics.skipped += len(due) - len(free)
        for narrow in {edge.narrow for edge in free}:
            memory = self._links.fresh(self._message_bytes(narrow))
            head, vectors = self._open_message(memory, narrow)
            for d, x in node.x.items():
                vectors[d].copy_(x)
            head[0] = all([kernels.check(v) for v in vectors.values()])
            head[1] = self._seconds
            for edge in free:
                if edge.narrow is narrow:
                    edge.out.send(memory)

    def _came(self, node: _Node, edge: _Edge) -> bool:
        if self.order == "free":
            return edge.into.has()
        if node.t == 0 or (node.t - 1) % edge.take_every:
            return False
        self._wait(edge.into.has, edge)
        return True

    def _take(self, node: _Node, edge: _Edge) -> None:
        """x <- x + alpha (message - x); a node that is not finite takes over the message."""
        head, vectors = self._open_message(edge.into.message(), edge.narrow)
        if head[0]:
            broken = not all([kernels.check(x) for x in node.x.values()])
            leaf = self.tree.is_leaf(node.index)
            if broken and leaf:
                self._revived = self.t
                self._begin_anew()
            for d, x in node.x.items():
                if broken:
                    x.copy_(vectors[d])
                    if leaf:
                        self._x[d].mine[self._n[d] :].copy_(self._fresh[d])
                else:
                    kernels.pull(x, vectors[d].to(x.device, x.dtype), self.moving_rate)
        if not (edge.above or self.computes):
            self._seconds = float(head[1])
        m, traffic = self.metrics, self.fabric.traffic
        m.rounds += 1
        if isinstance(edge.into, Inbox):
            nbytes = sum(v.numel() * v.element_size() for v in vectors.values())
            if edge.rank in self.topology.groups[self.topology.group_index]:
                traffic.group += nbytes
            else:
                traffic.across += nbytes
            m.bytes_group, m.bytes_across = traffic.group, traffic.across
        edge.into.release()

    def _wait(self, true: Callable[[], bool], edge: _Edge) -> None:
        """Lock-step: until the other end has come as far."""
        end = time.perf_counter() + _PATIENCE + self._message_bytes(edge.narrow) / _SLOWEST

        def come() -> bool:
            if true():
                return True
            if time.perf_counter() > end and self._links.rests(edge.rank):
                raise RuntimeError(
                    f"rank {edge.rank} has ended its steps, and this one needs it for its step {self.t}: "
                    'order="lock-step" is for equally many steps on every rank'
                )
            return False

        waited = wait_until(come)
        self.metrics.t_wait += waited

    # The life of a step

    def step(self, closure: Any = None, *, loss: Any = None) -> Any:
        if self.computes:
            return super().step(closure, loss=loss)
        self._refuse_if_unfit()
        start = time.perf_counter()
        with torch.no_grad():
            (node,) = self._own
            self._pass(node)
            while self.order == "free" and (rest := start + self._seconds - time.perf_counter()) > 0:
                time.sleep(min(_PAUSE, rest))
                for edge in node.edges:
                    if edge.into.has():
                        self._take(node, edge)
            node.t += 1
        self.t += 1
        return loss

    def _after(self, loss: Any) -> None:
        now = time.perf_counter()
        if self._last_step is not None:
            taken, known = now - self._last_step, self._seconds
            if known == _UNKNOWN:
                self._seconds = taken
            else:  # a pause is no step
                self._seconds = _MEMORY * known + (1 - _MEMORY) * min(taken, _PAUSED * known)
        self._last_step = now
        leaf, *hosted = self._own
        for node in hosted:
            self._pass(node)
            node.t += 1
        leaf.t = self.t
        busy = (
            any(e.into.has() or leaf.t % e.send_every == 0 for e in leaf.edges) or self.order == "lock-step"
        )
        if busy:
            with self._iterates():
                self._pass(leaf)
        self.metrics.t_comm += time.perf_counter() - now
        assert self._course is not None
        self._course.count(self.t)

    def reached(self, total_steps: int) -> bool:
        """Whether all leaves together have taken so many steps; see `Method.reached`."""
        assert self._course is not None
        if self.order == "lock-step":
            return self.t * len(self.workers) >= total_steps
        return self._course.reached(total_steps, self.t)

    # All meet

    def _rests(self) -> None:
        self._last_step = None
        if self.order == "lock-step":
            self._links.rest()

    def _wakes(self) -> None:
        self._links.deliver()

    def _catch_up(self, table: np.ndarray) -> None: ...

    def _set_centre(self) -> None:
        tree = self.tree
        fit = self.fabric.world.table([self._is_finite(CENTER) and self._revived != self.t])[:, 0]
        self._refuse_if_all({leaf for leaf in self.workers if not fit[leaf]})
        square = 0.0
        home = tree.host[tree.root]
        own = {d: w.mine[: self._n[d]].clone() for d, w in self._x.items()}
        if self.topology.world.rank == home:
            root = next(node for node in self._own if node.index == tree.root)
            for d, x in root.x.items():
                self._x[d].mine[: self._n[d]].copy_(x)
        self._copy_from(home)
        for d, x in own.items():
            square += float(torch.dist(x, self._x[d].mine[: self._n[d]])) ** 2
        self.metrics.distance = square**0.5

    def _extra(self) -> dict[str, Any]:
        nodes = []
        for node in self._own:
            lying = [[torch.from_numpy(memory.copy()) for memory in edge.into.lying()] for edge in node.edges]
            inner = node.index >= self.topology.world.size
            nodes.append((node.t, {str(d): x.clone() for d, x in node.x.items()} if inner else {}, lying))
        return {"nodes": nodes, "seconds": self._seconds, "layout": self._layout()}

    def _layout(self) -> list[Any]:
        """What a state is bound to."""
        sizes = [self._message_bytes(edge.narrow) for node in self._own for edge in node.edges]
        return [self.tree.parent, self.tree.host, sizes]

    def _load_extra(self, own: dict[str, Any]) -> None:
        self.fabric.world.table([0.0])  # nobody sends
        self.topology.agree(None if own.get("layout") == self._layout() else _OTHER_TREE)
        self._links.deliver()
        self._seconds, self._revived = own["seconds"], -1
        for node, (t, x, lying) in zip(self._own, own["nodes"], strict=True):
            node.t = t
            for d, vector in x.items():
                node.x[getattr(torch, d.removeprefix("torch."))].copy_(vector)
            for edge, messages in zip(node.edges, lying, strict=True):
                edge.into.put([memory.numpy() for memory in messages])
        assert self._course is not None
        self._course.load(self.t if self.computes else 0)
        self.fabric.world.table([0.0])

    def _free(self) -> None:
        self._links.free()
        self._own = []


_OTHER_TREE = (
    "the state is of another tree: another degree, inner, across_dtype, or ranks that lay otherwise on nodes"
)


def _room(nbytes: int) -> int:
    return -(-nbytes // 64) * 64

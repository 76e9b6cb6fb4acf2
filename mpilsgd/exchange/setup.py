"""How a method comes to be, and to an end: checks on all ranks, then memory, then the common start."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from mpilsgd import bound
from mpilsgd.exchange import leaving
from mpilsgd.exchange.behind import BEHIND
from mpilsgd.exchange.clocks import TwoPeriods
from mpilsgd.exchange.course import Course, course_problems
from mpilsgd.exchange.edges import Edges
from mpilsgd.exchange.equality import agreed, broadcast_rest, laid_out
from mpilsgd.exchange.landing import BehindSteps
from mpilsgd.exchange.metrics import Metrics
from mpilsgd.exchange.published import Published
from mpilsgd.exchange.rules import check_verbs
from mpilsgd.exchange.together import Together
from mpilsgd.exchange.vectors import Span, accumulation_dtype
from mpilsgd.exchange.wrapped import Members, wrap_problem
from mpilsgd.extension import place_of
from mpilsgd.flat import FlatParameters, find_modules, float_buffers
from mpilsgd.layout import Plan
from mpilsgd.optimizers.wrapped import described
from mpilsgd.transport import Fabric

if TYPE_CHECKING:
    from mpilsgd.exchange.method import Method


EXCHANGES = (*BEHIND, *BEHIND.values(), BehindSteps, Published, Edges)


def kind_of(m: Method) -> Any:
    """The exchange that a rule asks for. A TypeError on every rank where the two do not go together."""
    cls, kind = type(m), m.exchanges[m.asynchronous]
    if getattr(m, "overlap", False):
        if kind not in BEHIND:
            raise TypeError(f"{cls.__name__}: overlap goes with {' or '.join(k.__name__ for k in BEHIND)}")
        if not isinstance(m.overlap, bool) and BEHIND[kind] is not BEHIND[Together]:
            raise TypeError(f"{cls.__name__}: overlap in steps goes with {Together.__name__}")
        kind = BEHIND[kind] if isinstance(m.overlap, bool) else BehindSteps
    if isinstance(m.clock, TwoPeriods) and m.guard:
        raise TypeError(f'{cls.__name__}: with the clock TwoPeriods it is the pull that guards: guard = ""')
    allowed = kind.verbs & {"pull", "keep"} if isinstance(m.clock, TwoPeriods) else kind.verbs
    others = [other for asynchronous, other in m.exchanges.items() if asynchronous != m.asynchronous]
    check_verbs(cls, kind, allowed, others, EXCHANGES)
    return kind


def build(m: Method, model: torch.nn.Module | None, given: dict[str, Any]) -> None:
    """Everything of the constructor that is collective. ValueError on every rank if anything is wrong on any."""
    topology, cls = m.topology, type(m)
    problems = [wrap_problem(m.optimizer, cls.__name__, m.guard == "g")]
    if not isinstance(model, torch.nn.Module | None):
        problems.append(f"model must be a torch.nn.Module, not {model!r}")
    for field in m.fields.values():
        setattr(m, field.name, given.get(field.name, field.default))
        problems.append(field.check(getattr(m, field.name)))
    if not any(problems):
        problems += m.declare() or ()
    if "record" in m.fields:
        problems += course_problems(m)
    topology.agree("; ".join(p for p in problems if p) or None)
    m.clock = m.clock_of()
    kind = kind_of(m)
    topology.hold()
    m._held = True
    parameters = [p for group in m.optimizer.param_groups for p in group["params"] if p.requires_grad]
    leaving.reap(topology, parameters)
    m.modules = [model] if model is not None else find_modules(parameters)
    # constants such as a mask of -inf are not statistics
    held = [b for b in float_buffers(m.modules) if bool(torch.isfinite(b).all())]
    plan = laid_out(topology, parameters, held, m.modules)
    m.about = agreed(topology, cls.__name__, plan, _settings(m))
    m.number = leaving.number(m)
    m.workers = list(range(m.p))
    m.metrics = Metrics()
    if m.asynchronous or kind.always_ordered:
        m.course = Course(topology, *_order(m), {**m.about, "optimizer": described(m.optimizer)})
    m.r = kind(m)
    m._computes = topology.world.rank in m.workers
    if m.course is not None:
        m.course.workers = len(m.workers)
    _allocate(m, plan)
    m._members = Members(m.optimizer, m.flat)
    m._hooked, m._observes = _defines(cls, "before_step"), _defines(cls, "observe")
    _start(m)
    m.fabric.traffic.group = m.fabric.traffic.across = 0  # counts rounds
    m._open = True


def _defines(cls: type, name: str) -> bool:
    """Whether a rule defines a function that it need not define."""
    from mpilsgd.exchange.method import Method

    return getattr(cls, name) is not getattr(Method, name)


def _settings(m: Method) -> dict[str, Any]:
    """What all ranks must agree about; of the files of a recording, whether there are any."""
    told = {name: getattr(m, name) for name in m.fields if name not in ("order", "record", "replay")}
    order = tuple(getattr(m, name, None) for name in ("order", "record", "replay"))
    return {**told, "order, recorded, replayed": (order[0], order[1] is not None, order[2] is not None)}


def _order(m: Method) -> tuple[str, Any, Any]:
    free = m.asynchronous and getattr(m, "order", "free") == "free"
    return "free" if free else "round-robin", getattr(m, "record", None), getattr(m, "replay", None)


def _allocate(m: Method, plan: Plan) -> None:
    device, gradients = place_of(plan.parameters[0]), m.guard == "g"
    nbytes, wide = (
        sum(-(-t.numel() * kind(t.dtype).itemsize // 64) * 64 for t in [*plan.parameters, *plan.buffers])
        for kind in (lambda dtype: dtype, accumulation_dtype)
    )
    asked, hosted = _shared_bytes(m, nbytes, wide, gradients), int(m.r.hosted(nbytes, wide))
    m.fabric = Fabric(m.topology, asked, device, m.r.private, hosted)
    if m.course is not None:
        m.fabric.meet_by_mpi()
    m.device, m.x, m.g, m.windows = device, {}, {}, {}
    m.flat = FlatParameters(plan, allocate=_allocator(m, m.x))
    if gradients:
        m.flat.attach_grads(_allocator(m, m.g))
    m.edge = m.flat.n_parameters
    # the part of every vector that is exchanged
    m.n = {d: w.mine.numel() if m.buffers == "average" else m.edge[d] for d, w in m.x.items()}
    m._checks = [bound.check(w.mine[: m.n[d]]) for d, w in m.x.items()]
    m.fresh = {d: w.mine[m.n[d] :].clone() for d, w in m.x.items() if m.n[d] < w.mine.numel()}
    m.scratch, m.landing = {}, {}  # a vector an island: what arrives, and sums; what arrives in a group
    world, group = m.fabric.world, m.fabric.group
    sizes: dict[torch.dtype, int] = {}  # no set of types: its order is another one on every rank
    for d, w in m.x.items():
        for kind in (d, accumulation_dtype(d)) if world.n_islands > 1 else ():
            sizes[kind] = max(sizes.get(kind, 0), w.mine.numel())
        several = group.n_islands > 1 and isinstance(m.clock, TwoPeriods)
        m.landing[d] = m.fabric.place.common(group.channel, d, w.mine.numel()) if several else None
    for kind, numel in sizes.items():
        m.scratch[kind] = m.fabric.place.common(world.channel, kind, numel)
    m.r.allocate(list(m.vectors.values()))


def _shared_bytes(m: Method, nbytes: int, wide: int, gradients: bool) -> int:
    """Shared memory that this rank asks for, were its node an island."""
    node, group = m.topology.node.size, m.topology.group.size
    per = {"worker": 0.0, "group": 1 / group, "all": 1 / node}
    kept = sum((wide if v.wide else nbytes) * per[v.per] for v in m.vectors.values())
    scratch = (nbytes + (wide if wide > nbytes else 0)) / node * (node < m.p)
    return int(nbytes * (1 + gradients) + kept + scratch) + m.r.sizes(nbytes, wide) + 4096


def _allocator(m: Method, windows: dict[torch.dtype, Any]) -> Callable[..., torch.Tensor]:
    def allocate(dtype: torch.dtype, numel: int) -> torch.Tensor:
        windows[dtype] = m.fabric.place.vector(dtype, numel)
        return windows[dtype].mine

    return allocate


@torch.no_grad()
def _start(m: Method) -> None:
    """The common start of x, then of the vectors. Collective."""
    world = m.fabric.world
    if m.init == "same":
        m.copy_from(0)
        broadcast_rest(m.topology, m.modules, m.flat)
    m.fresh = {d: m.x[d].mine[m.n[d] :].clone() for d in m.fresh}
    if m.course is not None:
        m.course.open(m.fabric, m.clock.unit if m.clock.by_total else None)
    m.r.open()
    with m.iterates():
        for v in m.vectors.values():
            if v.per == "worker" and v.start == "x":
                for d, vector in v.items():
                    vector.copy_(m.x[d].mine[: m.n[d]])
        own = {d: w.mine.clone() for d, w in m.x.items()} if m.init == "different" else {}
        world.table([0.0])
        if own and any(v.start == "mean" for v in m.vectors.values()):
            m.mean_over([Span(w, 0, w.mine.numel()) for w in m.x.values()], set(m.workers))
        for v in m.vectors.values():
            if v.start == "mean":
                m.r.fill(v)
        world.table([0.0])
        for d, x in own.items():
            m.x[d].mine.copy_(x)
        m.start(m.r)
    world.table([0.0])


def release(m: Method) -> None:
    """Frees what is there; also of a method that was refused half way. Collective."""
    m._open = False
    flat, fabric, r = (m.__dict__.get(name) for name in ("flat", "fabric", "r"))
    try:
        if r is not None:
            r.free()  # before the parameters need memory of their own
            r.x, r.made = {}, {}
    finally:
        if flat is not None:
            flat.release()
    for vector in m.vectors.values():
        vector.memory = {}
    m._checks = []
    m.x, m.g, m.scratch, m.landing, m.windows, m.fresh = {}, {}, {}, {}, {}, {}
    if m.course is not None:
        m.course.free()
    if fabric is not None:
        fabric.free()
    if m.__dict__.pop("_held", False):
        m.topology.leave()
    if m._owns_topology:
        m.topology.free()

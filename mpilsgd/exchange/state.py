"""A method's state: what its rule declared, its clock and its exchange."""

from __future__ import annotations

import copy
import dataclasses
from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from mpilsgd.exchange.metrics import Metrics
from mpilsgd.exchange.vectors import Vector, save, shapes
from mpilsgd.exchange.vectors import load as load_vector

if TYPE_CHECKING:
    from mpilsgd.exchange.method import Method

_OTHER_RANKS = (
    "the state was saved by ranks that lay otherwise on nodes, or with other settings: its vectors do not fit"
)


def _own(m: Method) -> Iterator[tuple[str, Vector]]:
    """The vectors that this rank saves: its own, and as the first of its island what lies there once."""
    heads = {"worker": True, "group": _first(m.fabric.group), "all": _first(m.fabric.world)}
    return ((name, v) for name, v in m.vectors.items() if heads[v.per])


def _first(level: Any) -> bool:
    return level.local_ranks[0] == level.rank


def of(m: Method) -> dict[str, Any]:
    metrics = dataclasses.asdict(m.metrics)
    del metrics["t_comm"], metrics["t_wait"]  # this process's
    values = {name: _plain(getattr(m, name)) for name in m.values}
    return {
        "method": type(m).__name__,
        "model": m.about["model"],
        "t": m.t,
        "metrics": metrics,
        "values": values,
        "vectors": {name: save(v) for name, v in _own(m)},
        "exchange": m.r.state(),
        "kept": m.fabric.state(),
    }


def load(m: Method, state: dict[str, Any]) -> None:
    """Collective."""
    own = state.pop("mpilsgd", None)
    m.topology.agree(_unfit(m, own))
    m.settle()
    m.fabric.world.barrier()  # nobody exchanges
    m.optimizer.load_state_dict(state)
    m.t = int(own["t"])
    m.metrics = Metrics(**copy.deepcopy(own["metrics"]), t_comm=m.metrics.t_comm, t_wait=m.metrics.t_wait)
    m.fabric.traffic.group, m.fabric.traffic.across = m.metrics.bytes_group, m.metrics.bytes_across
    for name in m.values:
        kept = getattr(m, name)
        if isinstance(kept, deque):
            kept.clear()
            kept.extend(own["values"][name])
        else:
            setattr(m, name, copy.deepcopy(own["values"][name]))
    for name, v in _own(m):
        load_vector(v, own["vectors"][name])
    m.r.load(own["exchange"])
    m.fabric.load(own["kept"], m.device)
    if m.course is not None:
        m.course.load(m.t if m.computes else 0)
    m.fabric.world.barrier()


def _unfit(m: Method, own: Any) -> str | None:
    name = type(m).__name__
    if own is None or own.get("method") != name:
        return (
            f"this is the state of {'another optimizer' if own is None else own.get('method')}, not of {name}"
        )
    if own.get("model") != m.about["model"]:  # its vectors are laid out otherwise
        return "this is the state of other parameters (shapes, types, order, memory formats)"
    if not {"vectors", "values", "exchange", "kept"} <= own.keys():
        return f"this is the state of {name} of another version of mpilsgd"
    saved = {n: {d: v.numel() for d, v in of.items()} for n, of in own["vectors"].items()}
    if saved != shapes(dict(_own(m))):
        return _OTHER_RANKS
    if set(own["values"]) != set(m.values):
        return f"this is the state of {name} with other settings"
    return m.fabric.misfit(own["kept"]) or m.r.misfit(own["exchange"])


def _plain(value: Any) -> Any:
    return [float(v) for v in value] if isinstance(value, deque) else copy.deepcopy(value)

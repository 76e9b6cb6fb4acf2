"""All meet: for the centre, or for the end."""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch

from mpilsgd.exchange.rows import CENTER
from mpilsgd.exchange.vectors import Span
from mpilsgd.recalibration import recalibrate

if TYPE_CHECKING:
    from mpilsgd.exchange.method import Method


def rest(m: Method, purpose: float) -> None:
    """Takes part in the others' rounds until all workers rest, and for `purpose`. Collective."""
    m.settle()
    if m.course is not None:
        m.course.meet("center" if purpose == CENTER else "close", m.t)
    if m.left is not None and m.left < m.t:
        warnings.warn(
            f"rank {m.topology.world.rank} has gone on alone, as the others took all their steps while it waited in "
            "center(): all ranks have to enter center(), and equally often; inside it, `if rank == 0:` may evaluate "
            "and save",
            RuntimeWarning,
            stacklevel=4,
        )
    m.left, steps, rounds = None, _steps_of_all(m), 0
    while True:
        m.r.rests()
        rows = m.r.exchange(purpose)
        if rows is None:
            rounds += 1
            continue
        m.r.wakes()
        m.r.catch_up(rows)
        if min(rows.purpose) == purpose:
            alone = purpose == CENTER and rows.purpose.count(CENTER) == 1 < m.p
            m.left = m.t if alone and (rounds or _steps_of_all(m) > steps) else None
            return
        with held(m, ()):  # this worker closes, others want the centre: it helps
            pass


def _steps_of_all(m: Method) -> int:
    """As far as an asynchronous run counts them; while this worker rests only the others' change it."""
    return 0 if m.course is None else m.course.total()


@contextlib.contextmanager
def shown(m: Method, batches: Iterable[Any]) -> Iterator[None]:
    """`Method.center`."""
    grad = torch.is_grad_enabled()
    with torch.no_grad():
        rest(m, CENTER)
        with held(m, batches), torch.set_grad_enabled(grad):
            yield


@contextlib.contextmanager
def held(m: Method, batches: Iterable[Any]) -> Iterator[None]:
    m.flat.reseat()
    traffic = dataclasses.replace(m.fabric.traffic)  # counts rounds
    own = {d: w.mine.clone() for d, w in m.x.items()}  # as it lies there: it comes back exactly
    try:
        with contextlib.ExitStack() as stack:
            iterate = getattr(m.optimizer, "iterate", None)
            if iterate is not None:
                stack.enter_context(iterate())
            m.r.put(m.shown_centre())
            if m.buffers == "recalibrate" and m.flat.buffers:
                _recalibrate(m, batches)
            m._lent = True
            yield
    finally:
        m._lent = False
        m.fabric.traffic.group, m.fabric.traffic.across = traffic.group, traffic.across
        for d, w in m.x.items():
            w.mine.copy_(own[d])


def _recalibrate(m: Method, batches: Iterable[Any]) -> None:
    """BatchNorm statistics of the centre over each worker's batches, averaged over those that had any."""
    seen = recalibrate(m.modules, batches)
    had = m.fabric.world.table([float(seen)])[:, 0]
    if not had.any():
        raise ValueError("center(batches): no worker had any batch to recompute the statistics from")
    spans = [Span(w, m.edge[d], w.mine.numel()) for d, w in m.x.items()]
    m.mean_over(spans, {r for r, h in enumerate(had) if h})

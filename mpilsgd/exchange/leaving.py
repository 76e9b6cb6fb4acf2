"""Methods that end: with the program, or because nobody holds them any more. Their windows are freed by all ranks."""

from __future__ import annotations

import atexit
import gc
import itertools
import os
import weakref
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch

from mpilsgd.comm import Topology, end_job, exit_status
from mpilsgd.flat import FlatParameters

if TYPE_CHECKING:
    from mpilsgd.exchange.method import Method

_living: weakref.WeakValueDictionary[int, Method] = weakref.WeakValueDictionary()
_abandoned: dict[int, Method] = {}  # nobody holds them; they go on serving the others until all let them go
_process = os.getpid()
_serials, _owners = itertools.count(), itertools.count()
_MANY = 4


def number(m: Method) -> int:
    """Of a new method among those of its topology, or of those with one of their own: the same on every rank."""
    if m._owns_topology:
        return next(_owners)
    m.topology.made += 1
    return m.topology.made


def enter(m: Method) -> None:
    m.serial = next(_serials)
    _living[m.serial] = m


def forget(m: Method) -> None:
    _living.pop(m.serial, None)
    _abandoned.pop(m.serial, None)


def abandon(m: Method) -> None:
    """Nobody holds the method any more. It cannot be closed here, as the others may not have come so far."""
    if m.__dict__.get("_open") and os.getpid() == _process:
        _abandoned[m.serial] = m


def reap(topology: Topology, parameters: Iterable[torch.Tensor]) -> None:
    """Closes the methods of these workers that no rank holds any more. Collective. parameters: of the next one."""

    def theirs(m: Method) -> bool:
        return m.topology is topology or (m._owns_topology and m.p == topology.world.size)

    held = any(FlatParameters.of(p) for p in parameters)
    if held or sum(map(theirs, list(_living.values()))) >= _MANY:
        gc.collect()  # a method is part of a cycle; what nobody holds may be there still
    mine = {(m._owns_topology, m.number): m for m in list(_abandoned.values()) if theirs(m)}
    everyone = topology.allgather(sorted(mine))
    for key in sorted(set.intersection(*map(set, everyone))):
        mine[key].close()


@atexit.register
def _rest_at_exit() -> None:
    """The program ends on this rank: serve the others' rounds to their end, unless the job is being aborted."""
    if os.getpid() != _process:  # a fork's end is not the rank's
        return
    try:
        left: dict[int, Any] = {**dict(_living.items()), **_abandoned}
        for serial in sorted(left):  # in the same order on all ranks
            if not exit_status():
                left[serial].close()
    except Exception as failure:
        end_job(type(failure), failure, failure.__traceback__)

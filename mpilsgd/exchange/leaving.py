"""Methods that end: with the program, or because nobody holds them any more. Their windows are freed by all ranks."""

from __future__ import annotations

import gc
import itertools
import os
import weakref
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch

from mpilsgd.comm import Topology, end_job, exit_status, here
from mpilsgd.flat import FlatParameters

if TYPE_CHECKING:
    from mpilsgd.exchange.method import Method

_MANY = 4


class Books:
    """The methods of one rank. abandoned: nobody holds them; they go on serving the others until all let them go."""

    def __init__(self) -> None:
        self.living: weakref.WeakValueDictionary[int, Method] = weakref.WeakValueDictionary()
        self.abandoned: dict[int, Method] = {}
        self.process = os.getpid()
        self.serials, self.owners = itertools.count(), itertools.count()
        here.rank.at_end(self.rest)

    def rest(self) -> None:
        """The program ends on this rank: serve the others' rounds to their end, unless the job is being aborted."""
        if os.getpid() != self.process:  # a fork's end is not the rank's
            return
        try:
            left: dict[int, Any] = {**dict(self.living.items()), **self.abandoned}
            for serial in sorted(left):  # in the same order on all ranks
                if not exit_status():
                    left[serial].close()
        except Exception as failure:
            end_job(type(failure), failure, failure.__traceback__)


def books() -> Books:
    """Those of this rank."""
    return here.rank.once(Books)


books()  # in a program that is a rank: before what the user registers for its end, so after it


def number(m: Method) -> int:
    """Of a new method among those of its topology, or of those with one of their own: the same on every rank."""
    if m._owns_topology:
        return next(books().owners)
    m.topology.made += 1
    return m.topology.made


def enter(m: Method) -> None:
    m._books = books()
    m.serial = next(m._books.serials)
    m._books.living[m.serial] = m


def forget(m: Method) -> None:
    m._books.living.pop(m.serial, None)
    m._books.abandoned.pop(m.serial, None)


def abandon(m: Method) -> None:
    """Nobody holds the method any more. It cannot be closed here, as the others may not have come so far."""
    if m.__dict__.get("_open") and os.getpid() == m._books.process:
        m._books.abandoned[m.serial] = m


def reap(topology: Topology, parameters: Iterable[torch.Tensor]) -> None:
    """Closes the methods of these workers that no rank wants any more. Collective.

    parameters: of the next one. Who wraps them anew wants the one before no more: a notebook's cell is run again.
    """
    alone = topology.world.size == 1

    def theirs(m: Method) -> bool:
        same = m.topology is topology or (m._owns_topology and m.p == topology.world.size)
        return same or (alone and m.p == 1)

    own, parameters = books(), list(parameters)
    if any(map(FlatParameters.of, parameters)) or sum(map(theirs, list(own.living.values()))) >= _MANY:
        gc.collect()  # a method is part of a cycle; what nobody holds may be there still
    held = {id(flat) for flat in map(FlatParameters.of, parameters) if flat is not None}
    mine: dict[tuple[bool, int, int], Method] = {}
    for m in (*own.abandoned.values(), *own.living.values()):
        if theirs(m) and (m.serial in own.abandoned or id(m.flat) in held):
            mine[m._owns_topology, m.number, m.serial if alone else 0] = m
    everyone = topology.allgather(sorted(mine))
    for key in sorted(set.intersection(*map(set, everyone))):
        m = mine[key]
        if m.serial not in own.abandoned:
            m.replaced = ", as its parameters were wrapped anew"
        m.close()

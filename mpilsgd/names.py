"""The names of tensors in their modules, and what two ranks say of theirs."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from torch import Tensor, nn


@contextmanager
def without_collector() -> Iterator[None]:
    """Many small objects are made that all stay: the collector would walk over everything alive again and again."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


@without_collector()
def find_modules(parameters: Iterable[Tensor]) -> list[nn.Module]:
    """The largest live modules all of whose trainable parameters (at least one) are among `parameters`.

    An optimizer knows parameters only; this finds their names and the model's buffers. The order does not depend on
    that of the parameters (some build their groups from sets), except among modules of one class whose parameters have
    the same names and shapes: they come in the order of their first parameter.
    """
    order = {id(p): i for i, p in reversed(list(enumerate(parameters)))}
    things = gc.get_objects()
    # A check of types, not isinstance: that would call into proxies and half-built objects.
    kinds = {kind for kind in set(map(type, things)) if issubclass(kind, nn.Module)}
    live = [thing for thing in things if type(thing) in kinds and "_modules" in thing.__dict__]
    inside = {id(child) for module in live for child in module.children()}
    todo, seen = [module for module in live if id(module) not in inside], set[int]()
    found: dict[nn.Module, int] = {}
    while todo:
        module = todo.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        ids = [id(p) for p in module.parameters() if p.requires_grad]
        if ids and all(i in order for i in ids):
            found[module] = min(order[i] for i in ids)
        else:
            todo.extend(module.children())
    covered = {id(m) for outer in found for m in outer.modules() if m is not outer}
    largest = sorted((m for m in found if id(m) not in covered), key=found.__getitem__)
    return sorted(largest, key=_kind) if len(largest) > 1 else largest


def _kind(module: nn.Module) -> tuple[str, list[tuple[str, tuple[int, ...]]]]:
    named = [(name, tuple(p.shape)) for name, p in module.named_parameters() if p.requires_grad]
    return type(module).__name__, named


def parameter_names(modules: Iterable[nn.Module]) -> dict[int, str]:
    """id -> name of all parameters, then all buffers, in the modules' order.

    Of several modules with tensors of their own, the names begin with the class, and with a number where two are of
    one class: "Encoder.0.weight", "Tower[1].0.weight".
    """
    own, taken = [], set[int]()
    for module in modules:
        parts = [
            [(id(t), name) for name, t in named if id(t) not in taken]
            for named in (module.named_parameters(), module.named_buffers())
        ]
        taken.update(i for part in parts for i, _ in part)
        if any(parts):
            own.append((type(module).__name__, parts))
    all_kinds, names = [kind for kind, _ in own], dict[int, str]()
    for part in range(2):
        for k, (kind, parts) in enumerate(own):
            twin = f"[{all_kinds[:k].count(kind)}]" if all_kinds.count(kind) > 1 else ""
            prefix = f"{kind}{twin}." if len(own) > 1 else ""
            names.update((i, prefix + name) for i, name in parts[part])
    return names


def canonical(
    parameters: Iterable[Tensor], modules: Iterable[nn.Module]
) -> tuple[list[Tensor], dict[int, str]]:
    """The parameters, each once, in an order that all ranks agree on, and the names of the modules' tensors by id.

    If every parameter has a name the order is that of the modules; else it is the given one.
    """
    ordered = list({id(p): p for p in parameters}.values())
    names = parameter_names(modules)
    if all(id(p) in names for p in ordered):
        rank = {i: place for place, i in enumerate(names)}
        ordered.sort(key=lambda p: rank[id(p)])
    return ordered, names


class Described(NamedTuple):
    """A tensor as one rank tells another of it; `place` is where it lies: strides, start, slot of its gradient."""

    kind: str  # "parameter" or "buffer"
    name: str | None  # in its module
    text: str  # shape and dtype
    place: tuple[tuple[int, ...], int, int]


def common_prefix(rows: Sequence[Described]) -> str:
    """What the names of all parameters begin with, in whole parts: "_orig_mod.", "module."."""
    names = [row.name.split(".") for row in rows if row.kind == "parameter" and row.name]
    n = 0
    while names and all(len(name) > n + 1 and name[n] == names[0][n] for name in names):
        n += 1
    return "".join(part + "." for part in names[0][:n]) if n else ""


def without_prefix(rows: Sequence[Described]) -> list[Described]:
    """The rows with names that do not begin with the common prefix."""
    prefix = common_prefix(rows)
    return [row._replace(name=row.name.removeprefix(prefix) if row.name else None) for row in rows]


def first_difference(here: Sequence[Described], there: Sequence[Described], rank: int) -> str:
    """What differs first between rank 0's `Plan.described()` and another rank's; tensors are matched by their names."""
    if common_prefix(here) != common_prefix(there):
        here, there = without_prefix(here), without_prefix(there)
    one, two = _labelled(here), _labelled(there)
    for label, row in {**two, **one}.items():
        if label not in one or label not in two:
            has, lacks = (0, rank) if label in one else (rank, 0)
            only = [
                other
                for other in (two if label in one else one)
                if other not in (one if label in one else two)
            ]
            instead = f", which has {only[0]}" if only else ""
            return f"{label} ({row.text}) is there on rank {has}, but not on rank {lacks}{instead}"
    for label, a in one.items():
        b = two[label]
        if a.text != b.text:
            return f"{label} is {a.text} on rank 0 and {b.text} on rank {rank}"
        if a.place[0] != b.place[0]:
            return f"{label} has strides {a.place[0]} on rank 0 and {b.place[0]} on rank {rank}"
    for first, second in zip(one, two, strict=True):
        if first != second:
            return f"{first} comes on rank 0 where {second} comes on rank {rank}"
    return f"other tensors share their memory on rank {rank} than on rank 0"


def _labelled(rows: Sequence[Described]) -> dict[str, Described]:
    count = Counter[str]()
    labelled = {}
    for row in rows:
        labelled[f"{row.kind} {count[row.kind] if row.name is None else row.name}"] = row
        count[row.kind] += 1
    return labelled

"""What a rule keeps, by name: allocated, saved, loaded and freed for it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

if TYPE_CHECKING:
    from mpilsgd.exchange.method import Method

PER = ("worker", "group", "all")
STARTS = ("x", "mean", 0)


class Vector(Mapping[torch.dtype, torch.Tensor]):
    """A named vector as long as what is exchanged of x, one tensor a dtype of the model.

    per: "worker" (private), "group" (one a group: all its workers hold the same) or "all" (one in all). The last two
    lie once on each island, or in parts, one an island, as the exchange has it.
    start: "x" (this worker's start), "mean" (of the workers' starts) or 0. wide: float32 for half types.
    """

    def __init__(self, name: str, per: str, start: Any, wide: bool):
        if per not in PER or start not in STARTS:
            raise TypeError(
                f"vector({name!r}): per must be one of {PER} and start one of {STARTS}, not {per!r} and {start!r}"
            )
        if start == "x" and per != "worker":
            raise TypeError(f'vector({name!r}): start="x" is a worker\'s own; take "mean" with per={per!r}')
        self.name, self.per, self.start, self.wide = name, per, start, wide
        self.memory: dict[torch.dtype, torch.Tensor] = {}

    def kind(self, dtype: torch.dtype) -> torch.dtype:
        """The type that this vector has where x is of `dtype`."""
        return accumulation_dtype(dtype) if self.wide else dtype

    def __getitem__(self, dtype: torch.dtype) -> torch.Tensor:
        return self.memory[dtype]

    def __iter__(self) -> Iterator[torch.dtype]:
        return iter(self.memory)

    def __len__(self) -> int:
        return len(self.memory)


NOTHING = "nothing"  # that a span is about


class Span(NamedTuple):
    """A window's elements from start to stop.

    name: of those whose means follow each other. about: what the mean is near of: a vector that all hold alike, the
    last mean (None), or nothing, as that of gradients.
    """

    window: Any
    start: int
    stop: int
    name: str = ""
    about: Any = None


def allot(m: Method, v: Vector) -> None:
    """A vector that is private, or lies once on each island. Collective."""
    for d, x in m.x.items():
        if v.per == "worker":
            v.memory[d] = torch.zeros(m.n[d], dtype=v.kind(d), device=m.device)
            continue
        level = m.fabric.group if v.per == "group" else m.fabric.world
        window = m.fabric.place.common(level.channel, v.kind(d), x.mine.numel())
        m.windows.setdefault(v.name, {})[d] = window
        v.memory[d] = window.views[0][: m.n[d]]


def save(vector: Mapping[Any, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {str(d): v.clone() for d, v in vector.items()}


def load(vector: Mapping[Any, torch.Tensor], saved: Mapping[str, torch.Tensor]) -> None:
    for d, v in vector.items():
        v.copy_(saved[str(d)])


def shapes(vectors: Mapping[str, Mapping[Any, torch.Tensor]]) -> dict[str, dict[str, int]]:
    """What must be equal for a saved state to fit."""
    return {name: {str(d): v.numel() for d, v in of.items()} for name, of in vectors.items()}


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Half types are summed in float32."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype

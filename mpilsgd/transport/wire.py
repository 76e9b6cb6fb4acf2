"""How vectors travel between islands: as they are, rounded to a narrower type, or in a few bits a value."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from mpilsgd import blocks
from mpilsgd.devices import finish
from mpilsgd.extension import HOST, device_of, place_of

BITS = {"int8": 8, "int4": 4}  # by the name of the type


class Wire:
    """Vectors of `dtype` travel as `travels`.

    Attributes: block: parts of a vector are cut at multiples of so many elements; plain: it travels as it is; coded: in
    few bits, which whole vectors and sums bear only with what is kept of them (`Kept`).
    reaches: MPI sends from and receives into the memory of devices; else vectors travel through the host's.
    """

    block, coded = 1, False

    def __init__(self, dtype: torch.dtype, travels: torch.dtype, reaches: bool = False):
        self.dtype, self.travels, self.reaches = dtype, travels, reaches
        self.plain = travels is dtype

    def nbytes(self, numel: int) -> int:
        """Of so many elements, from a multiple of `block` on."""
        return numel * self.travels.itemsize

    def most(self, nbytes: int) -> int:
        """Elements, in whole blocks, that fit into so many bytes."""
        return max(nbytes // self.travels.itemsize, 1)

    def direct(self, vector: torch.Tensor, mapped: bool = False) -> bool:
        """Whether the vector's own memory can be sent and received into; mapped: it is another process'."""
        return self.plain and (place_of(vector) == HOST or (self.reaches and not mapped))

    def staging(self, vector: torch.Tensor, nbytes: int) -> torch.Tensor:
        """Bytes in which the vector's elements travel."""
        if self.reaches:
            return torch.empty(nbytes, dtype=torch.uint8, device=place_of(vector))
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=vector.is_cuda)

    def settle(self, memory: torch.Tensor) -> None:
        """MPI, which knows of no streams, may have this memory when it returns."""
        if device_of(memory) >= 0:
            finish(place_of(memory))

    def encode(self, x: torch.Tensor, codes: torch.Tensor, **kept: Any) -> None:
        """codes <- x. In few bits what is kept counts: see `blocks.encode`, and `blocks.decode`."""
        codes.view(self.travels).copy_(x)

    def decode(
        self,
        codes: torch.Tensor,
        out: torch.Tensor | None,
        base: torch.Tensor | None = None,
        weight: float = 1.0,
        add: bool = False,
        follow: bool = False,
    ) -> None:
        """out <- what came, or out + it;  follow: base <- it / weight where that is finite."""
        came = codes.view(self.travels)
        if out is not None and add:
            out += came.to(place_of(out))
        elif out is not None:
            out.copy_(came)
        if base is not None and follow:
            known = came.to(place_of(base), base.dtype) / weight
            base.copy_(torch.where(torch.isfinite(known), known, base))


class Blocks(Wire):
    """In 8 or 4 bits a value, and a scale for every block of them: see `blocks`."""

    block, coded, plain = blocks.BLOCK, True, False

    def __init__(self, dtype: torch.dtype, bits: int, reaches: bool = False):
        self.dtype, self._bits, self.reaches = dtype, bits, reaches
        self._block_bytes = self.nbytes(self.block)

    def nbytes(self, numel: int) -> int:
        return blocks.nbytes(numel, self.dtype, self._bits)

    def most(self, nbytes: int) -> int:
        return max(nbytes // self._block_bytes, 1) * self.block

    def encode(self, x: torch.Tensor, codes: torch.Tensor, **kept: Any) -> None:
        place = place_of(x)
        here = codes if place == place_of(codes) else torch.empty_like(codes, device=place)
        blocks.encode(here, x, self._bits, **kept)
        if here is not codes:
            codes.copy_(here)

    def decode(self, codes: torch.Tensor, out: torch.Tensor | None, *args: Any, **kept: Any) -> None:
        x = kept["base"] if out is None else out
        blocks.decode(codes.to(place_of(x)), out, self._bits, *args, **kept)


def wire_of(dtype: torch.dtype, across: torch.dtype | str | None, reaches: bool = False) -> Wire:
    """For vectors of `dtype` under the topology's across_dtype `across`; what is as narrow already stays as it is."""
    if isinstance(across, str):
        return Blocks(dtype, BITS[across], reaches)
    return Wire(dtype, dtype if across is None or across.itemsize >= dtype.itemsize else across, reaches)


@dataclasses.dataclass
class Stream:
    """Sums that follow each other: what is kept of one belongs to the next of the same name.

    weight, count: of a mean, the workers that this island's part of the sum is of, and those of all; it travels as
    the change since the last mean. Sums of differences, and gradients, have none. about: a vector, the same on all
    islands, to go by in place of the last mean.
    """

    name: str
    weight: float = 0.0
    count: float = 0.0
    about: torch.Tensor | None = None


@dataclasses.dataclass
class Kept:
    """What the first rank of an island keeps of a stream; on other ranks nothing has an element.

    residual: what was not sent yet of a sum, to be sent with the next one (error feedback): of the other islands'
    slices what this island owes to their sums, of its own slice what the sum that it sent back owes to all. base: what
    all know of a vector that travels by its changes, the same bits on every island. known: whether it is there; the
    first vector goes as it is.
    """

    residual: torch.Tensor
    base: torch.Tensor
    known: bool = False


@dataclasses.dataclass
class Change:
    """How one sum travels: a stream's numbers with what is kept of it."""

    residual: torch.Tensor
    base: torch.Tensor | None
    weight: float
    count: float
    follow: bool

    def of(self, a: int, b: int) -> torch.Tensor | None:
        return None if self.base is None else self.base[a:b]


class Streams:
    """Those of a level, by name. keeps: this rank is the first of its island."""

    def __init__(self, keeps: bool):
        self._keeps = keeps
        self._kept: dict[str, Kept] = {}

    def of(
        self, name: str, vector: torch.Tensor, residual: bool = False, base: bool = False
    ) -> tuple[Kept, bool]:
        """What is kept of a stream, and whether all know what its next vector goes by; from then on they do."""
        if name not in self._kept:
            wide = torch.promote_types(vector.dtype, torch.float32)
            n = vector.numel() * self._keeps
            zeros = [
                torch.zeros(n * there, dtype=wide, device=place_of(vector)) for there in (residual, base)
            ]
            self._kept[name] = Kept(zeros[0], zeros[1])
        kept = self._kept[name]
        known, kept.known = kept.known or not base, True
        return kept, known

    def change(self, stream: Stream, span: tuple[int, int], vector: torch.Tensor) -> tuple[Change, bool]:
        by_last = stream.count > 0 and stream.about is None
        kept, known = self.of(f"{stream.name} {span}", vector, residual=True, base=by_last)
        base = kept.base if by_last else stream.about
        return Change(kept.residual, base, stream.weight, stream.count or 1.0, by_last), known

    def state(self) -> dict[str, Any]:
        return {name: (k.residual.clone(), k.base.clone(), k.known) for name, k in self._kept.items()}

    def load(self, state: dict[str, Any], device: torch.device) -> None:
        self._kept = {
            name: Kept(residual.to(device).clone(), base.to(device).clone(), known)
            for name, (residual, base, known) in state.items()
        }

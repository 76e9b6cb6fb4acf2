"""Vectors that belong to nobody: each island keeps a part, and every rank can work on all of them in its turn."""

from __future__ import annotations

import dataclasses
from collections.abc import Generator, Sequence
from typing import Any

import torch

from mpilsgd.comm.coded import Coded
from mpilsgd.comm.mpi import MPI
from mpilsgd.comm.onesided import Turns, expose, transfer
from mpilsgd.comm.windows import Window

_ALIGN = 16  # elements: whole cache lines
_PIECE = 1 << 30  # bytes a message: counts are C ints


@dataclasses.dataclass
class Shard:
    """One island's part, in this rank's turn.

    Attributes: index; ticket: the number of the turn; updates: those of the shard before this one, if it counts;
    spans: the elements of each dtype's vector; vectors: by name and the dtype of the workers' vectors.
    """

    index: int
    ticket: int
    spans: dict[torch.dtype, tuple[int, int]]
    vectors: dict[str, dict[torch.dtype, torch.Tensor]]


class Shards:
    """Named vectors as long as the workers', cut into one shard an island, and the turns at each.

    In its own island a rank works on the shard where it lies; that of another is fetched, worked on and put back, all
    in its turn, so that an exchange is atomic a shard. Window rules: in a turn nobody else touches the shard through
    any window, and both kinds are synchronised (`Win.Sync`, `Flush`) before the turn is passed on.

    On devices that reach each other the only shard lies in their memory, where kernels work on it in the order of the
    turns. Several shards lie in the host's: one-sided operations of MPI do not take devices' memory.

    Where vectors travel between islands in a narrower type, shards are kept in it; what rounding takes from a worker's
    change is added to its next one (error feedback), so that nothing is lost for good. In few bits they are `Coded`.

    Args:
        sizes: elements of each dtype of the workers' vectors; kinds: for each name, the type its vectors have for a
            worker's dtype.
        device: where the workers compute.

    Collective: creation, `collect`, `free`.
    """

    def __init__(
        self,
        fabric: Any,
        sizes: dict[torch.dtype, int],
        kinds: dict[str, dict[torch.dtype, torch.dtype]],
        device: torch.device,
    ):
        self._level = level = fabric.world
        self._fabric, self._device = fabric, device
        self.turns = Turns(level, level.channel.heads_ranks)
        self._spans: list[dict[torch.dtype, tuple[int, int]]] = []
        for k in range(level.n_islands):
            self._spans.append({d: _part(n, k, level.n_islands) for d, n in sizes.items()})
        self.own: dict[str, dict[torch.dtype, Window]] = {}
        self._remote: dict[tuple[str, torch.dtype], MPI.Win] = {}
        self._fetched: dict[str, dict[torch.dtype, torch.Tensor]] = {}
        self.kinds = kinds
        self.residuals: dict[tuple[str, torch.dtype, Any], torch.Tensor] = {}  # by the shard, too
        self._coded: dict[tuple[str, torch.dtype], Coded] = {}
        self._on_host = fabric.on_host
        hosted = self._on_host or level.n_islands > 1
        self._order = None if hosted or level.size == 1 else fabric.place.turns(level.channel)
        for name, of in kinds.items():
            self.own[name], self._fetched[name] = {}, {}
            for d, kind in of.items():
                wire = fabric.wire(kind)
                if level.n_islands > 1 and wire.coded:
                    self._add_coded(name, d, Coded(fabric, wire, kind, [spans[d] for spans in self._spans]))
                    continue
                if level.n_islands > 1 and not wire.plain:
                    for k, spans in enumerate(self._spans):
                        self.residuals[name, d, k] = torch.zeros(spans[d][1] - spans[d][0], dtype=kind)
                    kind = wire.travels
                a, b = self._spans[level.channel.island][d]
                window = self.own[name][d] = fabric.place.common(level.channel, kind, b - a, host=hosted)
                if level.n_islands > 1:
                    memory = window.mine if level.local_ranks[0] == level.rank else torch.empty(0, dtype=kind)
                    exposed = memory.view(torch.uint8).numpy() if memory.numel() else MPI.BOTTOM
                    self._remote[name, d] = expose(exposed, level.comm)
                    longest = max(stop - start for start, stop in (s[d] for s in self._spans))
                    self._fetched[name][d] = torch.empty(longest, dtype=kind)
        # whether a turn's work is done on copies, new ones each time
        self.copies = (hosted and not self._on_host) or bool(self.residuals)
        self.waited = 0.0  # seconds, in all turns so far
        self._fetched_bytes = 0

    @property
    def moved(self) -> int:
        """Bytes fetched from other islands."""
        return self._fetched_bytes + sum(coded.fetched for coded in self._coded.values())

    def _add_coded(self, name: str, d: torch.dtype, coded: Coded) -> None:
        self._coded[name, d], self.own[name][d] = coded, coded.window
        for part in ("base", "residual", "moves"):
            self.residuals[name, d, part] = getattr(coded, part)

    def start(self, name: str, x: dict[torch.dtype, torch.Tensor]) -> None:
        """A vector begins as x is, which all ranks hold alike. On every rank; nobody may be in a turn."""
        for d, window in self.own[name].items():
            if (name, d) in self._coded:
                self._coded[name, d].base.copy_(x[d])
            elif self._level.local_ranks[0] == self._level.rank:
                window.mine.copy_(x[d][slice(*self.span(d))])

    @property
    def count(self) -> int:
        return len(self._spans)

    def span(self, dtype: torch.dtype) -> tuple[int, int]:
        """The elements of this island's shard."""
        return self._spans[self._level.channel.island][dtype]

    def visit(self, tickets: Sequence[int] | None, round_robin: bool) -> Generator[Shard, None, None]:
        """Takes this rank's turn at every shard, one after the other, its own island's first.

        What the caller has done to the vectors when it asks for the next is what the others will see. The turn is
        passed on also if the caller raises: close the iterator then (`contextlib.closing`).
        """
        first = 0 if round_robin else self._level.channel.island
        for k in [*range(first, self.count), *range(first)]:
            ticket, waited = self.turns.take(k, None if tickets is None else tickets[k], round_robin)
            self.waited += waited
            try:
                if self._order is not None:
                    self._order.begins()
                yield self._open(k, ticket)
                self._close(k)
            finally:
                try:
                    if self._order is not None:
                        self._order.ends()
                finally:
                    self.turns.pass_on(k, ticket, round_robin)

    def _open(self, k: int, ticket: int) -> Shard:
        here = k == self._level.channel.island
        vectors: dict[str, dict[torch.dtype, torch.Tensor]] = {}
        for name, windows in self.own.items():
            vectors[name] = {}
            for d, window in windows.items():
                if (name, d) in self._coded:
                    vectors[name][d] = self._coded[name, d].open(k)
                elif here:
                    window.sync()
                    vectors[name][d] = window.views[0]
                else:
                    a, b = self._spans[k][d]
                    vectors[name][d] = self._fetched[name][d][: b - a]
                    self._transfer(k, name, d, vectors[name][d], MPI.Win.Get)
        if self.copies:
            for name, of in vectors.items():
                vectors[name] = {d: v.to(self._device, self.kinds[name][d]) for d, v in of.items()}
        self._working = vectors
        return Shard(k, ticket, self._spans[k], vectors)

    def _close(self, k: int) -> None:
        here = k == self._level.channel.island
        for name, windows in self.own.items():
            for d, window in windows.items():
                vector = self._working[name][d]
                if (name, d) in self._coded:
                    self._coded[name, d].close(k, vector.cpu())
                    continue
                if self.copies:
                    host = window.views[0] if here else self._fetched[name][d][: vector.numel()]
                    residual = self.residuals.get((name, d, k))
                    if residual is not None:
                        residual += vector.cpu()
                        residual -= host.copy_(residual)
                    else:
                        host.copy_(vector)
                    vector = host
                if here:
                    window.sync()
                else:
                    self._transfer(k, name, d, vector, MPI.Win.Put)
        if self._remote and here:
            for win in self._remote.values():
                win.Sync()

    def _transfer(self, k: int, name: str, d: torch.dtype, vector: torch.Tensor, operation: Any) -> None:
        transfer(self._remote[name, d], self._level.channel.heads_ranks[k], vector, operation)
        if operation is MPI.Win.Get:
            self._fetched_bytes += vector.numel() * vector.element_size()

    def collect(self, name: str, dtype: torch.dtype, whole: Window | None) -> torch.Tensor:
        """All of a vector, readable on this island. Collective; nobody may be in a turn.

        whole: where it is put together, one an island; not needed on a single island.
        """
        level, own = self._level, self.own[name][dtype]
        if self.count == 1:
            return own.views[0]
        assert whole is not None
        vector = whole.views[0]
        if level.is_head and (name, dtype) in self._coded:
            host = vector if self._on_host else torch.empty(vector.numel(), dtype=vector.dtype)
            self._coded[name, dtype].collect(host)
            if host is not vector:
                vector.copy_(host)
        elif level.is_head:
            for k, spans in enumerate(self._spans):
                a, b = spans[dtype]
                part = vector[a:b]
                direct = part.dtype is own.mine.dtype and self._on_host
                stage = part if direct else torch.empty(b - a, dtype=own.mine.dtype)
                if k == level.channel.island:
                    stage.copy_(own.mine)
                data = stage.view(torch.uint8).numpy()
                for start in range(0, data.size, _PIECE):
                    level.channel.heads.Bcast([data[start : start + _PIECE], MPI.BYTE], root=k)
                part.copy_(stage)
        level.fence()
        return vector

    def free(self) -> None:
        """The vectors are freed with the fabric, afterwards."""
        for win in self._remote.values():
            win.Unlock_all()
            win.Free()
        for coded in self._coded.values():
            coded.free()
        self.turns.free()
        self.own, self._fetched, self._working, self._coded = {}, {}, {}, {}


def _part(n: int, k: int, parts: int) -> tuple[int, int]:
    """The k-th of the parts of n elements."""
    step = -(-n // parts)
    step = -(-step // _ALIGN) * _ALIGN
    return min(k * step, n), min((k + 1) * step, n)

"""Snapshots that workers publish and read without waiting for each other."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from mpilsgd.comm.mpi import MPI
from mpilsgd.comm.onesided import Board, expose, transfer
from mpilsgd.comm.waiting import wait_until

Vectors = dict[torch.dtype, torch.Tensor]


class Snapshots:
    """Of every worker the last two versions of its vectors, and a number with each.

    Version v lies in buffer v mod 2. Its owner announces a version, writes it, and only then counts it as published;
    who has copied version v has it whole if nothing later than v + 1 is announced by then. So readers never block
    the owner, and read again in the rare case that it went by them twice. In an island snapshots are read where they
    lie; others are fetched, and where they travel in few bits, as the difference from `bases`, which all hold alike;
    what a version's codes lack is added to the next one's (`residuals`).

    Args: sizes: elements of each dtype's vector. Collective: creation and `free`.
    """

    ANNOUNCED, PUBLISHED, DONE = range(3)
    NUMBER = 3  # and 4: those of the two buffers

    def __init__(self, fabric: Any, sizes: dict[torch.dtype, int]):
        self._level = level = fabric.world
        self._sizes, self._on_host = sizes, fabric.on_host
        self.board = Board(level.comm, 5, level.n_islands == 1)
        self._windows = [
            {d: fabric.place.vector(d, n, host=True) for d, n in sizes.items()} for _ in range(2)
        ]
        self._remote: list[dict[torch.dtype, MPI.Win]] = [{}, {}]
        self._narrow: list[dict[torch.dtype, torch.Tensor]] = [
            {},
            {},
        ]  # what others fetch, in a narrower type
        self._wire = {d: fabric.wire(d) for d in sizes}
        coded = {d: n for d, n in sizes.items() if self._wire[d].coded and level.n_islands > 1}
        wide = {d: torch.promote_types(d, torch.float32) for d in coded}
        self.bases, self.residuals = (
            {d: torch.zeros(n, dtype=wide[d]) for d, n in coded.items()} for _ in range(2)
        )
        if level.n_islands > 1:
            for windows, remote, narrow in zip(self._windows, self._remote, self._narrow, strict=True):
                for d, window in windows.items():
                    exposed = window.mine
                    if not self._wire[d].plain:
                        size = self._wire[d].nbytes(window.mine.numel())
                        exposed = narrow[d] = torch.zeros(size, dtype=torch.uint8)
                    memory = exposed.view(torch.uint8).numpy() if exposed.numel() else MPI.BOTTOM
                    remote[d] = expose(memory, level.comm)

    def publish(self, vectors: Vectors, number: float, may_overwrite: Callable[[int], bool]) -> int:
        """Publishes this worker's vectors; the version. may_overwrite(v): asked until version v may go."""
        rank, board = self._level.rank, self.board
        version = board.read(rank, self.PUBLISHED) + 1
        wait_until(lambda: may_overwrite(version - 2))
        board.write(rank, self.ANNOUNCED, version)
        board.sync()
        for d, window in self._windows[version % 2].items():
            window.mine.copy_(vectors[d])
            window.sync()
        for d, narrow in self._narrow[version % 2].items():
            kept = {"base": self.bases[d], "residual": self.residuals[d]} if d in self.bases else {}
            self._wire[d].encode(self._windows[version % 2][d].mine, narrow, **kept)
        for win in self._remote[version % 2].values():
            win.Sync()
        board.write(rank, self.NUMBER + version % 2, _bits(number))
        board.write(rank, self.PUBLISHED, version)
        return version

    def newest(self, rank: int) -> tuple[int, float]:
        """The last version of a worker (0: none yet) and its number."""
        version = self.board.read(rank, self.PUBLISHED)
        return version, _number(self.board.read(rank, self.NUMBER + version % 2)) if version else 0.0

    def copy(self, rank: int, version: int, into: Vectors) -> bool:
        """Copies a worker's version, for as long as it is there; whether it is whole."""
        level = self._level
        here = rank in level.local_ranks
        self.board.sync()
        for d, window in self._windows[version % 2].items():
            window.sync()
            if here:
                into[d].copy_(window.views[level.seats[rank]])
            else:
                wire = self._wire[d]
                direct = wire.direct(into[d])
                size = wire.nbytes(self._sizes[d])
                host = into[d].view(torch.uint8) if direct else torch.empty(size, dtype=torch.uint8)
                transfer(self._remote[version % 2][d], rank, host, MPI.Win.Get)
                if not direct:
                    self._read(d, host, into[d])
        self.board.sync()
        return self.board.read(rank, self.ANNOUNCED) <= version + 1

    def _read(self, d: torch.dtype, codes: torch.Tensor, into: torch.Tensor) -> None:
        if d not in self.bases:
            self._wire[d].decode(codes, into)
            return
        host = into if self._on_host else torch.empty(into.numel(), dtype=d)
        self._wire[d].decode(codes, host, base=self.bases[d])
        if host is not into:
            into.copy_(host)

    def last(self) -> tuple[float, Vectors, Vectors] | None:
        """A copy of this worker's last snapshot, and of what others fetch of it."""
        version, number = self.newest(self._level.rank)
        if not version:
            return None
        own = {d: w.mine.clone() for d, w in self._windows[version % 2].items()}
        return number, own, {d: v.clone() for d, v in self._narrow[version % 2].items()}

    def restart(self, snapshot: tuple[float, Vectors, Vectors] | None) -> None:
        """Withdraws what this worker has published, for this snapshot. Between barriers: nobody may be reading."""
        self.board.write(self._level.rank, self.PUBLISHED, 0)
        self.board.write(self._level.rank, self.ANNOUNCED, 0)
        if snapshot is not None:
            residuals = {d: v.clone() for d, v in self.residuals.items()}
            version = self.publish(snapshot[1], snapshot[0], lambda _: True)
            for kept, saved in ((self._narrow[version % 2], snapshot[2]), (self.residuals, residuals)):
                for d, v in kept.items():
                    v.copy_(saved[d])
            for win in self._remote[version % 2].values():
                win.Sync()

    def done(self, rank: int) -> int:
        """How many copies a worker has finished."""
        return self.board.read(rank, self.DONE)

    def finish(self) -> None:
        """This worker has finished a copy."""
        self.board.add(self._level.rank, self.DONE, 1)

    def free(self) -> None:
        """The buffers are freed with the fabric, afterwards."""
        for remote in self._remote:
            for win in remote.values():
                win.Unlock_all()
                win.Free()
        self.board.free()
        self._windows, self._remote, self._narrow = [], [], []


def _bits(number: float) -> int:
    return int(struct.unpack("<q", struct.pack("<d", number))[0])


def _number(bits: int) -> float:
    return float(np.array([bits], np.int64).view(np.float64)[0])

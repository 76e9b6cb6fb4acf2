"""Vectors in MPI-3 shared windows: a rank reads and writes those of its node where they lie."""

from __future__ import annotations

import torch

from mpilsgd.comm import Channel, Window


class SharedWindows:
    """Where the vectors of an island lie. Every transport has these verbs.

    vector: one a rank, seen by the island. common: one for those of a level on this island. host: in the host's
    memory wherever the workers compute. order: what makes the stores before a level's meeting seen after it; its
    `before` and `after` are told whether the ranks meet through MPI. free. All are collective over the island's ranks,
    `common` and `order` over those of the level on it.
    """

    def __init__(self, island: Channel):
        self._island = island
        self._windows: list[Window] = []

    def vector(self, dtype: torch.dtype, numel: int, host: bool = True) -> Window:
        return self._keep(Window(self._island.local, dtype, numel))

    def common(self, level: Channel, dtype: torch.dtype, numel: int, host: bool = True) -> Window:
        return self._keep(Window(level.local, dtype, numel, common=True))

    def _keep(self, window: Window) -> Window:
        self._windows.append(window)
        return window

    def order(self, level: Channel) -> SharedWindows:
        return self

    def before(self, through_mpi: bool) -> None:
        """A memory barrier, which other meetings have in them."""
        if through_mpi:
            for window in self._windows:
                window.sync()

    after = before

    def free(self) -> None:
        for window in self._windows:
            window.free()
        self._windows = []

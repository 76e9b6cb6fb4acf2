"""Vectors in memory of each rank's own, on any device: every rank is an island, and all that moves are messages."""

from __future__ import annotations

import torch

from mpilsgd.comm import Channel
from mpilsgd.extension import HOST


class Private:
    """A vector that only its owner sees."""

    def __init__(self, dtype: torch.dtype, numel: int, device: torch.device, common: bool = False):
        self.mine = torch.zeros(numel, dtype=dtype, device=device)
        self.views, self.common = [self.mine], common

    def sync(self) -> None: ...


class Messages:
    """The verbs of `SharedWindows` where nothing is shared."""

    def __init__(self, device: torch.device):
        self._device = device

    def vector(self, dtype: torch.dtype, numel: int, host: bool = False) -> Private:
        return Private(dtype, numel, HOST if host else self._device)

    def common(self, level: Channel, dtype: torch.dtype, numel: int, host: bool = False) -> Private:
        return Private(dtype, numel, HOST if host else self._device, common=True)

    def order(self, level: Channel) -> Messages:
        return self

    def before(self, through_mpi: bool) -> None: ...

    after = before

    def free(self) -> None: ...

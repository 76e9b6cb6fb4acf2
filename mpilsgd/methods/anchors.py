"""Leaders as they were at the last round, toward which `LSGD(when="every_step")` pulls at every step."""

from __future__ import annotations

from typing import Any

import torch

from mpilsgd import kernels
from mpilsgd.comm import Level, Window
from mpilsgd.flat import FlatParameters
from mpilsgd.methods.msgd import MSGD

Windows = dict[torch.dtype, Window]


class Anchors:
    """One vector a leader and island: the local leader's, the global one's; each there once it was elected.

    Args: kept: for each the level it leads, its vectors and the rate of the pull.
    """

    def __init__(self, x: Windows, n: dict[torch.dtype, int], kept: list[tuple[Level, Windows, float]]):
        self._x, self._n, self._kept = x, n, kept
        self._there = [False] * len(kept)

    def keep(self, leaders: tuple[int | None, int | None]) -> None:
        """Keeps the leaders' parameters as they are now (None: no change). Collective over their levels."""
        for k, ((level, windows, _), leader) in enumerate(zip(self._kept, leaders, strict=True)):
            if leader is None:
                continue
            self._there[k] = True
            for d, x in self._x.items():
                level.bring(x, leader, windows[d])
                if level.rank == leader:
                    windows[d].views[0].copy_(x.mine)
            level.table([0.0])

    def __bool__(self) -> bool:
        return any(self._there)

    def _vectors(self, d: torch.dtype) -> list[tuple[torch.Tensor, float]]:
        kept = zip(self._kept, self._there, strict=True)
        return [(windows[d].views[0], rate) for (_, windows, rate), there in kept if there]

    def pull(self, start: dict[torch.dtype, int]) -> None:
        """Pulls what is exchanged, from the element `start` of each dtype on."""
        for d, window in self._x.items():
            a, b = start[d], self._n[d]
            vectors = [(v[a:b], rate) for v, rate in self._vectors(d)]
            (leader, r), (other, s) = vectors[0], vectors[1] if len(vectors) > 1 else (None, 0.0)
            kernels.pull(window.mine[a:b], leader, r, other, s)

    def step(self, optimizer: MSGD, flat: FlatParameters) -> Any:
        """Gradient step and pull in one pass; buffers are pulled by themselves."""
        self.pull(flat.n_parameters)
        kept = [
            ({d: w.views[0] for d, w in windows.items()}, rate)
            for (_, windows, rate), there in zip(self._kept, self._there, strict=True)
            if there
        ]
        return optimizer.step(pulls=lambda p: [(flat.view(p, flats), rate) for flats, rate in kept])

    def state(self) -> dict[str, Any]:
        vectors = [{str(d): w.views[0].clone() for d, w in windows.items()} for _, windows, _ in self._kept]
        return {"there": list(self._there), "vectors": vectors}

    def load(self, state: dict[str, Any]) -> None:
        self._there = list(state["there"])
        for (_, windows, _), saved in zip(self._kept, state["vectors"], strict=True):
            for d, window in windows.items():
                window.views[0].copy_(saved[str(d)])  # the same on every rank of the island

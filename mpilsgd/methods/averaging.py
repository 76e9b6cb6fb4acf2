"""The mean over workers, and the statistics that must be recomputed after it."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch

from mpilsgd import kernels
from mpilsgd.comm import Level, Window

Span = tuple[Window, int, int]  # a window's elements from start to stop


def average(
    level: Level, scratch: dict[torch.dtype, Window], spans: list[Span], active: set[int]
) -> set[int]:
    """Replaces every worker's window[start:stop] by the mean over the active workers.

    Each rank handles its slice of every window on its island; across islands the sums meet in `scratch`.
    Collective, after a barrier; on return all windows hold the mean.

    Returns: the active ranks that had non-finite values. Those values do not count in the mean.
    """
    counted = [r for r in level.local_ranks if r in active]
    bad = np.zeros(level.size)
    for window, start, stop in spans:
        a, b = share(level, start, stop)
        peers = _views(level, window, counted, a, b)
        if level.n_islands == 1:
            moved = kernels.average(peers, stats=True)
            for view in _views(level, window, [r for r in level.local_ranks if r not in active], a, b):
                view.copy_(peers[0])
        else:
            total = scratch[accumulation_dtype(window.mine.dtype)].views[0][a:b]
            moved = kernels.total(total, peers, stats=True) if peers else None
        for i in moved.bad_peers if moved else ():
            bad[counted[i]] = 1.0
        level.count_local((b - a) * window.mine.element_size())
    level.combine(bad)
    excluded = {r for r in range(level.size) if bad[r]}
    if level.n_islands == 1 or excluded >= active:
        return excluded
    for window, start, stop in spans:  # dtypes of one accumulation type take turns in its scratch
        a, b = share(level, start, stop)
        sums = scratch[accumulation_dtype(window.mine.dtype)]
        total = sums.views[0][a:b]
        peers = _views(level, window, [r for r in counted if r not in excluded], a, b)
        if not peers:
            total.zero_()
        elif len(spans) > 1 or excluded:
            kernels.total(total, peers)
        level.allreduce(sums, start, stop)
        kernels.assign(_views(level, window, level.local_ranks, a, b), total, 1.0 / len(active - excluded))
        level.fence()
    return excluded


def share(level: Level, start: int, stop: int) -> tuple[int, int]:
    """This rank's slice of a vector on which the ranks of its island work together."""
    n, i = len(level.local_ranks), level.local_ranks.index(level.rank)
    step = -(-(stop - start) // n)
    step = -(-step // 16) * 16  # whole cache lines
    return min(start + i * step, stop), min(start + (i + 1) * step, stop)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Half types are summed in float32."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def recalibrate(roots: Iterable[torch.nn.Module], batches: Iterable[torch.Tensor | tuple | list]) -> int:
    """Recomputes the BatchNorm statistics as the plain average over the batches; returns how many there were."""
    roots = list(roots)
    modules = [m for root in roots for m in root.modules()]
    norms = [
        m for m in modules if isinstance(m, torch.nn.modules.batchnorm._BatchNorm) and m.track_running_stats
    ]
    momenta = [m.momentum for m in norms]
    tracked = [None if m.num_batches_tracked is None else m.num_batches_tracked.clone() for m in norms]
    modes = [m.training for m in modules]
    seen = 0
    try:
        for m in norms:
            m.reset_running_stats()
            m.momentum = None  # BatchNorm's own word for the plain average
        for root in roots:
            root.train()
        for batch in batches:
            seen += 1
            for root in roots:
                root(batch[0] if isinstance(batch, (tuple, list)) else batch)
    finally:
        for m, momentum, count in zip(norms, momenta, tracked, strict=True):
            m.momentum = momentum
            if count is not None and m.num_batches_tracked is not None:
                m.num_batches_tracked.copy_(count)
        for module, training in zip(modules, modes, strict=True):
            module.training = training
    return seen


def _views(level: Level, window: Window, ranks: Iterable[int], a: int, b: int) -> list[torch.Tensor]:
    return [window.views[level.seats[r]][a:b] for r in ranks]

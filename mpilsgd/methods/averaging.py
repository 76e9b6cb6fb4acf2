"""The mean over workers, and the statistics that must be recomputed after it."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from mpilsgd import kernels
from mpilsgd.comm import Level, Window

Span = tuple[Window, int, int]  # a window's elements from start to stop


def average(level: Level, scratch: dict[torch.dtype, Window], spans: list[Span], counted: set[int]) -> None:
    """Replaces every worker's window[start:stop] by the mean over the counted workers (at least one).

    Each rank handles its slice of every window on its island; across islands the sums meet in `scratch`.
    Collective, after a barrier; on return all windows hold the mean.
    """
    for window, start, stop in spans:  # dtypes of one accumulation type take turns in its scratch
        a, b = share(level, start, stop)
        every = {r: window.views[level.seats[r]][a:b] for r in level.local_ranks}
        peers = [view for r, view in every.items() if r in counted]
        level.count_local((b - a) * window.mine.element_size())
        if level.n_islands == 1:
            kernels.average(peers)
            for r, view in every.items():
                if r not in counted:
                    view.copy_(peers[0])
            continue
        sums = scratch[accumulation_dtype(window.mine.dtype)]
        total = sums.views[0][a:b]
        if peers:
            kernels.total(total, peers)
        else:
            total.zero_()
        for part in level.allreduce(sums, start, stop):
            a, b = share(level, *part)
            views = [window.views[level.seats[r]][a:b] for r in level.local_ranks]
            kernels.assign(views, sums.views[0][a:b], 1.0 / len(counted))
        level.fence()
    level.barrier()


def share(level: Level, start: int, stop: int) -> tuple[int, int]:
    """This rank's slice of a vector on which the ranks of its island work together."""
    n, i = len(level.local_ranks), level.local_ranks.index(level.rank)
    step = -(-(stop - start) // n)
    step = -(-step // 16) * 16  # whole cache lines
    return min(start + i * step, stop), min(start + (i + 1) * step, stop)


def follow(z: torch.Tensor, x: torch.Tensor, rate: float) -> None:
    """z <- z + rate (x - z), z of x's accumulation type: small rates would be lost in a half type."""
    if z.dtype == x.dtype:
        kernels.pull(z, x, rate)
    else:
        z.lerp_(x.to(z.dtype), rate)


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

"""BatchNorm statistics that are recomputed from data."""

from __future__ import annotations

from collections.abc import Iterable

import torch


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

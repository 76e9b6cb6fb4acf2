"""Test loss and test error of the model as it stands."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch.nn import functional

from mpilsgd.comm import Topology
from mpilsgd.train.data import Dataset

_BATCH = 500  # samples at a time


class Result(NamedTuple):
    """Mean cross-entropy, and the share of samples that were classified wrongly."""

    loss: float
    error: float


def evaluate(
    model: torch.nn.Module,
    test: Dataset,
    topology: Topology | None = None,
    autocast: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
) -> Result:
    """Evaluates the whole test set; with a topology each rank takes its share of it (collective).

    autocast: gives what forward pass and loss are computed in. Numbers are taken from the device at the end only.
    """
    rank, size = (topology.world.rank, topology.world.size) if topology is not None else (0, 1)
    loss: Any = 0.0
    wrong: Any = 0
    with evaluating(model), torch.no_grad():
        for indices in torch.arange(rank, len(test), size).split(_BATCH):
            inputs, targets = test.batch(indices)
            with autocast():
                outputs = model(inputs)
                loss = loss + functional.cross_entropy(outputs, targets, reduction="sum").double()
            # argmax of a NaN row is an index all the same: what is not finite is an error
            right = (outputs.argmax(1) == targets) & outputs.isfinite().all(1)
            wrong = wrong + (len(indices) - right.sum())
    own = float(loss), int(wrong)
    parts = [own] if topology is None else topology.allgather(own)
    return Result(sum(part[0] for part in parts) / len(test), sum(part[1] for part in parts) / len(test))


@contextlib.contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode inside, every submodule's own mode afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode

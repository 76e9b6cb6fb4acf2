"""What the model is worth as it stands: test loss and test error, or the user's figures."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from mpilsgd.comm import Topology
from mpilsgd.train.callables import InputError
from mpilsgd.train.samples import Dataset
from mpilsgd.train.task import Classification, Task


class Result(NamedTuple):
    """Means over the test set.

    Attributes:
        loss: the task's, as the mean cross-entropy.
        error: the share of samples that were classified wrongly; None where nothing is classified.
        more: further figures by their names.
    """

    loss: float
    error: float | None = None
    more: dict[str, float] = {}  # noqa: RUF012

    @property
    def judged(self) -> float:
        """What the best has least of: the error, or the loss where nothing is classified."""
        return self.loss if self.error is None else self.error


def evaluate(
    model: torch.nn.Module,
    test: Dataset,
    topology: Topology | None = None,
    autocast: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
    task: Task | None = None,
) -> Result:
    """Evaluates the whole test set; with a topology each rank takes its share of it (collective).

    An InputError, with a topology on every rank, says what is wrong with a sample.

    autocast: gives what forward pass and loss are computed in. Numbers are taken from the device at the end only.
    """
    task = task or Classification(test.classes)
    rank, size = (topology.world.rank, topology.world.size) if topology is not None else (0, 1)
    sums: dict[str, Any] = {}
    count, wrong = 0, None
    try:
        with evaluating(model), torch.no_grad():
            for batch, samples in test.share(rank, size):
                with autocast():
                    found = task.sums(model, batch, samples)
                count += samples
                for name, value in found.items():
                    sums[name] = sums.get(name, 0.0) + value
    except InputError as error:  # of this rank's share: all are to know
        wrong = f"rank {rank}: the test set: {error}"
    own = count, {name: float(value) for name, value in sums.items()}, wrong
    parts = [own] if topology is None else topology.allgather(own)
    for wrong in [wrong for _, _, wrong in parts if wrong]:
        raise InputError(wrong)
    total = sum(samples for samples, _, _ in parts)
    if not total:
        raise InputError("the test set holds no samples")
    names = dict.fromkeys(name for _, part, _ in parts for name in part)
    means = {name: sum(part.get(name, 0.0) for _, part, _ in parts) / total for name in names}
    return Result(means.pop("loss"), means.pop("error", None), means)


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

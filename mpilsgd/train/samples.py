"""What the training loop needs of a data set; and one that lies in memory."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch

from mpilsgd.train.devices import onto
from mpilsgd.train.sampling import Sampler

Batch = Any  # a pair (inputs, targets); for a Task of the user's whatever it takes
Job = tuple[torch.Tensor, torch.Generator | None]  # sample numbers, and random numbers for training


class Reading(NamedTuple):
    """How data of the user's are taken.

    Attributes:
        loss: the configuration's; it says what targets may be.
        classes: how many there are, where the data do not tell.
        workers: processes that read ahead, 0: this one reads.
        batch_size: samples at a time in evaluations.
        rank, size: offered to the user's callable.
    """

    loss: str = "auto"
    classes: int | None = None
    workers: int = 0
    batch_size: int = 500
    rank: int = 0
    size: int = 1


class Dataset:
    """A training or test set.

    Attributes:
        input_shape: of one sample's input; None where that is no tensor.
        classes: how many there are; None where the targets are no classes, or it is not known.
        on_host: whether a batch is put together in the host's memory, whatever the device.
        chunk: samples at a time in evaluations.
        streamed, whole: whether it is iterable, and if so, whether on every rank the whole set.
        stays: whether processes that read it go on from one pass to the next, or end with each.
        check: is given every batch that is read only now, and the sample numbers; its InputError ends the run.
    """

    input_shape: tuple[int, ...] | None
    classes: int | None
    on_host = False
    chunk = 500
    streamed = False
    whole = True
    stays = True
    check: Callable[[Batch, Any], None] = staticmethod(lambda batch, numbers: None)

    def __len__(self) -> int:
        raise NotImplementedError

    @property
    def samples(self) -> int | None:
        """How many there are; None: not known."""
        return len(self)

    def batch(self, indices: torch.Tensor, generator: torch.Generator | None = None) -> Batch:
        """The samples of these numbers; a generator asks for random augmentation (training)."""
        raise NotImplementedError

    def to(self, device: torch.device) -> None:
        """Batches are wanted on this device from now on."""
        raise NotImplementedError

    def stream(self, jobs: Iterable[Job]) -> Iterator[Batch]:
        """The batches of these jobs, one after the other."""
        return (self.batch(*job) for job in jobs)

    def first(self) -> Batch:
        """Two samples, or the only one."""
        return self.batch(torch.arange(min(2, len(self))))

    def training(self, sampler: Any, number: int) -> Iterator[Batch]:
        """A worker's batches without an end, from this one on."""
        return self.stream(_jobs(sampler, number))

    def share(self, rank: int, size: int) -> Iterator[tuple[Batch, int]]:
        """Every size-th sample from this rank on, in batches, and how many each holds."""
        parts = [part for part in torch.arange(rank, len(self), size).split(self.chunk) if len(part)]
        return zip(self.stream((part, None) for part in parts), map(len, parts), strict=True)


def _jobs(sampler: Sampler, number: int) -> Iterator[Job]:
    known, order = -1, torch.empty(0)
    for n in itertools.count(number):
        epoch, batch = divmod(n, sampler.batches * sampler.accumulate)
        if epoch != known:
            known, order = epoch, sampler.epoch(epoch)
        yield order[batch], sampler.augmentation(epoch, batch)


class TensorSet(Dataset):
    """Inputs and targets of the user's that lie in memory; uint8 inputs are brought to [0, 1]."""

    def __init__(self, inputs: torch.Tensor, labels: torch.Tensor, classes: int | None):
        self.inputs, self.labels, self.classes = inputs, labels, classes
        self.input_shape = tuple(inputs.shape[1:])

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device) -> None:
        self.inputs, self.labels = self.inputs.to(device), self.labels.to(device)

    def batch(
        self, indices: torch.Tensor, generator: torch.Generator | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        indices = onto(indices, self.labels.device)
        inputs = self.inputs[indices]
        return (inputs / 255 if inputs.dtype == torch.uint8 else inputs), self.labels[indices]


def moved(batch: Batch, device: torch.device) -> Batch:
    """A nested batch on the device."""
    if isinstance(batch, torch.Tensor):
        return onto(batch, device)
    if isinstance(batch, dict):
        return {key: moved(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(moved(value, device) for value in batch))
    if type(batch) in (list, tuple):
        return type(batch)(moved(value, device) for value in batch)
    return batch.to(device) if hasattr(batch, "to") else batch

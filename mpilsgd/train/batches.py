"""The training batches of a worker, in order; and batches that lie channels last."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from mpilsgd.train.samples import Batch, Dataset
from mpilsgd.train.sampling import generator

_CALIBRATION = 20  # batches a rank


class Batches:
    """Gives each step its batches.

    Args:
        data: the training set; sampler: this worker's part of it.
        ahead: `look_ahead` makes a batch before it is asked for.
    """

    def __init__(self, data: Dataset, sampler: Any, ahead: bool = False):
        self._data, self._sampler, self._ahead = data, sampler, ahead
        self._stream: Iterator[Batch] = iter(())
        self._next = -1  # what the stream gives next
        self._ready: tuple[int, Batch] | None = None

    def take(self, number: int) -> Batch:
        """A batch, counted from 0: the step's, where a step has one."""
        ready, self._ready = self._ready, None
        return ready[1] if ready is not None and ready[0] == number else self._make(number)

    def look_ahead(self, number: int) -> None:
        """Makes the batch of the next step, while a GPU is busy with this one."""
        if self._ahead:
            self._ready = number, self._make(number)

    def calibration(self, step: int, rank: int) -> Iterator[torch.Tensor]:
        """Inputs of this worker's part, for BatchNorm statistics at a step, with random numbers of their own."""
        for batch, indices in enumerate(self._sampler.epoch(step // self._sampler.batches)[:_CALIBRATION]):
            own = generator(self._sampler.seed, "calibration", rank, batch)
            yield self._data.batch(indices, own)[0]

    def _make(self, number: int) -> Batch:
        if number != self._next:
            self._stream = self._data.training(self._sampler, number)
        self._next = number + 1
        return next(self._stream)


class ChannelsLast(Dataset):
    """A data set of images whose batches lie channels last: the values of a pixel beside each other."""

    def __init__(self, data: Dataset):
        self._data = data
        self.input_shape, self.classes = data.input_shape, data.classes
        self.on_host, self.chunk = data.on_host, data.chunk
        self.streamed, self.whole = data.streamed, data.whole

    def __len__(self) -> int:
        return len(self._data)

    @property
    def samples(self) -> int | None:
        return self._data.samples

    def to(self, device: torch.device) -> None:
        self._data.to(device)

    def batch(self, indices: torch.Tensor, generator: torch.Generator | None = None) -> Batch:
        return _last(self._data.batch(indices, generator))

    def first(self) -> Batch:
        return _last(self._data.first())

    def training(self, sampler: Any, number: int) -> Iterator[Batch]:
        return map(_last, self._data.training(sampler, number))

    def share(self, rank: int, size: int) -> Iterator[tuple[Batch, int]]:
        return ((_last(batch), count) for batch, count in self._data.share(rank, size))


def _last(batch: Batch) -> Batch:
    inputs, *others = batch  # a task of the user's may take more than targets
    return (inputs.contiguous(memory_format=torch.channels_last), *others)

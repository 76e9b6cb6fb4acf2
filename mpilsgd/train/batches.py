"""The training batches of a worker, in order; and batches that lie channels last."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from mpilsgd.train.data import Dataset
from mpilsgd.train.sampling import Sampler, generator, random_state

_CALIBRATION = 20  # batches a rank
Batch = tuple[torch.Tensor, torch.Tensor]


class Batches:
    """Gives each step its batch.

    Args:
        data: the training set; sampler: this worker's part of it.
        ahead: `look_ahead` makes a batch before it is asked for.
    """

    def __init__(self, data: Dataset, sampler: Sampler, ahead: bool = False):
        self._data, self._sampler, self._ahead = data, sampler, ahead
        self._epoch, self._order = -1, torch.empty(0)
        self._ready: tuple[int, Batch] | None = None
        self._before: dict[str, Any] = {}

    def take(self, step: int) -> Batch:
        """Inputs and targets for a step, counted from 0."""
        ready, self._ready = self._ready, None
        return ready[1] if ready is not None and ready[0] == step else self._make(step)

    def look_ahead(self, step: int) -> None:
        """Makes the batch of the next step, while a GPU is busy with this one."""
        if self._ahead:
            self._before = random_state()
            self._ready = step, self._make(step)

    def random_state(self) -> dict[str, Any]:
        """As of `sampling`, before anything that a batch has drawn which no step has taken yet."""
        return random_state() if self._ready is None else self._before

    def calibration(self, step: int, rank: int) -> Iterator[torch.Tensor]:
        """Inputs of this worker's part, for BatchNorm statistics at a step, with random numbers of their own."""
        for batch, indices in enumerate(self._sampler.epoch(step // self._sampler.batches)[:_CALIBRATION]):
            own = generator(self._sampler.seed, "calibration", rank, batch)
            yield self._data.batch(indices, own)[0]

    def _make(self, step: int) -> Batch:
        epoch, batch = divmod(step, self._sampler.batches)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self._sampler.epoch(epoch)
        return self._data.batch(self._order[batch], self._sampler.augmentation(epoch, batch))


class ChannelsLast:
    """A data set of images whose batches lie channels last: the values of a pixel beside each other."""

    def __init__(self, data: Dataset):
        self._data = data
        self.input_shape, self.classes, self.on_host = data.input_shape, data.classes, data.on_host

    def __len__(self) -> int:
        return len(self._data)

    def to(self, device: torch.device) -> None:
        self._data.to(device)

    def batch(self, indices: torch.Tensor, generator: torch.Generator | None = None) -> Batch:
        inputs, targets = self._data.batch(indices, generator)
        return inputs.contiguous(memory_format=torch.channels_last), targets

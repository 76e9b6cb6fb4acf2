"""Data sets of the user's that are read as they are needed, by this process or by workers of torch's DataLoader."""

from __future__ import annotations

import functools
import itertools
import pickle
import random
import signal
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, default_collate

from mpilsgd.train.callables import InputError
from mpilsgd.train.formats import DataError
from mpilsgd.train.samples import Batch, Dataset, Job, Reading, moved
from mpilsgd.train.sampling import derived_seed


class _Read(Dataset):
    """What `MapSet` and `StreamSet` have in common. collate: of the set's own `collate_fn`, else torch's."""

    on_host = True

    def __init__(self, dataset: Any, classes: int | None = None, reading: Reading | None = None):
        reading = reading or Reading()
        self.dataset, self.classes = dataset, classes
        self.workers, self.chunk = reading.workers, reading.batch_size
        self.device = torch.device("cpu")
        self.collate: Callable[[list[Any]], Batch] = getattr(dataset, "collate_fn", default_collate)

    @functools.cached_property
    def input_shape(self) -> tuple[int, ...] | None:  # type: ignore[override]
        """Read with the first sample, when it is asked for."""
        return _input_shape(self._one())

    def _one(self) -> Any:
        raise NotImplementedError

    def to(self, device: torch.device) -> None:
        self.device = device

    def _arrived(self, found: tuple[Batch, Any] | InputError) -> Batch:
        if isinstance(found, InputError):
            raise found
        self.check(*found)
        return moved(found[0], self.device)


def _input_shape(sample: Any) -> tuple[int, ...] | None:
    if not isinstance(sample, tuple | list) or not sample:
        return None
    first = sample[0]
    return (
        tuple(torch.as_tensor(first).shape) if isinstance(first, torch.Tensor | np.ndarray | float) else None
    )


class MapSet(_Read):
    """A torch Dataset with `__getitem__` and `__len__`; it does its own augmentation.

    What it draws for a training batch comes from random numbers of that batch: the same whoever reads it, and when.
    """

    def __init__(self, dataset: Any, classes: int | None = None, reading: Reading | None = None):
        super().__init__(dataset, classes, reading)
        self._fetch, self._jobs = _Fetch(dataset, self.collate), _Jobs()
        self._loader: DataLoader[Any] | None = None

    def _one(self) -> Any:
        return self.dataset[0]

    def __len__(self) -> int:
        return len(self.dataset)

    def batch(self, indices: torch.Tensor, generator: torch.Generator | None = None) -> Batch:
        return self._arrived(self._fetch[_plain((indices, generator))])

    def stream(self, jobs: Iterable[Job]) -> Iterator[Batch]:
        if not self.workers:
            return super().stream(jobs)
        loader = self._loader
        if loader is None:
            loader = _loader(self._fetch, self.workers, sampler=self._jobs, persistent_workers=self.stays)
        if self.stays:
            self._loader = loader
        self._jobs.now = map(_plain, jobs)
        return map(self._arrived, _begun(loader))


def _plain(job: Job) -> tuple[list[int], int]:
    """Sample numbers and a seed; what is drawn for samples of the test set is always the same."""
    numbers, own = job[0].tolist(), job[1]
    return numbers, derived_seed(0, "test", numbers[0]) if own is None else own.initial_seed()


class _Jobs:
    """The sampler of a DataLoader whose workers stay."""

    now: Iterator[tuple[list[int], int]] = iter(())

    def __iter__(self) -> Iterator[tuple[list[int], int]]:
        return self.now


class _Fetch(torch.utils.data.Dataset):
    """Gives a DataLoader whole batches: (sample numbers, seed) -> (batch, sample numbers), or what is wrong."""

    def __init__(self, dataset: Any, collate: Callable[[list[Any]], Batch]):
        self.dataset, self.collate = dataset, collate

    def __getitem__(self, job: tuple[list[int], int]) -> tuple[Batch, list[int]] | InputError:
        numbers, seed = job
        try:
            with Numbers(seed).drawn():
                return self.collate([self.dataset[i] for i in numbers]), numbers
        except InputError as error:  # a worker's exception would come as its whole trace
            return error


class Numbers:
    """Random numbers of the host that go on from one `drawn()` to the next, and leave the global ones as they were."""

    def __init__(self, seed: int):
        self._state: Any = None
        self._seed = seed

    @contextmanager
    def drawn(self) -> Iterator[None]:
        before = _state()
        if self._state is None:
            torch.default_generator.manual_seed(self._seed)
            random.seed(self._seed)
            np.random.seed(self._seed % 2**32)
        else:
            _set(self._state)
        try:
            yield
        finally:
            self._state = _state()
            _set(before)


def _state() -> Any:
    return torch.get_rng_state(), random.getstate(), np.random.get_state()


def _set(state: Any) -> None:
    torch.set_rng_state(state[0])
    random.setstate(state[1])
    np.random.set_state(state[2])


class StreamSet(_Read):
    """An iterable data set: worker r of p takes the items r, r + p, r + 2 p, ... of every pass.

    It is read by one process ahead at most. `set_epoch(pass)` is called if it has that. A run that is taken up again
    reads once more, and drops, what it has read in the pass that it stopped in, or in all passes where there is no
    `len()`.

    Args:
        whole: whether every rank's is the whole set; else it is this rank's part already.
    """

    streamed = True

    def __init__(self, dataset: Any, classes: int | None, reading: Reading | None = None, whole: bool = True):
        if iter(dataset) is dataset:
            raise DataError(
                f"{dataset!r} is used up after one pass: give an object whose __iter__ begins anew"
            )
        self.whole = whole
        self._length: int | None = len(dataset) if hasattr(dataset, "__len__") else None
        super().__init__(dataset, classes, reading)

    @property
    def samples(self) -> int | None:
        return self._length

    def _one(self) -> Any:
        return self._begin()[0]

    def first(self) -> Batch:
        return self._arrived((self.collate(self._begin()), None))

    def _begin(self) -> list[Any]:
        found = list(itertools.islice(iter(self.dataset), 2))
        if not found:
            raise DataError(f"{self.dataset!r} holds no samples")
        return found

    def training(self, sampler: Any, number: int) -> Iterator[Batch]:
        passes = _Passes(self.dataset, self.collate, sampler, number, self._length is not None)
        found = iter(passes) if not self.workers else _begun(_loader(passes, 1))
        return map(self._arrived, found)

    def share(self, rank: int, size: int) -> Iterator[tuple[Batch, int]]:
        items = itertools.islice(iter(self.dataset), *((rank, None, size) if self.whole else (None,)))
        for samples in iter(lambda: list(itertools.islice(items, self.chunk)), []):
            yield self._arrived((self.collate(samples), None)), len(samples)


class _Passes(IterableDataset):
    """A worker's batches of an iterable data set without an end. known: the length of a pass is."""

    def __init__(self, dataset: Any, collate: Any, sampler: Any, number: int, known: bool):
        self.dataset, self.collate, self.sampler = dataset, collate, sampler
        self.number, self.known = number, known

    def __iter__(self) -> Iterator[Any]:
        try:
            yield from self._passes()
        except InputError as error:
            yield error

    def _passes(self) -> Iterator[tuple[Batch, None]]:
        sampler = self.sampler
        per = sampler.batches * sampler.accumulate if self.known else None
        first, skip = divmod(self.number, per) if per else (0, self.number)
        for number in itertools.count(first):
            if hasattr(self.dataset, "set_epoch"):
                self.dataset.set_epoch(number)
            seen = 0
            for batch in itertools.islice(self._pass(number), per):
                seen += 1
                if skip:
                    skip -= 1
                else:
                    yield batch, None
            if seen < (per or 1):
                told = f"by its len() it has {per}" if per else "it is too short"
                raise DataError(
                    f"a pass over {self.dataset!r} gave worker {sampler.rank} {seen} batch(es) of "
                    f"{sampler.batch_size}; {told}"
                )

    def _pass(self, number: int) -> Iterator[Batch]:
        sampler = self.sampler
        drawn = Numbers(derived_seed(sampler.seed, "stream", number, sampler.rank)).drawn
        with drawn():
            items = itertools.islice(iter(self.dataset), sampler.offset, None, sampler.stride)
        while True:
            with drawn():
                samples = list(itertools.islice(items, sampler.batch_size))
                if len(samples) < sampler.batch_size:
                    return
                batch = self.collate(samples)
            yield batch


def _as_it_is(batch: Batch) -> Batch:
    return batch


def _loader(dataset: Any, workers: int, **more: Any) -> DataLoader[Any]:
    """By processes that are spawned: one that is forked after MPI has started may hang. Draws nothing here."""
    return DataLoader(
        dataset,
        batch_size=None,
        num_workers=workers,
        collate_fn=_as_it_is,  # not the default, which would make other types of what the user's own gives
        multiprocessing_context="spawn",
        generator=torch.Generator(),
        worker_init_fn=_deaf,
        **more,
    )


def _deaf(_: int) -> None:
    """Signals are for the rank: a launcher sends them to all processes, and a reader that dies ends the run at once.
    Without their rank readers leave by themselves."""
    for name in ("SIGINT", "SIGTERM", "SIGUSR1"):
        signal.signal(getattr(signal, name), signal.SIG_IGN)


def _begun(loader: DataLoader[Any]) -> Iterator[Any]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's advice to fork
            return iter(loader)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise InputError(
            f"workers: the data set cannot be sent to another process ({error}): take --workers 0"
        ) from None

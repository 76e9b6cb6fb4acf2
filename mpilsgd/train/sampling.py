"""Which samples a worker trains on, and in which order: a function of the seed, the rank and the epoch alone; and the
state of the random numbers that it draws besides.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from mpilsgd.train.callables import InputError

SAMPLINGS = ("partition", "shuffle", "replacement")


class Sampler:
    """The batches of one worker.

    Args:
        kind: "partition": every epoch a fresh permutation, the same on all workers, is cut into disjoint parts, one a
            worker (LSGD 9.2); "shuffle": each worker goes through the whole set in its own order;
            "replacement": each worker draws its samples independently (an epoch is as long as a partition's).
            The last incomplete batch is dropped, and every worker has the same number of batches.
        samples: number of training samples.
        batch_size: samples a batch.
        rank, size: this worker and the number of workers.
        seed: shared by all workers.
        accumulate: batches a step.

    Raises:
        InputError: there are more workers than samples, or no step can be filled.

    Attributes:
        batches: steps of an epoch, each of `accumulate` batches.

    The state is the position (epoch, batch): nothing else needs saving.
    """

    def __init__(
        self,
        kind: str,
        samples: int,
        batch_size: int,
        rank: int = 0,
        size: int = 1,
        seed: int = 0,
        accumulate: int = 1,
    ):
        if kind not in SAMPLINGS:
            raise InputError(f"sampling must be one of {', '.join(SAMPLINGS)}, not {kind!r}")
        if samples < size:
            raise InputError(
                f"{size} workers, but only {samples} training sample(s): start at most {samples} rank(s)"
            )
        self.part = samples if kind == "shuffle" else samples // size
        if batch_size * accumulate > self.part:
            share = f"each of {size} workers has {self.part} of the {samples} training samples"
            most = f"use at most {self.part}" + (
                f" in accumulate={accumulate} batches" if accumulate > 1 else ""
            )
            raise InputError(f"batch_size={batch_size} cannot be filled: {share}; {most}")
        self.kind, self.samples, self.batch_size = kind, samples, batch_size
        self.rank, self.size, self.seed = rank, size, seed
        self.accumulate = accumulate
        self.batches = self.part // (batch_size * accumulate)

    def epoch(self, epoch: int) -> torch.Tensor:
        """The sample numbers of each batch, (batches x accumulate, batch_size)."""
        taken = self.batches * self.accumulate * self.batch_size
        if self.kind == "partition":
            order = torch.randperm(self.samples, generator=generator(self.seed, "order", epoch))
            start = self.rank * self.part
            order = order[start : start + taken]
        elif self.kind == "shuffle":
            order = torch.randperm(self.samples, generator=generator(self.seed, "order", epoch, self.rank))[
                :taken
            ]
        else:
            order = torch.randint(
                self.samples, (taken,), generator=generator(self.seed, "order", epoch, self.rank)
            )
        return order.view(-1, self.batch_size)

    def augmentation(self, epoch: int, batch: int) -> torch.Generator:
        """The random numbers for one batch's crops and flips."""
        return generator(self.seed, "augmentation", epoch, self.rank, batch)


class StreamSampler:
    """What stands for a `Sampler` where the data set is iterable: a worker takes every stride-th item from `offset` on.

    Args:
        batches: steps of an epoch.
    """

    def __init__(
        self, batches: int, batch_size: int, rank: int, offset: int, stride: int, seed: int, accumulate: int
    ):
        self.batches, self.batch_size, self.accumulate = batches, batch_size, accumulate
        self.rank, self.offset, self.stride, self.seed = rank, offset, stride, seed


def generator(seed: int, purpose: str, *position: int) -> torch.Generator:
    """Random numbers of their own for every purpose and position."""
    return torch.Generator().manual_seed(derived_seed(seed, purpose, *position))


def derived_seed(seed: int, purpose: str, *position: int) -> int:
    """A 63-bit seed mixed from all of the arguments."""
    words = [seed, *purpose.encode(), len(position), *position]
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0] >> np.uint64(1))


def random_state() -> dict[str, Any]:
    """The state of all global random numbers that a model may draw, in plain types."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
        "python": list(random.getstate()),
        "numpy": [str(kind), [int(key) for key in keys], int(position), int(has_gauss), float(gauss)],
    }


def restore_random_state(state: dict[str, Any]) -> None:
    """What `random_state` gave."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))


@contextlib.contextmanager
def other_random_numbers(seed: int, purpose: str, *position: int) -> Iterator[None]:
    """What is drawn inside leaves the global random numbers outside as they were."""
    before = random_state()
    own = derived_seed(seed, purpose, *position)
    torch.manual_seed(own)
    random.seed(own)
    np.random.seed(own % 2**32)
    try:
        yield
    finally:
        restore_random_state(before)
